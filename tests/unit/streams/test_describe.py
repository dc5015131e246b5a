"""What `status --json` shows, and the one sentence that says why a task is where it is."""

from __future__ import annotations

import pytest

from perdure.schemas import commands
from perdure.schemas.codec import replace
from perdure.schemas.reports import ReportProgress
from tests.unit.streams.test_task_lifecycle import STATES, TYPES, make
from tests.world import (
    HOUR,
    MINUTE,
    SECOND,
    ScriptedWorker,
    World,
    begun,
    checkpoint,
    completed,
    failed,
    progress,
    step,
    stopped,
)

SHOWN = {
    "task_id", "type", "state", "reason", "progress", "current_step", "steps_completed", "total_steps", "units_done",
    "units_total", "attempt", "epoch", "elapsed_seconds", "eta_seconds", "submitted_at", "started_at", "finished_at",
    "worker_id", "result", "error", "checkpoint_version", "why", "stopping",
}  # fmt: skip
WHY = {
    "PENDING queued": "no live worker", "PENDING delayed": "start time, 3600.0 s to go",
    "PENDING retry_backoff": "next attempt, 300.0 s to go", "RUNNING none": "runs on worker w1, attempt 1, epoch 1",
    "RUNNING pausing": "stops at its next boundary", "RUNNING cancelling": "is being cancelled",
    "RUNNING timing_out": "time ran out", "RUNNING draining": "hands back", "PAUSED": "resume it",
    "PAUSED retry_backoff": "resume it", "COMPLETED": "COMPLETED", "FAILED": "ValueError: it broke",
    "FAILED discarded": "ValueError: it broke", "TIMED_OUT": "the run timeout ran out", "CANCELLED": "CANCELLED",
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_shown_and_explained(state: str) -> None:
    world = World(types=TYPES)
    task_id = make(world, state)
    shown = world.status(task_id)
    assert shown.keys() >= SHOWN
    assert shown["state"] == state.partition(" ")[0]
    assert WHY[state] in shown["why"]
    assert (shown["finished_at"] is not None) == (shown["state"] in ("COMPLETED", "FAILED", "TIMED_OUT", "CANCELLED"))


def test_progress_elapsed_time_and_estimate() -> None:
    world = World()
    worker = ScriptedWorker(world, beating=True).start()
    task_id = world.submit(estimated_duration=HOUR)
    assert world.status(task_id)["eta_seconds"] == 3600
    worker.run()
    world.advance(MINUTE)
    assert (world.status(task_id)["eta_seconds"], world.status(task_id)["elapsed_seconds"]) == (3540, 60)
    worker.report(worker.grant(), progress(0.25, current_step="load"), step("a"))
    shown = world.status(task_id)
    assert (shown["progress"], shown["eta_seconds"], shown["steps_completed"]) == (0.25, 180, 1)
    worker.report(worker.grant(), completed({"n": 1}))
    shown = world.status(task_id)
    assert (shown["progress"], shown["eta_seconds"], shown["result"]) == (1.0, None, {"n": 1})


def test_the_pace_is_that_of_all_attempts_and_a_wait_counts() -> None:
    world = World(types={"noop": {"retry": {"max_attempts": 2, "delay": HOUR, "max_delay": HOUR, "jitter": False}}})
    worker = ScriptedWorker(world, beating=True).start()
    task_id = world.submit()
    worker.run()
    world.advance(MINUTE)
    worker.report(worker.grant(), progress(0.5), failed("ValueError"))
    assert world.status(task_id)["eta_seconds"] == 3660
    world.advance(HOUR + SECOND)
    worker.report(worker.run(), progress(0.5))
    assert world.status(task_id)["eta_seconds"] == 60, "not at once, as the second attempt alone would have it"
    world.do(commands.PauseTask, task_id)
    worker.report(worker.grant(), stopped("paused"))
    assert world.status(task_id)["eta_seconds"] is None


@pytest.mark.parametrize(("interval", "allowed"), [(None, 15 * MINUTE), (20 * SECOND, MINUTE)])
def test_a_checkpoint_that_is_overdue_by_two_intervals_shows(interval: int | None, allowed: int) -> None:
    world = World()
    worker = ScriptedWorker(world, beating=True).start()
    task_id = world.submit(checkpoint_interval=interval)
    worker.run()

    def overdue() -> bool:
        shown = world.status(task_id)
        assert (shown["checkpoint_overdue_seconds"] is not None) == ("overdue" in shown["why"])
        return shown["checkpoint_overdue_seconds"] is not None

    world.advance(allowed)
    assert not overdue()
    world.advance(SECOND)
    assert overdue()
    worker.report(worker.grant(), checkpoint(1))
    assert not overdue()
    world.advance(allowed + SECOND)
    assert overdue()
    worker.report(worker.grant(), completed())
    assert not overdue()


def test_units_make_the_fraction_where_none_is_told() -> None:
    world = World()
    worker = ScriptedWorker(world).start()
    task_id = world.submit()
    worker.report(worker.run(), ReportProgress(seq=0, units_done=3, units_total=4))
    assert world.status(task_id)["progress"] == 0.75
    worker.report(worker.grant(), ReportProgress(seq=0, units_done=9, units_total=4))
    assert world.status(task_id)["progress"] == 1.0


def test_why_a_ready_task_waits() -> None:
    world = World()
    task_id = world.submit()
    assert world.status(task_id)["reason"] == "no_worker"
    worker = ScriptedWorker(world, slots=1).start()
    waiting = world.submit()
    assert world.status(waiting)["reason"] == "queued"
    assert "every slot is taken" in world.status(waiting)["why"]
    worker.stop()
    assert world.status(waiting)["reason"] == "no_worker"


def test_the_last_error_is_kept_while_the_next_attempt_waits_and_runs() -> None:
    world = World(types={"noop": {"retry": {"max_attempts": 2, "delay": 0}}})
    worker = ScriptedWorker(world, slots=1).start()
    task_id = world.submit()
    worker.report(worker.run(), failed("app.Broken", message="why"))
    world.advance(SECOND)
    worker.report(worker.grant(), begun())
    shown = world.status(task_id)
    assert (shown["state"], shown["attempt"], shown["error"]["type"], shown["max_attempts"]) == (
        "RUNNING", 2, "app.Broken", 2,
    )  # fmt: skip
    worker.report(worker.grant(), completed())
    assert world.status(task_id)["error"] is None


def test_a_query_changes_nothing() -> None:
    world = World()
    task_id = world.submit()
    events = len(world.events())
    for kind in (commands.DescribeTask, commands.DescribeTask):
        assert world.do(kind, task_id, command_id="same").accepted
    assert len(world.events()) == events
    assert len(world.replies("same")) == 2


@pytest.mark.parametrize(("stores", "warned"), [(("one", "one"), False), (("one", "two"), True)])
def test_a_checkpoint_that_not_every_worker_can_see_is_told(stores: tuple[str, str], warned: bool) -> None:
    world = World()
    for name, store in zip(("w1", "w2"), stores, strict=True):
        worker = ScriptedWorker(world, name, slots=1)
        worker.say(replace(worker.started(), labels={commands.CHECKPOINT_STORE: store}))
    task_id = world.submit()
    holder = next(w for w in world.workers if w.grants())
    grant = holder.run()
    assert "share" not in world.status(task_id)["why"], "it has no checkpoint yet"
    holder.report(grant, checkpoint(1))
    assert ("do not share a checkpoint store" in world.status(task_id)["why"]) == warned
    holder.report(grant, stopped("drained"))
    assert ("do not share a checkpoint store" in world.status(task_id)["why"]) == warned
