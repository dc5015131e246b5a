"""Restate's handlers; served by hypercorn."""

from __future__ import annotations

import restate

from benchmarks.peers import work

bench = restate.Service("Bench")


@bench.handler()
async def tiny(ctx: restate.Context) -> None:
    """Nothing."""


@bench.handler()
async def first_line(ctx: restate.Context) -> int:  # noqa: ARG001
    """When its first line ran."""
    return work.now()


@bench.handler()
async def steps(ctx: restate.Context, count: int) -> list[int]:
    """Steps one after another; when the first and the last began."""
    times = [await ctx.run_typed("step", work.now) for _ in range(count)]
    return [times[0], times[-1]]


@bench.handler()
async def slow(ctx: restate.Context, asked: dict[str, object]) -> None:
    """Slow steps, one after another."""
    for number in range(int(str(asked["count"]))):
        await ctx.run_typed("step", work.slow_step, number=number, witness=str(asked["witness"]))


app = restate.app([bench])
