"""Timeouts, delays, waiters and retention: what ticks fire, and when."""

from __future__ import annotations

from typing import Any

import pytest

from perdure.schemas import commands, events, inbox, limits
from perdure.streams import tables
from tests.world import (
    CLIENT,
    HOUR,
    MINUTE,
    SECOND,
    ScriptedWorker,
    World,
    begun,
    completed,
    failed,
    milestone,
    progress,
    step,
    stopped,
)

TIMEOUTS = ("queue", "run", "total", "no_progress")
LIMIT = 20 * SECOND


def make(world: World, state: str, **timeouts: int) -> tuple[str, ScriptedWorker]:
    """A task with timeouts in PENDING, RUNNING or PAUSED, at the time of its submit."""
    worker = ScriptedWorker(world, slots=1, beating=state == "RUNNING")
    task_id = world.submit(**timeouts)
    if state == "RUNNING":
        worker.start().run()
    elif state == "PAUSED":
        world.do(commands.PauseTask, task_id)
    assert world.task(task_id).state == state
    return task_id, worker


FIRES = {("queue", "PENDING"), ("total", "PENDING"), ("run", "RUNNING"), ("total", "RUNNING"),
         ("no_progress", "RUNNING"), ("total", "PAUSED")}  # fmt: skip


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "PAUSED"])
@pytest.mark.parametrize("which", TIMEOUTS)
def test_each_timeout_in_each_state(which: str, state: str) -> None:
    world = World()
    task_id, worker = make(world, state, **{f"{which}_timeout": LIMIT})
    world.advance(LIMIT - SECOND)
    assert (world.task(task_id).state, world.task(task_id).stopping) == (state, "none")
    world.advance(2 * SECOND)
    if (which, state) not in FIRES:
        world.advance(10 * LIMIT)
        assert (world.task(task_id).state, world.task(task_id).stopping) == (state, "none")
    elif state == "RUNNING":
        assert world.task(task_id).stopping == "timing_out"
        assert [c.reason for c in world.inbox(worker.session, inbox.CancelAttempt)] == [f"timed_out: {which}"]
        worker.report(worker.grant(), stopped("timed_out"))
    if (which, state) in FIRES:
        t = world.task(task_id)
        assert (t.state, t.stop_detail, t.dead_letter) == ("TIMED_OUT", which, True)
        assert world.of_kind(events.TaskTimedOut, task_id)[0].which == which
    assert not world.quarantined()


def test_two_timeouts_of_a_task_that_run_out_in_one_tick_end_it_once() -> None:
    world = World()
    task_id = world.submit(queue_timeout=LIMIT, total_timeout=LIMIT)
    other = world.submit(queue_timeout=LIMIT)
    world.advance(LIMIT + SECOND)
    assert world.task(task_id).state == world.task(other).state == "TIMED_OUT"
    assert not world.quarantined()
    assert world.kinds(task_id).count("TaskTimedOut") == 1


@pytest.mark.parametrize(("which", "left"), [("run", 1), ("no_progress", 1), ("total", 0)])
def test_which_timeouts_of_a_running_attempt_are_retried(which: str, left: int) -> None:
    world = World(types={"noop": {"retry": {"max_attempts": 2, "delay": 0}}})
    task_id, worker = make(world, "RUNNING", **{f"{which}_timeout": LIMIT})
    world.advance(LIMIT + SECOND)
    worker.report(worker.grant(), stopped("timed_out"))
    world.advance(SECOND)
    assert len(worker.grants()) == 1 + left
    if left:
        assert [e.outcome for e in world.of_kind(events.AttemptFailed, task_id)] == ["TIMED_OUT"]
        assert worker.run().attempt == 2
        world.advance(LIMIT + SECOND)
        worker.report(worker.grant(), stopped("timed_out"))
    assert world.task(task_id).state == "TIMED_OUT"


def test_the_run_clock_counts_running_time_only_and_goes_on_after_a_pause() -> None:
    world = World()
    task_id, worker = make(world, "RUNNING", run_timeout=LIMIT)
    world.advance(LIMIT // 2)
    world.do(commands.PauseTask, task_id)
    worker.report(worker.grant(), stopped("paused"))
    world.advance(HOUR)
    world.do(commands.ResumeTask, task_id)
    grant = worker.run()
    assert grant.run_timeout_left == LIMIT // 2
    world.advance(LIMIT // 2 - SECOND)
    assert world.task(task_id).stopping == "none"
    world.advance(2 * SECOND)
    assert world.task(task_id).stopping == "timing_out"


def test_the_queue_clock_stands_while_paused_and_begins_anew_after_a_retry() -> None:
    world = World(types={"noop": {"retry": {"max_attempts": 2, "delay": 0}}})
    task_id, _ = make(world, "PENDING", queue_timeout=LIMIT)
    world.advance(LIMIT // 2)
    world.do(commands.PauseTask, task_id)
    world.advance(HOUR)
    world.do(commands.ResumeTask, task_id)
    world.advance(LIMIT // 2 - SECOND)
    assert world.task(task_id).state == "PENDING"
    worker = ScriptedWorker(world, slots=1).start()
    grant = worker.run()
    worker.stop()
    worker.report(grant, failed())
    world.advance(LIMIT - SECOND)
    assert world.task(task_id).state == "PENDING"
    world.advance(2 * SECOND)
    assert world.task(task_id).state == "TIMED_OUT"


def test_a_delay_is_not_queue_time() -> None:
    world = World()
    task_id = world.submit(not_before=world.now + HOUR, queue_timeout=LIMIT)
    world.advance(HOUR + LIMIT - SECOND)
    assert world.task(task_id).state == "PENDING"
    world.advance(2 * SECOND)
    assert world.task(task_id).state == "TIMED_OUT"


@pytest.mark.parametrize("sign", [step("a"), progress(0.1), milestone("m")], ids=lambda r: type(r).__name__)
def test_progress_restarts_the_no_progress_clock_and_beats_do_not(sign: Any) -> None:
    world = World()
    task_id, worker = make(world, "RUNNING", no_progress_timeout=LIMIT)
    world.advance(LIMIT - SECOND)
    worker.report(worker.grant(), sign)
    world.advance(LIMIT - SECOND)
    assert world.task(task_id).stopping == "none"
    world.advance(2 * SECOND)
    assert world.task(task_id).stopping == "timing_out"


def test_the_no_progress_clock_stands_while_paused() -> None:
    world = World()
    task_id, worker = make(world, "RUNNING", no_progress_timeout=LIMIT)
    world.do(commands.PauseTask, task_id)
    worker.report(worker.grant(), stopped("paused"))
    world.advance(HOUR)
    world.do(commands.ResumeTask, task_id)
    worker.run()
    world.advance(LIMIT - SECOND)
    assert world.task(task_id).stopping == "none"
    world.advance(2 * SECOND)
    assert world.task(task_id).stopping == "timing_out"


def test_a_timeout_that_runs_out_while_cancelling_leaves_it_cancelling() -> None:
    world = World()
    task_id, worker = make(world, "RUNNING", run_timeout=LIMIT, total_timeout=2 * LIMIT)
    world.do(commands.CancelTask, task_id, reason="enough")
    world.advance(3 * LIMIT)
    assert world.task(task_id).stopping == "cancelling"
    worker.report(worker.grant(), stopped("cancelled"))
    assert (world.task(task_id).state, world.task(task_id).stop_detail) == ("CANCELLED", "enough")


def test_the_total_timeout_overrides_a_run_timeout_that_is_stopping_the_attempt() -> None:
    world = World(types={"noop": {"retry": {"max_attempts": 5}}})
    task_id, worker = make(world, "RUNNING", run_timeout=LIMIT, total_timeout=LIMIT + 5 * SECOND)
    world.advance(LIMIT + 10 * SECOND)
    worker.report(worker.grant(), stopped("timed_out"))
    assert (world.task(task_id).state, world.task(task_id).stop_detail) == ("TIMED_OUT", "total")


def test_a_timeout_overrides_a_pause_and_a_completion_wins_over_both() -> None:
    world = World()
    task_id, worker = make(world, "RUNNING", run_timeout=LIMIT)
    world.do(commands.PauseTask, task_id)
    world.advance(2 * LIMIT)
    assert world.task(task_id).stopping == "timing_out"
    worker.report(worker.grant(), completed(3))
    assert world.task(task_id).state == "COMPLETED"


def test_a_grant_that_is_never_started_is_lost_at_its_deadline_although_beats_arrive() -> None:
    world = World()
    worker = ScriptedWorker(world, slots=1, beating=True).start()
    task_id = world.submit()
    world.advance(limits.START_DEADLINE_MS - SECOND)
    assert world.task(task_id).epoch == 1
    world.advance(2 * SECOND)
    assert [e.why for e in world.of_kind(events.AttemptLost, task_id)] == ["not_started"]
    assert world.inbox(worker.session, inbox.RevokeAttempt)[0].epoch == 1
    assert world.task(task_id).epoch == 2


def test_more_timers_than_a_tick_may_fire_all_fire() -> None:
    world = World()
    count = limits.TICK_TIMERS + 200
    tasks = []
    for first in range(0, count, limits.BATCH_TASKS_MAX):
        batch = [
            commands.SubmitTask(command_id=f"c{n}", task_id=f"default/b{n}", type="noop", queue_timeout=LIMIT)
            for n in range(first, first + limits.BATCH_TASKS_MAX)
        ]
        tasks += [one.task_id for one in batch]
        world.send(commands.SubmitBatch(command_id=f"batch{first}", tasks=batch), world.partition_of("default/"))
    world.advance(LIMIT + 2 * SECOND)
    assert {world.task(t).state for t in tasks} == {"TIMED_OUT"}
    assert not world.quarantined()


# Waiters -------------------------------------------------------------------------------------------------------------


def test_a_waiter_is_told_the_end() -> None:
    world = World()
    worker = ScriptedWorker(world).start()
    task_id = world.submit()
    world.send(commands.AwaitTask(command_id="wait", task_id=task_id, reply_to=CLIENT))
    assert not world.replies("wait")
    worker.report(worker.run(), completed(7))
    assert [b'"state":"COMPLETED"' in (r.body or b"") for r in world.replies("wait")] == [True]


def test_a_waiter_is_told_how_the_task_stands_when_its_time_is_up_and_is_forgotten() -> None:
    world = World()
    task_id = world.submit()
    world.send(commands.AwaitTask(command_id="wait", task_id=task_id, reply_to=CLIENT, timeout=5 * SECOND))
    world.send(commands.AwaitTask(command_id="wait2", task_id=task_id, reply_to=CLIENT, timeout=10 * SECOND))
    world.advance(6 * SECOND)
    assert [b'"state":"PENDING"' in (r.body or b"") for r in world.replies("wait")] == [True]
    assert not world.replies("wait2")
    world.advance(HOUR)
    assert len(world.replies("wait")) == len(world.replies("wait2")) == 1
    assert not [k for k in world.rows(world.partition_of(task_id)) if k[:1] == b"w"]


def test_a_waiter_for_an_ended_or_unknown_task_is_answered_at_once() -> None:
    world = World()
    task_id = world.submit()
    world.do(commands.CancelTask, task_id)
    assert world.do(commands.AwaitTask, task_id).body is not None
    unknown = world.do(commands.AwaitTask, "default/none")
    assert (unknown.accepted, unknown.reason) == (False, "not_found")
    assert not world.of_kind(events.CommandRejected)


# Retention -----------------------------------------------------------------------------------------------------------


def ended(world: World, how: str) -> tuple[str, ScriptedWorker]:
    worker = ScriptedWorker(world, slots=1).start()
    task_id = world.submit()
    grant = worker.run()
    worker.report(grant, *(step(f"s{n}") for n in range(3)))
    match how:
        case "completed":
            worker.report(grant, completed(1))
        case "cancelled":
            world.do(commands.CancelTask, task_id)
            worker.report(grant, stopped("cancelled"))
        case _:
            worker.report(grant, failed())
            if how == "discarded":
                world.do(commands.DiscardDeadLetter, task_id)
    worker.stop()
    world.advance(MINUTE)
    return task_id, worker


@pytest.mark.parametrize("how", ["completed", "cancelled", "discarded"])
def test_an_ended_task_is_forgotten_whole_after_its_time(how: str) -> None:
    world = World()
    task_id, _ = ended(world, how)
    where = world.partition_of(task_id)
    world.advance(limits.RETAIN_MS - HOUR)
    assert world.known(task_id)
    world.advance(HOUR)
    assert not world.known(task_id)
    assert world.kinds(task_id)[-1] == "TaskRetired"
    left = [k for k in world.rows(where) if k[:1] in (b"t", b"d", b"D", b"g", b"q", b"u", b"W")]
    assert not left


def test_a_dead_letter_is_kept_until_it_is_discarded() -> None:
    world = World()
    task_id, _ = ended(world, "failed")
    world.advance(3 * limits.RETAIN_MS)
    assert world.known(task_id)
    world.do(commands.DiscardDeadLetter, task_id)
    world.advance(limits.RETAIN_MS + MINUTE)
    assert not world.known(task_id)


def test_a_discarded_task_that_is_redriven_is_kept() -> None:
    world = World()
    task_id, _ = ended(world, "discarded")
    world.do(commands.RetryTask, task_id)
    world.advance(2 * limits.RETAIN_MS)
    assert world.task(task_id).state == "PENDING"


def test_the_last_answers_go_together_with_their_task() -> None:
    """A command that comes again is never decided anew while its task is known."""
    world = World()
    task_id = world.submit()
    world.do(commands.CancelTask, task_id, reason="enough")
    world.advance(limits.RETAIN_MS + HOUR)
    forgotten, retired = world.events(task_id)[-2:]
    assert (type(forgotten), type(retired)) == (events.AnswersForgotten, events.TaskRetired)
    assert forgotten.cause.offset == retired.cause.offset


def test_a_task_whose_steps_are_being_forgotten_cannot_be_redriven() -> None:
    world = World()
    worker = ScriptedWorker(world, slots=1).start()
    task_id = world.submit()
    grant = worker.run()
    for first in range(0, 1500, 500):
        worker.report(grant, *(step(f"s{n:05}") for n in range(first, first + 500)))
    worker.report(grant, failed())
    worker.stop()
    world.do(commands.DiscardDeadLetter, task_id)
    where = world.partition_of(task_id)
    world.now += limits.RETAIN_MS + MINUTE
    world.append(commands.Tick(due=world.now, host_clock=world.now), where)
    world.append(commands.RetryTask(command_id="late", task_id=task_id), where)
    world.pump()
    kept = world.of_kind(events.StepCompleted, task_id)
    redriven = world.of_kind(events.TaskRedriven, task_id)
    assert not redriven or world.task(task_id).steps_kept == len(kept), "a redrive has to keep every recorded step"


def test_a_tick_that_has_nothing_to_do_changes_nothing_but_the_position() -> None:
    world = World()
    world.submit(queue_timeout=LIMIT)
    for where in range(world.partitions):
        before = world.rows(where)
        world.tick(where)
        world.tick(where, due=0)
        world.tick(where, due=world.now + HOUR)
        after = world.rows(where)
        changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
        assert not {k for k in changed if k[:1] not in (tables.POSITION, b"\xff")}


def test_begun_twice_starts_the_run_clock_once() -> None:
    world = World()
    task_id, worker = make(world, "RUNNING", run_timeout=LIMIT)
    world.advance(LIMIT // 2)
    worker.report(worker.grant(), begun())
    world.advance(LIMIT // 2 + SECOND)
    assert world.task(task_id).stopping == "timing_out"
