"""The log, as everything else in Perdure sees it: an interface with a Kafka and an in-memory implementation.

Topics are named without the namespace's prefix. An offset of x means "the next record to read is x". `at` is the
record's log-append time in ms. One conformance suite (tests/conformance/test_log.py) runs on both implementations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from perdure.schemas import topics
from perdure.schemas.errors import InfrastructureError, Unreachable, ValueTooLarge

BEGIN = -2
END = -1
_READ_AT_ONCE = 2_000
_APPEND_S = 15.0
_LOOK_S = 10.0
STILL_S = 90.0

TopicPartition = tuple[str, int]
OnAck = Callable[[int, InfrastructureError | None], None]
"""Called with the record's offset (-1 on error) and the error; on a thread of the log's own."""


@dataclass(slots=True)
class Record:
    """One record of a topic partition."""

    topic: str
    partition: int
    offset: int
    at: int
    key: bytes | None
    value: bytes | None


class TransactionAborted(InfrastructureError):
    """The transaction is undone as a whole; the same input may be executed again with the same producer."""

    code = "aborted"


class OutcomeUnknown(InfrastructureError):
    """Nobody can say whether the transaction was committed: take a new producer of the same name and read back."""

    code = "outcome_unknown"


def check_size(topic: str, key: bytes | None, value: bytes | None) -> None:
    """Raise `ValueTooLarge` for a record that the topic would not take: a broker says so too late and too vaguely."""
    limit = topics.BY_NAME[topic].record_max
    size = len(value or b"") + len(key or b"")
    if size > limit:
        raise ValueTooLarge(f"a record of {size:,} bytes for {topic}: it takes {limit:,}", field="record")


class Producer(Protocol):
    """Appends without transactions: idempotent, `acks=all`, ordered per partition. Thread-safe."""

    def append(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, on_ack: OnAck | None = None
    ) -> None:
        """Hand a record over; returns at once, `on_ack` follows. Blocks only while the local queue is full.

        Raises `ValueTooLarge` for a record above the producer's limit.
        """

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything handed over is acknowledged or failed; False if `timeout_s` ran out."""

    def close(self) -> None:
        """Flush for at most 5 s and let go."""


class Member(Protocol):
    """A consumer that shares the partitions of some topics with the other members of its group."""

    def read(self, max_records: int, timeout_s: float) -> list[Record]:
        """At most `max_records`; waits up to `timeout_s` for the first, not for more. Runs the rebalance callbacks."""

    def committed(self, wanted: Iterable[TopicPartition], *, settled: bool = True) -> dict[TopicPartition, int | None]:
        """The group's committed offsets; None where there is none. Blocks for some 10 s, then raises `Unreachable`;
        settled, for as long again, to say whether it is a transaction that they wait for.

        settled: those in transactions that have not ended are waited for, and not passed over.
        """

    def tell(self, reached: Mapping[TopicPartition, int]) -> None:
        """Let the group's offsets say how far its members are, for who looks at them. Returns at once.

        For the thread that reads. May come to nothing: then the next one says more.
        """

    def seek(self, topic: str, partition: int, offset: int) -> None:
        """Read on from `offset`; records of the partition already handed to the local queue are dropped."""

    def pause(self, wanted: Iterable[TopicPartition]) -> None:
        """Stop fetching these partitions, keeping them assigned."""

    def resume(self, wanted: Iterable[TopicPartition]) -> None:
        """Fetch these partitions again."""

    def close(self) -> None:
        """Leave, or with a static instance id just stop."""


class Transactional(Protocol):
    """A transactional producer of a stable name; creating it fences every older one of that name.

    Not thread-safe, but its methods may be called from different threads in turn.
    """

    def begin(self) -> None:
        """Begin a transaction.

        Raises `Fenced`, or `OutcomeUnknown` where a new producer has to take over first (see `commit`): who goes on has
        to read what was committed before.
        """

    def append(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, on_ack: OnAck | None = None
    ) -> None:
        """Add a record to the open transaction."""

    def append_all(self, topic: str, partition: int, records: Sequence[tuple[bytes | None, bytes | None]]) -> None:
        """Add (key, value) records to the open transaction, in order."""

    def commit(self, member: Member, offsets: Mapping[TopicPartition, int]) -> None:
        """Commit records and input offsets as one, if there are any: then a member that its group has put out is
        refused as well. Blocks until it is known.

        Raises `TransactionAborted`, `Fenced` or `OutcomeUnknown`; after the latter two this producer is useless.
        """

    def abort(self) -> None:
        """Undo the open transaction. Raises `Fenced` or `OutcomeUnknown`."""

    def close(self) -> None:
        """Let go; an open transaction is aborted by the broker later."""


class Reader(Protocol):
    """Reads chosen partitions from chosen offsets, in no group."""

    def assign(self, positions: Mapping[TopicPartition, int]) -> None:
        """Read these partitions and no others; an offset, BEGIN or END for each."""

    def read(self, max_records: int, timeout_s: float) -> list[Record]:
        """At most `max_records`; waits up to `timeout_s` for the first, not for more."""

    def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        """(first offset kept, offset after the last record appended, uncommitted ones included). Blocks, for each of
        them for 10 s at the most, then raises `Unreachable`.
        """

    def caught_up(self, topic: str, partition: int, target: int) -> bool:
        """Whether everything below `target` that can be read has been read (holes and markers are passed over)."""

    def close(self) -> None:
        """Let go."""


class Log(Protocol):
    """A namespace's topics."""

    @property
    def partitions(self) -> int:
        """The pinned partition count of the partitioned topics."""

    def producer(self) -> Producer:
        """A new producer without transactions."""

    def transactional(self, name: str) -> Transactional:
        """A new transactional producer; blocks until older ones of that name are fenced (seconds at the most)."""

    def reader(self, *, committed: bool = True, gather_ms: int = 0) -> Reader:
        """A new reader; `committed=False` also reads open and aborted transactions.

        `gather_ms`: how long records may wait for others before they are read; much cheaper for broker and reader.
        """

    def member(
        self,
        group: str,
        topics: Iterable[str],
        *,
        instance: str | None = None,
        committed: bool = True,
        gather_ms: int = 0,
        on_assigned: Callable[[list[TopicPartition]], None],
        on_revoked: Callable[[list[TopicPartition], bool], None],
    ) -> Member:
        """Join a group. `on_revoked` is told whether the partitions are lost already (nothing may be committed).

        `gather_ms`: see `reader`.
        """

    def committed(self, group: str, wanted: Iterable[TopicPartition]) -> dict[TopicPartition, int | None]:
        """A group's committed offsets, for those who are not in it; None where there is none. As `Member.committed`."""

    def topic_id(self, topic: str) -> str:
        """An id that changes when the topic is deleted and created again."""


def records_of(log: Log, topic: str, partition: int, *, first: int = BEGIN, committed: bool = True) -> Iterator[Record]:
    """What a partition of a topic holds at this moment, from `first` on, or from its beginning. Blocks while it reads.

    Raises `Unreachable`, also when nothing more has come for 90 s: longer than any transaction is left open.
    """
    reader = log.reader(committed=committed)
    try:
        begin, end = reader.bounds(topic, partition)
        reader.assign({(topic, partition): max(first, begin)})  # by number: BEGIN has to be looked up first
        moved = time.monotonic()
        while not reader.caught_up(topic, partition, end):
            found = reader.read(_READ_AT_ONCE, 0.2)
            for record in found:
                if record.offset >= end:
                    return
                yield record
            now = time.monotonic()
            moved = now if found else moved
            if now - moved > STILL_S:
                raise Unreachable(f"{topic}/{partition} stands still before {end}: a transaction on it is open")
    finally:
        reader.close()


def time_of(reader: Reader, topic: str, partition: int, offset: int) -> int | None:
    """Log time, ms, of the record at an offset; None if there is none, or none any more, or the mark of a transaction.

    For a reader of uncommitted records; assigns it. Blocks for milliseconds. Raises `Unreachable` after 10 s.
    """
    first, end = reader.bounds(topic, partition)
    if not first <= offset < end:
        return None
    reader.assign({(topic, partition): offset})
    deadline = time.monotonic() + _LOOK_S
    while not reader.caught_up(topic, partition, offset + 1):
        for record in reader.read(1, 0.2):
            return record.at if record.offset == offset else None
        if time.monotonic() > deadline:
            raise Unreachable(f"{topic}/{partition} could not be read at {offset} within {_LOOK_S:g} s")
    return None


def append_one(log: Log, topic: str, partition: int, key: bytes | None, value: bytes) -> None:
    """Append a record and wait until the log has it. Raises `Unreachable` after 15 s, or what it was refused with."""
    refused: list[InfrastructureError] = []

    def heard(_offset: int, error: InfrastructureError | None) -> None:
        if error is not None:
            refused.append(error)

    producer = log.producer()
    try:
        producer.append(topic, partition, key, value, heard)
        done = producer.flush(_APPEND_S)
    finally:
        producer.close()
    if refused:
        raise refused[0]
    if not done:
        raise Unreachable(f"a record for {topic}/{partition} was not acknowledged within {_APPEND_S:g} s")
