"""Perdure's tasks."""

from __future__ import annotations

from benchmarks.peers import work
from perdure import Context, task


@task(queue="bench")
async def tiny(ctx: Context) -> None:
    """Nothing."""


@task(queue="bench")
def first_line(ctx: Context) -> int:  # noqa: ARG001
    """When its first line ran."""
    return work.now()


@task(queue="bench")
def steps(ctx: Context, count: int) -> list[int]:
    """Steps one after another; when the first and the last began."""
    times = [ctx.step("step", work.now) for _ in range(count)]
    return [times[0], times[-1]]


@task(queue="bench")
def slow(ctx: Context, count: int, witness: str) -> None:
    """Slow steps, one after another."""
    for number in range(count):
        ctx.step("step", work.slow_step, number, witness)
