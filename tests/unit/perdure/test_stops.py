"""Pause, drain, cancel and timeout, as the attempt honours them."""

from __future__ import annotations

import pytest

from perdure import channel
from perdure.context import Context
from tests.unit.perdure.attempting import Calls, engine_for, once, result_of, stop


@pytest.mark.parametrize("why", ["paused", "drained", "timed_out"])
def test_a_stop_is_honoured_at_the_next_item_with_a_checkpoint_first(why: str) -> None:
    done: list[int] = []

    def job(ctx: Context) -> None:
        for i in ctx.track(range(5)):
            done.append(i)
            ctx.state["i"] = i
            if i == 2 and ctx.epoch == 1:
                stop(way, why)

    engine = engine_for(job, checkpoint_interval="1h")
    attempt, way = engine.attempt()
    attempt.run()
    assert way.last.why == why
    assert [saved.positions for saved in way.of(channel.Checkpoint)] == [{"track": 3}]
    result_of(engine.run())
    assert done == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("why", ["cancelled", "revoked"])
def test_a_stop_for_good_saves_nothing(why: str) -> None:
    def job(ctx: Context) -> None:
        for _ in ctx.track(range(5)):
            stop(way, why)

    attempt, way = engine_for(job).attempt()
    attempt.run()
    assert way.last.why == why
    assert way.of(channel.Checkpoint) == []


@pytest.mark.parametrize(("why", "steps"), [("cancelled", 0), ("paused", 1)])
def test_cancel_ends_at_the_next_step_in_an_item_and_pause_does_not(why: str, steps: int) -> None:
    def job(ctx: Context) -> None:
        for _ in ctx.track(range(2)):
            stop(way, why)
            assert ctx.cancelled == (why == "cancelled")
            ctx.step("s", once)

    attempt, way = engine_for(job).attempt()
    attempt.run()
    assert way.last.why == why
    assert len(way.of(channel.Step)) == steps


def test_pause_between_steps_of_no_track() -> None:
    calls = Calls()

    def job(ctx: Context) -> int:
        first = ctx.step("a", calls, 1)
        if ctx.epoch == 1:
            stop(way, "paused")
            assert not ctx.cancelled
        return int(first + ctx.step("b", once, 1))

    engine = engine_for(job)
    attempt, way = engine.attempt()
    attempt.run()
    assert way.last.why == "paused"
    assert way.of(channel.Checkpoint) == [], "all there is to save is recorded"
    assert result_of(engine.run()) == 2
    assert calls == [1]


def test_nothing_new_is_not_saved_again_on_a_stop() -> None:
    def job(ctx: Context) -> None:
        for _ in ctx.track(range(3)):
            raise AssertionError("stopped before the first item")

    engine = engine_for(job)
    attempt, way = engine.attempt()
    stop(way, "drained")
    attempt.run()
    assert way.last.why == "drained"
    assert way.of(channel.Checkpoint) == []


def test_a_pause_that_is_undone_is_forgotten() -> None:
    def job(ctx: Context) -> str:
        stop(way, "paused")
        assert not ctx.cancelled  # reads what has come
        stop(way, "paused", undo=True)
        list(ctx.track(range(3)))
        return "done"

    attempt, way = engine_for(job).attempt()
    attempt.run()
    assert result_of(way) == "done"


def test_a_pause_that_is_undone_while_it_is_being_saved_is_forgotten() -> None:
    def undo(frame: channel.Frame) -> None:
        if isinstance(frame, channel.Checkpoint):
            stop(way, "paused", undo=True)

    def job(ctx: Context) -> str:
        for i in ctx.track(range(3)):
            ctx.state["i"] = i
            if i == 0:
                stop(way, "paused")
        return "done"

    attempt, way = engine_for(job).attempt()
    way.on_send = undo
    attempt.run()
    assert result_of(way) == "done"
    assert len(way.of(channel.Checkpoint)) == 1


def test_the_stronger_of_two_stops_holds_and_an_undo_takes_only_its_own() -> None:
    def job(ctx: Context) -> None:
        for why in ("paused", "drained"):
            stop(way, why)
        stop(way, "paused", undo=True)
        list(ctx.track(range(3)))

    attempt, way = engine_for(job).attempt()
    attempt.run()
    assert way.last.why == "drained"


def test_user_code_that_catches_exceptions_does_not_swallow_a_stop() -> None:
    cleaned: list[str] = []

    def job(ctx: Context) -> None:
        ctx.defer(cleaned.append, "deferred")
        stop(way, "cancelled")
        assert ctx.cancelled
        for _ in range(10):
            try:
                ctx.step("s", once)
            except Exception:  # noqa: BLE001  as users do
                cleaned.append("swallowed")

    attempt, way = engine_for(job).attempt()
    attempt.run()
    assert way.last.why == "cancelled"
    assert cleaned == ["deferred"]


def test_a_task_that_returns_although_it_was_told_to_stop_has_completed() -> None:
    def job(ctx: Context) -> str:
        stop(way, "cancelled")
        return "partial" if ctx.cancelled else "whole"

    attempt, way = engine_for(job).attempt()
    attempt.run()
    assert result_of(way) == "partial"


def test_stop_error_raised_by_a_signal() -> None:
    def job(ctx: Context) -> None:
        assert attempt.interrupt() is None
        stop(way, "cancelled")
        raise attempt.interrupt() or AssertionError("not told")

    attempt, way = engine_for(job).attempt()
    attempt.run()
    assert way.last.why == "cancelled"
    assert attempt.interrupt() is None, "no user code runs any more"


def test_usage_is_told_at_the_end() -> None:
    def job(ctx: Context) -> None:
        engine.clock.now += 1_500

    engine = engine_for(job)
    last = engine.run().last
    assert (last.duration_ms, last.cpu_seconds) == (1_500, 1.5)
