"""How an attempt begins and ends, on a channel and clock that the test plays."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from perdure import channel
from perdure.context import Context
from perdure.schemas import limits
from perdure.schemas.errors import StepError
from tests.unit.perdure.attempting import TASK, engine_for, failure_of, once, result_of


def test_completed_with_numbered_frames_from_one() -> None:
    def job(ctx: Context, a: int) -> dict[str, int]:
        ctx.milestone("half")
        return {"a": ctx.step("s", once, a)}

    way = engine_for(job).run({"a": 4})
    assert result_of(way) == {"a": 4}
    assert [frame.number for frame in way.sent if hasattr(frame, "number")] == [1, 2, 3, 4]
    assert [type(f).__name__ for f in way.sent if hasattr(f, "number")] == ["Started", "Milestone", "Step", "Completed"]


class OwnError(ValueError):
    pass


def test_failure_tells_classes_message_and_the_users_part_of_the_traceback() -> None:
    def job(ctx: Context) -> None:
        raise OwnError("bad value")

    failed = failure_of(engine_for(job).run())
    assert failed.error_types == [f"{__name__}.OwnError", "builtins.ValueError", "builtins.Exception"]
    assert failed.message == "bad value"
    assert not failed.final
    assert 'raise OwnError("bad value")' in failed.traceback
    assert "perdure/attempt.py" not in failed.traceback


def test_failure_texts_are_cut_to_their_limits() -> None:
    def deep(n: int) -> None:
        if n == 0:
            raise ValueError("x" * 100_000 + "\ud800")
        deep(n - 1)

    def job(ctx: Context) -> None:
        deep(200)

    failed = failure_of(engine_for(job).run())
    assert len(failed.message) == limits.MESSAGE_MAX
    assert len(failed.traceback.encode()) <= limits.TRACEBACK_MAX


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), MemoryError()])
def test_whatever_user_code_raises_fails_the_attempt_alone(error: BaseException) -> None:
    def job(ctx: Context) -> None:
        raise error

    failed = failure_of(engine_for(job).run())
    assert failed.error_types[0] == f"builtins.{type(error).__name__}"
    assert not failed.final


def test_an_error_whose_text_cannot_be_made_is_still_told() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    def job(ctx: Context) -> None:
        raise Odd

    assert "RuntimeError" in failure_of(engine_for(job).run()).message


def test_input_that_does_not_fit_is_final() -> None:
    def job(ctx: Context, path: str) -> None: ...

    failed = failure_of(engine_for(job).run({"paht": "/a"}))
    assert failed.final
    assert "paht" in failed.message
    assert "path" in failed.message


@pytest.mark.parametrize("bad", [object(), "x" * (limits.VALUE_MAX + 1), float("nan")])
def test_result_that_is_no_json_or_too_large_is_final(bad: Any) -> None:
    def job(ctx: Context) -> Any:
        return bad

    failed = failure_of(engine_for(job).run())
    assert failed.final
    assert "result" in failed.message


def test_deferred_calls_run_last_first_at_every_end() -> None:
    for end in (None, ValueError("no")):
        calls: list[Any] = []

        def job(ctx: Context, calls: list[Any] = calls, end: Exception | None = end) -> None:
            ctx.defer(calls.append, 1)
            ctx.defer(lambda: calls.append(2))
            if end:
                raise end

        engine_for(job).run()
        assert calls == [2, 1]


def test_a_deferred_call_that_raises_fails_the_attempt() -> None:
    def broken() -> None:
        raise OSError("cannot clean up")

    def job(ctx: Context) -> None:
        ctx.defer(broken)

    assert failure_of(engine_for(job).run()).message == "cannot clean up"


def test_a_configuration_that_cannot_be_read_fails_its_attempt_alone() -> None:
    """The process may be running a thousand others."""

    def job(ctx: Context) -> None:
        pass

    engine = engine_for(job)
    engine.more = {"agent_config": b'{"x":{"$perdure":"datetime","value":"no"}}'}
    way = engine.run()
    assert isinstance(way.of(channel.Started)[0], channel.Started)
    assert way.last.final


def test_ctx_tells_what_the_attempt_is() -> None:
    seen: dict[str, Any] = {}

    def job(ctx: Context, a: int) -> None:
        seen.update(
            task_id=ctx.task_id, type=ctx.type, input=ctx.input, attempt=ctx.attempt, epoch=ctx.epoch,
            started_at=ctx.started_at, timeout=ctx.timeout, deadline=ctx.deadline, cancelled=ctx.cancelled,
            config=ctx.config, log=ctx.log.name,
        )  # fmt: skip

    engine = engine_for(job, timeout="1h")
    start = dt.datetime.fromtimestamp(1000, dt.UTC)
    engine.more = {"agent_config": b'{"model":"m"}', "run_timeout_left": 60_000, "deadline": 1_030_000}
    engine.run({"a": 1})
    assert seen == {
        "task_id": TASK, "type": "job", "input": {"a": 1}, "attempt": 1, "epoch": 1, "started_at": start,
        "timeout": dt.timedelta(hours=1), "deadline": start + dt.timedelta(seconds=30), "cancelled": False,
        "config": {"model": "m"}, "log": "perdure.task.job",
    }  # fmt: skip


def test_ctx_is_over_with_the_attempt() -> None:
    kept: list[Context] = []

    def job(ctx: Context) -> None:
        kept.append(ctx)

    engine_for(job).run()
    with pytest.raises(StepError, match="ended"):
        kept[0].milestone("late")


def test_progress_of_the_outermost_track_and_of_steps() -> None:
    def job(ctx: Context) -> None:
        for _ in ctx.track(range(2)):
            for _ in ctx.track([1, 2, 3]):
                ctx.step("s", once)

    way = engine_for(job).run()
    told = [(p.fraction, p.units_done, p.units_total, p.current_step) for p in way.of(channel.Progress)]
    assert told == [
        (0.0, 0, 2, ""),
        *[(0.0, 0, 2, "s")] * 3,
        (0.5, 1, 2, ""),
        *[(0.5, 1, 2, "s")] * 3,
        (1.0, 2, 2, ""),
    ]


def test_progress_said_by_the_task() -> None:
    def job(ctx: Context) -> None:
        ctx.progress(done=3, total=12, step="reading")
        ctx.progress(0.5)
        ctx.progress(7.0)
        with pytest.raises(ValueError, match="nan"):
            try:
                ctx.progress(float("nan"))
            except Exception as error:
                raise ValueError(str(error)) from error

    told = engine_for(job).run().of(channel.Progress)
    assert [(p.fraction, p.units_done, p.units_total, p.current_step) for p in told] == [
        (0.25, 3, 12, "reading"),
        (0.5, 3, 12, "reading"),
        (1.0, 3, 12, "reading"),
    ]


def test_progress_is_told_again_after_a_resume() -> None:
    def job(ctx: Context) -> None:
        if ctx.epoch == 1:
            ctx.progress(0.4, step="half way")
            ctx.checkpoint()
            raise ValueError

    engine = engine_for(job)
    engine.run()
    (told,) = engine.run().of(channel.Progress)
    assert (told.fraction, told.current_step) == (0.4, "half way")


def test_a_milestone_is_told_once_over_all_attempts() -> None:
    def job(ctx: Context) -> None:
        ctx.milestone("a")
        ctx.milestone("a")
        assert ctx.epoch > 1

    engine = engine_for(job)
    assert len(engine.run().of(channel.Milestone)) == 1
    assert engine.run().of(channel.Milestone) == []


def test_names_of_milestones_that_the_engine_would_not_take_are_refused_at_once() -> None:
    def job(ctx: Context) -> None:
        for n in range(20):
            ctx.milestone(f"{n} " + "x" * 1_000)

    run = engine_for(job).run()
    assert len(run.of(channel.Milestone)) == limits.MILESTONES_BYTES // 1_003
    assert "12,288 bytes of names" in failure_of(run).message
