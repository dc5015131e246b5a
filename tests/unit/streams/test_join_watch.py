"""A member that its group does not take in says so, and only then."""

from __future__ import annotations

import pytest

from perdure.streams.join_watch import JoinWatch


class Clock:
    """Set by the test."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_it_is_said_now_and_then_while_it_lasts(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    watch = JoinWatch("engine", clock)
    said = []
    for now in (0, 19, 20, 21, 39, 40, 41):
        clock.now = now
        watch.look()
        said.append(len(caplog.records))
    assert said == [0, 0, 1, 1, 1, 2, 2]
    assert "engine: the group has not taken this member in for 40 s" in caplog.records[-1].getMessage()


def test_who_belongs_to_the_group_says_nothing_until_it_is_put_out(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    watch = JoinWatch("engine", clock)
    watch.inside()
    clock.now = 1_000
    watch.look()
    watch.outside()
    clock.now = 1_019
    watch.look()
    assert not caplog.records
    clock.now = 1_020
    watch.look()
    assert "for 20 s" in caplog.records[-1].getMessage()
