"""What a campaign sees: every event of the log as it appears, and every line of the witness file."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perdure.schemas import codec, topics
from perdure.streams.kafka_log import KafkaLog
from perdure.streams.log import BEGIN
from tests.integration.stack import Execution, Seen

ENDS = ("TaskCompleted", "TaskFailed", "TaskCancelled", "TaskTimedOut")
_STOPS = (*ENDS, "AttemptLost", "AttemptFailed", "TaskPaused")
_ENDINGS = ("CommandRejected", "ReportRejected", "ForwardQueued", "ForwardTaken")


@dataclass(frozen=True)
class Violation:
    """Something that must not be; at: ms, when it is known."""

    what: str
    at: int | None = None


@dataclass
class Life:
    """One task, as its events tell it."""

    seq: int = 0
    epoch: int = 0
    attempt: int = 0
    worker: str | None = None
    """Who runs it now."""
    over: dict[int, str] = field(default_factory=dict)
    """Epoch -> why it ended before the task did."""
    steps: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Number -> (epoch that recorded it, at)."""
    end: str | None = None
    result: Any = None
    redrives: int = 0
    kinds: dict[str, int] = field(default_factory=dict)


class Probes:
    """Commands sent at a steady pace to every partition, and when their events were seen. Times: monotonic, s."""

    def __init__(self, partitions: int) -> None:
        self._sent: list[list[float]] = [[] for _ in range(partitions)]
        self._seen: list[dict[int, float]] = [{} for _ in range(partitions)]

    def sent(self, partition: int) -> int:
        """One more is about to be sent; its number."""
        self._sent[partition].append(time.monotonic())
        return len(self._sent[partition]) - 1

    def seen(self, partition: int, number: int) -> None:
        """Its event is there."""
        self._seen[partition].setdefault(number, time.monotonic())

    def flowing(self, since: float) -> float | None:
        """When every partition had executed the first command sent after `since`; None: not yet."""
        moments = [seen.get(bisect_left(sent, since)) for sent, seen in zip(self._sent, self._seen, strict=True)]
        return None if None in moments else max(m for m in moments if m is not None)

    def unseen(self) -> int:
        """How many have no event yet."""
        return sum(len(sent) - len(seen) for sent, seen in zip(self._sent, self._seen, strict=True))


class Observer(threading.Thread):
    """Reads `task-events`, committed records only, and keeps what the proofs need."""

    def __init__(self, log: KafkaLog) -> None:
        super().__init__(name="observer", daemon=True)
        self.probes = Probes(log.partitions)
        self.lives: dict[str, Life] = defaultdict(Life)
        self.violations: list[Violation] = []
        self.refused: dict[str, str] = {}
        """Command -> why it was refused."""
        self.endings: list[Seen] = []
        """Events that tell where a hostile record has ended."""
        self.events = 0
        self.last = time.monotonic()
        self._reader = log.reader(committed=True)
        self._reader.assign({(topics.EVENTS.name, p): BEGIN for p in range(log.partitions)})
        self._stopping = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._stopping.is_set():
                for record in self._reader.read(2_000, 0.05):
                    if record.value is not None:
                        self._see(Seen(record, codec.decode(record.value)))
        except BaseException as error:  # noqa: BLE001 - the campaign raises it
            self.failure = error
        self._reader.close()

    def stop(self) -> None:
        """End, with what has been read until now."""
        self._stopping.set()
        self.join()

    def running(self, worker: str | None = None) -> dict[str, int]:
        """Tasks that run (on a worker) -> their epochs."""
        lives = list(self.lives.items())
        return {i: one.epoch for i, one in lives if one.worker is not None and worker in (None, one.worker)}

    def _see(self, seen: Seen) -> None:
        event, kind = seen.message, type(seen.message).__name__
        self.events += 1
        self.last = time.monotonic()
        if kind in _ENDINGS:
            self.endings.append(seen)
        if kind == "CommandRejected":
            self.refused[event.command_id] = event.reason
        command = event.cause.command_id or ""
        if command.startswith("probe/"):
            _, partition, number = command.split("/")
            self.probes.seen(int(partition), int(number))
        task = getattr(event, "task_id", None)
        if task is not None:
            self._of_task(self.lives[task], event, kind)

    def _of_task(self, life: Life, event: Any, kind: str) -> None:
        if event.seq != life.seq + 1:
            self._wrong(event, f"{event.task_id}: event {event.seq} ({kind}) follows event {life.seq}")
        life.seq = event.seq
        life.kinds[kind] = life.kinds.get(kind, 0) + 1
        if kind == "TaskGranted":
            if event.epoch != life.epoch + 1:
                self._wrong(event, f"{event.task_id}: epoch {event.epoch} follows epoch {life.epoch}")
            life.epoch, life.attempt, life.worker = event.epoch, event.attempt, event.worker_id
        elif kind == "StepCompleted":
            number = int(event.result)
            if number in life.steps:
                self._wrong(event, f"{event.task_id}: step {number} is recorded a second time")
            if event.epoch != life.epoch:
                self._wrong(event, f"{event.task_id}: step {number} is recorded for an epoch that is over")
            life.steps[number] = event.epoch, event.at
        elif kind == "AttemptLost":
            life.over[event.epoch] = event.why
        elif kind == "TaskRedriven":
            life.end, life.redrives = None, life.redrives + 1
        if kind in _STOPS:
            life.worker = None
        if kind in ENDS:
            if life.end is not None:
                self._wrong(event, f"{event.task_id}: {kind} after {life.end}")
            life.end = kind
            life.result = getattr(event, "result", None)

    def _wrong(self, event: Any, what: str) -> None:
        self.violations.append(Violation(what, event.at))


class Witness:
    """The witness file, read as it grows. For one thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self.executions: dict[str, list[tuple[int, Execution]]] = defaultdict(list)
        """Task -> (epoch, execution) in order."""

    def look(self) -> None:
        """Read what has been written since."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new.rfind(b"\n") + 1
        self._read += whole
        for line in new[:whole].decode().splitlines():
            execution = Execution.of(line)
            _, task, epoch, _ = execution.words
            self.executions[task].append((int(epoch), execution))

    def last(self, task: str) -> tuple[int, Execution] | None:
        """Its last execution, and under which epoch."""
        found = self.executions.get(task)
        return found[-1] if found else None

    def first_after(self, task: str, epoch: int) -> Execution | None:
        """The first execution under a later epoch."""
        return next((e for at, e in self.executions.get(task, []) if at > epoch), None)
