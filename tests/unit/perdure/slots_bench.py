"""Slots over a played fork server, for tests."""

from __future__ import annotations

from typing import Any

from perdure import channel
from perdure.children import Events
from perdure.reporter import Reporter
from perdure.schemas import codec
from perdure.schemas.common import Policy, Retry
from perdure.schemas.inbox import CancelAttempt, PauseAttempt, RunAttempt
from perdure.schemas.public import LogLine
from perdure.schemas.reports import (
    ReportBatch,
)
from perdure.session import Lane, Session
from perdure.slots import Slots
from perdure.streams.memory_log import MemoryLog
from tests.unit.perdure.answering import KEYS
from tests.unit.perdure.played import PlayedChild, PlayedServer

TASK = "etl/1"


class Bench:
    """Slots over a played fork server, a log in memory, and a clock in the test's hands."""

    def __init__(self, slots: int = 2, async_slots: int = 100) -> None:
        self.now = 100_000
        self.log = MemoryLog(lambda: self.now)
        self.server = PlayedServer()
        self.events = Events()
        self.reporter = Reporter(self.log.producer(), KEYS.newest_worker(), "w", lambda: self.now)
        self.lines: list[LogLine] = []
        self.freed: list[str] = []
        self.slots = Slots(
            self.server, self.events, self.reporter, self._offer, {"work": "process", "poll": "async"},
            {"process": slots, "async": async_slots}, self.freed.append, lambda: self.now, lambda: self.now,
        )  # fmt: skip
        lane = Lane("w", "process", {"work": 1}, slots)
        self.session = Session(lane, 0, "s", ["etl"], slots, 0, heard=self.now, beat_due=0)
        shared = Lane("w.async", "async", {"poll": 1}, async_slots)
        self.shared = Session(shared, 0, "s2", ["etl"], async_slots, 0, heard=self.now, beat_due=0)
        self.slots.open()

    def _offer(self, partition: int, line: LogLine) -> bool:
        self.lines.append(line)
        return True

    def turn(self, after_ms: int = 0) -> None:
        """Let time pass, and everything that is ready happen."""
        self.now += after_ms
        self.slots.tick(self.now)
        for _ in range(5):
            self.events.wait(0)

    def children(self, kind: str = "process") -> list[PlayedChild]:
        return [c for c in self.server.children if c.kind == kind and c.alive]

    def ready(self) -> None:
        for child in self.server.children:
            if child.alive and not child.greeted:
                child.hello()
        self.turn()

    def take(self, task_id: str = TASK, task_type: str = "work", epoch: int = 1, **policy: Any) -> None:
        session = self.shared if task_type == "poll" else self.session
        self.slots.take(
            session,
            RunAttempt(
                worker_id=session.lane.worker_id, session=session.id, grant=session.grants_seen + 1, task_id=task_id,
                type=task_type, input=b'{"x":1}', policy=Policy(retry=Retry(), **policy), attempt=1, epoch=epoch,
                token=b"secret",
            ),
        )  # fmt: skip
        self.turn()

    def begin(self, task_id: str = TASK, task_type: str = "work", **policy: Any) -> PlayedChild:
        """An attempt that has started; the child that runs it."""
        self.take(task_id, task_type, **policy)
        for child in self.children("async" if task_type == "poll" else "process"):
            if any(isinstance(f, channel.Run) and f.task_id == task_id for f in child.heard()):
                child.say(channel.Started(task_id, 1, 1))
                self.turn()
                child.heard()
                return child
        raise AssertionError("no child has got the attempt")

    def reports(self, *kinds: type) -> list[Any]:
        found: list[Any] = []
        for record in self.log.records("task-commands"):
            assert record.value is not None
            for entry in codec.decode_as(ReportBatch, record.value).entries:
                found += [r for r in entry.reports if not kinds or isinstance(r, kinds)]
        return found

    def reported(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for record in self.log.records("task-commands"):
            assert record.value is not None
            for entry in codec.decode_as(ReportBatch, record.value).entries:
                assert entry.token == b"secret"
                found.setdefault(entry.task_id, []).extend(type(r).__name__ for r in entry.reports)
        return found

    def cancel(self, reason: str = "cancelled: by you", grace_ms: int = 1_000, task_id: str = TASK) -> None:
        self.slots.cancel(
            CancelAttempt(worker_id="w", session="s", task_id=task_id, epoch=1, reason=reason, grace_ms=grace_ms)
        )

    def pause(self, *, undo: bool = False) -> None:
        self.slots.pause(PauseAttempt(worker_id="w", session="s", task_id=TASK, epoch=1, undo=undo))


def completed(task_id: str = TASK) -> channel.Completed:
    """What a child says when user code has returned."""
    return channel.Completed(task_id, 1, 9, b"42", 12, 0.25)
