"""Consumers on Kafka: of chosen partitions, or as members of a group.

Positions are always given: nothing is ever reset silently.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)

from perdure.schemas.errors import Fenced, InfrastructureError, LogTruncated, Unreachable
from perdure.streams.kafka_connection import ASK_S, CALL_S, FORBIDDEN, GRANT, Connection, patiently, quiet
from perdure.streams.log import BEGIN, END, Record
from perdure.streams.log import TopicPartition as Where

_MUCH = 262_144
_CONSUMER: dict[str, Any] = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "auto.offset.reset": "error",
    "fetch.queue.backoff.ms": 10,
    "fetch.error.backoff.ms": 50,
    # A partition that has just been drained joins the next fetch; the one under way must not wait long for others.
    "fetch.wait.max.ms": 100,
    "queued.max.messages.kbytes": 16_384,
    "enable.partition.eof": True,
}


def _gathering(ms: int) -> dict[str, Any]:
    """Have the broker answer a fetch when so much time has passed, or much has come."""
    return {"fetch.wait.max.ms": ms, "fetch.min.bytes": _MUCH} if ms else {}


_OFFSETS = {BEGIN: OFFSET_BEGINNING, END: OFFSET_END}


def _record(log: Connection, message: Message) -> Record:
    _, at = message.timestamp()
    topic, partition, offset = message.topic(), message.partition(), message.offset()
    assert topic is not None, "a consumed message has a place"
    assert partition is not None, "a consumed message has a place"
    assert offset is not None, "a consumed message has a place"
    return Record(log.plain(topic), partition, offset, at, message.key(), message.value())


class _Consuming:
    """Reading with a consumer: records, ends of partitions, errors."""

    _consumer: Consumer

    def __init__(self, log: Connection) -> None:
        self._log = log
        self._ends: dict[Where, int] = {}

    def read(self, max_records: int, timeout_s: float) -> list[Record]:
        messages: list[Message] = []
        first = self._consumer.poll(timeout_s)
        if first is not None:
            messages.append(first)
            if max_records > 1:
                messages += self._consumer.consume(max_records - 1, 0.001)
        records: list[Record] = []
        for message in messages:
            error = message.error()
            if error is None:
                records.append(_record(self._log, message))
            else:
                self._take_in(error, message)
        return records

    def _take_in(self, error: KafkaError, message: Message) -> None:
        """What came in place of a record. Raises `LogTruncated` or another `InfrastructureError`."""
        if error.code() == KafkaError._PARTITION_EOF:
            self._ends[self._log.plain(str(message.topic())), message.partition() or 0] = message.offset() or 0
        elif error.code() == KafkaError._AUTO_OFFSET_RESET:
            topic, partition = self._log.plain(str(message.topic())), message.partition() or 0
            first, end = self._log.offsets(topic, partition)
            raise LogTruncated(
                f"{topic}/{partition} begins at {first} and ends at {end}, but its reader stands outside of that "
                f"({error.str()}): records were deleted before they were read, or the topic was replaced"
            )
        elif error.code() in FORBIDDEN:
            raise InfrastructureError(f"reading {message.topic()}: {error.str()}. {GRANT}")
        elif error.fatal():
            raise InfrastructureError(f"reading {message.topic()}: {error.str()}")
        # Else a lost connection and the like: librdkafka goes on by itself.

    def close(self) -> None:
        self._consumer.close()


class KafkaReader(_Consuming):
    """A consumer in no group."""

    def __init__(self, log: Connection, committed: bool, gather_ms: int = 0) -> None:
        super().__init__(log)
        self._nexts: dict[Where, int] = {}
        level = "read_committed" if committed else "read_uncommitted"
        own = {"group.id": f"{log.prefix}reader", "isolation.level": level, "error_cb": quiet}
        self._consumer = Consumer(log.config(_CONSUMER, _gathering(gather_ms), own))

    def assign(self, positions: Mapping[Where, int]) -> None:
        self._ends.clear()
        self._nexts = {w: o for w, o in positions.items() if o >= 0}
        self._consumer.assign(
            [TopicPartition(self._log.prefix + t, p, _OFFSETS.get(o, o)) for (t, p), o in positions.items()]
        )

    def read(self, max_records: int, timeout_s: float) -> list[Record]:
        found = super().read(max_records, timeout_s)
        for record in found:
            self._nexts[record.topic, record.partition] = record.offset + 1
        return found

    def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        # A read_committed consumer would answer with the last stable offset.
        return self._log.offsets(topic, partition)

    def caught_up(self, topic: str, partition: int, target: int) -> bool:
        where = (topic, partition)
        return max(self._ends.get(where, 0), self._nexts.get(where, 0)) >= target


def committed(log: Connection, group: str, wanted: Iterable[Where], *, settled: bool = True) -> dict[Where, int | None]:
    """Positions of a group; `settled`: those of open transactions are waited for, which Kafka may end only later.

    Asked by a client of its own: a consumer answers only from the thread that polls it. An `AdminClient` would ask too,
    but ends the process now and then when its broker does not answer (librdkafka's issue 4605).
    """
    partitions = [TopicPartition(log.prefix + t, p) for t, p in wanted]
    level = "read_committed" if settled else "read_uncommitted"
    own = {"group.id": group, "isolation.level": level, "error_cb": quiet}

    def ask() -> list[TopicPartition]:
        consumer = Consumer(log.config(_CONSUMER, own))
        try:
            return consumer.committed(partitions, ASK_S)
        finally:
            consumer.close()

    try:
        found = patiently(ask, f"no committed offsets of group {group}")
    except Unreachable as error:
        if not settled:
            raise
        committed(log, group, wanted, settled=False)  # raises, unless it is only the settling that does not come
        raise Unreachable(
            f"offsets of group {group} are in a transaction that has not ended for {CALL_S:g} s. If that lasts: "
            f"`kafka-transactions.sh find-hanging` (Kafka 4.3.0 to 4.4.0 lose ends: KAFKA-20734); if it finds none, "
            f"restart the broker that coordinates the group"
        ) from error
    return {(log.plain(f.topic), f.partition): f.offset if f.offset >= 0 else None for f in found}


class KafkaMember(_Consuming):
    """A consumer in a group: classic protocol, range assignor, static membership where an instance id is given.

    A call on the consumer waits for a poll under way on another thread, for as long as polls follow each other. So the
    consumer belongs to the thread that reads; what other threads ask of it is done at the beginning of the next read.
    """

    def __init__(
        self,
        log: Connection,
        group: str,
        topics: Iterable[str],
        instance: str | None,
        committed: bool,
        gather_ms: int,
        on_assigned: Callable[[list[Where]], None],
        on_revoked: Callable[[list[Where], bool], None],
    ) -> None:
        super().__init__(log)
        self.group = log.prefix + group
        own: dict[str, Any] = {
            "group.id": self.group, "partition.assignment.strategy": "range", "session.timeout.ms": 10_000,
            "heartbeat.interval.ms": 1_000, "isolation.level": "read_committed" if committed else "read_uncommitted",
            "max.poll.interval.ms": 300_000, "error_cb": quiet,
            # Fetched again only once the last answer was read, and then all that has come: who reads sets the pace.
            "queued.min.messages": 1, "fetch.queue.backoff.ms": 1,
        }  # fmt: skip
        self._paused: set[Where] = set()
        if instance is not None:
            own["group.instance.id"] = instance
        self._consumer = Consumer(log.config(_CONSUMER, _gathering(gather_ms), own))
        self._on_assigned, self._on_revoked = on_assigned, on_revoked
        self._asked: deque[Callable[[], Any]] = deque()
        self._at_assignment: dict[Where, int | None] = {}
        self._metadata: Any = None
        self._owner = 0
        self._consumer.subscribe(
            [log.prefix + t for t in topics],
            on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost,
        )  # fmt: skip

    def group_metadata(self) -> Any:
        """What fences a member of an older generation, as of the last poll: generations change in polls only."""
        return self._metadata

    def _take_in(self, error: KafkaError, message: Message) -> None:
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            where = self._log.plain(str(message.topic())), message.partition() or 0
            if where in self._paused:
                return  # fetched before it was paused: its owner says from where it is to be read
        if error.code() == KafkaError._FATAL:
            # Said once; after it the consumer reads nothing more.
            raise Fenced(f"{self.group}: the group has put this member out: {error.str()}")
        super()._take_in(error, message)

    def read(self, max_records: int, timeout_s: float) -> list[Record]:
        self._owner = threading.get_ident()
        while self._asked:
            self._asked.popleft()()
        found = super().read(max_records, timeout_s)
        self._metadata = self._consumer.consumer_group_metadata()
        return found

    def committed(self, wanted: Iterable[Where], *, settled: bool = True) -> dict[Where, int | None]:
        where, known = list(wanted), self._at_assignment.copy()
        if not settled and known.keys() >= set(where):
            return {w: known[w] for w in where}  # since then only this member has moved them
        return committed(self._log, self.group, where, settled=settled)

    def tell(self, reached: Mapping[Where, int]) -> None:
        offsets = [TopicPartition(self._log.prefix + t, p, o) for (t, p), o in reached.items()]
        with suppress(KafkaException):  # while there is no coordinator; nothing depends on it
            self._consumer.commit(offsets=offsets, asynchronous=True)

    def seek(self, topic: str, partition: int, offset: int) -> None:
        where = TopicPartition(self._log.prefix + topic, partition, _OFFSETS.get(offset, offset))
        # Right after an assignment the partition's fetcher may not have started yet.
        self._ask(lambda: patiently(lambda: self._consumer.seek(where), f"seek {topic}/{partition} to {offset}"))

    def pause(self, wanted: Iterable[Where]) -> None:
        where = list(wanted)
        self._paused.update(where)
        self._ask(lambda: self._consumer.pause([TopicPartition(self._log.prefix + t, p) for t, p in where]))

    def resume(self, wanted: Iterable[Where]) -> None:
        where = list(wanted)

        def resume() -> None:
            self._paused.difference_update(where)
            self._consumer.resume([TopicPartition(self._log.prefix + t, p) for t, p in where])

        self._ask(resume)

    def _ask(self, call: Callable[[], Any]) -> None:
        if threading.get_ident() == self._owner:
            call()
        else:
            self._asked.append(call)

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        # Where the group has no position the log's first record is meant; anything else out of range is an error.
        # A killed member's transaction may be open still: only its successor, who comes after this, puts an end to it.
        where = [(self._log.plain(p.topic), p.partition) for p in partitions]
        try:
            known = committed(self._log, self.group, where, settled=False)
        except Unreachable:
            known = {}  # who gets the partition asks again, patiently, and seeks before it reads
        self._at_assignment |= known
        for p in partitions:
            offset = known.get((self._log.plain(p.topic), p.partition))
            p.offset = OFFSET_BEGINNING if offset is None else offset
        consumer.assign(partitions)
        self._on_assigned([(self._log.plain(p.topic), p.partition) for p in partitions])

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._taken_away(consumer, partitions, lost=False)

    def _lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._taken_away(consumer, partitions, lost=True)

    def _taken_away(self, consumer: Consumer, partitions: list[TopicPartition], lost: bool) -> None:
        self._on_revoked([(self._log.plain(p.topic), p.partition) for p in partitions], lost)
        self._at_assignment.clear()
        self._asked.clear()  # by those who had the partitions, always all of them: a seek would now be an error
        consumer.unassign()
