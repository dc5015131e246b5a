"""An attempt by its steps, boundaries, checkpoints and end, on a channel and clock that the test plays."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from perdure import channel
from perdure.checkpoint import interval_ms
from perdure.connectors import checkpoints
from perdure.context import Context
from perdure.schemas import limits
from perdure.schemas.errors import DuplicateStep, NotSerializable, StepError
from tests.unit.perdure.attempting import TASK, Way, engine_for


def once(value: Any = None) -> Any:
    return value


def result_of(way: Way) -> Any:
    assert isinstance(way.last, channel.Completed), way.last
    return json.loads(way.last.result)


def failure_of(way: Way) -> channel.Failed:
    assert isinstance(way.last, channel.Failed), way.last
    return way.last


# The end of an attempt ------------------------------------------------------------------------------------------------


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
        if n:
            deep(n - 1) if n % 2 else deep(n - 1)
        else:
            raise ValueError("x" * 100_000 + "\ud800")

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


# Steps ----------------------------------------------------------------------------------------------------------------


def test_identities() -> None:
    def job(ctx: Context) -> None:
        ctx.step("a/b", once)
        ctx.step("s", once, key="k[1]")
        ctx.step("s", once)
        ctx.step("s", once)
        for _ in ctx.track(["x"], name="files"):
            ctx.step("s", once)
            for _ in ctx.track(range(1)):
                ctx.step("t", once, key=7)
        for _ in ctx.track([1]):
            ctx.step("s", once)
        for _ in ctx.track([1]):
            ctx.step("s", once)
        ctx.step("é%", once)

    way = engine_for(job).run()
    assert [step.step_id for step in way.of(channel.Step)] == [
        "/a%2Fb",
        "/s[k%5B1%5D]",
        "/s",
        "/s#2",
        "files@000000000000/s",
        "files@000000000000/track@000000000000/t[7]",
        "track@000000000000/s",
        "track#2@000000000000/s",
        "/é%25",
    ]


def test_a_loop_left_by_break_or_error_is_left() -> None:
    def job(ctx: Context) -> None:
        for _ in ctx.track(range(3), name="a"):
            for _ in ctx.track(range(3), name="b"):
                break
            ctx.step("in-a", once)
            break
        with pytest.raises(ZeroDivisionError):
            for _ in ctx.track(range(3), name="c"):
                _ = 1 / 0
        ctx.step("after", once)

    way = engine_for(job).run()
    assert [step.step_id for step in way.of(channel.Step)] == ["a@000000000000/in-a", "/after"]


def test_a_recorded_step_is_not_called_again() -> None:
    calls: list[str] = []

    def job(ctx: Context) -> Any:
        got = ctx.step("s", lambda: calls.append("s") or {"t": (1, dt.date(2026, 1, 2))})
        if len(calls) == 1 and ctx.epoch == 1:
            raise ValueError
        return [got, ctx.step("new", once, 5)]

    engine = engine_for(job)
    engine.run()
    way = engine.run()
    assert calls == ["s"]
    assert [step.step_id for step in way.of(channel.Step)] == ["/new"]
    assert result_of(way)[1] == 5


def test_a_step_gives_the_same_value_now_and_when_it_is_found() -> None:
    @dataclasses.dataclass
    class Found:
        rows: tuple[int, ...]

    seen: list[Any] = []

    def job(ctx: Context) -> None:
        seen.append(ctx.step("s", lambda: {"f": Found((1, 2)), "d": dt.date(2026, 1, 2), "b": b"x"}))
        assert ctx.epoch > 1

    engine = engine_for(job)
    engine.run()
    engine.run()
    assert seen == [{"f": {"rows": [1, 2]}, "d": dt.date(2026, 1, 2), "b": b"x"}] * 2


def test_a_step_waits_for_its_acknowledgement() -> None:
    def job(ctx: Context) -> None:
        ctx.step("s", once)
        raise AssertionError("went on without it")

    engine = engine_for(job)
    engine.acknowledges = False
    attempt, way = engine.attempt()
    waited: list[int] = []

    class Outage(BaseException): ...

    def wait() -> None:
        waited.append(1)
        if len(waited) == 3:
            raise Outage  # the connection is lost
        assert way.attempt is not None
        way.attempt.receive(channel.Ack(TASK, 1, 1))  # of the frame before
        way.attempt.receive(channel.Ack("etl/other", 1, 99))
        way.attempt.receive(channel.Ack(TASK, 7, 99))

    way.wait = wait  # type: ignore[method-assign]
    attempt.run()
    assert failure_of(way).error_types[0].endswith("Outage")


def test_a_failed_step_is_reported_and_runs_again() -> None:
    tries: list[int] = []

    def flaky() -> int:
        tries.append(1)
        if len(tries) == 1:
            raise OwnError("first")
        return 7

    def job(ctx: Context) -> int:
        return int(ctx.step("s", flaky))

    engine = engine_for(job)
    way = engine.run()
    (step,) = way.of(channel.Step)
    assert (step.result, step.error_message, step.error_types[0]) == (None, "first", f"{__name__}.OwnError")
    assert "raise OwnError" in step.error_traceback
    assert failure_of(way).message == "first"
    assert result_of(engine.run()) == 7


def test_a_step_result_that_is_no_json_ends_the_task_even_if_caught() -> None:
    def job(ctx: Context) -> str:
        with pytest.raises(NotSerializable):
            ctx.step("s", object)
        return "went on"

    failed = failure_of(engine_for(job).run())
    assert failed.final
    assert failed.error_types[0].endswith("NotSerializable")
    assert "'s'" in failed.message


def test_an_async_function_in_a_plain_task_is_refused() -> None:
    async def later() -> None: ...

    def job(ctx: Context) -> None:
        ctx.step("s", later)

    failed = failure_of(engine_for(job).run())
    assert failed.final
    assert "async def" in failed.message


def changed(ctx: Context, fn: Callable[..., Any], *args: Any) -> Any:
    return ctx.step("s", fn, *args)


@pytest.mark.parametrize(
    ("second", "differs"),
    [((once, 1), False), ((once, 2), True), ((str, 1), True), ((partial(once), 1), False)],
)
@pytest.mark.parametrize("policy", ["warn", "fail", "rerun"])
def test_a_recorded_step_with_another_function_or_arguments(
    second: tuple[Any, ...], differs: bool, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan: list[tuple[Any, ...]] = [(once, 1), second]

    def job(ctx: Context) -> Any:
        got = ctx.step("s", *plan[ctx.epoch - 1])
        if ctx.epoch == 1:
            raise ValueError
        return got

    engine = engine_for(job, step_mismatch=policy)
    engine.run()
    with caplog.at_level(logging.WARNING):
        way = engine.run()
    if differs and policy == "fail":
        assert failure_of(way).final
        assert failure_of(way).error_types[0].endswith("StepMismatch")
    elif differs and policy == "rerun":
        assert result_of(way) == second[0](second[1])
        assert len(way.of(channel.Step)) == 1
    else:
        assert result_of(way) == 1
        assert way.of(channel.Step) == []
    assert bool(caplog.records) == (differs and policy != "fail")


def test_another_code_version_alone_only_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    def job(ctx: Context) -> None:
        for i in range(5):
            ctx.step("s", once, key=i)
        assert ctx.epoch > 1

    engine = engine_for(job, step_mismatch="fail")
    engine.run()
    engine.type = dataclasses.replace(engine.type, code_version="v2")
    with caplog.at_level(logging.WARNING):
        result_of(engine.run())
    assert [record.message for record in caplog.records] == ["steps were recorded by code version v1, this is v2"]


def test_arguments_that_are_no_json_are_not_compared() -> None:
    def job(ctx: Context) -> Any:
        got = ctx.step("s", lambda lock: 1, threading.Lock())
        assert ctx.epoch > 1
        return got

    engine = engine_for(job, step_mismatch="fail")
    engine.run()
    assert result_of(engine.run()) == 1


def test_at_most_once_records_its_start_first() -> None:
    order: list[str] = []

    def job(ctx: Context) -> None:
        ctx.step("pay", lambda: order.append("paid"), at_most_once=True)

    engine = engine_for(job)
    engine.run(prepare=lambda way: setattr(way, "on_send", lambda f: order.append(type(f).__name__)))
    assert order == ["Started", "Step", "Progress", "paid", "Step", "Completed"]
    assert engine.begun == set()


def test_at_most_once_with_unknown_outcome_waits_for_a_person() -> None:
    calls: list[int] = []

    def job(ctx: Context) -> None:
        try:
            ctx.step("pay", lambda: calls.append(1), at_most_once=True)
        except Exception:
            ctx.log.exception("a task that catches everything")

    engine = engine_for(job)
    engine.begun = {"/pay"}
    failed = failure_of(engine.run())
    assert failed.final
    assert failed.error_types[0].endswith("OutcomeUnknown")
    assert calls == []


def test_at_most_once_that_failed_may_run_again() -> None:
    def job(ctx: Context) -> int:
        return int(ctx.step("pay", lambda: 1 // (ctx.epoch - 1), at_most_once=True))

    engine = engine_for(job)
    assert not failure_of(engine.run()).final
    assert result_of(engine.run()) == 1


def test_idempotency_key_is_the_steps_own_and_stays() -> None:
    def job(ctx: Context) -> list[str]:
        keys = [ctx.idempotency_key]
        keys += [ctx.step("a", lambda: ctx.idempotency_key), ctx.step("b", lambda: ctx.idempotency_key)]
        keys += [ctx.idempotency_key for _ in ctx.track(range(2))]
        return keys

    first, second = result_of(engine_for(job).run()), result_of(engine_for(job).run())
    assert first == second
    assert len(set(first)) == 5


def test_state_is_read_only_inside_a_step() -> None:
    def assign(ctx: Context, change: Callable[[Any], Any]) -> None:
        change(ctx.state)

    changes: list[Callable[[Any], Any]] = [
        lambda s: s.__setitem__("a", 2),
        lambda s: s.__delitem__("a"),
        lambda s: s.update(a=2),
        lambda s: s.setdefault("b", 2),
        lambda s: s.pop("a"),
        lambda s: s.popitem(),
        lambda s: s.clear(),
        lambda s: s.__ior__({"a": 2}),
    ]

    def job(ctx: Context) -> Any:
        ctx.state["a"] = 1
        for place, change in enumerate(changes):
            with pytest.raises(StepError, match="read-only"):
                ctx.step("s", assign, ctx, change, key=place)
        assert ctx.step("read", lambda: ctx.state["a"]) == 1
        return ctx.state

    assert result_of(engine_for(job).run()) == {"a": 1}


def test_steps_in_threads_have_the_items_scope_and_need_keys() -> None:
    def job(ctx: Context) -> None:
        with ThreadPoolExecutor(4) as pool:
            for n in ctx.track(range(2)):
                list(pool.map(lambda i, n=n: ctx.step("s", once, (n, i), key=i), range(5)))

    way = engine_for(job).run()
    assert sorted(step.step_id for step in way.of(channel.Step)) == [
        f"track@{n:012d}/s[{i}]" for n in range(2) for i in range(5)
    ]


def test_one_name_from_two_threads_is_a_duplicate_even_one_after_the_other() -> None:
    def job(ctx: Context) -> None:
        ctx.step("s", once)
        with ThreadPoolExecutor(1) as pool:
            assert isinstance(pool.submit(ctx.step, "s", once).exception(), DuplicateStep)

    failed = failure_of(engine_for(job).run())
    assert failed.final
    assert "key=" in failed.message


def test_a_resume_over_5000_steps_reads_page_after_page() -> None:
    calls: list[int] = []

    def job(ctx: Context) -> int:
        total = sum(ctx.step("s", lambda i=i: calls.append(i) or i, key=f"{i:05d}") for i in range(5_500))
        assert ctx.epoch > 1
        return total

    engine = engine_for(job, page_size=1_700)
    engine.run()
    assert len(engine.steps) == 5_500
    way = engine.run()
    assert result_of(way) == sum(range(5_500))
    assert len(calls) == 5_500
    assert engine.pages_sent == 4
    assert [want.after for want in way.of(channel.WantSteps)] == [f"/s[{n * 1_700 - 1:05d}]" for n in (1, 2, 3)]


def test_pages_are_read_before_a_step_counts_as_new() -> None:
    """Ids in an order other than the code's, and a new one that sorts between recorded ones."""
    calls: list[str] = []

    def job(ctx: Context) -> None:
        names = ["z", "m", "a", "q"] if ctx.epoch == 1 else ["z", "b", "m", "a", "q", "zz"]
        for name in names:
            ctx.step(name, calls.append, name)
        assert ctx.epoch > 1

    engine = engine_for(job, page_size=1)
    engine.run()
    way = engine.run()
    result_of(way)
    assert calls == ["z", "m", "a", "q", "b", "zz"]
    assert len(way.of(channel.WantSteps)) == 3


def test_two_threads_that_wait_for_the_same_page_ask_once() -> None:
    def job(ctx: Context) -> list[int]:
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda i: ctx.step("s", once, i, key=i), range(8)))
        assert ctx.epoch > 1
        return got

    engine = engine_for(job, page_size=3)
    engine.run()
    way = engine.run()
    assert result_of(way) == list(range(8))
    assert len(way.of(channel.WantSteps)) == 2


# Tracks and checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("elapsed_ms", "last_save_ms", "expected"),
    [
        (0, 0, 1_000),
        (100_000, 0, 1_000),
        (1_000_000, 0, 5_000),
        (10_000_000, 0, 10_000),  # elapsed / 200 = 50 s, but 10 s is enough for a cheap one
        (10_000_000, 30, 30_000),  # 1000 times what it costs
        (10_000_000, 300, 50_000),  # no rarer than elapsed / 200
        (10**9, 10**6, 300_000),
    ],
)
def test_interval_rule(elapsed_ms: float, last_save_ms: float, expected: float) -> None:
    assert interval_ms(None, elapsed_ms, last_save_ms) == expected
    assert interval_ms(2_500, elapsed_ms, last_save_ms) == 2_500


def test_checkpoints_come_at_the_first_boundary_after_the_interval() -> None:
    def job(ctx: Context) -> None:
        for i in ctx.track(range(10)):
            ctx.state["i"] = i
            engine.clock.now += 700

    engine = engine_for(job, checkpoint_interval="2s")
    way = engine.run()
    assert [saved.positions for saved in way.of(channel.Checkpoint)] == [{"track": 3}, {"track": 6}, {"track": 9}]
    assert [saved.version for saved in way.of(channel.Checkpoint)] == [1, 2, 3]


def test_unset_interval_follows_the_tasks_age_over_attempts() -> None:
    def job(ctx: Context) -> None:
        for _ in ctx.track(range(4_000)):
            engine.clock.now += 1_000
            if ctx.epoch == 1 and engine.clock.now >= 1_000_000 + 1_000_000:
                raise ValueError

    engine = engine_for(job)
    first = engine.run()
    saves = [saved.positions["track"] for saved in first.of(channel.Checkpoint)]
    assert saves[:3] == [1, 2, 3], "every second while the task is young"
    assert saves[-1] - saves[-2] == 5, "every elapsed / 200 later on"
    second = engine.run()
    later = [saved.positions["track"] for saved in second.of(channel.Checkpoint)]
    assert later[1] - later[0] in (5, 6), "a resumed task is as old as it was"
    assert later[-1] - later[-2] == 10, "and never rarer than 10 s while they cost nothing"


@pytest.mark.parametrize("make", [list, tuple, range, lambda r: (x for x in r), lambda r: {x: 1 for x in r}])
def test_a_resume_goes_on_at_the_checkpoints_position(make: Callable[[range], Any]) -> None:
    done: list[int] = []

    def job(ctx: Context) -> int:
        ctx.state.setdefault("sum", 0)
        for item in ctx.track(range(10) if make is range else make(range(10)), total=10):
            done.append(item)
            ctx.state["sum"] += item
            engine.clock.now += 1_000
            if ctx.epoch == 1 and item == 6:
                raise ValueError
        return int(ctx.state["sum"])

    engine = engine_for(job, checkpoint_interval="3s")
    engine.run()
    assert engine.checkpoint is not None
    assert engine.checkpoint.positions == {"track": 6}
    assert result_of(engine.run()) == sum(range(10))
    assert done == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9]


def test_a_finished_track_is_not_done_again() -> None:
    done: list[str] = []

    def job(ctx: Context) -> None:
        for item in ctx.track("ab", name="first"):
            done.append(item)
        ctx.checkpoint()
        for item in ctx.track("cd", name="second"):
            done.append(item)
            if ctx.epoch == 1:
                raise ValueError

    engine = engine_for(job, checkpoint_interval="1h")
    engine.run()
    assert engine.checkpoint is not None
    assert engine.checkpoint.positions == {"first": 2}
    result_of(engine.run())
    assert done == ["a", "b", "c", "c", "d"]


def test_positions_of_nested_tracks_go_with_their_item() -> None:
    def job(ctx: Context) -> None:
        for a in ctx.track(range(2), name="a"):
            for _ in ctx.track(range(2), name="b"):
                engine.clock.now += 1_000
            for _ in ctx.track(range(1), name="c"):
                engine.clock.now += 1_000
            if ctx.epoch == 1 and a == 1:
                raise ValueError

    engine = engine_for(job, checkpoint_interval="1ms")
    way = engine.run()
    assert [saved.positions for saved in way.of(channel.Checkpoint)] == [
        {"a": 0, "a@000000000000/b": 1},
        {"a": 0, "a@000000000000/b": 2},
        {"a": 0, "a@000000000000/b": 2, "a@000000000000/c": 1},
        {"a": 1, "a@000000000001/b": 1},
        {"a": 1, "a@000000000001/b": 2},
        {"a": 1, "a@000000000001/b": 2, "a@000000000001/c": 1},
    ]
    resumed = engine.run()
    assert [saved.positions for saved in resumed.of(channel.Checkpoint)] == [], "nothing was left to do"
    assert isinstance(resumed.last, channel.Completed)


def test_a_checkpoint_is_one_object() -> None:
    def job(ctx: Context) -> None:
        ctx.state["when"] = dt.date(2026, 1, 2)
        ctx.milestone("begun")
        ctx.step("s", once)
        ctx.step("s", once)
        for _ in ctx.track(range(4)):
            engine.clock.now += 500

    engine = engine_for(job, checkpoint_interval="1500ms")
    way = engine.run()
    (saved,) = way.of(channel.Checkpoint)
    text = checkpoints.unpack(engine.store.load(saved.uri, saved.sha256))
    assert json.loads(text) == {
        "state": {"when": {"$perdure": "date", "value": "2026-01-02"}},
        "positions": {"track": 3},
        "scopes": {"": {"/s": 2}},
        "progress": {"current_step": "s", "fraction": 0.75, "units_done": 3, "units_total": 4},
        "milestones": ["begun"],
        "at": 1_001_500,
        "elapsed_ms": 1_500.0,
        "code_version": "v1",
    }


def test_a_checkpoint_is_saved_before_it_is_told_and_awaited() -> None:
    def job(ctx: Context) -> None:
        ctx.state["a"] = 1
        ctx.checkpoint()
        raise AssertionError("went on without it")

    engine = engine_for(job)
    engine.acknowledges = False
    attempt, way = engine.attempt()

    class Outage(BaseException): ...

    def wait() -> None:
        (told,) = way.of(channel.Checkpoint)
        assert engine.store.load(told.uri, told.sha256)
        raise Outage

    way.wait = wait  # type: ignore[method-assign]
    attempt.run()
    assert failure_of(way).error_types[0].endswith("Outage")


def test_only_the_newest_checkpoints_are_kept() -> None:
    def job(ctx: Context) -> None:
        for i in range(6):
            ctx.state["i"] = i
            ctx.checkpoint()

    engine = engine_for(job)
    engine.run()
    assert [kept.version for kept in engine.store.list(TASK)] == [4, 5, 6]


def test_state_that_is_no_json_ends_the_task_by_name() -> None:
    def job(ctx: Context) -> None:
        ctx.state["lock"] = threading.Lock()
        ctx.checkpoint()

    failed = failure_of(engine_for(job).run())
    assert failed.final
    assert "ctx.state" in failed.message


def test_a_checkpoint_that_cannot_be_loaded_fails_the_attempt_by_name() -> None:
    def job(ctx: Context) -> None:
        ctx.checkpoint()
        assert ctx.epoch > 1

    engine = engine_for(job)
    engine.run()
    assert engine.checkpoint is not None
    engine.store.delete(engine.checkpoint.uri)
    failed = failure_of(engine.run())
    assert engine.checkpoint.uri in failed.message
    assert not failed.final


@pytest.mark.parametrize("inside", ["track", "checkpoint"])
def test_nothing_is_saved_inside_a_step(inside: str) -> None:
    def body(ctx: Context) -> None:
        if inside == "track":
            list(ctx.track([1]))
        else:
            ctx.checkpoint()

    def job(ctx: Context) -> None:
        ctx.step("s", body, ctx)

    failed = failure_of(engine_for(job).run())
    assert failed.final
    assert "inside the step /s" in failed.message


def test_a_set_cannot_be_tracked() -> None:
    def job(ctx: Context) -> None:
        list(ctx.track({"a", "b"}))

    assert "sort it" in failure_of(engine_for(job).run()).message


def test_too_many_tracks_are_refused_by_name() -> None:
    def job(ctx: Context) -> None:
        for _ in range(limits.POSITIONS_MAX + 1):
            list(ctx.track([1]))

    assert str(limits.POSITIONS_MAX) in failure_of(engine_for(job).run()).message


def test_a_track_in_a_thread_is_gone_through_without_a_position() -> None:
    def job(ctx: Context) -> None:
        def side() -> None:
            for i in ctx.track(range(3), name="side"):
                ctx.step("s", once, i)

        with ThreadPoolExecutor(1) as pool:
            pool.submit(side).result()
        ctx.checkpoint()
        assert ctx.epoch > 1

    engine = engine_for(job)
    way = engine.run()
    assert [step.step_id for step in way.of(channel.Step)] == [f"side@{i:012d}/s" for i in range(3)]
    assert way.of(channel.Checkpoint)[0].positions == {}
    assert engine.run().of(channel.Step) == []


# Progress and milestones ----------------------------------------------------------------------------------------------


def test_progress_of_the_outermost_track_and_of_steps() -> None:
    def job(ctx: Context) -> None:
        for _ in ctx.track(range(2)):
            for _ in ctx.track([1, 2, 3]):
                ctx.step("s", once)

    way = engine_for(job).run()
    told = [(p.fraction, p.units_done, p.units_total, p.current_step) for p in way.of(channel.Progress)]
    assert told == [
        (0.0, 0, 2, None),
        *[(0.0, 0, 2, "s")] * 3,
        (0.5, 1, 2, "s"),
        *[(0.5, 1, 2, "s")] * 3,
        (1.0, 2, 2, "s"),
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


# Stops ----------------------------------------------------------------------------------------------------------------


def stop(way: Way, why: str, *, undo: bool = False) -> None:
    way.coming.append(channel.Stop(TASK, way.engine.epoch, why, undo=undo))


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


def test_cancel_ends_at_the_next_step_in_an_item_and_pause_does_not() -> None:
    for why, steps in (("cancelled", 0), ("paused", 1)):

        def job(ctx: Context, why: str = why) -> None:
            for _ in ctx.track(range(2)):
                stop(ways[why], why)
                assert ctx.cancelled == (why == "cancelled")
                ctx.step("s", once)

        attempt, way = engine_for(job).attempt()
        ways = {why: way}
        attempt.run()
        assert way.last.why == why
        assert len(way.of(channel.Step)) == steps


def test_pause_between_steps_of_no_track() -> None:
    calls: list[int] = []

    def job(ctx: Context) -> int:
        first = ctx.step("a", lambda: calls.append(1) or 1)
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
            except Exception:
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
