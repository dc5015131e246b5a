"""DBOS's workflows and steps; as a program, the process that works the queue off."""

from __future__ import annotations

import os
import threading

from dbos import DBOS

from benchmarks.peers import work

QUEUE = "bench"


def configure() -> None:
    """Make the process's DBOS; `DBOS.launch` starts it."""
    DBOS(config={
        "name": "bench", "system_database_url": os.environ["PEER_POSTGRES"], "executor_id": "bench",
        "application_version": "1", "log_level": "WARNING",
    })  # fmt: skip


@DBOS.workflow()
def tiny() -> None:
    """Nothing."""


@DBOS.workflow()
def first_line() -> int:
    """When its first line ran."""
    return work.now()


@DBOS.step()
def _step() -> int:
    return work.now()


@DBOS.workflow()
def steps(count: int) -> list[int]:
    """Steps one after another; when the first and the last began."""
    times = [_step() for _ in range(count)]
    return [times[0], times[-1]]


@DBOS.step()
def _slow_step(number: int, witness: str) -> int:
    return work.slow_step(number, witness)


@DBOS.workflow()
def slow(count: int, witness: str) -> None:
    """Slow steps, one after another."""
    for number in range(count):
        _slow_step(number, witness)


if __name__ == "__main__":
    configure()
    DBOS.launch()
    DBOS.register_queue(QUEUE, polling_interval_sec=0.05)
    print("ready", flush=True)
    threading.Event().wait()
