"""Partition time: what jumps of the broker's clock, disagreeing clocks and silence do to timers and leases.

True time is `world.now`; the broker's clock is ahead of it by `world.skew`. No timer may fire more than 5 s early.
"""

from __future__ import annotations

from typing import Any

import pytest

from perdure.schemas import commands, events, limits
from tests.world import HOUR, MINUTE, SECOND, ScriptedWorker, World, failed, milestone, progress, step, stopped

EARLY = 5 * SECOND
RETRIED = {
    "noop": {"retry": {"max_attempts": 3, "delay": 10 * MINUTE, "max_delay": HOUR, "backoff": "fixed", "jitter": False}}
}


def fired_at(world: World, task_id: str, kind: type[object], wait: int, step: int = SECOND) -> int:
    """True time at which an event of the kind appears; time passes until then, `wait` ms at the most."""
    end = world.now + wait
    while not world.of_kind(kind, task_id):
        assert world.now < end, f"no {kind.__name__} within {wait} ms"
        world.advance(step)
    return world.now


def jump(world: World, ms: int) -> None:
    """The broker's clock is set."""
    world.skew += ms


@pytest.mark.parametrize(
    "steps", [(-HOUR,), (-HOUR // 2, -HOUR // 2), (-HOUR + 10, -10), (-HOUR + 3 * SECOND, -3 * SECOND)]
)
def test_an_hour_ahead_for_a_minute_and_back_fires_nothing_early(steps: tuple[int, ...]) -> None:
    world = World()
    before = world.submit(queue_timeout=10 * MINUTE)
    delayed = world.submit(not_before=world.now + 10 * MINUTE)
    due = world.now + 10 * MINUTE
    world.advance(SECOND)
    jump(world, HOUR)
    meanwhile = world.submit(queue_timeout=10 * MINUTE)
    due_meanwhile = world.now + 10 * MINUTE
    world.advance(MINUTE)
    assert {world.task(t).state for t in (before, meanwhile, delayed)} == {"PENDING"}
    for back in steps:
        jump(world, back)
        world.submit()
        world.advance(SECOND)
    assert fired_at(world, before, events.TaskTimedOut, HOUR) >= due - EARLY
    assert world.now <= due + 2 * SECOND
    world.advance(max(0, due + 2 * SECOND - world.now))
    assert world.task(delayed).ready
    assert fired_at(world, meanwhile, events.TaskTimedOut, HOUR) >= due_meanwhile - EARLY
    assert world.now <= due_meanwhile + 2 * SECOND
    assert not world.quarantined()


@pytest.mark.parametrize("first", ["tick", "submit"])
def test_an_hour_behind_for_a_minute_and_right_again_fires_nothing_early(first: str) -> None:
    world = World()
    before = world.submit(queue_timeout=10 * MINUTE)
    due = world.now + 10 * MINUTE
    world.advance(SECOND)
    jump(world, -HOUR)
    meanwhile = world.submit(queue_timeout=10 * MINUTE)
    due_meanwhile = world.now + 10 * MINUTE
    world.advance(MINUTE)
    jump(world, HOUR)
    world.tick(world.partition_of(before)) if first == "tick" else world.submit()
    assert due - EARLY <= fired_at(world, before, events.TaskTimedOut, HOUR) <= due + 2 * SECOND
    assert due_meanwhile - EARLY <= fired_at(world, meanwhile, events.TaskTimedOut, HOUR) <= due_meanwhile + 2 * SECOND


def test_time_that_passes_while_the_clock_is_behind_counts() -> None:
    world = World()
    task_id = world.submit(queue_timeout=3 * HOUR)
    due = world.now + 3 * HOUR
    jump(world, -HOUR)
    world.submit()
    world.now += 2 * HOUR
    jump(world, HOUR)
    assert due - EARLY <= fired_at(world, task_id, events.TaskTimedOut, 4 * HOUR, MINUTE) <= due + 2 * MINUTE


def test_the_record_that_brings_the_clock_back_fires_nothing_early() -> None:
    world = World()
    task_id = world.submit(queue_timeout=10 * MINUTE)
    where = world.partition_of(task_id)
    world.advance(SECOND)
    jump(world, HOUR)
    world.tick(where)
    jump(world, -HOUR)
    world.tick(where)
    world.advance(MINUTE)
    assert world.task(task_id).state == "PENDING"


def test_a_session_that_beats_as_the_clock_comes_back_is_not_believed_for_an_hour() -> None:
    world = World()
    worker = ScriptedWorker(world).start()
    world.advance(SECOND)
    jump(world, HOUR)
    worker.beat()
    jump(world, -HOUR)
    worker.beat()
    world.advance(3 * limits.LEASE_MS)
    assert worker.session not in world.of_engine(worker.partition).state.sessions


def test_a_start_time_set_while_the_clock_is_ahead_is_kept_to() -> None:
    world = World()
    world.submit()
    jump(world, HOUR)
    due = world.now + 2 * HOUR
    task_id = world.submit(not_before=due)
    world.advance(MINUTE)
    jump(world, -HOUR)
    world.submit()
    while not world.task(task_id).ready:
        world.advance(MINUTE)
    assert due - EARLY <= world.now <= due + 2 * MINUTE


def test_a_start_time_that_the_clock_has_only_passed_by_being_ahead_is_kept_to() -> None:
    world = World()
    world.submit()
    jump(world, HOUR)
    due = world.now + 10 * MINUTE
    task_id = world.submit(not_before=due)
    assert not world.task(task_id).ready
    world.advance(MINUTE)
    jump(world, -HOUR)
    world.submit()
    while not world.task(task_id).ready:
        world.advance(SECOND)
    assert due - EARLY <= world.now <= due + 2 * SECOND


@pytest.mark.parametrize("skew", [HOUR, -HOUR])
@pytest.mark.parametrize("paused", [False, True])
def test_a_start_time_given_while_the_clock_is_wrong_is_kept_to_once_it_is_right(skew: int, paused: bool) -> None:
    """A start time is wall time: nothing of it is counted by a clock that is wrong."""
    world = World()
    world.submit()
    jump(world, skew)
    due = world.now + 10 * MINUTE
    task_id = world.submit(not_before=due)
    world.advance(MINUTE)
    if paused:
        world.do(commands.PauseTask, task_id)
        world.do(commands.ResumeTask, task_id)
    world.advance(MINUTE)
    assert not world.task(task_id).ready
    jump(world, -skew)
    world.advance(due - EARLY - world.now)
    assert not world.task(task_id).ready
    world.advance(EARLY + 2 * SECOND)
    assert world.task(task_id).ready


def test_a_start_time_that_was_passed_while_the_task_was_paused_is_over_at_once() -> None:
    world = World()
    task_id = world.submit(not_before=world.now + MINUTE)
    world.do(commands.PauseTask, task_id)
    world.advance(HOUR)
    world.do(commands.ResumeTask, task_id)
    world.advance(limits.TICK_SPACING_MS)
    assert world.task(task_id).ready
    assert world.task(task_id).due is None


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_delay_that_is_paused_and_resumed_while_the_clock_is_ahead_is_kept_to(when: str) -> None:
    world = World(types=RETRIED)
    worker = ScriptedWorker(world).start()
    task_id = world.submit()
    if when == "meanwhile":
        jump(world, HOUR)
    worker.report(worker.run(), failed())
    worker.stop()
    due = world.now + 10 * MINUTE
    if when == "before":
        jump(world, HOUR)
        world.submit()
    world.do(commands.PauseTask, task_id)
    world.do(commands.ResumeTask, task_id)
    world.advance(MINUTE)
    jump(world, -HOUR)
    world.submit()
    while not world.task(task_id).ready:
        world.advance(10 * SECOND)
    assert due - EARLY <= world.now <= due + 20 * SECOND


def test_a_jump_that_is_true_counts_once_an_agreeing_tick_confirms_it() -> None:
    """An idle partition for hours, then a delayed submit: it fires on time."""
    world = World()
    world.submit()
    world.now += 5 * HOUR
    task_id = world.submit(not_before=world.now + 10 * MINUTE, total_timeout=20 * MINUTE)
    due = world.now + 10 * MINUTE
    assert due <= fired_at(world, task_id, events.TaskTimedOut, HOUR) - 10 * MINUTE <= due + 2 * SECOND
    queued = next(e for e in world.of_kind(events.TaskQueued, task_id) if e.reason == "queued")
    assert due - EARLY <= queued.at <= due + 2 * SECOND


def test_timers_that_ran_out_in_the_silence_fire_after_it() -> None:
    world = World()
    task_id = world.submit(queue_timeout=10 * MINUTE)
    world.now += 5 * HOUR
    other = world.submit(queue_timeout=10 * MINUTE)
    world.advance(2 * SECOND)
    assert world.task(task_id).state == "TIMED_OUT"
    assert world.task(other).state == "PENDING"


def test_a_worker_that_registers_after_hours_of_silence_is_granted_work_at_once() -> None:
    world = World()
    world.submit()
    world.now += 5 * HOUR
    worker = ScriptedWorker(world).start()
    world.now += 100
    world.pump()
    assert world.of_engine(worker.partition).state.sessions[worker.session].state == "live"
    task_id = world.submit()
    assert worker.grant(task_id)


def test_an_outage_of_an_hour_costs_no_lease_of_a_worker_that_is_back_within_a_term() -> None:
    world = World()
    first, second = (ScriptedWorker(world, f"w{n}", slots=1).start() for n in range(2))
    tasks = [world.submit(), world.submit()]
    first.run(), second.run()
    world.advance(SECOND)
    world.now += HOUR
    first.beat()  # the first that gets through; the second one's connection is back 5 s later
    for _ in range(5):
        world.now += SECOND
        world.pump()
    second.beat()
    world.advance(2 * SECOND)
    assert [world.task(t).epoch for t in tasks] == [1, 1]
    assert not world.of_kind(events.AttemptLost)


def test_disagreeing_clocks_fire_nothing_and_say_so() -> None:
    world = World()
    task_id = world.submit(queue_timeout=10 * SECOND)
    where = world.partition_of(task_id)
    world.skew = 31 * SECOND
    for _ in range(120):
        world.tick(where)
        world.now += SECOND
    assert world.task(task_id).state == "PENDING"
    world.skew = 0
    world.advance(2 * MINUTE)
    assert world.task(task_id).state == "TIMED_OUT"


@pytest.mark.parametrize("skew", [20 * SECOND, -20 * SECOND])
def test_clocks_that_agree_roughly_are_good_enough(skew: int) -> None:
    """The host waits by its own clock: timers are late by as much as the broker's is ahead, and never early."""
    world = World()
    world.skew = skew
    world.submit()
    task_id = world.submit(queue_timeout=10 * SECOND)
    world.advance(9 * SECOND)
    assert world.task(task_id).state == "PENDING"
    world.advance(max(0, skew) + 3 * SECOND)
    assert world.task(task_id).state == "TIMED_OUT"


def test_small_backward_steps_are_waited_out() -> None:
    world = World()
    task_id = world.submit(queue_timeout=10 * SECOND)
    begun = world.now
    for _ in range(15):
        world.advance(SECOND - 100)
        jump(world, -900 if world.skew == 0 else 900)
        world.submit()
    at = fired_at(world, task_id, events.TaskTimedOut, MINUTE)
    assert begun + 10 * SECOND - EARLY <= at <= begun + 20 * SECOND


def test_a_clock_that_is_set_back_for_good_delays_nothing() -> None:
    world = World()
    task_id = world.submit(queue_timeout=10 * MINUTE)
    due = world.now + 10 * MINUTE
    world.advance(MINUTE)
    world.submit()
    jump(world, -10 * SECOND)
    world.submit()
    assert due - EARLY <= fired_at(world, task_id, events.TaskTimedOut, HOUR) <= due + 2 * SECOND


@pytest.mark.parametrize("due", [0, 2**62, -1])
def test_ticks_of_others_are_harmless(due: int) -> None:
    world = World()
    task_id = world.submit(queue_timeout=MINUTE)
    where = world.partition_of(task_id)
    for clock in (world.now, world.now + 29 * SECOND, world.now - 29 * SECOND, 0, 2**62):
        world.tick(where, due=due, host_clock=clock)
    world.advance(MINUTE - SECOND)
    assert world.task(task_id).state == "PENDING"
    world.advance(2 * SECOND)
    assert world.task(task_id).state == "TIMED_OUT"
    assert not world.quarantined()


def test_a_no_progress_timeout_set_while_the_clock_is_ahead_fires_after_it_is_back() -> None:
    world = World()
    worker = ScriptedWorker(world, beating=True).start()
    task_id = world.submit(no_progress_timeout=10 * MINUTE)
    jump(world, HOUR)
    worker.run()
    world.advance(MINUTE)
    jump(world, -HOUR)
    world.advance(8 * MINUTE)
    assert world.task(task_id).stopping == "none"
    world.advance(15 * MINUTE)
    assert world.task(task_id).stopping == "timing_out"


@pytest.mark.parametrize("sign", [progress(0.5), step("a"), milestone("m")], ids=lambda s: type(s).__name__)
def test_a_sign_of_life_that_comes_first_after_a_silence_counts_as_of_now(sign: Any) -> None:
    """Nobody has confirmed yet that so much time has passed; when a tick does, it must not lie before it."""
    world = World()
    worker = ScriptedWorker(world, beating=True).start()
    task_id = world.submit(no_progress_timeout=5 * MINUTE)
    worker.run()
    world.now += 10 * MINUTE
    worker.report(worker.grant(), sign)
    world.advance(4 * MINUTE)
    assert world.task(task_id).stopping == "none"
    world.advance(MINUTE + SECOND)
    assert world.task(task_id).stopping == "timing_out"


def test_progress_before_a_silence_is_no_sign_of_life_after_it() -> None:
    world = World()
    worker = ScriptedWorker(world, beating=True).start()
    task_id = world.submit(no_progress_timeout=10 * MINUTE)
    worker.report(worker.run(), progress(0.5))
    world.advance(10 * MINUTE - SECOND)
    assert world.task(task_id).stopping == "none"
    world.advance(2 * SECOND)
    assert world.task(task_id).stopping == "timing_out"


def test_a_policy_bound_after_a_silence_counts_the_total_timeout_from_the_submit() -> None:
    world = World(types={})
    task_id = world.submit("later", queue="default")
    due = world.now + 10 * HOUR
    world.now += 5 * HOUR
    world.configure_type("later", {"total_timeout": 10 * HOUR})
    world.pump()
    world.advance(MINUTE)
    assert world.task(task_id).state == "PENDING"
    assert due - EARLY <= fired_at(world, task_id, events.TaskTimedOut, 20 * HOUR, MINUTE) <= due + 2 * MINUTE


def test_many_timers_set_while_the_clock_is_ahead_all_come_back() -> None:
    world = World()
    world.submit()
    jump(world, HOUR)
    tasks = []
    for first in range(0, 600, 100):
        batch = [
            commands.SubmitTask(command_id=f"c{n}", task_id=f"default/b{n}", type="noop", queue_timeout=10 * MINUTE)
            for n in range(first, first + 100)
        ]
        tasks += [one.task_id for one in batch]
        world.send(commands.SubmitBatch(command_id=f"batch{first}", tasks=batch), world.partition_of("default/"))
    due = world.now + 10 * MINUTE
    world.advance(MINUTE)
    jump(world, -HOUR)
    world.submit()
    world.advance(due - world.now - EARLY)
    assert {world.task(t).state for t in tasks} == {"PENDING"}
    world.advance(EARLY + 5 * SECOND)
    assert {world.task(t).state for t in tasks} == {"TIMED_OUT"}


def test_a_run_timeout_across_a_pause_in_a_false_hour_is_not_shortened() -> None:
    world = World()
    worker = ScriptedWorker(world, beating=True).start()
    task_id = world.submit(run_timeout=10 * MINUTE)
    worker.run()
    world.advance(MINUTE)
    jump(world, HOUR)
    world.do(commands.PauseTask, task_id)
    worker.report(worker.grant(), stopped("paused"))
    world.do(commands.ResumeTask, task_id)
    assert worker.run().run_timeout_left == 9 * MINUTE
    world.advance(MINUTE)
    jump(world, -HOUR)
    world.advance(7 * MINUTE + 50 * SECOND)
    assert world.task(task_id).stopping == "none"
    world.advance(30 * SECOND)
    assert world.task(task_id).stopping == "timing_out"
