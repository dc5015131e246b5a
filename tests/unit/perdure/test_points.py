"""Points of the past, as people write them."""

from __future__ import annotations

import datetime as dt

import pytest

from perdure.points import Place, parse_place
from perdure.schemas.errors import InvalidRequest
from perdure.streams.past import Point

NOW = 1_800_000_000_000
LOCAL = dt.datetime(2026, 11, 21, 14, 0).astimezone()

TIMES = [
    ("1700000000000", 1_700_000_000_000),
    ("now", NOW),
    ("2h ago", NOW - 7_200_000),
    ("1 day 30 minutes ago", NOW - 88_200_000),
    ("2026-11-21T14:00:00Z", 1_795_269_600_000),
    ("2026-11-21 14:00:00.250+01:00", 1_795_266_000_250),
    ("2026-11-21 14:00", round(LOCAL.timestamp() * 1000)),  # of this machine's zone
    ("2026-11-21", round(LOCAL.replace(hour=0).timestamp() * 1000)),
]


@pytest.mark.parametrize(("text", "at"), TIMES)
def test_a_time_is_a_point_of_every_partition(text: str, at: int) -> None:
    place = parse_place(text, NOW, 4, "when")
    assert place == Place(at=at)
    assert place.of(3) == Point(at=at)


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("3:120", {3: Point(command=120)}),
        ("commands/0:5, task-events/1:7", {0: Point(command=5), 1: Point(event=7)}),
        ("events/2:0", {2: Point(event=0)}),
    ],
)
def test_offsets_are_points_of_the_partitions_they_name(text: str, points: dict[int, Point]) -> None:
    place = parse_place(text, NOW, 4, "when")
    assert {p: place.of(p) for p in range(4) if place.of(p)} == points


REFUSED = ["", "yesterday", "12:3:4", "4:1", "1:2,1:3", "1:2,2h ago", "-1h ago", "ago", "1700000000", "2400-01-01",
           "2026-13-01", "events/1"]  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_anything_else_is_refused_with_the_field(text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_place(text, NOW, 4, "when")
    assert refused.value.field == "when"
