"""RQ's jobs: plain functions."""

from __future__ import annotations

from benchmarks.peers import work


def tiny() -> None:
    """Nothing."""


def first_line() -> int:
    """When its first line ran."""
    return work.now()


def slow_step(number: int, witness: str) -> int:
    """A link of a slow chain."""
    return work.slow_step(number, witness)
