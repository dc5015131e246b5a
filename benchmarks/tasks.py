"""Tasks that the benchmarks run."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from perdure import Context, task
from perdure.context import AsyncContext


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
def held(ctx: Context, gate: str) -> None:  # noqa: ARG001 - every task has a context
    """Waits for the gate to open."""
    while not Path(gate).exists():
        time.sleep(1.0)


@task(queue="bench")
async def held_async(ctx: AsyncContext, gate: str) -> None:  # noqa: ARG001 - every task has a context
    """Waits for the gate to open."""
    while not _open(gate):
        await asyncio.sleep(1.0)


def _open(gate: str) -> bool:
    return Path(gate).exists()


@task(queue="bench")
def stamps(ctx: Context, count: int, pause_s: float) -> None:
    """Progress that says when it was reported, ns since 1970."""
    for i in range(count):
        ctx.progress((i + 1) / (count + 1), step=str(time.time_ns()))
        time.sleep(pause_s)


@task(queue="bench", checkpoint_interval="1h")
def saves(ctx: Context, megabytes: int, count: int) -> list[float]:
    """Seconds for which a checkpoint of so much state holds the task up."""
    line = "x" * 999_997  # a million bytes as JSON, with its comma
    ctx.state["lines"] = [line for _ in range(megabytes)]
    took = []
    for i in range(count):
        ctx.state["count"] = i
        began = time.perf_counter()
        ctx.checkpoint()
        took.append(time.perf_counter() - began)
    return took


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
