"""Attempts of async tasks: the same rules, awaited."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from perdure import channel
from perdure.context import Context
from perdure.schemas.errors import DuplicateStep
from tests.unit.perdure.attempting import TASK, Way, engine_for, result_of, run_async


async def once(value: Any = None) -> Any:
    await asyncio.sleep(0)
    return value


def test_steps_tracks_checkpoints_and_state() -> None:
    done: list[int] = []

    async def later(n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i

    async def job(ctx: Context, n: int) -> int:
        first = await ctx.step("async", once, 1)
        second = await ctx.step("plain", lambda: 2)
        ctx.state.setdefault("sum", first + second)
        items: Any = later(n) if n % 2 else range(n)
        async for i in ctx.track(items):
            done.append(i)
            ctx.state["sum"] += await ctx.step("s", once, i)
            engine.clock.now += 1_000
            if ctx.epoch == 1 and i == 3:
                raise ValueError
        await ctx.checkpoint()
        return int(ctx.state["sum"])

    for n in (5, 6):
        done.clear()
        engine = engine_for(job, checkpoint_interval="2s")
        engine.run({"n": n})
        assert engine.checkpoint is not None
        assert engine.checkpoint.positions == {"track": 2}
        assert result_of(engine.run({"n": n})) == 3 + sum(range(n))
        assert done == [0, 1, 2, 3, 2, 3, *range(4, n)]


def test_two_equal_names_under_gather_are_a_duplicate() -> None:
    async def job(ctx: Context) -> None:
        await asyncio.gather(ctx.step("s", once), ctx.step("s", once))

    way = engine_for(job).run()
    assert isinstance(way.last, channel.Failed)
    assert way.last.final
    assert way.last.error_types[0].endswith("DuplicateStep")


def test_two_equal_names_in_gathered_sections_are_a_duplicate_whoever_comes_first() -> None:
    async def section(ctx: Context, pause: int) -> None:
        for _ in range(pause):
            await asyncio.sleep(0)
        await ctx.step("s", once)

    async def job(ctx: Context) -> str:
        with pytest.raises(DuplicateStep):
            await asyncio.gather(section(ctx, 0), section(ctx, 500))
        return "caught"

    way = engine_for(job).run()
    assert way.last.final, "catching it does not help"


def test_keys_and_order_tell_concurrent_steps_apart() -> None:
    async def job(ctx: Context) -> Any:
        got = await asyncio.gather(*(ctx.step("s", once, i, key=i) for i in range(50)))
        got.append(await ctx.step("t", once, 1))
        got.append(await asyncio.wait_for(ctx.step("t", once, 2), 60))
        assert ctx.epoch > 1
        return got

    engine = engine_for(job, page_size=7)
    assert len(engine.run().of(channel.Step)) == 52
    way = engine.run()
    assert result_of(way) == [*range(50), 1, 2]
    assert way.of(channel.Step) == []


def test_gathered_sections_inherit_the_item_they_were_started_in() -> None:
    async def job(ctx: Context) -> None:
        async for _ in ctx.track(range(2)):
            await asyncio.gather(*(asyncio.create_task(ctx.step("s", once, i, key=i)) for i in range(2)))
            await asyncio.to_thread(ctx.milestone, f"thread {ctx.idempotency_key}")

    way = engine_for(job).run()
    assert sorted(step.step_id for step in way.of(channel.Step)) == [
        f"track@{n:012d}/s[{i}]" for n in range(2) for i in range(2)
    ]
    assert len(way.of(channel.Milestone)) == 2


def test_a_loop_left_by_break_is_left() -> None:
    async def job(ctx: Context) -> None:
        async for _ in ctx.track(range(3)):
            break
        await ctx.step("after", once)

    assert engine_for(job).run().of(channel.Step)[0].step_id == "/after"


def test_a_plain_for_loop_is_told_what_to_write() -> None:
    async def job(ctx: Context) -> None:
        for _ in ctx.track([1]):
            pass

    assert "async for" in engine_for(job).run().last.message


@pytest.mark.parametrize("why", ["paused", "drained", "cancelled"])
def test_stops_at_an_item(why: str) -> None:
    cleaned: list[str] = []

    async def clean() -> None:
        await asyncio.sleep(0)
        cleaned.append("async")

    async def job(ctx: Context) -> None:
        ctx.defer(cleaned.append, "plain")
        ctx.defer(clean)
        async for i in ctx.track(range(3)):
            if i == 1:
                attempt.receive(channel.Stop(TASK, 1, why))
            ctx.state["i"] = i

    engine = engine_for(job)
    attempt, way = engine.attempt()
    asyncio.run(run_async(attempt, way))
    assert way.last.why == why
    assert len(way.of(channel.Checkpoint)) == (why != "cancelled")
    assert cleaned == ["async", "plain"]


def test_a_stop_inside_a_task_group_is_a_stop() -> None:
    async def section(ctx: Context, name: str) -> None:
        await asyncio.sleep(0)
        await ctx.step(name, once)

    async def job(ctx: Context) -> None:
        attempt.receive(channel.Stop(TASK, 1, "cancelled"))
        async with asyncio.TaskGroup() as group:
            group.create_task(section(ctx, "a"))
            group.create_task(section(ctx, "b"))

    attempt, way = engine_for(job).attempt()
    asyncio.run(run_async(attempt, way))
    assert isinstance(way.last, channel.Stopped), way.last


def test_cancelling_the_asyncio_task_of_a_stopped_attempt_stops_it() -> None:
    async def job(ctx: Context) -> None:
        await asyncio.Event().wait()

    for told in (True, False):
        attempt, way = engine_for(job).attempt()

        async def scene(attempt: Any = attempt, way: Way = way, told: bool = told) -> None:
            running = asyncio.create_task(run_async(attempt, way))
            await asyncio.sleep(0.01)
            if told:
                attempt.receive(channel.Stop(TASK, 1, "timed_out"))
            running.cancel()
            await running

        asyncio.run(scene())
        assert isinstance(way.last, channel.Stopped if told else channel.Failed)


def test_state_is_read_only_inside_a_step_only_for_its_own_section() -> None:
    async def job(ctx: Context) -> Any:
        inside = asyncio.Event()
        assigned = asyncio.Event()

        async def slow() -> None:
            inside.set()
            await assigned.wait()

        async def other() -> None:
            await inside.wait()
            ctx.state["a"] = 1
            assigned.set()

        await asyncio.gather(ctx.step("slow", slow), other())
        return ctx.state

    assert result_of(engine_for(job).run()) == {"a": 1}


def test_a_timeout_around_a_step_leaves_its_identity_free_again() -> None:
    async def job(ctx: Context) -> str:
        if sys.version_info < (3, 12):
            ctx.log.info("wait_for makes a task of its own here, and the identity is taken before")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ctx.step("s", asyncio.Event().wait), 0.01)
        return str(await ctx.step("s", once, "second"))

    way = engine_for(job).run()
    assert result_of(way) == "second"
    assert [step.step_id for step in way.of(channel.Step)] == ["/s#2"]
