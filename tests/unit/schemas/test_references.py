"""References to values too large for a record: no value can be taken for one, and no odd bytes for a reference."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure.schemas import limits, references, values
from perdure.schemas.errors import DecodeError
from perdure.schemas.references import Reference

ONE = Reference(day=20_000, sha256="ab" * 32, size=limits.VALUE_MAX + 1, preview='{"größe":"☃')
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
)


def fields(**changes: Any) -> bytes:
    return b"@" + json.dumps(vars(ONE) | changes).encode()


def test_a_reference_comes_back_as_it_was() -> None:
    assert references.is_reference(ONE.encode())
    assert references.parse(ONE.encode()) == ONE
    assert references.shown(ONE.encode()) == vars(ONE)


@given(JSON)
def test_no_value_is_taken_for_a_reference(value: Any) -> None:
    text = values.dumps(value, field="input")
    assert not references.is_reference(text)
    assert references.identity(text) == text
    assert references.shown(text) is None


@pytest.mark.parametrize("value", [vars(ONE), ONE.encode().decode(), [ONE.encode().decode()], "@", "@{}"])
def test_a_value_that_looks_like_one_is_a_value(value: Any) -> None:
    assert not references.is_reference(values.dumps(value, field="input"))


@pytest.mark.parametrize("data", [
    b"", b"@", b"@{", b"@null", b"@[]", b"@{}", b"{}", b"@" + b"[" * 100_000, b"@\xff", ONE.encode()[1:],
    b" " + ONE.encode(), ONE.encode() + b"x", fields(more=1), fields(day="1"), fields(day=-1), fields(day=1.5),
    fields(day=10**9), fields(size=True), fields(size=limits.VALUE_MAX), fields(size=limits.LARGE_VALUE_MAX + 1),
    fields(sha256="ab" * 31), fields(sha256="AB" * 32), fields(sha256="../" * 21 + "x"), fields(preview=None),
    fields(preview="x" * limits.REFERENCE_MAX), b"@" + ONE.encode()[1:].decode().encode("utf-16"),
    ONE.encode()[:-2] + b'\xed\xa0\x80"}',
])  # fmt: skip
def test_other_bytes_are_no_reference(data: bytes) -> None:
    with pytest.raises(DecodeError):
        references.parse(data)


def test_the_longest_preview_fits() -> None:
    for char in ('"', "\\", "\x7f", "\U0001f600", " "):
        longest = Reference(999_999, "0" * 64, limits.LARGE_VALUE_MAX, char * limits.PREVIEW_MAX)
        assert references.parse(longest.encode()) == longest


def test_the_same_value_written_on_another_day_is_the_same() -> None:
    later = Reference(ONE.day + 1, ONE.sha256, ONE.size, ONE.preview)
    other = Reference(ONE.day, "cd" * 32, ONE.size, ONE.preview)
    assert references.identity(later.encode()) == references.identity(ONE.encode())
    assert references.identity(other.encode()) != references.identity(ONE.encode())
