"""Tasks that the worker tests run. Each appends to a witness file what it did, one line per execution."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from perdure.context import AsyncContext, Context
from perdure.tasks import task

QUEUE = "etl"


def witness(folder: str, text: str) -> None:
    """Append a line at once, as one write."""
    with (Path(folder) / "witness").open("a") as file:
        file.write(text + "\n")


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


@task(queue=QUEUE)
def add(ctx: Context, a: int, b: int) -> int:
    return a + b


@task(queue=QUEUE)
def talk(ctx: Context, number: int) -> int:
    """Says its number in every way there is."""
    print(f"{number} print")
    print(f"{number} careful", file=sys.stderr)
    logging.getLogger("app").warning("%d logged", number)
    os.write(1, f"{number} raw\n".encode())
    subprocess.run(["/bin/sh", "-c", f"echo {number} echo"], check=True)
    print(f"{number} unfinished", end="")
    return os.getpid()


@task(queue=QUEUE)
def flood(ctx: Context, lines: int) -> None:
    for i in range(lines):
        print("line", i)


@task(queue=QUEUE)
def late(ctx: Context, number: int) -> None:
    """Leaves a thread behind that goes on printing."""

    def gossip() -> None:
        for _ in range(500):
            print(f"{number} late", flush=True)
            time.sleep(0.001)

    threading.Thread(target=gossip, daemon=True).start()
    print(f"{number} print")


@task(queue=QUEUE)
def crash(ctx: Context, folder: str, exit_code: int | None = None) -> None:
    """Dies, without a word, in its first three attempts; the second time by a signal."""
    witness(folder, f"crash {ctx.epoch}")
    if ctx.epoch < 3 or exit_code is not None:
        print("going", flush=True)
        if ctx.epoch == 2 and exit_code is None:
            os.kill(os.getpid(), signal.SIGSEGV)
        os._exit(exit_code or 3)


@task(queue=QUEUE)
def fail(ctx: Context) -> None:
    raise LookupError("no such thing")


@task(queue=QUEUE)
def files(ctx: Context, folder: str, count: int) -> int:
    """A step per file; pausable between them."""
    ctx.state.setdefault("total", 0)
    for number in ctx.track(range(count)):
        ctx.state["total"] += ctx.step("file", _file, folder, number)
    return int(ctx.state["total"])


def _file(folder: str, number: int) -> int:
    witness(folder, f"file {number}")
    time.sleep(0.02)
    return number


@task(queue=QUEUE)
def pages(ctx: Context, folder: str, count: int, size: int) -> int:
    """Many large steps, then a crash in the first attempt: the second one needs several pages."""
    total = sum(len(ctx.step("page", _page, folder, number, size)) for number in range(count))
    if ctx.epoch == 1:
        os._exit(1)
    return total


def _page(folder: str, number: int, size: int) -> str:
    witness(folder, f"page {number}")
    return "x" * size


@task(queue=QUEUE, cancel_grace="300ms")
def stubborn(ctx: Context, folder: str, ignore: bool = False) -> None:
    """Never reaches a boundary; with a grandchild in a session of its own."""
    if ignore:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    grandchild = subprocess.Popen(["/bin/sleep", "600"], start_new_session=True)
    witness(folder, f"pids {os.getpid()} {grandchild.pid}")
    while True:
        time.sleep(1)


@task(queue=QUEUE)
def together(ctx: Context, folder: str, number: int) -> int:
    """Runs until the test has seen it running."""
    (Path(folder) / f"here-{number}").touch()
    _wait_for(Path(folder) / "go")
    return number


@task(queue=QUEUE)
async def poll(ctx: AsyncContext, number: int) -> int:
    print(f"{number} polls")
    await asyncio.sleep(0.01)
    return number


@task(queue=QUEUE)
async def wait(ctx: AsyncContext, folder: str, number: int) -> Any:
    (Path(folder) / f"here-{number}").touch()
    while not (Path(folder) / "go").exists():
        await asyncio.sleep(0.01)
    return number


@task(queue=QUEUE, cancel_grace="300ms")
async def hog(ctx: AsyncContext, folder: str) -> None:
    """Never gives the event loop back."""
    witness(folder, "hog")
    while True:
        time.sleep(1)
