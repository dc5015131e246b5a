"""Tasks that workers of a whole stack run. What they do they write down, one line per execution, in a witness file."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

from perdure.context import AsyncContext, Context
from perdure.tasks import Retry, task

QUEUE = "etl"
_POLL_S = 0.01
BULKY_STEPS = 10


def note(witness: str, *words: object) -> None:
    """Append a line as one write: lines of several processes never mix."""
    line = " ".join(map(str, (time.time_ns() // 1_000_000, os.getpid(), *words)))
    descriptor = os.open(witness, os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, line.encode() + b"\n")
    os.close(descriptor)


@task(queue=QUEUE, checkpoint_interval="1s")
def files(ctx: Context, witness: str, count: int, seconds: float = 0.05) -> int:
    """A step for each of `count` files inside a track; the sum of their numbers."""
    ctx.state.setdefault("total", 0)
    for number in ctx.track(range(count), name="files"):
        ctx.state["total"] += ctx.step("file", _file, witness, ctx.task_id, number, seconds)
    return int(ctx.state["total"])


def _file(witness: str, task_id: str, number: int, seconds: float) -> int:
    note(witness, "file", task_id, number)
    time.sleep(seconds)
    return number


@task(queue=QUEUE)
def saved(ctx: Context, gates: str, count: int) -> int:
    """A checkpoint whenever the test opens the next gate."""
    for version in range(1, count + 1):
        while not (Path(gates) / str(version)).exists():
            time.sleep(0.01)
        ctx.state["version"] = version
        ctx.checkpoint()
    return count


@task(queue=QUEUE)
def gated(ctx: Context, witness: str, gate: str) -> int:
    """One step that ends when the test opens the gate; the epoch that recorded it."""
    return int(ctx.step("gate", _gate, witness, ctx.task_id, ctx.epoch, gate))


def _gate(witness: str, task_id: str, epoch: int, gate: str) -> int:
    note(witness, "gate", task_id, epoch)
    while not Path(gate).exists():
        time.sleep(_POLL_S)
    return epoch


@task(queue=QUEUE)
def bulky(ctx: Context, witness: str, gate: str, data: str) -> dict[str, object]:
    """Turns a large input into a large result, in steps that are large too; the step in the middle waits for a gate."""
    size = len(data) // BULKY_STEPS
    parts = [ctx.step("part", _part, witness, gate, n, data[n * size :][:size], key=n) for n in range(BULKY_STEPS)]
    return {"epoch": ctx.epoch, "data": "".join(parts)}


def _part(witness: str, gate: str, number: int, data: str) -> str:
    note(witness, "part", number)
    while number == BULKY_STEPS // 2 and not Path(gate).exists():
        time.sleep(_POLL_S)
    return data.upper()


@task(queue=QUEUE)
def family(ctx: Context, witness: str) -> None:
    """Never ends; has a grandchild in its own group and one in a session of its own."""
    near = subprocess.Popen(["/bin/sleep", "600"])
    far = subprocess.Popen(["/bin/sleep", "600"], start_new_session=True)
    note(witness, "family", near.pid, far.pid)
    while True:
        time.sleep(1)


@task(queue=QUEUE, retry=Retry(max_attempts=3, backoff="fixed", delay="10ms", jitter=False))
def flaky(ctx: Context) -> int:
    """Fails twice, then says in which attempt it has not."""
    if ctx.attempt < 3:
        raise ConnectionError("not yet")
    return ctx.attempt


@task(queue=QUEUE)
def broken(ctx: Context) -> None:
    """Fails for good."""
    raise LookupError("no such thing")


@task(queue=QUEUE)
def talk(ctx: Context, number: int) -> int:
    """Says its number in several ways."""
    print(f"{number} print")
    print(f"{number} careful", file=sys.stderr)
    ctx.log.warning("%d logged", number)
    os.write(1, f"{number} raw\n".encode())
    print(f"{number} unfinished", end="")
    return os.getpid()


@task(queue=QUEUE)
def add(ctx: Context, a: int, b: int) -> int:
    return a + b


@task(queue=QUEUE)
async def steady(ctx: AsyncContext, gate: str, number: int, of: int) -> int:
    """Reports where it stands, a number that no other task has, until the gate is open."""
    while not Path(gate).exists():
        ctx.progress((number + 1) / (of + 1), step=f"number {number}")
        await asyncio.sleep(0.2)
    return number


@task(queue=QUEUE, checkpoint_interval="1s", retry=Retry(max_attempts=3, backoff="fixed", delay="20ms", jitter=False))
def walk(ctx: Context, witness: str, count: int, seconds: float, stumbles: int = 0) -> int:
    """A step for each of `count` items; the sum of their numbers. Stumbles half way in its first `stumbles` attempts."""

    def item(number: int) -> int:
        note(witness, "item", ctx.task_id, ctx.epoch, number)
        time.sleep(seconds)
        return number

    ctx.state.setdefault("total", 0)
    for number in ctx.track(range(count), name="items"):
        ctx.state["total"] += ctx.step("item", item, number)
        if number == count // 2 and ctx.attempt <= stumbles:
            raise ConnectionError(f"stumbled in attempt {ctx.attempt}")
    return int(ctx.state["total"])


@task(queue=QUEUE, checkpoint_interval="1s", retry=Retry(max_attempts=3, backoff="fixed", delay="20ms", jitter=False))
async def drift(ctx: AsyncContext, witness: str, count: int, seconds: float, stumbles: int = 0) -> int:
    """As `walk`, in a process that it shares with others."""

    async def item(number: int) -> int:
        note(witness, "item", ctx.task_id, ctx.epoch, number)
        await asyncio.sleep(seconds)
        return number

    ctx.state.setdefault("total", 0)
    async for number in ctx.track(range(count), name="items"):
        ctx.state["total"] += await ctx.step("item", item, number)
        if number == count // 2 and ctx.attempt <= stumbles:
            raise ConnectionError(f"stumbled in attempt {ctx.attempt}")
    return int(ctx.state["total"])
