"""Durations as people write them, and as they read them."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure.schemas.durations import MAX_MS, to_ms, to_text
from perdure.schemas.errors import InvalidRequest

S, M, H, D = 1_000, 60_000, 3_600_000, 86_400_000


@pytest.mark.parametrize(
    ("written", "ms"),
    [
        ("90s", 90 * S),
        ("5 minutes", 5 * M),
        ("5m", 5 * M),  # minutes, not months
        ("5min", 5 * M),
        ("1 minute", M),
        ("6h", 6 * H),
        ("6 Hours", 6 * H),
        ("1h30m", H + 30 * M),
        ("1h 30m", H + 30 * M),
        ("1 hour, 30 minutes", H + 30 * M),
        ("2d", 2 * D),
        ("1 week", 7 * D),
        ("250ms", 250),
        ("1 millisecond", 1),
        ("0.5s", 500),
        ("1.5h", 90 * M),
        ("  10 s  ", 10 * S),
        ("10", 10 * S),  # a bare number is seconds, in JSON and in text
        ("1.5", 1_500),
        (10, 10 * S),
        (0.25, 250),
        (1e-3, 1),
        (dt.timedelta(hours=6), 6 * H),
        (dt.timedelta(microseconds=1_500), 2),
        ("36500d", MAX_MS),
        (100 * 365 * 86_400, MAX_MS),
    ],
)
def test_durations(written: Any, ms: int) -> None:
    assert to_ms(written, field="timeout") == ms


@pytest.mark.parametrize(
    "written",
    [
        "",
        "  ",
        "soon",
        "5 parsecs",
        "5 mm",
        "h",
        "-5s",
        "5s-",
        "5s 7",
        "5,5s",
        "1e3s",
        ".5s",
        "5.s",
        "5 s x",
        "--5",
        "s5",
        "PT5S",
        "1:30",
        "0",
        "0s",
        "0.0001s",
        "36501d",
        "9" * 400,
        "9" * 99,
        "9" * 90 + "h",
        "5s " * 1_000,
        -1,
        0,
        0.0001,
        float("nan"),
        float("inf"),
        float("-inf"),
        10**400,
        -(10**400),
        10**5_000,
        3_153_600_001,
        dt.timedelta(0),
        dt.timedelta(days=-1),
        dt.timedelta.max,
        True,
        None,
        b"5s",
        ["5s"],
        {"s": 5},
    ],
    ids=lambda w: f"{type(w).__name__} {str(w)[:20] if not isinstance(w, int) else hex(w)[:12]}",
)
def test_what_is_no_duration_is_refused_by_the_fields_name(written: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^retry\.delay: ") as caught:
        to_ms(written, field="retry.delay")
    assert caught.value.field == "retry.delay"
    assert len(str(caught.value)) < 300


def test_zero_is_a_duration_where_it_may_be() -> None:
    assert to_ms("0s", field="delay", positive=False) == 0
    assert to_ms(0, field="delay", positive=False) == 0
    with pytest.raises(InvalidRequest):
        to_ms(-0.001, field="delay", positive=False)


@given(st.text(max_size=20) | st.text(alphabet="0123456789.smhdw ,", max_size=20) | st.floats() | st.integers())
def test_anything_is_a_duration_in_range_or_refused(written: Any) -> None:
    try:
        ms = to_ms(written, field="timeout")
    except InvalidRequest:
        return
    assert 0 < ms <= MAX_MS


@given(st.timedeltas(dt.timedelta(milliseconds=1), dt.timedelta(days=36_499)))
def test_a_timedelta_is_rounded_to_the_millisecond(written: dt.timedelta) -> None:
    assert abs(to_ms(written, field="timeout") - written / dt.timedelta(milliseconds=1)) <= 0.5


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "0ms"),
        (40, "40ms"),
        (999, "999ms"),
        (1_000, "1s"),
        (12_300, "12.3s"),
        (59_900, "59.9s"),
        (59_960, "1m"),
        (59_999, "1m"),
        (60_000, "1m"),
        (61_000, "1m 1s"),
        (3_599_600, "1h 0m"),
        (5 * H + 3 * M, "5h 3m"),
        (D, "1d 0h"),
        (D + 3 * H + 59 * M, "1d 3h"),
        (30 * D, "30d 0h"),
    ],
)
def test_a_text_for_people(ms: int, text: str) -> None:
    assert to_text(ms) == text


@given(st.integers(1_000, MAX_MS))
def test_what_is_shown_can_be_read_again(ms: int) -> None:
    """Two units at most, so the smaller of them is the error."""
    read = to_ms(to_text(ms), field="timeout")
    assert abs(read - ms) <= max(500, ms // 24)
