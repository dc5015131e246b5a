"""User values as JSON text: canonical bytes in, Python values out, with limits on size and depth.

What JSON has no form for is carried as an object with one reserved key, `$perdure`: dates, durations, bytes, sets,
decimals, UUIDs. A user's own object that has this key is carried as its list of pairs, so it comes back as it was.
Dataclasses and pydantic models become plain objects, tuples lists. Nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import decimal
import enum
import json
import math
import pathlib
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from perdure.schemas import limits
from perdure.schemas.errors import DecodeError, NotSerializable, ValueTooLarge

TAG = "$perdure"
_UNFIT = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)
"""What JSON, or a value's own code (`model_dump`, a field never set), raises over a value that cannot be carried."""


def dumps(value: Any, *, field: str, limit: int = limits.VALUE_MAX) -> bytes:
    """Canonical JSON (sorted keys, no spaces, UTF-8) of a user's value.

    Raises `NotSerializable` or `ValueTooLarge`, both naming `field`.
    """
    return _bounded(value, field, limit, _canonical)


def dumps_large(value: Any, *, field: str, limit: int) -> bytes:
    """As `dumps`, ten times faster; `loads` gives back the same, but a number may be written otherwise (1e16)."""
    return _bounded(value, field, limit, _QUICK.encode)


def _bounded(value: Any, field: str, limit: int, write: Callable[[Any], bytes]) -> bytes:
    try:
        data = write(_plain(value, field, 0))
    except NotSerializable:
        raise
    except _UNFIT as error:
        raise NotSerializable(f"{field} cannot be carried as JSON: {error}", field=field) from error
    if len(data) > limit:
        raise ValueTooLarge(f"{field} is {len(data):,} bytes of JSON; at most {limit:,} are taken", field=field)
    return data


def _canonical(plain: Any) -> bytes:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


_QUICK = msgspec.json.Encoder(order="sorted")


def loads(data: bytes) -> Any:
    """The Python value of JSON text written by `dumps`. Raises `DecodeError`."""
    try:
        return json.loads(data, object_hook=_revive, parse_constant=_no_constant)
    except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise DecodeError(f"a recorded value is no JSON: {error}") from error


def _plain(value: Any, field: str, depth: int) -> Any:
    """`value` with only JSON's own types in it."""
    if depth > limits.DEPTH_MAX:
        raise NotSerializable(f"{field} is nested deeper than {limits.DEPTH_MAX} levels", field=field)
    if isinstance(value, enum.Enum):
        return _plain(value.value, field, depth + 1)
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise NotSerializable(f"{field} holds {value}, which JSON has no form for", field=field)
        return value
    if isinstance(value, Mapping):
        plain = {_key(k, field): _plain(v, field, depth + 1) for k, v in value.items()}
        return {TAG: "object", "value": sorted(plain.items())} if TAG in plain else plain
    if isinstance(value, (list, tuple)):
        return [_plain(v, field, depth + 1) for v in value]
    if isinstance(value, (set, frozenset)):
        items = [_hashable(_plain(v, field, depth + 1), field) for v in value]
        return {TAG: "set" if isinstance(value, set) else "frozenset", "value": sorted(items, key=_text)}
    for kind, write in _TAGGED.items():
        if isinstance(value, kind):
            name, inner = write(value)
            return {TAG: name, "value": inner}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name), field, depth + 1) for f in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return _plain(value.model_dump(mode="json"), field, depth + 1)
    if hasattr(value, "item") and type(value).__module__ == "numpy":
        return _plain(value.item(), field, depth + 1)
    raise NotSerializable(f"{field} holds a {type(value).__module__}.{type(value).__qualname__}; give JSON values, "
                          "dataclasses, pydantic models, dates, bytes, sets or paths", field=field)  # fmt: skip


def _key(key: Any, field: str) -> str:
    if isinstance(key, str):
        return str.__str__(key)  # the text itself: str() of an enum member would be its name
    raise NotSerializable(f"{field} has the key {key!r}; keys of JSON objects are text", field=field)


def _hashable(plain: Any, field: str) -> Any:
    """`plain`, if a set can hold it again after it was read: objects come back as dicts, which no set can hold."""
    if isinstance(plain, dict) and plain.get(TAG, "object") == "object":
        raise NotSerializable(f"{field} holds a set of objects; give a list of them", field=field)
    if isinstance(plain, list):
        for item in plain:
            _hashable(item, field)
    return plain


def _text(plain: Any) -> str:
    """Orders the items of a set in the same way in every process."""
    return json.dumps(plain, sort_keys=True)


_TAGGED: dict[type, Callable[[Any], tuple[str, Any]]] = {
    dt.datetime: lambda v: ("datetime", v.isoformat()),
    dt.date: lambda v: ("date", v.isoformat()),
    dt.time: lambda v: ("time", v.isoformat()),
    dt.timedelta: lambda v: ("timedelta", [v.days, v.seconds, v.microseconds]),
    bytes: lambda v: ("bytes", base64.b64encode(v).decode()),
    decimal.Decimal: lambda v: ("decimal", str(v)),
    uuid.UUID: lambda v: ("uuid", str(v)),
    pathlib.PurePath: lambda v: ("path", str(v)),
}

_REVIVERS: dict[str, Callable[[Any], Any]] = {
    "object": dict,
    "datetime": dt.datetime.fromisoformat,
    "date": dt.date.fromisoformat,
    "time": dt.time.fromisoformat,
    "timedelta": lambda v: dt.timedelta(*v),
    "bytes": base64.b64decode,
    "decimal": decimal.Decimal,
    "uuid": uuid.UUID,
    "path": pathlib.Path,
    "frozenset": lambda v: frozenset(map(_tuples, v)),
    "set": lambda v: set(map(_tuples, v)),
}


def _revive(value: dict[str, Any]) -> Any:
    tag = value.get(TAG)
    if value.keys() != {TAG, "value"} or not isinstance(tag, str) or tag not in _REVIVERS:
        return value
    try:
        return _REVIVERS[tag](value["value"])
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"no valid {tag}: {error}") from error


def _tuples(item: Any) -> Any:
    """An item of a set: a list in it was a tuple."""
    return tuple(map(_tuples, item)) if isinstance(item, list) else item


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
