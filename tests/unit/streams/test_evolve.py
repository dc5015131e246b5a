"""Events change state, and nothing else does: what does not fit is refused, and the fold gives the durable rows."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from perdure.schemas import commands, events
from perdure.schemas.codec import replace
from perdure.schemas.common import Cause, ErrorInfo, Policy, Retry
from perdure.schemas.rows import TaskState
from perdure.streams import tables
from perdure.streams.event_fold import fold_events
from perdure.streams.evolve import HANDLED, evolve
from perdure.streams.store import MemoryStore
from perdure.streams.task_change import IllegalTransition
from perdure.streams.task_lifecycle import LEGAL
from tests.unit.streams.test_task_lifecycle import STATES, TYPES, make
from tests.world import HOUR, ScriptedWorker, World, begun, checkpoint, completed, crashed, failed, milestone, step

HEAD: dict[str, Any] = {"at": 1, "cause": Cause(partition=0, offset=1), "build": "b", "feature_level": 1}
ERROR = ErrorInfo(type="x", message="", error_types=[])


def of_each_kind(task_id: str, seq: int, epoch: int) -> list[Any]:
    """One event of each kind that a task can have, but for its first."""
    head = HEAD | {"task_id": task_id, "seq": seq}
    run = head | {"epoch": epoch, "attempt": 1}
    return [
        events.TaskPolicyBound(**head, policy=Policy(retry=Retry()), policy_version=1),
        events.TaskQueued(**head, reason="queued"),
        events.TaskGranted(**head, epoch=epoch + 1, attempt=1, worker_id="w", session="s", grant=99),
        events.AttemptStarted(**run),
        events.StepStarted(**head, epoch=epoch, step_id="/z", name="z"),
        events.StepCompleted(
            **run, step_id="/z", name="z", function="", code_version="", args_hash="", result=b"1", duration_ms=0
        ),
        events.StepFailed(**run, step_id="/z", name="z", error=ERROR, duration_ms=0),
        events.MilestoneReached(**head, epoch=epoch, name="m"),
        events.CheckpointRecorded(**head, epoch=epoch, version=9, uri="u", sha256="", size=1, positions={}),
        events.PauseRequested(**head),
        events.TaskPaused(**head),
        events.TaskResumed(**head),
        events.CancelRequested(**head),
        events.TaskCancelled(**head),
        events.TimeoutReached(**head, which="run"),
        events.DrainRequested(**head),
        events.AttemptLost(**head, epoch=epoch, why="crashed"),
        events.AttemptFailed(**run, error=ERROR),
        events.RetryScheduled(**head, attempt=1, due=5, delay=1),
        events.TaskCompleted(**run, result=b"1"),
        events.TaskFailed(**head, error=ERROR),
        events.TaskTimedOut(**head, which="total"),
        events.TaskDeadLettered(**head, state="FAILED"),
        events.TaskRedriven(**head),
        events.DeadLetterDiscarded(**head),
        events.AnswersForgotten(**head, count=0),
        events.TaskRetired(**head),
    ]


# Kind -> states in which it may come. What moves a task is here once more, by hand: the table of CONTRACT section 1.
RUNNING, DEAD = {"RUNNING"}, {"FAILED", "TIMED_OUT"}
MAY: dict[str, set[str]] = dict.fromkeys(
    ("AttemptStarted", "StepStarted", "StepCompleted", "StepFailed", "MilestoneReached", "CheckpointRecorded",
     "PauseRequested", "CancelRequested", "TimeoutReached", "DrainRequested", "AttemptLost", "AttemptFailed",
     "RetryScheduled", "TaskCompleted"), RUNNING,
) | {
    "TaskPolicyBound": set(), "TaskQueued": {"PENDING", "PAUSED"}, "TaskGranted": {"PENDING"},
    "TaskPaused": {"PENDING", "RUNNING"}, "TaskResumed": {"PAUSED", "RUNNING"},
    "TaskCancelled": {"PENDING", "PAUSED", "RUNNING"}, "TaskFailed": {"PENDING", "RUNNING"},
    "TaskTimedOut": {"PENDING", "PAUSED", "RUNNING"}, "TaskDeadLettered": DEAD, "TaskRedriven": DEAD,
    "DeadLetterDiscarded": DEAD, "AnswersForgotten": {"COMPLETED", "CANCELLED", *DEAD},
    "TaskRetired": {"COMPLETED", "CANCELLED", *DEAD},
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_an_event_that_does_not_fit_the_state_is_refused(state: str) -> None:
    world = World(types=TYPES)
    task_id = make(world, state)
    s = world.of_engine(world.partition_of(task_id)).state
    t = world.task(task_id)
    for event in of_each_kind(task_id, t.seq + 1, t.epoch):
        name = type(event).__name__
        fits = t.state in MAY[name] and (name != "TaskGranted" or t.ready)
        s.mark()
        if not fits:
            with pytest.raises(IllegalTransition):
                evolve(s, event)
        else:
            evolve(s, event)
            after = s.task(task_id)
            assert after is None or after.state == t.state or after.state in LEGAL[t.state]
        s.undo()
        assert s.task(task_id) == t


def test_the_sequence_of_a_task_and_of_the_partition_has_no_gaps_and_no_repeats() -> None:
    world = World()
    task_id = world.submit()
    s = world.of_engine(world.partition_of(task_id)).state
    queued = events.TaskQueued(**HEAD, task_id=task_id, seq=2, reason="queued")
    for seq in (0, 1, 2, 4):
        with pytest.raises(IllegalTransition):
            evolve(s, replace(queued, seq=seq))
    count = s.counter("events")
    for seq in (0, count, count + 2):
        with pytest.raises(IllegalTransition):
            evolve(s, events.ForwardTaken(**HEAD, seq=seq, source=1, number=1))


def test_events_of_another_epoch_or_of_no_task_are_refused() -> None:
    world = World(types=TYPES)
    task_id = make(world, "RUNNING none")
    s = world.of_engine(world.partition_of(task_id)).state
    t = world.task(task_id)
    for wrong in (t.epoch - 1, t.epoch + 1):
        for event in of_each_kind(task_id, t.seq + 1, wrong):
            if hasattr(event, "epoch") and not isinstance(event, events.TaskGranted):
                with pytest.raises(IllegalTransition):
                    evolve(s, event)
    for event in of_each_kind("default/none", 1, 1):
        with pytest.raises(IllegalTransition):
            evolve(s, event)
    submitted = world.of_kind(events.TaskSubmitted)[0]
    for seq in (1, t.seq + 1):
        with pytest.raises(IllegalTransition):
            evolve(s, replace(submitted, seq=seq))


def test_every_event_has_a_handler() -> None:
    assert set(get_args(events.Event)) == HANDLED


def a_life(world: World) -> None:
    """A bit of everything that changes durable rows."""
    worker = ScriptedWorker(world, slots=2, types={"noop": 0}).start()
    first, second = world.submit(labels={"a": "b"}, total_timeout=HOUR), world.submit(not_before=world.now + HOUR)
    grant = worker.run(first)
    worker.report(grant, *(step(f"t@{n:012}/s") for n in range(9)), milestone("m"), checkpoint(1, t=5))
    worker.report(grant, replace(step("once", None), begun=True), crashed())
    worker.report(worker.run(first), step("last"), failed())
    world.do(commands.RetryTask, first, input=b"[1]")
    world.do(commands.PauseTask, second)
    world.do(commands.ResumeTask, second)
    world.do(commands.ResumeTask, second)
    world.skew = HOUR
    third = world.submit("unknown", queue_timeout=HOUR, queue="default")
    world.skew = 0
    world.json(1 - worker.partition, command="CancelTask", task_id=third)
    world.configure_type("unknown")
    world.pump()
    worker.report(worker.run(first), begun(), completed({"x": 1}))
    world.advance(HOUR)


def durable(world: World, partition: int) -> dict[bytes, bytes]:
    return {k: v for k, v in world.rows(partition).items() if k[:1] != b"\xff" and tables.is_durable(k)}


@pytest.mark.parametrize("partition", [0, 1])
def test_the_fold_of_the_events_gives_the_durable_rows_byte_for_byte(partition: int) -> None:
    """G5."""
    world = World()
    a_life(world)
    store = MemoryStore()
    fold_events(world.events(partition=partition), store, partition, world.partitions)
    assert dict(store.scan(b"")) == durable(world, partition)


def test_a_begun_step_is_kept_apart_from_recorded_ones() -> None:
    world = World()
    worker = ScriptedWorker(world).start()
    task_id = world.submit()
    worker.report(worker.run(), step("a"), replace(step("b", None), begun=True))
    s = world.of_engine(worker.partition).state
    assert [i for i, _ in s.steps(task_id)] == ["/a"]
    assert world.task(task_id).steps_kept == 1
    worker.report(worker.grant(), step("b"))
    assert [i for i, _ in s.steps(task_id)] == ["/a", "/b"]
    assert not list(s.scan(tables.task(task_id), prefix=tables.BEGUN))


def test_an_ended_task_leaves_no_timer_place_or_lease_behind() -> None:
    world = World()
    worker = ScriptedWorker(world, slots=1).start()
    task_id = world.submit(run_timeout=HOUR, queue_timeout=HOUR, total_timeout=HOUR)
    worker.report(worker.run(), completed(1))
    rows = world.rows(worker.partition)
    assert sorted(k[:1] for k in rows if k[:1] in b"dqgWhu") == [b"d"]
    t = world.task(task_id)
    assert (set(t.timers), t.session, t.ready, t.due) == ({"retain"}, "", False, None)


def test_state_is_small_however_many_steps_a_task_has() -> None:
    world = World()
    worker = ScriptedWorker(world).start()
    task_id = world.submit()
    worker.run()
    sizes = []
    for first in range(0, 1_000, 250):
        worker.report(worker.grant(), *(step(f"s{n}") for n in range(first, first + 250)))
        sizes.append(len(world.rows(worker.partition)[tables.task(task_id) + tables.STATE]))
    assert max(sizes) - min(sizes) < 10
    assert isinstance(world.task(task_id), TaskState)
