"""Hypothesis strategies for record classes, read off their annotations, and hand-made Avro bytes."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from hypothesis import strategies as st

from perdure.schemas import codec
from perdure.schemas.records import field_types, registered

assert codec.published_schemas(), "importing the codec registers every record class"

ALL = sorted(registered().values(), key=lambda cls: cls.avro_name)  # type: ignore[attr-defined]
SIGNED = [cls for cls in ALL if "hmac" in field_types(cls)]
LONG_MIN, LONG_MAX = -(2**63), 2**63 - 1

_SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    str: st.text(max_size=8),
    int: st.integers(LONG_MIN, LONG_MAX),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    bytes: st.binary(max_size=8),
    type(None): st.none(),
}


def name_of(cls: type) -> str:
    """The full Avro name, as the id of a test case."""
    name: str = cls.avro_name  # type: ignore[attr-defined]
    return name


def records(cls: type) -> st.SearchStrategy[Any]:
    """Records of a class, every field drawn."""
    return st.builds(cls, **{name: _values(hint) for name, hint in field_types(cls).items()})


def _values(hint: Any) -> st.SearchStrategy[Any]:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _values(inner[0])
    if origin is Union or origin is type(int | str):
        return st.one_of([_values(arm) for arm in inner])
    if origin is list:
        return st.lists(_values(inner[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(_values(inner[0]), _values(inner[1]), max_size=3)
    return records(hint) if is_dataclass(hint) else _SCALARS[hint]  # type: ignore[arg-type]


def long(number: int) -> bytes:
    """An Avro long by hand: zig-zag, seven bits a byte, low bits first."""
    rest = (number << 1 ^ number >> 63) & (2**64 - 1)
    out = bytearray()
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    return bytes([*out, rest])


def text(value: str) -> bytes:
    """An Avro string by hand."""
    data = value.encode()
    return long(len(data)) + data
