"""Avro binary encoding of record classes, compiled once per class (Avro 1.11 specification, "Binary Encoding").

fastavro decides at run time, for every value, which branch of a union it belongs to; here the class's annotations have
said so already. Encoding an event so costs a third. Decoding stays fastavro's, which so checks every byte that is
written here (docs/decisions/0002).
"""

from __future__ import annotations

import struct
import types
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin

from perdure.schemas.records import field_types

Write = Callable[[Any, Callable[[bytes], None]], None]
"""(record, append) -> None: appends the record's bytes piece by piece."""


def _varint(z: int) -> bytes:
    out = bytearray()
    while z > 0x7F:
        out.append(z & 0x7F | 0x80)
        z >>= 7
    out.append(z)
    return bytes(out)


_TABLE = 16_384
_SMALL = tuple(_varint(n << 1) for n in range(_TABLE))
_LONG_MIN, _LONG_MAX = -(1 << 63), (1 << 63) - 1
_pack_double = struct.Struct("<d").pack


def long(n: int) -> bytes:
    """A zigzag varint. Raises `ValueError` outside of 64 bits."""
    if 0 <= n < _TABLE:
        return _SMALL[n]
    if not _LONG_MIN <= n <= _LONG_MAX:
        raise ValueError(f"{n} does not fit into 64 bits")
    return _varint((n << 1) ^ (n >> 63))


def double(x: float) -> bytes:
    """8 bytes, little-endian. Raises `TypeError` for what is no number."""
    try:
        return _pack_double(x)
    except struct.error as error:
        raise TypeError(f"{x!r} is no number") from error


def compile_writer(cls: type) -> Write:
    """The writer of a record class."""
    code = _Code()
    body = ["def write(m, a):", *code.record(cls, "m", 1)]
    namespace: dict[str, Any] = dict(code.names) | {"L": long, "double": double}
    exec(compile("\n".join(body), f"<writer of {cls.__name__}>", "exec"), namespace)  # noqa: S102 - our own annotations
    write: Write = namespace["write"]
    return write


class _Code:
    """Python statements that write values of annotated types."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self._count = 0

    def record(self, cls: type, value: str, depth: int) -> list[str]:
        hints = field_types(cls)
        return [line for f in fields(cls) for line in self.value(hints[f.name], f"{value}.{f.name}", depth)] or ["pass"]

    def value(self, hint: Any, value: str, depth: int) -> list[str]:
        """Statements that write the expression `value` of type `hint`."""
        while get_origin(hint) is Annotated:
            hint = get_args(hint)[0]
        origin = get_origin(hint)
        if origin in (types.UnionType, typing.Union):
            return self._union(get_args(hint), value, depth)
        pad = "    " * depth
        if origin is list:
            return self._blocks(value, depth, lambda item: self.value(get_args(hint)[0], item, depth + 2))
        if origin is dict:
            return self._map(get_args(hint)[1], value, depth)
        if isinstance(hint, type) and is_dataclass(hint):
            return self.record(hint, value, depth)
        if hint is str:
            v = self._name()
            return [f"{pad}{v} = {value}.encode()", f"{pad}a(L(len({v}))); a({v})"]
        if hint is bytes:
            return [f"{pad}a(L(len({value}))); a({value})"]
        simple = {int: f"a(L({value}))", bool: f"a(b'\\x01' if {value} else b'\\x00')", float: f"a(double({value}))"}
        return [pad + simple[hint]]

    def _union(self, arms: tuple[Any, ...], value: str, depth: int) -> list[str]:
        pad, inner = "    " * depth, "    " * (depth + 1)
        v = self._name()
        lines = [f"{pad}{v} = {value}"]
        present = [a for a in arms if a is not type(None)]
        optional = len(present) < len(arms)
        if optional:
            lines += [f"{pad}if {v} is None:", f"{inner}a(b'\\x00')"]
        for index, arm in enumerate(present, start=int(optional)):
            if len(present) == 1:
                lines += [f"{pad}else:"] if optional else []
            else:
                name = self._bind(arm)
                lines.append(f"{pad}{'if' if index == 0 else 'elif'} type({v}) is {name}:")
            lines += [f"{inner}a(L({index}))", *self.value(arm, v, depth + 1)]
        if len(present) > 1:
            lines += [f"{pad}else:", f"{inner}raise TypeError(f'{{type({v}).__name__}} has no place here')"]
        return lines

    def _blocks(self, value: str, depth: int, item_lines: Callable[[str], list[str]]) -> list[str]:
        pad = "    " * depth
        item = self._name()
        return [
            f"{pad}if {value}:",
            f"{pad}    a(L(len({value})))",
            f"{pad}    for {item} in {value}:",
            *item_lines(item),
            f"{pad}a(b'\\x00')",
        ]

    def _map(self, hint: Any, value: str, depth: int) -> list[str]:
        pad = "    " * depth
        key, item, raw = self._name(), self._name(), self._name()
        return [
            f"{pad}if {value}:",
            f"{pad}    a(L(len({value})))",
            f"{pad}    for {key}, {item} in {value}.items():",
            f"{pad}        {raw} = {key}.encode()",
            f"{pad}        a(L(len({raw}))); a({raw})",
            *self.value(hint, item, depth + 2),
            f"{pad}a(b'\\x00')",
        ]

    def _name(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def _bind(self, cls: type) -> str:
        name = f"T{len(self.names)}_{cls.__name__}"
        self.names[name] = cls
        return name
