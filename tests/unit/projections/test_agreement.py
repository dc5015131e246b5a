"""The read side tells what the engine knows: the real engine lives random lives, and the folds are held against it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.projections import render
from perdure.projections.dead_letters import DeadLetterProcessor
from perdure.projections.history import attempts
from perdure.projections.inputs import fact
from perdure.projections.progress import ProgressProcessor
from perdure.schemas import commands, events, inbox, reports, topics
from perdure.schemas.codec import decode, decode_as, encode
from perdure.schemas.common import Retry, Usage
from perdure.schemas.public import ConfigRecord, DeadLetter, TaskProgress
from perdure.schemas.rows import TaskState
from perdure.schemas.signing import Keys, signed
from perdure.streams.local_engine import LocalEngine
from perdure.streams.log import Record
from perdure.streams.memory_log import MemoryLog
from perdure.streams.store import META
from tests.unit.projections.story import Clock, FakeTransaction

TASKS = ("etl/a", "etl/b/c")
TIMES = {"updated_at", "elapsed_seconds", "eta_seconds"}
"""Fields that an answer counts at its own moment, or (`updated_at`) from events alone."""


class World:
    """An engine of one partition, a worker that does what it is told, and clients."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.log = MemoryLog(self.clock, partitions=1)
        self.keys = Keys.generate()
        self.number = 0
        content = json.dumps({"queue": "etl", "policy": {"retry": {"max_attempts": 2, "delay": 5_000}}}).encode()
        self.log.producer().append(
            "config", 0, b"type/crunch", encode(ConfigRecord(name="type/crunch", content=content))
        )
        self.engine = LocalEngine(self.log, self.keys, self.clock)
        self.session = ""
        self.grants: dict[str, inbox.RunAttempt] = {}
        self.said: dict[str, int] = {}
        self.read = 0
        self.send(b"")  # nothing yet: the configuration is applied
        self.work()

    def send(self, data: bytes) -> None:
        if data:
            self.log.producer().append("task-commands", 0, None, data)
        self.engine.pump()
        found = self.log.records("worker-inbox")
        for record in found[self.read :]:
            message = decode(record.value or b"")
            if isinstance(message, inbox.RunAttempt):
                self.grants[message.task_id], self.said[message.task_id] = message, 0
        self.read = len(found)

    def say(self, message: Any) -> None:
        self.send(signed(message, *next(iter(self.keys.worker.items()))))

    def work(self) -> None:
        """A worker's (new) session."""
        self.number += 1
        self.session = f"s{self.number:04d}"
        self.say(commands.WorkerStarted(
            session=self.session, worker_id="w1", types={"crunch": 0}, queues=["etl"], slots=1,
        ))  # fmt: skip

    def command(self, kind: Any, task_id: str, **said: Any) -> None:
        self.number += 1
        self.send(encode(kind(command_id=f"c{self.number}", task_id=task_id, **said)))

    def report(self, kind: Any, task_id: str, **said: Any) -> None:
        """A report of the grant that the worker knows, whether it still holds or not."""
        grant = self.grants.get(task_id)
        if grant is None:
            return
        self.said[task_id] += 1
        report = kind(seq=self.said[task_id], **said)
        entry = reports.ReportEntry(task_id=task_id, epoch=grant.epoch, token=grant.token, reports=[report])
        self.say(reports.ReportBatch(session=grant.session, entries=[entry]))

    def pass_time(self, ms: int, *, beating: bool) -> None:
        for _ in range(max(1, ms // 2_000)):
            self.clock.now += min(ms, 2_000)
            if beating:
                seen = max((g.grant for g in self.grants.values() if g.session == self.session), default=0)
                self.say(commands.WorkerBeat(session=self.session, grants_seen=seen, free=8))
            self.send(b"")

    def act(self, what: str, task_id: str) -> None:
        """One step of the story."""
        self.clock.now += 7
        match what:
            case "submit":
                self.command(commands.SubmitTask, task_id, type="crunch", queue="etl", labels={"a": "b"}, input=b"[1]",
                             retry=Retry(max_attempts=2, delay=5_000), total_timeout=300_000)  # fmt: skip
            case "submit later":
                self.command(
                    commands.SubmitTask, task_id, type="crunch", queue="etl", not_before=self.clock.now + 9_000
                )
            case "pause" | "resume" | "cancel" | "retry" | "discard":
                kinds = {"pause": commands.PauseTask, "resume": commands.ResumeTask, "cancel": commands.CancelTask,
                         "retry": commands.RetryTask, "discard": commands.DiscardDeadLetter}  # fmt: skip
                self.command(kinds[what], task_id)
            case "start":
                self.report(reports.AttemptStarted, task_id)
            case "step":
                self.report(
                    reports.ReportStep, task_id, step_id=f"s{self.number}{self.clock.now}", name="s", result=b"1"
                )
            case "progress":
                done = self.clock.now % 100
                self.report(
                    reports.ReportProgress, task_id, units_done=done, units_total=100, current_step=f"at {done}"
                )
            case "milestone":
                self.report(reports.ReportMilestone, task_id, name=f"m{self.clock.now % 3}")
            case "checkpoint":
                self.report(reports.ReportCheckpoint, task_id, version=self.clock.now, uri="u", sha256="", size=1,
                            positions={})  # fmt: skip
            case "complete":
                self.report(reports.AttemptCompleted, task_id, result=b"2", usage=Usage())
            case "fail":
                self.report(
                    reports.AttemptFailed,
                    task_id,
                    error_types=["app.Broken"],
                    message="no",
                    traceback="",
                    usage=Usage(),
                )
            case "crash":
                self.report(reports.AttemptCrashed, task_id, signal=9, usage=Usage())
            case "stop paused":
                self.report(reports.AttemptStopped, task_id, why="paused", usage=Usage())
            case "stop cancelled":
                self.report(reports.AttemptStopped, task_id, why="cancelled", usage=Usage())
            case "decline":
                self.report(reports.AttemptDeclined, task_id, reason="full")
            case "drain":
                self.say(commands.WorkerStopping(session=self.session))
            case "restart":
                self.work()
            case "wait":
                self.pass_time(12_000, beating=True)
            case "silence":
                self.pass_time(40_000, beating=False)

    def state(self, task_id: str) -> TaskState | None:
        return self.engine.engine(0).state.task(task_id)

    def described(self, task_id: str) -> dict[str, Any]:
        """What `status --json` shows: the engine's own answer."""
        self.command(commands.DescribeTask, task_id, reply_to="client")
        answer = decode_as(inbox.CommandReply, self.log.records("command-replies")[-1].value or b"")
        found: dict[str, Any] = json.loads(answer.body or b"")
        return found


ACTS = ["submit", "submit later", "pause", "resume", "cancel", "retry", "discard", "start", "step", "progress",
        "milestone", "checkpoint", "complete", "fail", "crash", "stop paused", "stop cancelled", "decline", "drain",
        "restart", "wait", "silence"]  # fmt: skip
LIFE = st.lists(st.tuples(st.sampled_from(ACTS), st.sampled_from(TASKS)), max_size=60)
BEGUN = [("submit", TASKS[0]), ("start", TASKS[0])]


def interleaved(world: World, seed: int) -> Iterator[Record]:
    """Events and telemetry, each in its order; between the two topics there is none."""
    draw = random.Random(seed)
    left = [list(reversed(world.log.records(topic))) for topic in (topics.EVENTS.name, topics.TELEMETRY.name)]
    bias = draw.random()
    while any(left):
        first = left[0] if left[0] and (not left[1] or draw.random() < bias) else left[1]
        yield first.pop()


def told(records: Iterable[Record]) -> tuple[dict[str, TaskProgress], dict[str, DeadLetter]]:
    """What the two projections make of the log."""
    progress, letters = FakeTransaction(), FakeTransaction()
    for record in records:
        ProgressProcessor().handle(record, progress)
        if record.topic == topics.EVENTS.name:
            DeadLetterProcessor().handle(record, letters)
    assert progress.quarantined == letters.quarantined == []
    open_letters: dict[str, DeadLetter] = {}
    for _, key, value in letters.emitted:
        name = (key or b"").decode()
        open_letters.pop(name, None)
        if value is not None:
            open_letters[name] = decode_as(DeadLetter, value)
    public = {k.decode(): v for k, v in progress.rows.items() if not k.startswith(META)}
    assert not any(k.startswith(META + b"early/") for k in progress.rows), "telemetry waits for a submit that has come"
    return {k: decode_as(TaskProgress, v) for k, v in public.items()}, open_letters


@settings(max_examples=300)
@given(LIFE, st.integers(0, 2**32))
def test_the_projections_agree_with_the_engine(life: list[tuple[str, str]], seed: int) -> None:
    world = World()
    for what, task_id in [*BEGUN, *life]:
        world.act(what, task_id)
    assert world.log.records("quarantine") == []
    progress, letters = told(interleaved(world, seed))
    for task_id in TASKS:
        row = world.state(task_id)
        assert (row is None) == (task_id not in progress)
        if row is None:
            continue
        said, shown = world.described(task_id), render.status(progress[task_id], world.clock.now)
        if said["reason"] == "no_worker":  # computed by the engine when it is asked; recorded as queued
            said["reason"] = "queued"
        shared = said.keys() & shown.keys() - TIMES
        assert {name: shown[name] for name in shared} == {name: said[name] for name in shared}
        assert shown["updated_at"] >= said["updated_at"]
        assert (task_id in letters) == row.dead_letter
        if row.dead_letter:
            assert letters[task_id].error == row.error
            assert (letters[task_id].attempts, letters[task_id].state) == (row.attempt, row.state)
            assert letters[task_id].steps_completed == row.steps_completed
        lived = [fact(r.value) for r in world.log.records("task-events") if r.key == task_id.encode()]
        grants = [e.epoch for e in lived if isinstance(e, events.TaskGranted)]
        assert [e.number for a in attempts(lived) for e in a.epochs] == grants


def test_the_lives_reach_every_state() -> None:
    """The random lives would prove little if the scripted worker could not bring tasks to their ends."""
    ends = {
        "COMPLETED": ["submit", "start", "step", "progress", "complete"],
        "FAILED": ["submit", "start", "fail", "wait", "start", "fail"],
        "CANCELLED": ["submit", "start", "cancel", "stop cancelled"],
        "PAUSED": ["submit", "start", "pause", "stop paused"],
        "TIMED_OUT": ["submit", "start", "pause", "stop paused", *["silence"] * 9],
        "RUNNING": ["submit", "start", "silence", "restart", "start", "step"],
        "PENDING": ["submit", "start", "crash", "drain", "decline"],
    }
    for state, acts in ends.items():
        world = World()
        for what in acts:
            world.act(what, "etl/a")
        assert told(interleaved(world, 0))[0]["etl/a"].state == state, acts
