"""What a runner runs: the engine and the projections, one instance per partition.

A processor keeps what its records bring about until the transaction is committed or rolled back. `Table` makes one out
of a plain function of (record, transaction), for processors whose output topic is their own changelog.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from perdure.schemas import codec, limits, topics
from perdure.schemas.errors import InfrastructureError
from perdure.schemas.public import Quarantined
from perdure.streams.log import Record
from perdure.streams.store import META, Store


@dataclass(slots=True)
class Out:
    """A record to write in the transaction, to the processor's own partition of `topic`."""

    topic: str
    key: bytes | None
    value: bytes | None


class Processor(Protocol):
    """One partition of a stateful stream processor."""

    def execute(self, record: Record, *, careful: bool = False) -> None:
        """Process one record; never raises for what the record holds.

        `careful`: see at once whether what it brings about can be written; else `writes` may raise `ValueError`.
        """

    def set_aside_unread(self, record: Record, detail: str) -> None:
        """Pass over a record that has killed the process before, without touching it."""

    def take_out(self) -> list[Out]:
        """Records to write for what was executed since the last call."""

    def writes(self) -> dict[bytes, bytes | None]:
        """Every change of state since the last commit; keys beginning with `META` stay out of the changelog."""

    def positions(self) -> dict[str, int]:
        """Input topic -> next offset, as far as the state knows it."""

    def latest(self) -> int | None:
        """Log time, ms, than which nothing that was executed is newer; None: the state does not say."""

    def committed(self) -> None:
        """The store has the changes."""

    def rolled_back(self) -> None:
        """The transaction was aborted: as after the last commit."""


@dataclass(frozen=True)
class Kind:
    """A processor in general: what it reads, where its state is kept, and how an instance is opened."""

    name: str
    inputs: tuple[str, ...]
    changelog: str | None
    """Topic that holds the state; None: the input itself does, and a lost store reads it again from its beginning."""
    open: Callable[[Store, int], Processor]
    """(store, partition) -> instance."""
    skippable: frozenset[str] = frozenset()
    """Inputs whose records may be lost to retention while nobody reads; all others are refused then."""
    gather_ms: int = 0
    """How long input may wait for more of it: many small transactions are what costs the broker most."""
    plain_changelog: bool = False
    """The changelog is a public topic that holds the state's values and no positions; see `Table`. The group's offsets
    are the positions then."""

    @property
    def positions_in_changelog(self) -> bool:
        """Whether who takes a partition over reads in the changelog how far its inputs are executed.

        Then the group is only told of positions, for lags. Elsewhere each transaction sends them to the group, which
        refuses those of a member that it has put out, and with them the transaction.
        """
        return self.changelog is not None and not self.plain_changelog


class Transaction:
    """What a table's function may do with the record at hand."""

    def __init__(self, store: Store, reader: str) -> None:
        self._store, self._reader = store, reader
        self.dirty: dict[bytes, bytes | None] = {}
        self.out: list[Out] = []
        self._fresh: dict[bytes, bytes | None] = {}
        self._mark = 0

    def get(self, key: bytes) -> bytes | None:
        """The row of a key, or None."""
        for rows in (self._fresh, self.dirty):
            if key in rows:
                return rows[key]
        return self._store.get(key)

    def after(self, key: bytes) -> bytes | None:
        """The key behind a key in the store, as of the last commit; None: there is none."""
        found = next(self._store.scan(b"", start=key + b"\x00"), None)
        return None if found is None or found[0].startswith(META) else found[0]

    def put(self, key: bytes, value: bytes | None) -> None:
        """Set or (None) delete a row; it goes to the changelog topic under the same key."""
        self._fresh[key] = value

    def keep(self) -> None:
        """The record at hand is done."""
        self.dirty |= self._fresh
        self._fresh = {}
        self._mark = len(self.out)

    def drop(self) -> None:
        """Nothing of the record at hand stays."""
        self._fresh = {}
        del self.out[self._mark :]

    def emit(self, topic: str, key: bytes | None, value: bytes | None) -> None:
        """Write a record to the record's own partition of another topic."""
        self.out.append(Out(topic, key, value))

    def quarantine(self, record: Record, cause: str, detail: str) -> None:
        """Set the record aside."""
        data = record.value or b""
        self.out.append(Out(topics.QUARANTINE.name, None, codec.encode(Quarantined(
            topic=record.topic, partition=record.partition, offset=record.offset, at=record.at, reader=self._reader,
            cause=cause, detail=detail[: limits.TRACEBACK_MAX], key=(record.key or b"")[: limits.TEXT_MAX] or None,
            record=data[: limits.QUARANTINE_KEPT], size=len(data),
        ))))  # fmt: skip


@dataclass
class Table:
    """A processor made of a function; its rows are the values of its output topic."""

    name: str
    store: Store
    handle: Callable[[Record, Transaction], None]
    inputs: tuple[str, ...]
    _tx: Transaction = field(init=False)
    _positions: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self._tx = Transaction(self.store, self.name)
        self._positions = self._stored()

    def execute(self, record: Record, *, careful: bool = False) -> None:  # noqa: ARG002 - rows are bytes already
        try:
            self.handle(record, self._tx)
        except (InfrastructureError, MemoryError):
            raise  # of the store or the machine: no record is to blame, and none may be passed over
        except Exception as error:  # noqa: BLE001 - a defect of a fold must not stop the others
            self._tx.drop()
            self._tx.quarantine(record, "defect", f"{type(error).__name__}: {error}")
        self._tx.keep()
        self._positions[record.topic] = record.offset + 1

    def set_aside_unread(self, record: Record, detail: str) -> None:
        self._tx.quarantine(record, "killer", detail)
        self._tx.keep()
        self._positions[record.topic] = record.offset + 1

    def take_out(self) -> list[Out]:
        out, self._tx.out = self._tx.out, []
        self._tx.keep()
        return out

    def writes(self) -> dict[bytes, bytes | None]:
        marks: dict[bytes, bytes | None] = {
            META + b"input/" + topic.encode(): offset.to_bytes(8, "big") for topic, offset in self._positions.items()
        }
        return self._tx.dirty | marks

    def positions(self) -> dict[str, int]:
        return dict(self._positions)

    def latest(self) -> int | None:
        return None

    def committed(self) -> None:
        self._tx.dirty = {}

    def rolled_back(self) -> None:
        self._tx = Transaction(self.store, self.name)
        self._positions = self._stored()

    def _stored(self) -> dict[str, int]:
        found = {t: self.store.get(META + b"input/" + t.encode()) for t in self.inputs}
        return {t: int.from_bytes(v, "big") for t, v in found.items() if v is not None}


def changelog_rows(writes: Mapping[bytes, bytes | None]) -> dict[bytes, bytes | None]:
    """The part of a processor's writes that belongs in its changelog."""
    return {key: value for key, value in writes.items() if not key.startswith(META)}
