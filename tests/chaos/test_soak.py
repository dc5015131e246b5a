"""What a soak takes for growth."""

from __future__ import annotations

import os

import pytest

from tests.chaos.soak import Look, grown, look_at


def looks(memory: list[float], pid: int = 1) -> list[Look]:
    return [Look(pid, {"memory, MB": m, "open files": 50, "threads": 9}) for m in memory]


@pytest.mark.parametrize(
    ("memory", "found"),
    [
        ([100.0] * 40, []),
        ([30.0] * 10 + [100.0] * 30, []),  # what a beginning needs is no growth
        ([100.0 + n for n in range(400)], ["p: memory, MB rose from 250 to 450"]),
        ([100.0, 119.0] * 20, []),
        ([1_000.0] * 30 + [1_099.0] * 10, []),
        ([1_000.0] * 30 + [1_101.0] * 10, ["p: memory, MB rose from 1,000 to 1,101"]),
    ],
)
def test_growth_is_told_from_coming_and_going(memory: list[float], found: list[str]) -> None:
    assert list(grown("p", looks(memory))) == found


def test_only_a_processs_last_life_counts() -> None:
    assert list(grown("p", [*looks([10.0] * 40), *looks([500.0] * 40, pid=2)])) == []
    assert list(grown("p", [*looks([10.0] * 40), *looks([500.0] * 5, pid=2)])) == [
        "p: it lived for too short a time to tell"
    ]
    assert list(grown("p", [])) == ["p: it lived for too short a time to tell"]


def test_a_process_can_be_looked_at() -> None:
    look = look_at(os.getpid())
    assert look.pid == os.getpid()
    assert all(value > 0 for value in look.figures.values())
