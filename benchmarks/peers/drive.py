"""The client's side of the workloads, the same for every peer; runs in the peer's own environment.

`python -m benchmarks.peers.<peer>.client WORKLOAD [ARGUMENT]` prints what was measured as one line of JSON.
"""

from __future__ import annotations

import json
import random
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from benchmarks.peers.work import now

WARM_S = 5.0
PAUSE_S = 0.1
"""Starts come at random within this: one right after the other would always meet the same phase of a peer's polling."""
SLOW_STEPS = 20


class Driver(ABC):
    """What a client of a peer can do."""

    @abstractmethod
    def tiny(self, count: int) -> None:
        """Submit tasks that do nothing, as fast as the client may, and return when the last result is known."""

    @abstractmethod
    def start(self) -> int:
        """Submit one task and return its result: the time of its first line, ns."""

    @abstractmethod
    def steps(self, count: int) -> tuple[int, int]:
        """Run durable steps of one task, one after another; when the first and the last began, ns."""

    @abstractmethod
    def slow(self, count: int, witness: str) -> None:
        """Submit one task of slow steps; returns once the submit is durable."""

    def close(self) -> None:  # noqa: B027 - most clients have nothing to do
        """Let go of connections."""


def main(driver: Driver) -> None:
    """Do what the command line asks for; the connection is made before the clock runs."""
    workload, *argument = sys.argv[1:]
    try:
        if workload not in ("warm", "slow"):
            driver.start()
        print(json.dumps(MEASURES[workload](driver, *argument)), flush=True)
    finally:
        driver.close()


def _warm(driver: Driver) -> None:
    """Let whatever compiles, connects or forks at first use do so."""
    end = time.monotonic() + WARM_S
    while time.monotonic() < end:
        driver.start()
        driver.tiny(20)
    driver.steps(10)


def _tiny(driver: Driver, count: str) -> float:
    """Tasks per second, from the first submit to the last result."""
    began = time.perf_counter()
    driver.tiny(int(count))
    return int(count) / (time.perf_counter() - began)


def _starts(driver: Driver, count: str) -> list[float]:
    """Milliseconds from each submit to the task's first line, one task after another."""
    times = []
    for _ in range(int(count)):
        time.sleep(random.uniform(0, PAUSE_S))
        began = now()
        times.append((driver.start() - began) / 1e6)
    return times


def _steps(driver: Driver, count: str) -> float:
    """Steps per second, from the beginning of the first to the beginning of the last."""
    first, last = driver.steps(int(count))
    return (int(count) - 1) / ((last - first) / 1e9)


def _slow(driver: Driver, witness: str) -> None:
    driver.slow(SLOW_STEPS, witness)


MEASURES: dict[str, Callable[..., Any]] = {
    "warm": _warm,
    "tiny": _tiny,
    "starts": _starts,
    "steps": _steps,
    "slow": _slow,
}
