"""Avro binary encoding of record classes, compiled once per class (Avro 1.11 specification, "Binary Encoding").

fastavro decides at run time, for every value, which branch of a union it belongs to; here the class's annotations have
said so already. Encoding an event so costs a third. Decoding stays fastavro's, which so checks every byte that is
written here (docs/decisions/0002).
"""

from __future__ import annotations

import struct
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from itertools import groupby
from typing import Annotated, Any, get_args, get_origin

from perdure.schemas.records import field_types

Write = Callable[[Any, Callable[[Iterable[bytes]], None]], None]
"""(record, extend) -> None: hands over the record's bytes in pieces."""


_LAST = [bytes((n,)) for n in range(0x80)]
_MORE = [bytes((n | 0x80,)) for n in range(0x80)]
"""7 bits of a varint, with which it ends or goes on."""
_ENDS = (*_LAST, *(low + high for high in _LAST[1:] for low in _MORE))
_GOES_ON = tuple(low + high for high in _MORE for low in _MORE)
"""14 bits of a varint: its end, or two bytes that more follow."""
_TABLE = 16_384
_SMALL = _ENDS[::2] + tuple(low + _LAST[1] for low in _GOES_ON[::2])
"""The zigzag varints of 0 to 16,383."""
_SMALL_PRESENT = tuple(b"\x02" + small for small in _SMALL)
"""The same behind the index of a union's second branch: a number, or a length, that is there."""
_LONG_MIN, _LONG_MAX = -(1 << 63), (1 << 63) - 1
_pack_double = struct.Struct("<d").pack


@lru_cache(maxsize=16_384, typed=True)
def long(n: int) -> bytes:
    """A zigzag varint. Raises `ValueError` outside of 64 bits. Most are times, and the same ones again and again."""
    if not _LONG_MIN <= n <= _LONG_MAX:
        raise ValueError(f"{n} does not fit into 64 bits")
    z = (n << 1) ^ (n >> 63)
    out = b""
    while z >= _TABLE:
        out += _GOES_ON[z & (_TABLE - 1)]
        z >>= 14
    return out + _ENDS[z]


def double(x: float) -> bytes:
    """8 bytes, little-endian. Raises `TypeError` for what is no number."""
    try:
        return _pack_double(x)
    except struct.error as error:
        raise TypeError(f"{x!r} is no number") from error


def compile_writer(cls: type) -> Write:
    """The writer of a record class."""
    code = _Code()
    body = ["def write(m, e):", *_lines(code.record(cls, "m"), 1)]
    tables = {"S": _SMALL, "P": _SMALL_PRESENT, "T": _TABLE, "L": long, "D": double}
    namespace: dict[str, Any] = dict(code.names) | tables
    exec(compile("\n".join(body), f"<writer of {cls.__name__}>", "exec"), namespace)  # noqa: S102 - our own annotations
    write: Write = namespace["write"]
    return write


@dataclass(frozen=True)
class _Block:
    """A statement that has others under it."""

    head: str
    body: list[str | _Block]


Part = str | _Block
"""An expression for some bytes, or a statement."""


def _lines(parts: Sequence[Part], depth: int) -> list[str]:
    """Python lines; neighbouring expressions are handed over together."""
    pad = "    " * depth
    lines: list[str] = []
    for is_block, group in groupby(parts, key=lambda part: isinstance(part, _Block)):
        if not is_block:
            lines.append(f"{pad}e(({', '.join(map(str, group))},))")
            continue
        for block in group:
            assert isinstance(block, _Block)
            lines.append(pad + block.head)
            if block.head.endswith(":"):
                lines += _lines(block.body, depth + 1)
    return lines or [f"{pad}pass"]


class _Code:
    """Python code that writes values of annotated types."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self._count = 0

    def record(self, cls: type, value: str) -> list[Part]:
        hints = field_types(cls)
        return [part for f in fields(cls) for part in self.value(hints[f.name], f"{value}.{f.name}")]

    def value(self, hint: Any, value: str) -> list[Part]:
        """Code that writes the expression `value` of type `hint`."""
        hint = _plain(hint)
        origin = get_origin(hint)
        if origin in (types.UnionType, typing.Union):
            return self._union(get_args(hint), value)
        if origin is list:
            return self._blocks(value, lambda item: self.value(get_args(hint)[0], item))
        if origin is dict:
            return self._map(get_args(hint)[1], value)
        if isinstance(hint, type) and is_dataclass(hint):
            return self.record(hint, value)
        v = self._name()
        if hint in (str, bytes):
            data = f"{value}.encode()" if hint is str else value
            return [f"S[n] if (n := len({v} := {data})) < T else L(n)", v]
        simple = {
            int: f"S[n] if 0 <= (n := {value}) < T else L(n)",
            bool: f"b'\\x01' if {value} else b'\\x00'",
            float: f"D({value})",
        }
        return [simple[hint]]

    def _union(self, arms: tuple[Any, ...], value: str) -> list[Part]:
        v = self._name()
        present = [_plain(arm) for arm in arms if arm is not type(None)]
        if len(present) == 1 and present[0] in (int, str, bytes):
            return self._optional(present[0], value, v)
        parts: list[Part] = [_Block(f"{v} = {value}", [])]
        optional = len(present) < len(arms)
        if optional:
            parts.append(_Block(f"if {v} is None:", ["b'\\x00'"]))
        for index, arm in enumerate(present, start=int(optional)):
            test = f"{'elif' if index else 'if'} type({v}) is {self._bind(arm)}:"
            which = "else:" if len(present) == 1 else test
            parts.append(_Block(which, [f"S[{index}]", *self.value(arm, v)]))
        if len(present) > 1:
            parts.append(_Block("else:", [_Block(f"raise TypeError(f'{{type({v}).__name__}} has no place here')", [])]))
        return parts

    def _optional(self, hint: type, value: str, v: str) -> list[Part]:
        """A number or text that may be missing: an expression, as most fields of most records are of this kind."""
        absent = f"b'\\x00' if ({v} := {value}) is None else"
        if hint is int:
            return [f"{absent} P[{v}] if 0 <= {v} < T else b'\\x02' + L({v})"]
        data = f"{v}.encode()" if hint is str else v
        return [f"{absent} P[n] if (n := len({v} := {data})) < T else b'\\x02' + L(n)", f"{v} or b''"]

    def _blocks(self, value: str, item_parts: Callable[[str], list[Part]]) -> list[Part]:
        item = self._name()
        loop = _Block(f"for {item} in {value}:", item_parts(item))
        return [_Block(f"if {value}:", [f"L(len({value}))", loop]), "b'\\x00'"]

    def _map(self, hint: Any, value: str) -> list[Part]:
        key, item = self._name(), self._name()
        loop = _Block(f"for {key}, {item} in {value}.items():", [*self.value(str, key), *self.value(hint, item)])
        return [_Block(f"if {value}:", [f"L(len({value}))", loop]), "b'\\x00'"]

    def _name(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def _bind(self, cls: type) -> str:
        name = f"T{len(self.names)}_{cls.__name__}"
        self.names[name] = cls
        return name


def _plain(hint: Any) -> Any:
    """A type without its annotations."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return hint
