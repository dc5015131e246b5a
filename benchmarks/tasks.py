"""Tasks that the benchmarks run."""

from __future__ import annotations

import time
from typing import Any

from perdure import Context, task


@task(queue="bench")
def first_line(ctx: Context) -> int:  # noqa: ARG001 - every task has a context
    """When its first line ran, ns since 1970."""
    return time.time_ns()


@task(queue="bench")
async def tiny(ctx: Context) -> None:
    """Nothing."""


@task(queue="bench")
def steps(ctx: Context, count: int) -> float:
    """Sequential steps per second, as the task itself sees it."""
    began = time.perf_counter()
    for i in range(count):
        ctx.step("step", _nothing, i)
    return count / (time.perf_counter() - began)


@task(queue="bench")
def slow_steps(ctx: Context, count: int, witness: str) -> None:
    """Steps of 50 ms, each with a line in the witness when it begins."""
    for i in range(count):
        ctx.step("step", _witnessed, i, witness)


def _nothing(i: int) -> int:
    return i


def _witnessed(i: int, witness: str) -> Any:
    import os

    with open(witness, "a") as out:
        out.write(f"{time.time_ns()} {os.getpid()} {i}\n")
    time.sleep(0.05)
    return i
