"""Bytes to records and back: Avro single-object encoding (Avro 1.11 specification, "Single-object encoding").

`C3 01`, the CRC-64-AVRO fingerprint of the writer's schema (8 bytes, little-endian), the Avro body. Each record so
names its own schema and no registry is needed. The only importer of fastavro.

None of the schemas is recursive and none has array or map items of zero bytes (a test holds both), so the work of
decoding is bounded by the record's size, whatever block counts it claims.
"""

from __future__ import annotations

import io
import json
import typing
from collections.abc import Callable, Container
from dataclasses import is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from fastavro import parse_schema, schemaless_reader
from fastavro.schema import fingerprint, to_parsing_canonical_form

from perdure.schemas import messages
from perdure.schemas.encoder import Write, compile_writer
from perdure.schemas.errors import DecodeError, ValueTooLarge
from perdure.schemas.published import check_published
from perdure.schemas.records import avro_schema, field_types, registered

MARKER = b"\xc3\x01"
HEADER = 10
_READ: dict[str, Any] = {"return_record_name": True, "return_record_name_override": True}
"""Members of unions of records come with their names, all others as they are."""
R = TypeVar("R")

assert messages.__all__, "importing messages registers every record class"


_AVRO = Path(__file__).with_name("avro")
_FINGERPRINTS: dict[str, str] = json.loads((_AVRO / "fingerprints.json").read_text())
"""Full name -> fingerprint of the present schema, as `tools/write_schemas.py` has found it: computing them all takes
longer than everything else a short command does."""


class UnknownSchema(DecodeError):
    """The record names a schema that this build does not know."""

    code = "unknown_schema"


class _Format:
    """How one record class is written and read; each part is made when it is first needed."""

    def __init__(self, cls: type) -> None:
        self.cls = cls
        known = _FINGERPRINTS.get(cls.avro_name)  # type: ignore[attr-defined]
        self.header = MARKER + (bytes.fromhex(known) if known else schema_fingerprint(avro_schema(cls)))

    @cached_property
    def parsed(self) -> Any:
        """The schema as fastavro wants it."""
        return parse_schema(avro_schema(self.cls))

    @cached_property
    def write(self) -> Write:
        """The class's writer."""
        return compile_writer(self.cls)

    @cached_property
    def from_datum(self) -> Callable[[dict[str, Any]], Any]:
        """What fastavro has read, as a record."""
        return _reader(self.cls)


class _Older:
    """An older version of a class, still read."""

    def __init__(self, cls: type, schema: dict[str, Any]) -> None:
        self.cls, self.parsed, self.from_datum = cls, parse_schema(schema), _reader(cls, older=True)


def schema_fingerprint(schema: dict[str, Any]) -> bytes:
    """CRC-64-AVRO of the schema's parsing canonical form, in the byte order of the header."""
    return bytes.fromhex(fingerprint(to_parsing_canonical_form(schema), "CRC-64-AVRO"))


def encode(message: object) -> bytes:
    """The record's bytes. Raises `TypeError` or `ValueError` for what is no record or does not fit its own schema."""
    form = _BY_CLASS.get(type(message))
    if form is None:
        raise TypeError(f"{type(message).__qualname__} is no record class")
    parts = [form.header]
    try:
        form.write(message, parts.extend)
        return b"".join(parts)
    except (AttributeError, KeyError, OverflowError) as error:
        raise ValueError(f"no valid {form.cls.__name__}: {type(error).__name__}: {error}") from error


def decode(data: bytes) -> Any:
    """The record that `data` holds. Raises `UnknownSchema` or `DecodeError`, and `Unreachable` where a schema that is
    unknown here has to be asked for (see `learn_from`).
    """
    if data[:2] != MARKER or len(data) < HEADER:
        raise DecodeError(f"no single-object Avro record: begins with {data[:2].hex() or 'nothing'}, {len(data)} bytes")
    known = _BY_HEADER.get(data[:HEADER]) or _learned(data[:HEADER])
    if known is None:
        raise UnknownSchema(f"unknown schema fingerprint {data[2:HEADER].hex()}")
    body = io.BytesIO(data)
    body.seek(HEADER)
    try:
        datum: Any = schemaless_reader(body, known.parsed, None, **_READ)
        message = known.from_datum(datum)
    except Exception as error:  # fastavro raises many kinds on bad bytes; all mean the same here
        raise DecodeError(f"bad {known.cls.__name__}: {type(error).__name__}: {error}") from error
    if body.tell() != len(data):
        raise DecodeError(f"bad {known.cls.__name__}: {len(data) - body.tell()} bytes behind its end")
    return message


def header_of(cls: type) -> bytes:
    """What every record of a class begins with: enough to count or pick them without decoding."""
    return _BY_CLASS[cls].header


def class_of(data: bytes) -> type | None:
    """The class that a record says it is of, in any version, without decoding it; None if it has to be asked for."""
    known = _BY_HEADER.get(data[:HEADER])
    return None if known is None else known.cls


def decode_if(kinds: tuple[type, ...], data: bytes) -> Any | None:
    """The record, if it is of one of these classes, in any version, and can be read; else None, soon."""
    known = class_of(data)
    if data[:2] != MARKER or (known is not None and known not in kinds):
        return None
    try:
        message = decode(data)
    except DecodeError:
        return None
    return message if isinstance(message, kinds) else None


def decode_as(cls: type[R], data: bytes) -> R:
    """`decode`, for a place where only records of `cls` belong. Raises `DecodeError`."""
    message = decode(data)
    if not isinstance(message, cls):
        raise DecodeError(f"expected {cls.__name__}, found {type(message).__name__}")
    return message


def bounded(data: bytes, limit: int, what: str) -> bytes:
    """`data`, if it is within `limit` bytes. Raises `ValueTooLarge`."""
    if len(data) > limit:
        raise ValueTooLarge(f"{what} is {len(data):,} bytes; at most {limit:,} are taken", field=what)
    return data


def replace(message: R, **changes: Any) -> R:
    """A copy of a record with some fields changed: `dataclasses.replace` without its cost."""
    made: R = object.__new__(type(message))
    made.__dict__.update(message.__dict__)
    made.__dict__.update(changes)
    return made


def read_also(schema: dict[str, Any]) -> None:
    """From now on also decode records that were written with this older schema of a record class.

    Fields that it lacks get the class's defaults, fields that the class lacks are dropped, types have to be the same:
    fastavro's own schema resolution would give text as the default of bytes, and one list as the default of all.
    Raises `ValueError` if no class has the schema's name.
    """
    form = _BY_NAME.get(f"{schema['namespace']}.{schema['name']}")
    if form is None:
        raise ValueError(f"no record class is named {schema['namespace']}.{schema['name']}")
    _BY_HEADER.setdefault(MARKER + schema_fingerprint(schema), _Older(form.cls, schema))


Ask = Callable[[str], dict[str, Any] | None]
"""Fingerprint (hex) -> the schema that somebody has published under it, or None."""
_ASKED: list[Ask] = []
_REFUSED: dict[bytes, Any] = {}
"""Schemas that were published and are not believed: to find that out again for each record would take too long."""
_REFUSED_MOST = 1_000


def learn_from(ask: Ask) -> Callable[[], None]:
    """Have `decode` ask for the schemas of builds that are newer than this one; returns what ends that.

    A newer build publishes its schemas before it writes with them. What it has added to a record is passed over.
    """
    _ASKED.append(ask)
    return lambda: _ASKED.remove(ask)


def _learned(header: bytes) -> _Older | _Format | None:
    """The format of a record of another build, if somebody knows its schema and this build its class."""
    name = header[2:].hex()
    for ask in list(_ASKED):
        schema = ask(name)
        if schema is None or _REFUSED.get(header) == schema:
            continue
        if _is_anothers(schema, name):
            read_also(schema)
            return _BY_HEADER[header]
        if len(_REFUSED) < _REFUSED_MOST:
            _REFUSED[header] = schema
    return None


def _is_anothers(schema: dict[str, Any], fingerprint: str) -> bool:
    """Whether it is another build's schema of a class. Whoever may write `config` can publish anything."""
    try:
        form = _BY_NAME.get(f"{schema.get('namespace')}.{schema.get('name')}")
        if form is None:
            return False
        check_published(schema, avro_schema(form.cls))
        return schema_fingerprint(schema).hex() == fingerprint
    except Exception:  # noqa: BLE001 - what is no schema is wrong in many ways, and all of them mean the same here
        return False


def published_schemas() -> dict[str, dict[str, Any]]:
    """Fingerprint (hex) -> schema, of every version this build reads."""
    found = {f.header[2:].hex(): avro_schema(f.cls) for f in _BY_CLASS.values()}
    return found | {schema_fingerprint(s).hex(): s for s in _older_versions()}


def unpublished_schemas(names: Container[str]) -> dict[str, dict[str, Any]]:
    """Name in `config` -> schema, of every version this build reads, but for the names that are there already.

    To derive all of them takes tens of milliseconds, which a process that comes back can do without.
    """
    own = {schema_name(f.header[2:].hex()): f.cls for f in _BY_CLASS.values()}
    older = {schema_name(schema_fingerprint(s).hex()): s for s in _older_versions()}
    found = {name: avro_schema(cls) for name, cls in own.items() if name not in names}
    return found | {name: schema for name, schema in older.items() if name not in names}


def schema_name(fingerprint: str) -> str:
    """Where `config` has a schema."""
    return f"schema/{fingerprint}"


# Between records and what fastavro reads and writes ------------------------------------------------------------------


def _make(cls: type, datum: dict[str, Any]) -> Any:
    made: Any = object.__new__(cls)
    made.__dict__.update(datum)
    return made


def _reader(cls: type, older: bool = False) -> Callable[[dict[str, Any]], Any]:
    hints = field_types(cls)
    nested = [(n, r) for n, hint in hints.items() if (r := _read_value(hint, older)) is not None]

    def read_older(datum: dict[str, Any]) -> Any:
        for name, convert in nested:
            if name in datum:
                datum[name] = convert(datum[name])
        return cls(**{name: value for name, value in datum.items() if name in hints})

    def read(datum: dict[str, Any]) -> Any:
        for name, convert in nested:
            datum[name] = convert(datum[name])
        return _make(cls, datum)

    return read_older if older else read


def _read_value(hint: Any, older: bool) -> Callable[[Any], Any] | None:
    hint, optional = _core(hint)
    arms = _record_arms(hint)
    if len(arms) > 1:
        readers = {a.avro_name: _reader(a, older) for a in arms}
        return lambda v: readers[v[0]](v[1])
    if get_origin(hint) is list and (inner := _read_value(get_args(hint)[0], older)) is not None:
        return lambda v: None if v is None else [inner(item) for item in v]
    if arms:
        single = _reader(arms[0], older)
        return (lambda v: None if v is None else single(v)) if optional else single
    return None


def _core(hint: Any) -> tuple[Any, bool]:
    """The hint without annotations and without None, and whether None was in it."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    arms = [a for a in _arms(hint) if a is not type(None)]
    if len(arms) == len(_arms(hint)):
        return hint, False
    return (arms[0] if len(arms) == 1 else typing.Union[tuple(arms)]), True  # noqa: UP007


def _arms(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (typing.Union, type(int | str)) else (hint,)


def _record_arms(hint: Any) -> list[Any]:
    return [a for a in _arms(hint) if isinstance(a, type) and is_dataclass(a)]


def _older_versions() -> list[dict[str, Any]]:
    """Schemas that earlier builds wrote and this one still reads."""
    return [json.loads(file.read_text()) for file in sorted((_AVRO / "old").glob("*.avsc"))]


_BY_CLASS: dict[type, _Format] = {c: _Format(c) for c in registered().values()}
_BY_HEADER: dict[bytes, _Format | _Older] = {f.header: f for f in _BY_CLASS.values()}
_BY_NAME: dict[str, _Format] = {f.cls.avro_name: f for f in _BY_CLASS.values()}  # type: ignore[attr-defined]
for _schema in _older_versions():
    read_also(_schema)
