"""Add golden bytes for schema versions that have none: tests/histories/<full name>.<fingerprint>.json.

    python tools/write_histories.py [--check]

A file holds one record as a build once wrote it, and its fields. Files are only ever added: what was written once must
be read for ever, and tests/unit/schemas/test_histories.py holds today's code to it. A file whose schema no build has
released (it changed again before the release) is removed by hand.
"""

from __future__ import annotations

import itertools
import json
import sys
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from perdure.schemas import codec
from perdure.schemas.records import JsonText, field_types, registered

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "histories"


def missing() -> dict[Path, type]:
    """File -> class, for every schema that this build reads and that has no golden bytes yet."""
    names = {fp: f"{schema['namespace']}.{schema['name']}" for fp, schema in codec.published_schemas().items()}
    wanted = {FOLDER / f"{name}.{fingerprint}.json": registered()[name] for fingerprint, name in names.items()}
    return {path: cls for path, cls in wanted.items() if not path.exists()}


def sample(cls: type) -> Any:
    """A record with something in every field; equal for equal classes."""
    return _sample(cls, "", itertools.count(1))


def to_plain(value: Any) -> Any:
    """A record as JSON values: `$record` and its fields, bytes as hex."""
    if type(value) in registered().values():
        return {"$record": type(value).avro_name, "fields": {n: to_plain(v) for n, v in value.__dict__.items()}}
    if isinstance(value, bytes):
        return {"$bytes": value.hex()}
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return value


def from_plain(value: Any) -> Any:
    """The record of today's class: fields it has got since have their defaults, fields it has no more are left out."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "$bytes" in value:
        return bytes.fromhex(value["$bytes"])
    if "$record" not in value:
        return {key: from_plain(item) for key, item in value.items()}
    cls = registered()[value["$record"]]
    known = field_types(cls)
    return cls(**{name: from_plain(item) for name, item in value["fields"].items() if name in known})


def _sample(hint: Any, name: str, numbers: Iterator[int]) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        json_text = any(isinstance(mark, JsonText) for mark in inner)
        return b'{"n":%d}' % next(numbers) if json_text else _sample(inner[0], name, numbers)
    if origin is typing.Union or origin is type(int | str):
        return _sample(next(arm for arm in inner if arm is not type(None)), name, numbers)
    if origin is list:
        return [_sample(arm, name, numbers) for arm in _arms(inner[0])]
    if origin is dict:
        return {f"{name}/ü": _sample(inner[1], name, numbers)}
    if is_dataclass(hint):
        cls: Any = hint
        return cls(**{field: _sample(inner, field, numbers) for field, inner in field_types(cls).items()})
    number = next(numbers)
    return {
        str: f"{name} {number}",
        int: number * 1_000_003,
        float: number / 8,
        bool: True,
        bytes: b"\x00\xff%d" % number,
    }[hint]


def _arms(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (typing.Union, type(int | str)) else (hint,)


def main() -> int:
    found = missing()
    if "--check" in sys.argv:
        for path in found:
            print(f"no golden bytes: {path.name}; run: python tools/write_histories.py")
        return 1 if found else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path, cls in found.items():
        data = codec.encode(sample(cls))
        if data[2 : codec.HEADER].hex() not in path.name:
            raise SystemExit(f"{path.name}: only the build that wrote this older schema can make its golden bytes")
        content = {"hex": data.hex(), "value": to_plain(sample(cls))}
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(found)} golden records added to {FOLDER.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
