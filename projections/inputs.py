"""What the processors of the read side share: how they read their input, and what they may do with it.

A processor is run by the runner, one transaction per batch: its rows, its output and its input positions are committed
as one, so each input record counts exactly once.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, TypeVar, get_args

from perdure.schemas.codec import decode, encode
from perdure.schemas.errors import DecodeError
from perdure.schemas.events import Event, ProgressReported
from perdure.streams.log import Record

Fact: TypeAlias = Event | ProgressReported
"""What `task-events` and `task-telemetry` carry."""

_FACTS = (*get_args(Event), ProgressReported)
_SMALL = 2_048
"""Bytes of a record that is kept decoded for a while; nearly all are."""
_MOST_KNOWN = 4_096
_KNOWN: dict[bytes, Any] = {}
"""Records by their bytes. Progress, dead letters and views look at each event within a moment, and a row is read again
with its task's next event: decoding was half of what they cost."""
R = TypeVar("R")


class Transaction(Protocol):
    """What a processor may do while it handles a record."""

    def get(self, key: bytes) -> bytes | None:
        """A row of the processor's own store."""

    def after(self, key: bytes) -> bytes | None:
        """The key of the next row in the store, as of the last commit; None: there is none."""

    def put(self, key: bytes, value: bytes | None) -> None:
        """Set a row, or with None delete it; it goes to the processor's changelog too, if it has one."""

    def emit(self, topic: str, key: bytes | None, value: bytes | None) -> None:
        """Append to the record's own partition of a topic."""

    def quarantine(self, record: Record, cause: str, detail: str) -> None:
        """Give up on a record: it is kept for people to look at, and the processor goes on."""


GATHER_MS = 50
"""How long what is only looked at may wait for more of its kind: a tenth of what workers wait between two reports."""


def written(record: object) -> bytes:
    """The record's bytes; who reads them soon is handed the record itself. It must not be changed any more."""
    return _kept(encode(record), record)


def read_as(cls: type[R], data: bytes) -> R:
    """The record in bytes that were written or read a moment ago, mostly; not to be changed. Raises `DecodeError`."""
    found = _read(data)
    if not isinstance(found, cls):
        raise DecodeError(f"expected {cls.__name__}, found {type(found).__name__}")
    return found


def _read(data: bytes) -> Any:
    found = _KNOWN.get(data)
    if found is None:
        found = decode(data)
        _kept(data, found)
    return found


def _kept(data: bytes, record: object) -> bytes:
    if len(data) <= _SMALL:
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[data] = record
    return data


def fact(data: bytes | None) -> Fact:
    """The event or accepted progress that a record's value holds. Raises `DecodeError`."""
    if data is None:
        raise DecodeError("the record has no value")
    found = _read(data)
    if not isinstance(found, _FACTS):
        raise DecodeError(f"expected an event, found {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def readable(record: Record, tx: Transaction) -> Fact | None:
    """The fact in a record; None if there is none: then the record is in quarantine."""
    try:
        return fact(record.value)
    except DecodeError as error:
        tx.quarantine(record, error.code, str(error))
        return None


def task_of(event: Fact) -> str | None:
    """The task that an event belongs to; None for events of a partition."""
    task_id: str | None = getattr(event, "task_id", None)
    return task_id
