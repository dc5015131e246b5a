"""Reads a namespace's topics for the audit: by plain consumers, partition by partition, with bounded memory.

Of each partition the changelog is read first, up to the end of a transaction, then what belongs to the same
transactions in the other topics. What the engine writes is read committed; `task-commands` holds what anybody sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from confluent_kafka import OFFSET_INVALID, Consumer, KafkaError, KafkaException, Message, TopicPartition

from perdure.projections.audit import Audit
from perdure.projections.audit_partition import CHANGELOG, COMMANDS, EVENTS, QUARANTINE, READ, REPLIES
from perdure.projections.audit_records import LogRecord
from perdure.schemas import topics
from perdure.schemas.errors import ConfigurationError, InfrastructureError, LogTruncated, Unreachable

CONFIG = topics.CONFIG.name
_ASK_S = 10.0
_STILL_S = 90.0
"""Without a record for so long, what is missing does not come: longer than any transaction is left open."""
_SLICE = 2_000
_BACKLOG = 20_000
_TALK_S = 2.0
_OPTIONS: dict[str, Any] = {
    "group.id": "perdure-audit", "enable.auto.commit": False, "enable.auto.offset.store": False,
    "auto.offset.reset": "error", "enable.partition.eof": True, "queued.max.messages.kbytes": 16_384,
    "fetch.wait.max.ms": 50, "fetch.queue.backoff.ms": 10,
}  # fmt: skip


_MOVING = frozenset(
    {
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError._TRANSPORT,
    }
)
"""What a client is told that knows an older leader; it asks for the present one by itself."""
_AGAIN_S = 0.1


def _watermarks(consumer: Consumer, where: TopicPartition) -> tuple[int, int]:
    """(first offset kept, end) as the consumer may see it. Raises `Unreachable` after 10 s."""
    deadline = time.monotonic() + _ASK_S
    while True:
        try:
            low, high = consumer.get_watermark_offsets(where, timeout=_ASK_S)
        except KafkaException as error:
            if error.args[0].code() not in _MOVING or time.monotonic() > deadline:
                raise Unreachable(f"no offsets of {where.topic}: {error.args[0].str()}") from error
            time.sleep(_AGAIN_S)
        else:
            return low, high


@dataclass(slots=True)
class _Record:
    """A record as it was read."""

    topic: str
    partition: int
    offset: int
    at: int
    key: bytes | None
    value: bytes | None


class _Topic:
    """One topic, one partition at a time, read on from where it was."""

    def __init__(self, name: str, prefix: str, options: Mapping[str, Any]) -> None:
        self.name, self._prefix = name, prefix
        level = "read_uncommitted" if name == COMMANDS else "read_committed"
        self._consumer = Consumer({**_OPTIONS, "isolation.level": level, "error_cb": lambda _: None, **options})
        self._positions: dict[int, int] = {}
        self._partition = self._target = 0
        self._moved = 0.0

    def _where(self, partition: int, offset: int = OFFSET_INVALID) -> TopicPartition:
        return TopicPartition(self._prefix + self.name, partition, offset)

    def bounds(self, partition: int) -> tuple[int, int]:
        """(first offset kept, end); read committed, the end is that of the last transaction that has ended."""
        return _watermarks(self._consumer, self._where(partition))

    def partitions(self) -> int:
        """How many the topic has."""
        name = self._prefix + self.name
        try:
            found = self._consumer.list_topics(name, timeout=_ASK_S).topics[name]
        except KafkaException as error:
            raise Unreachable(f"no metadata of {name}: {error.args[0].str()}") from error
        if found.error is not None or not found.partitions:
            raise ConfigurationError(f"there is no topic {name}: is the namespace {self._prefix!r} the right one?")
        return len(found.partitions)

    def begin(self, partition: int, target: int) -> None:
        """Read a partition from where it was left up to an offset."""
        self._partition, self._target, self._moved = partition, target, time.monotonic()
        if partition not in self._positions:
            self._positions[partition] = self.bounds(partition)[0]
        if not self.done:
            self._consumer.assign([self._where(partition, self._positions[partition])])

    def start(self, partition: int, first: int) -> None:
        """Read a partition from here: what is deleted from now on is missed, not passed over."""
        self._positions[partition] = first

    def position(self, partition: int) -> int:
        """Next offset to read."""
        return self._positions.get(partition, 0)

    @property
    def done(self) -> bool:
        """Whether the target is reached."""
        return self._positions[self._partition] >= self._target

    def read(self) -> list[LogRecord]:
        """The next records, none beyond the target. Raises `LogTruncated` or `InfrastructureError`."""
        found: list[LogRecord] = []
        for message in self._consumer.consume(_SLICE, 0.2):
            if message.partition() not in (None, self._partition):
                continue  # of the partition before
            offset = self._offset(message)
            if message.error() is None and offset < self._target:
                found.append(_Record(
                    self.name, self._partition, offset, message.timestamp()[1], message.key(), message.value()
                ))  # fmt: skip
                offset += 1
            self._positions[self._partition] = max(self._positions[self._partition], min(offset, self._target))
        now = time.monotonic()
        self._moved = now if found else self._moved
        if not self.done and now - self._moved > _STILL_S:
            raise InfrastructureError(
                f"{self.name}/{self._partition} has stood still at {self._positions[self._partition]} of "
                f"{self._target} for {_STILL_S:.0f} s: a transaction on it is open, or its broker is away"
            )
        return found

    def _offset(self, message: Message) -> int:
        """Of a record, or of the end of what can be read."""
        error, offset = message.error(), message.offset()
        if error is None or error.code() == KafkaError._PARTITION_EOF:
            return -1 if offset is None else offset
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            raise LogTruncated(f"{self.name}/{self._partition}: records were deleted before they were audited")
        if error.fatal():
            raise InfrastructureError(f"reading {self.name}: {error.str()}")
        return -1

    def close(self) -> None:
        self._consumer.close()


class AuditReader:
    """Feeds an audit with the topics of a namespace. `options` are librdkafka's own. Raises `Unreachable`.

    progress: told now and then what is being read, and how much of it there is.
    """

    def __init__(
        self, bootstrap: str, prefix: str, options: Mapping[str, Any], progress: Callable[[str], None]
    ) -> None:
        client = {"bootstrap.servers": bootstrap, "enable.metrics.push": False, "log_level": 0, **options}
        self._topics = {name: _Topic(name, prefix, client) for name in (CONFIG, *READ)}
        # The end of events that open transactions hide as well: what a changelog's transaction wrote lies before it.
        self._progress, self._talked = progress, time.monotonic()
        self._ends = Consumer({**_OPTIONS, "isolation.level": "read_uncommitted", **client})
        self._prefix = prefix
        self._partitions = self._topics[COMMANDS].partitions()
        starts = {(t, p): self._topics[t].bounds(p)[0] for t in READ for p in range(self._partitions)}
        for (topic, partition), first in starts.items():
            self._topics[topic].start(partition, first)
        self.audit = Audit(starts)

    def round(self) -> None:
        """Read all that is there now, and check it. Blocks as long as that takes."""
        self._read_all(CONFIG, 0, self._topics[CONFIG].bounds(0)[1])
        for partition in range(self._partitions):
            self._read_partition(partition)
        self.audit.check()

    def _read_partition(self, partition: int) -> None:
        self._read_all(CHANGELOG, partition, self._topics[CHANGELOG].bounds(partition)[1])
        mine = self.audit.partition(partition)
        ends = {name: self._end(name, partition) for name in (REPLIES, EVENTS, QUARANTINE)}
        self._read_all(CONFIG, 0, self._topics[CONFIG].bounds(0)[1])  # a schema is published before it is used
        ends[COMMANDS] = mine.rows.position or 0
        self._read_all(REPLIES, partition, ends.pop(REPLIES))
        for name, end in ends.items():
            self._topics[name].begin(partition, end)
        while unread := {name for name in ends if not self._topics[name].done}:
            for name in unread:
                if mine.backlog(name) < _BACKLOG:
                    self.audit.feed(self._topics[name].read())
            mine.settle(unread)
            self._talk(partition, COMMANDS, ends[COMMANDS])
        mine.settle()

    def _end(self, name: str, partition: int) -> int:
        return _watermarks(self._ends, TopicPartition(self._prefix + name, partition))[1]

    def _read_all(self, name: str, partition: int, target: int) -> None:
        topic = self._topics[name]
        topic.begin(partition, target)
        while not topic.done:
            self.audit.feed(topic.read())
            self._talk(partition, name, target)

    def _talk(self, partition: int, name: str, target: int) -> None:
        if time.monotonic() - self._talked > _TALK_S:
            self._talked = time.monotonic()
            at = self._topics[name].position(partition)
            total = self.audit.records
            self._progress(f"partition {partition + 1} of {self._partitions}: {name} {at:,} of {target:,}; "
                           f"{total:,} records in all")  # fmt: skip

    def close(self) -> None:
        """Stop reading."""
        for topic in self._topics.values():
            topic.close()
        self._ends.close()
