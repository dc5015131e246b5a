"""Durations as people write them: "90s", "5 minutes", "1h30m", a timedelta, or a number of seconds."""

from __future__ import annotations

import datetime as dt
import re

from perdure.schemas.errors import InvalidRequest

Duration = str | float | int | dt.timedelta

_UNITS_MS = {
    "ms": 1, "millisecond": 1, "milliseconds": 1,
    "s": 1_000, "sec": 1_000, "secs": 1_000, "second": 1_000, "seconds": 1_000,
    "m": 60_000, "min": 60_000, "mins": 60_000, "minute": 60_000, "minutes": 60_000,
    "h": 3_600_000, "hour": 3_600_000, "hours": 3_600_000,
    "d": 86_400_000, "day": 86_400_000, "days": 86_400_000,
    "w": 604_800_000, "week": 604_800_000, "weeks": 604_800_000,
}  # fmt: skip
_PART = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*,?")
MAX_MS = 100 * 365 * 86_400_000
TEXT_LENGTH_MAX = 100


def to_ms(value: Duration, *, field: str, positive: bool = True) -> int:
    """Milliseconds. Plain numbers are seconds. Raises `InvalidRequest` naming `field`."""
    ms = _ms(value, field)
    if not 0 <= ms <= MAX_MS or (positive and ms == 0):
        raise InvalidRequest(f"{field}: {value!r} is no usable duration (1 ms to 100 years)", field=field)
    return ms


def _ms(value: Duration, field: str) -> int:
    if isinstance(value, dt.timedelta):
        return round(value.total_seconds() * 1000)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not 0 <= value <= MAX_MS:  # false for NaN too
            raise InvalidRequest(f"{field}: no number of seconds between 1 ms and 100 years", field=field)
        return round(value * 1000)
    if not isinstance(value, str) or len(value) > TEXT_LENGTH_MAX:
        raise InvalidRequest(f"{field}: {value!r:.100} is no duration; write '90s', '5 minutes' or '6h'", field=field)
    text = value.strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return round(float(text) * 1000)
    total, at = 0.0, 0
    while at < len(text):
        part = _PART.match(text, at)
        if part is None or part[2] not in _UNITS_MS:
            raise InvalidRequest(f"{field}: {value!r} is no duration; write '90s', '5 minutes' or '6h'", field=field)
        total += float(part[1]) * _UNITS_MS[part[2]]
        at = part.end()
    if at == 0:
        raise InvalidRequest(f"{field}: an empty text is no duration", field=field)
    return round(total)


def to_text(ms: int) -> str:
    """A short text for people: 5h 3m, 12.3s, 40ms."""
    if ms < 1000:
        return f"{ms}ms"
    if ms < 59_950:  # from here on it would be rounded to 60s
        return f"{ms / 1000:.1f}s".replace(".0s", "s")
    minutes, sec = divmod(round(ms / 1000), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    parts = [(days, "d"), (hour, "h"), (minute, "m"), (sec, "s")]
    while parts[0][0] == 0:
        parts.pop(0)
    return " ".join(f"{n}{unit}" for n, unit in parts[:2] if n or unit != "s")
