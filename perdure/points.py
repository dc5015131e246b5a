"""Points of a namespace's past, as people write them: a time, or offsets of its partitions."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from perdure.schemas.durations import to_ms
from perdure.schemas.errors import InvalidRequest
from perdure.streams.past import Point

_MS = re.compile(r"\d{12,14}")
_OFFSET = re.compile(r"(?:(?:task-)?(commands|events)/)?(\d{1,6}):(\d{1,18})")
_HINT = (
    "write '2026-11-21 14:00', '2h ago', ms since 1970, or PARTITION:OFFSET of task-commands or, as events/P:O, of "
    "task-events"
)


@dataclass(frozen=True)
class Place:
    """A point of every partition (a time), or of some."""

    at: int | None = None
    partitions: Mapping[int, Point] = field(default_factory=dict)

    def of(self, partition: int) -> Point | None:
        """The point of one partition; None if only others are named."""
        return self.partitions.get(partition) if self.at is None else Point(at=self.at)


def parse_place(text: str, now: int, partitions: int, field: str) -> Place:
    """What a person means. `now`: this machine's clock, ms. Raises `InvalidRequest` naming `field`."""
    parts = [_OFFSET.fullmatch(part.strip()) for part in text.split(",")]
    if all(parts):
        named: dict[int, Point] = {}
        for topic, partition, offset in (part.groups() for part in parts if part):
            if int(partition) >= partitions or int(partition) in named:
                what = "is named twice" if int(partition) in named else f"is not one of 0 to {partitions - 1}"
                raise InvalidRequest(f"{field}: partition {partition} {what}", field=field)
            by_event = topic == "events"
            named[int(partition)] = Point(event=int(offset)) if by_event else Point(command=int(offset))
        return Place(partitions=named)
    at = parse_time(text, now, field)
    if at > now:
        raise InvalidRequest(f"{field}: {text!r} has not come yet by this machine's clock", field=field)
    return Place(at=at)


def parse_time(text: str, now: int, field: str) -> int:
    """A time in ms: a date (of this machine's zone, if it names none), an age such as '2h ago', or ms since 1970."""
    text = text.strip()
    if _MS.fullmatch(text):
        return int(text)
    if text == "now":
        return now
    try:
        if text.endswith(" ago"):
            return now - to_ms(text.removesuffix(" ago"), field=field)
        return round(dt.datetime.fromisoformat(text).astimezone().timestamp() * 1000)
    except (ValueError, OverflowError, OSError, InvalidRequest) as error:
        raise InvalidRequest(f"{field}: {text!r} is no point in time; {_HINT}", field=field) from error
