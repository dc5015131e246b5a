"""A restore says how far it is, and does not stand still for ever."""

from __future__ import annotations

import pytest

from perdure.streams.restore_watch import RestoreWatch


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_is_said_while_it_lasts(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    watch = RestoreWatch("engine-changelog/3", 1_000, 101_000, clock)
    with caplog.at_level("INFO", "perdure.restore"):
        for now, position in ((1.0, 5_000), (4.0, 11_000), (10.0, 41_000), (12.0, 51_000), (20.0, 101_000)):
            clock.now = now
            watch.advanced(position)
    assert caplog.messages == [
        "engine-changelog/3: restored 40,000 of 100,000 records, 4,000 a second, about 15 s to go",
        "engine-changelog/3: restored 100,000 of 100,000 records, 5,000 a second, about 0 s to go",
    ]


def test_three_minutes_without_a_record_are_too_long() -> None:
    clock = Clock()
    watch = RestoreWatch("engine-changelog/3", 0, 100, clock)
    clock.now = 179.0
    assert not watch.is_stuck()
    watch.advanced(40)
    clock.now += 179.0
    assert not watch.is_stuck(), "a record counts"
    watch.excuse()
    clock.now += 179.0
    assert not watch.is_stuck(), "a broker that is away is no hanging transaction"
    clock.now += 1.0
    assert watch.is_stuck()
    assert "engine-changelog/3: nothing could be read for 180 s at offset 40, 60 before" in watch.why_stuck(100)
    assert "a transaction of another program" in watch.why_stuck(100)
    assert "The topic ends at 70 now" in watch.why_stuck(70)
