"""Steps: identity, records, pages, mismatch, failure, at most once."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import logging
import operator
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from perdure import channel
from perdure.context import Context
from perdure.schemas.errors import DuplicateStep, NotSerializable, StepError
from tests.unit.perdure.attempting import TASK, Calls, engine_for, failure_of, once, result_of


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


@pytest.mark.parametrize(
    ("fn", "args", "name"),
    [
        (str.upper, ("x",), "builtins.str.upper"),
        ((1).__add__, (2,), "builtins.int.__add__"),
        (operator.itemgetter(0), ([1],), "operator.itemgetter"),
        (once, (1,), f"{once.__module__}.once"),
    ],
)
def test_whatever_can_be_called_can_be_a_step(fn: Any, args: tuple[Any, ...], name: str) -> None:
    way = engine_for(lambda ctx: ctx.step("s", fn, *args), name="job").run()
    assert result_of(way) == fn(*args)
    assert way.of(channel.Step)[0].function == name


@pytest.mark.parametrize("name", ["", None, 5, ["a"], "\ud800", "x" * 1025])
def test_what_is_no_name_is_refused_for_good(name: Any) -> None:
    failed = failure_of(engine_for(lambda ctx: ctx.step(name, once), name="job").run())
    assert failed.final
    assert failed.error_types[0] == f"{StepError.__module__}.StepError"


@pytest.mark.parametrize("key", [object(), (once, 1), {"a", "b"}, frozenset("ab"), ""])
def test_a_key_that_would_be_another_in_the_next_process_is_refused_for_good(key: Any) -> None:
    failed = failure_of(engine_for(lambda ctx: ctx.step("s", once, key=key), name="job").run())
    assert failed.final
    assert failed.error_types[0] == f"{StepError.__module__}.StepError"


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


def test_a_track_that_has_ended_is_left_even_if_it_is_kept() -> None:
    def job(ctx: Context) -> None:
        kept = ctx.track(range(2), name="kept")
        for _ in kept:
            ctx.step("in", once)
        ctx.step("after", once)
        assert list(kept) == []

    steps = engine_for(job).run().of(channel.Step)
    assert [step.step_id for step in steps] == ["kept@000000000000/in", "kept@000000000001/in", "/after"]


def test_a_recorded_step_is_not_called_again() -> None:
    calls = Calls()

    def job(ctx: Context) -> Any:
        got = ctx.step("s", calls, "s")
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


def test_a_step_that_fails_again_and_again_waits_each_time_until_that_is_recorded() -> None:
    """While the broker is away the loop of an author, who tries until it works, is not to fill the memory."""

    def job(ctx: Context) -> None:
        for _ in range(100):
            with contextlib.suppress(ZeroDivisionError):
                ctx.step("s", lambda: 1 / 0)

    engine = engine_for(job)
    engine.acknowledges = False
    attempt, way = engine.attempt()

    class Outage(BaseException): ...

    def wait() -> None:
        raise Outage

    way.wait = wait  # type: ignore[method-assign]
    attempt.run()
    assert len(way.of(channel.Step)) == 1


def test_a_failed_step_is_reported_and_runs_again() -> None:
    tries: list[int] = []

    def flaky() -> int:
        tries.append(1)
        if len(tries) == 1:
            raise LookupError("first")
        return 7

    def job(ctx: Context) -> int:
        return int(ctx.step("s", flaky))

    engine = engine_for(job)
    way = engine.run()
    (step,) = way.of(channel.Step)
    assert (step.result, step.error_message, step.error_types[0]) == (None, "first", "builtins.LookupError")
    assert "raise LookupError" in step.error_traceback
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


@pytest.mark.parametrize(
    ("second", "differs"),
    [
        ((once, 1), False),
        ((once, 2), True),
        ((str, 1), True),
        ((partial(once), 1), False),
        ((partial(once, 1),), False),
        ((partial(once, 2),), True),
    ],
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
        assert result_of(way) == second[0](*second[1:])
        assert len(way.of(channel.Step)) == 1
    else:
        assert result_of(way) == 1
        assert way.of(channel.Step) == []
    assert bool(caplog.records) == (differs and policy != "fail")


@pytest.mark.parametrize("policy", ["warn", "fail", "rerun"])
def test_another_code_version_is_a_mismatch_by_policy_and_else_told_once(
    caplog: pytest.LogCaptureFixture, policy: str
) -> None:
    def job(ctx: Context) -> None:
        for i in range(5):
            ctx.step("s", once, key=i)
        assert ctx.epoch > 1

    engine = engine_for(job, step_mismatch=policy)
    engine.run()
    engine.type = dataclasses.replace(engine.type, code_version="v2")
    with caplog.at_level(logging.WARNING):
        way = engine.run()
    if policy == "fail":
        assert failure_of(way).error_types[0].endswith("StepMismatch")
        assert "code version v1, this is v2" in failure_of(way).message
    else:
        result_of(way)
        assert len(way.of(channel.Step)) == (5 if policy == "rerun" else 0)
        assert len(caplog.records) == (5 if policy == "rerun" else 1)
        assert "recorded by code version v1, this is v2" in caplog.records[0].message


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
    calls = Calls()

    def job(ctx: Context) -> int:
        total: int = sum(ctx.step("s", calls, i, key=f"{i:05d}") for i in range(5_500))
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


def test_pages_are_asked_for_as_they_are_needed() -> None:
    def job(ctx: Context) -> None:
        for i in range(9):
            ctx.step("s", once, i, key=i)
            if ctx.epoch == 2 and i == 4:
                break
        assert ctx.epoch > 1

    engine = engine_for(job, page_size=3)
    engine.run()
    assert len(engine.run().of(channel.WantSteps)) == 1


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
