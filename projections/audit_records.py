"""Records as the auditor reads them: generic Avro by the shipped schema files, JSON commands, and keys of rows.

Nothing of this is shared with the engine: a defect of its codec or of its key layout must not hide from the audit.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Protocol

from fastavro import parse_schema, schemaless_reader
from fastavro.schema import fingerprint, to_parsing_canonical_form

from perdure.schemas import limits

_MAGIC = bytes.fromhex("c301")
_DIGEST = 12


class Unreadable(Exception):
    """The bytes are no record that the schema files, or the published schemas, tell how to read."""


class LogRecord(Protocol):
    """What the auditor has to know of a record, whatever it was read with."""

    topic: str
    partition: int
    offset: int
    at: int
    key: bytes | None
    value: bytes | None


@dataclass(slots=True)
class Told:
    """A record's content: its full name without the namespace, as `events.TaskQueued`, and its fields."""

    name: str
    fields: dict[str, Any]


class Decoder:
    """Reads values by the schemas that the package ships and those that `learn` is given."""

    def __init__(self) -> None:
        self._schemas = dict(_shipped())
        self._wanted: dict[bytes, Any] = {}
        """Fingerprint of another build's schema -> the present one: what a newer build has added is passed over, and
        what an older one does not know has its default."""
        for text in _texts(old=True):
            self.learn(text)

    def learn(self, text: str) -> None:
        """Take in a schema that `config` publishes, as JSON text."""
        identity, schema = _parsed(text)
        if identity not in self._schemas:
            self._schemas[identity] = schema
            self._wanted[identity] = next((s for s in _shipped().values() if s["name"] == schema["name"]), None)

    def read(self, value: bytes) -> Told:
        """What a value holds. Raises `Unreadable`. Records of several kinds in one list come as (name, fields)."""
        schema = self._schemas.get(value[2:10])
        if value[:2] != _MAGIC or schema is None:
            raise Unreadable(f"begins with {value[:10].hex()}, which no schema is known by")
        body = io.BytesIO(value[10:])
        try:
            fields = schemaless_reader(
                body, schema, self._wanted.get(value[2:10]), return_record_name=True, return_record_name_override=True
            )
        except (EOFError, ValueError, IndexError, OverflowError, MemoryError, RecursionError) as error:
            raise Unreadable(f"{schema['name']}: {error}") from error
        assert isinstance(fields, dict)
        return Told(schema["name"].removeprefix("perdure."), fields)

    def read_input(self, value: bytes) -> Told:
        """As `read`, for what may be a JSON command as well."""
        if value[:1] != b"{":
            return self.read(value)
        try:
            content = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"no JSON: {error}") from error
        for name in ("command_id", "task_id", "reply_to"):
            if not _is_usable(content.get(name)):
                content[name] = None
        return Told(f"commands.{content.pop('command', '')}", content)


@cache
def _shipped() -> dict[bytes, Any]:
    """The package's present schemas by their fingerprints."""
    return dict(_parsed(text) for text in _texts(old=False))


@cache
def _texts(*, old: bool) -> list[str]:
    """The package's schema files: of released builds' records that have changed since, or all others."""
    groups = [g for g in (files("perdure.schemas") / "avro").iterdir() if g.is_dir() and (g.name == "old") == old]
    return [file.read_text() for group in groups for file in group.iterdir() if file.name.endswith(".avsc")]


def _parsed(text: str) -> tuple[bytes, Any]:
    schema = json.loads(text)
    return bytes.fromhex(fingerprint(to_parsing_canonical_form(schema), "CRC-64-AVRO")), parse_schema(schema)


def _is_usable(value: Any) -> bool:
    """Whether an id in a JSON command, which may be a refused one, serves to answer it."""
    if not isinstance(value, str) or "\x00" in value or any(0xD800 <= ord(c) <= 0xDFFF for c in value):
        return False
    return 0 < len(value.encode()) <= limits.TEXT_MAX


def digest(row: Any) -> bytes:
    """A short stand-in for a row: equal for equal fields, in whatever order they come."""
    text = json.dumps(row, sort_keys=True, default=bytes.hex)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_DIGEST).digest()


# Keys of rows --------------------------------------------------------------------------------------------------------
# A text ends with NUL and holds none: 00 is written as 01 01, and 01 as 01 02. Numbers are 8 bytes, big-endian.

TASK, TIMER, START, READY, HELD, LEASE = b"t", b"d", b"e", b"q", b"h", b"g"
CONFIG, COUNTER, CLOCK, OUTBOX, IDEMPOTENCY, UNBOUND = b"c", b"n", b"k", b"o", b"K", b"u"
SESSION, MARK, POSITION = b"S", b"m", b"z"
SPEC, STATE, RESULT, ANSWER, STEP, BEGUN = b"c", b"s", b"r", b"a", b"p", b"b"
TIMERS = frozenset({TIMER, START})
"""Due times in partition time, and start times that were given, in wall time."""
NOT_BEFORE = "not_before"
"""Kind of the latter."""
WAKING = TIMERS | {READY, HELD, LEASE}
"""Rows that bring a task on: due times, places in a queue, leases."""
FOLDED = frozenset({TASK, CONFIG, COUNTER, CLOCK, OUTBOX, IDEMPOTENCY, UNBOUND})
"""Rows that are a fold of events. What follows from a task's own row is looked at with it (`WAKING`)."""
LIVE = b"l"
"""A task's row of the session class: latest reports."""


def text(value: str) -> bytes:
    """A text as part of a key."""
    return value.encode().replace(b"\x01", b"\x01\x02").replace(b"\x00", b"\x01\x01") + b"\x00"


def number(value: int) -> bytes:
    """A number as part of a key."""
    return value.to_bytes(8, "big")


def scope_of(task_id: str) -> bytes:
    """What the keys of all rows of a task begin with: its local id, then its routing key."""
    routing_key, _, local = task_id.partition("/")
    return TASK + text(local) + text(routing_key)


def task_of(key: bytes) -> tuple[str, bytes]:
    """(task id, what follows its scope) of the key of a task's row."""
    local, _, rest = key[1:].partition(b"\x00")
    routing_key, _, suffix = rest.partition(b"\x00")
    return f"{_plain(routing_key)}/{_plain(local)}", suffix


def timer_key(due: int, kind: str, task_id: str) -> bytes:
    """Key of a timer's row."""
    scope = START if kind == NOT_BEFORE else TIMER
    return scope + number(max(due, 0)) + text(kind) + text(task_id)


def timer_of(key: bytes) -> tuple[str, str]:
    """(kind, task id) of the key of a timer's row."""
    kind, _, rest = key[9:].partition(b"\x00")
    return _plain(kind), _plain(rest[:-1])


def _plain(part: bytes) -> str:
    return part.replace(b"\x01\x01", b"\x00").replace(b"\x01\x02", b"\x01").decode()
