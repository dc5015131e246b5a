"""The log on Kafka, by confluent-kafka.

Producers are idempotent with `acks=all`; transactional ones never buffer for long (`linger.ms=0`, Nagle off), because a
commit flushes anyway. Positions are always given: nothing is ever reset silently.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    Consumer,
    ConsumerGroupTopicPartitions,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from perdure.schemas import limits
from perdure.schemas.errors import Fenced, InfrastructureError, Unreachable, ValueTooLarge
from perdure.streams import topology
from perdure.streams.log import BEGIN, END, OnAck, OutcomeUnknown, Record, TransactionAborted
from perdure.streams.log import TopicPartition as Where

_SLOW_COMMIT_S = 0.35
"""librdkafka repeats a lost EndTxn by itself, 0.8 x retry.backoff.ms later at the earliest. A commit this slow may have
been repeated, and the first request may still arrive: inside the next transaction, unless a new epoch fences it."""
_CALL_S = 10.0

_COMMON: dict[str, Any] = {
    "enable.metrics.push": False,
    "socket.nagle.disable": True,
    "reconnect.backoff.ms": 50,
    "reconnect.backoff.max.ms": 1_000,
    "log_level": 0,
}
_PRODUCER: dict[str, Any] = {
    "enable.idempotence": True,
    "acks": "all",
    "linger.ms": 0,
    "partitioner": "murmur2_random",
    "message.max.bytes": limits.TOPIC_RECORD_MAX + 65_536,
    "queue.buffering.max.messages": 500_000,
}
_CONSUMER: dict[str, Any] = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "auto.offset.reset": "error",
    "fetch.queue.backoff.ms": 10,
    "fetch.error.backoff.ms": 50,
    "fetch.wait.max.ms": 500,
    "queued.max.messages.kbytes": 16_384,
    "enable.partition.eof": True,
}
_OFFSETS = {BEGIN: OFFSET_BEGINNING, END: OFFSET_END}


class KafkaLog:
    """A namespace's topics on a Kafka cluster.

    `options` are librdkafka's own and go to every client (SASL, TLS). `partitions=None` reads the pinned count from
    `config/topology`. Raises `Unreachable` or `ConfigurationError`.
    """

    def __init__(
        self,
        bootstrap: str,
        prefix: str = "perdure.",
        *,
        options: Mapping[str, Any] | None = None,
        partitions: int | None = None,
    ) -> None:
        self.bootstrap, self.prefix = bootstrap, prefix
        self._lock = threading.Lock()
        self._admin: AdminClient | None = None
        self._options: dict[str, Any] = {**_COMMON, "bootstrap.servers": bootstrap, **(options or {})}
        self._partitions = partitions if partitions is not None else topology.pinned_partitions(self)

    @property
    def partitions(self) -> int:
        return self._partitions

    def producer(self) -> KafkaProducer:
        return KafkaProducer(self)

    def transactional(self, name: str) -> KafkaTransactional:
        return KafkaTransactional(self, name)

    def reader(self, *, committed: bool = True) -> KafkaReader:
        return KafkaReader(self, committed)

    def member(
        self,
        group: str,
        topics: Iterable[str],
        *,
        instance: str | None = None,
        committed: bool = True,
        on_assigned: Callable[[list[Where]], None],
        on_revoked: Callable[[list[Where], bool], None],
    ) -> KafkaMember:
        return KafkaMember(self, group, topics, instance, committed, on_assigned, on_revoked)

    def topic_id(self, topic: str) -> str:
        admin = self.admin()
        name = self.prefix + topic
        description = admin.describe_topics(TopicCollection([name]), request_timeout=_CALL_S)[name]
        try:
            return str(description.result(_CALL_S).topic_id)
        except KafkaException as error:
            raise Unreachable(f"no description of topic {name} from {self.bootstrap}: {error}") from error

    def admin(self) -> AdminClient:
        """The log's client for topics, offsets and cluster; thread-safe."""
        with self._lock:
            if self._admin is None:
                self._admin = AdminClient({k: v for k, v in self._options.items() if k != "enable.metrics.push"})
            return self._admin

    def offsets(self, topic: str, partition: int) -> tuple[int, int]:
        """(first offset kept, offset after the last record appended, uncommitted ones included)."""
        where = TopicPartition(self.prefix + topic, partition)

        def ask(spec: OffsetSpec) -> int:
            asked = self.admin().list_offsets(
                {where: spec}, isolation_level=IsolationLevel.READ_UNCOMMITTED, request_timeout=_CALL_S
            )
            return int(asked[where].result(_CALL_S).offset)

        what = f"no offsets of {where.topic}/{partition} from {self.bootstrap}"
        first = _patiently(lambda: ask(OffsetSpec.earliest()), what)  # type: ignore[no-untyped-call]
        end = _patiently(lambda: ask(OffsetSpec.latest()), what)  # type: ignore[no-untyped-call]
        return first, end

    def config(self, *parts: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of one client: the parts, with the user's own on top."""
        merged: dict[str, Any] = {}
        for part in parts:
            merged |= part
        return merged | self._options

    def plain(self, topic: str) -> str:
        """A topic's name without the prefix."""
        return topic[len(self.prefix) :]


def _quiet(_: KafkaError) -> None:
    """librdkafka reports every lost connection here and mends it by itself; what fails for good fails its call."""


def _record(log: KafkaLog, message: Message) -> Record:
    _, at = message.timestamp()
    topic, partition, offset = message.topic(), message.partition(), message.offset()
    assert topic is not None, "a consumed message has a place"
    assert partition is not None, "a consumed message has a place"
    assert offset is not None, "a consumed message has a place"
    return Record(log.plain(topic), partition, offset, at, message.key(), message.value())


def _hand_over(
    producer: Producer, topic: str, partition: int, key: bytes | None, value: bytes | None, on_ack: OnAck | None
) -> None:
    """Produce, waiting while the local queue is full. Raises `ValueTooLarge`."""
    callback = None if on_ack is None else _acknowledge(on_ack)
    while True:
        try:
            producer.produce(topic, value=value, key=key, partition=partition, on_delivery=callback)
            return
        except BufferError:
            producer.poll(0.05)
        except KafkaException as error:
            if error.args[0].code() == KafkaError.MSG_SIZE_TOO_LARGE:
                raise ValueTooLarge(f"a record of {len(value or b''):,} bytes for {topic} is larger than a topic takes",
                                    field="record") from error  # fmt: skip
            raise _sorted(error, f"append to {topic}") from error


def _acknowledge(on_ack: OnAck) -> Callable[[KafkaError | None, Message], None]:
    def delivered(error: KafkaError | None, message: Message) -> None:
        if error is None:
            on_ack(message.offset() or 0, None)
        else:
            on_ack(-1, InfrastructureError(f"not appended to {message.topic()}: {error.str()}"))

    return delivered


def _sorted(error: KafkaException, doing: str) -> InfrastructureError:
    """A Kafka error as one of ours."""
    cause: KafkaError = error.args[0]
    text = f"{doing}: {cause.str()} ({cause.name()})"
    if cause.fatal() or cause.code() in (
        KafkaError._FENCED,
        KafkaError.PRODUCER_FENCED,
        KafkaError.INVALID_PRODUCER_EPOCH,
    ):
        fenced = cause.code() in (KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH)
        return Fenced(f"{text}: another producer of this name has taken over") if fenced else OutcomeUnknown(text)
    if cause.txn_requires_abort():
        return TransactionAborted(text)
    return OutcomeUnknown(text)


_PASSING = frozenset(
    {
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.NOT_COORDINATOR,
        KafkaError._TIMED_OUT,
        KafkaError._TRANSPORT,
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._STATE,
    }
)
T = TypeVar("T")


def _patiently(call: Callable[[], T], what: str) -> T:
    """Call, and again while brokers move or start. Raises `Unreachable` after 10 s."""
    deadline = time.monotonic() + _CALL_S
    while True:
        try:
            return call()
        except KafkaException as error:
            if error.args[0].code() not in _PASSING or time.monotonic() > deadline:
                raise Unreachable(f"{what}: {error.args[0].str()}") from error
            time.sleep(0.02)


class KafkaProducer:
    """An idempotent producer and the thread that serves its acknowledgements."""

    def __init__(self, log: KafkaLog) -> None:
        self._log = log
        self._producer = Producer(
            log.config(_PRODUCER, {"message.timeout.ms": 86_400_000, "error_cb": _quiet, "linger.ms": 0})
        )
        self._open = True
        self._thread = threading.Thread(target=self._serve, name="kafka-acks", daemon=True)
        self._thread.start()

    def append(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, on_ack: OnAck | None = None
    ) -> None:
        _hand_over(self._producer, self._log.prefix + topic, partition, key, value, on_ack)

    def flush(self, timeout_s: float) -> bool:
        return int(self._producer.flush(timeout_s)) == 0

    def close(self) -> None:
        self._producer.flush(5.0)
        self._open = False
        self._thread.join(5.0)

    def _serve(self) -> None:
        while self._open:
            self._producer.poll(0.2)


class KafkaTransactional:
    """A transactional producer; takes a fresh epoch by itself when a commit was slow (see `_SLOW_COMMIT_S`)."""

    def __init__(self, log: KafkaLog, name: str) -> None:
        self._log, self._name = log, name
        self._suspect = False
        self._producer = self._create()

    def _create(self) -> Producer:
        producer = Producer(self._log.config(_PRODUCER, {
            "transactional.id": self._log.prefix + self._name, "transaction.timeout.ms": 15_000,
            "message.timeout.ms": 15_000, "retry.backoff.ms": 500, "error_cb": _quiet,
        }))  # fmt: skip
        try:
            producer.init_transactions(60.0)
        except KafkaException as error:
            raise Unreachable(
                f"no transactions for {self._name} on {self._log.bootstrap}: {error.args[0].str()}"
            ) from error
        return producer

    def begin(self) -> None:
        if self._suspect:
            self._producer = self._create()
            self._suspect = False
        self._call("begin", self._producer.begin_transaction)

    def append(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, on_ack: OnAck | None = None
    ) -> None:
        _hand_over(self._producer, self._log.prefix + topic, partition, key, value, on_ack)

    def append_all(self, topic: str, partition: int, records: Sequence[tuple[bytes | None, bytes | None]]) -> None:
        messages: list[dict[str, Any]] = [{"key": k, "value": v} for k, v in records]
        if self._producer.produce_batch(self._log.prefix + topic, messages, partition) != len(messages):
            first = next(m["_error"] for m in messages if "_error" in m)
            raise TransactionAborted(f"not all of {len(messages)} records for {topic} could be handed over: {first}")

    def commit(self, member: Any, offsets: Mapping[Where, int]) -> None:
        positions = [TopicPartition(self._log.prefix + t, p, o) for (t, p), o in offsets.items()]
        self._call(
            "send offsets",
            lambda: self._producer.send_offsets_to_transaction(positions, member.group_metadata(), _CALL_S),
        )
        self._producer.flush(15.0)
        began = time.monotonic()
        self._call("commit", lambda: self._producer.commit_transaction(30.0))
        self._suspect = time.monotonic() - began >= _SLOW_COMMIT_S

    def abort(self) -> None:
        began = time.monotonic()
        self._call("abort", lambda: self._producer.abort_transaction(30.0))
        self._suspect = time.monotonic() - began >= _SLOW_COMMIT_S

    def close(self) -> None:
        self._producer.purge()
        self._producer.flush(0.5)

    def _call(self, doing: str, call: Callable[[], Any]) -> None:
        """Call, and again while the error is retriable. Raises ours."""
        deadline = time.monotonic() + 60.0
        while True:
            try:
                call()
                return
            except KafkaException as error:
                if not (error.args[0].retriable() and time.monotonic() < deadline):
                    raise _sorted(error, f"{doing} ({self._name})") from error


class _Consuming:
    """Reading with a consumer: records, ends of partitions, errors."""

    _consumer: Consumer

    def __init__(self, log: KafkaLog) -> None:
        self._log = log
        self._ends: dict[Where, int] = {}
        self._nexts: dict[Where, int] = {}

    def read(self, max_records: int, timeout_s: float) -> list[Record]:
        messages: list[Message] = []
        first = self._consumer.poll(timeout_s)
        if first is not None:
            messages.append(first)
            if max_records > 1:
                messages += self._consumer.consume(max_records - 1, 0.001)
        return [r for m in messages if (r := self._sort(m)) is not None]

    def _sort(self, message: Message) -> Record | None:
        error = message.error()
        if error is None:
            record = _record(self._log, message)
            self._nexts[record.topic, record.partition] = record.offset + 1
            return record
        if error.code() == KafkaError._PARTITION_EOF:
            self._ends[self._log.plain(str(message.topic())), message.partition() or 0] = message.offset() or 0
            return None
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            raise InfrastructureError(
                f"offset of {message.topic()}/{message.partition()} is outside of the log: {error.str()}. Records were "
                f"deleted before they were read, or the topic was replaced"
            )
        if error.fatal() or error.code() in (
            KafkaError.TOPIC_AUTHORIZATION_FAILED,
            KafkaError.GROUP_AUTHORIZATION_FAILED,
        ):
            raise InfrastructureError(f"reading {message.topic()}: {error.str()}")
        return None  # a lost connection and the like: librdkafka goes on by itself

    def close(self) -> None:
        self._consumer.close()


class KafkaReader(_Consuming):
    """A consumer in no group."""

    def __init__(self, log: KafkaLog, committed: bool) -> None:
        super().__init__(log)
        level = "read_committed" if committed else "read_uncommitted"
        own = {"group.id": f"{log.prefix}reader", "isolation.level": level, "error_cb": _quiet}
        self._consumer = Consumer(log.config(_CONSUMER, own))

    def assign(self, positions: Mapping[Where, int]) -> None:
        self._ends.clear()
        self._nexts = {w: o for w, o in positions.items() if o >= 0}
        self._consumer.assign(
            [TopicPartition(self._log.prefix + t, p, _OFFSETS.get(o, o)) for (t, p), o in positions.items()]
        )

    def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        # A read_committed consumer would answer with the last stable offset.
        return self._log.offsets(topic, partition)

    def caught_up(self, topic: str, partition: int, target: int) -> bool:
        where = (topic, partition)
        return max(self._ends.get(where, 0), self._nexts.get(where, 0)) >= target


class KafkaMember(_Consuming):
    """A consumer in a group: classic protocol, range assignor, static membership where an instance id is given.

    A call on the consumer waits for a poll under way on another thread, for as long as polls follow each other. So the
    consumer belongs to the thread that reads; what other threads ask of it is done at the beginning of the next read.
    """

    def __init__(
        self,
        log: KafkaLog,
        group: str,
        topics: Iterable[str],
        instance: str | None,
        committed: bool,
        on_assigned: Callable[[list[Where]], None],
        on_revoked: Callable[[list[Where], bool], None],
    ) -> None:
        super().__init__(log)
        self.group = log.prefix + group
        own: dict[str, Any] = {
            "group.id": self.group, "partition.assignment.strategy": "range", "session.timeout.ms": 10_000,
            "heartbeat.interval.ms": 1_000, "isolation.level": "read_committed" if committed else "read_uncommitted",
            "max.poll.interval.ms": 300_000, "error_cb": _quiet, "fetch.wait.max.ms": 100,
        }  # fmt: skip
        if instance is not None:
            own["group.instance.id"] = instance
        self._consumer = Consumer(log.config(_CONSUMER, own))
        self._on_assigned, self._on_revoked = on_assigned, on_revoked
        self._asked: deque[Callable[[], Any]] = deque()
        self._metadata: Any = None
        self._owner = 0
        self._consumer.subscribe(
            [log.prefix + t for t in topics],
            on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost,
        )  # fmt: skip

    def group_metadata(self) -> Any:
        """What fences a member of an older generation, as of the last poll: generations change in polls only."""
        return self._metadata

    def read(self, max_records: int, timeout_s: float) -> list[Record]:
        self._owner = threading.get_ident()
        while self._asked:
            self._asked.popleft()()
        found = super().read(max_records, timeout_s)
        self._metadata = self._consumer.consumer_group_metadata()
        return found

    def committed(self, wanted: Iterable[Where]) -> dict[Where, int | None]:
        # Asked by a client of its own: a consumer answers only from the thread that polls it.
        asked = ConsumerGroupTopicPartitions(self.group, [TopicPartition(self._log.prefix + t, p) for t, p in wanted])
        answer = self._log.admin().list_consumer_group_offsets([asked], require_stable=True, request_timeout=_CALL_S)
        found = _patiently(lambda: answer[self.group].result(), f"no committed offsets of group {self.group}")
        return {
            (self._log.plain(f.topic), f.partition): f.offset if f.offset >= 0 else None
            for f in found.topic_partitions or []
        }

    def seek(self, topic: str, partition: int, offset: int) -> None:
        where = TopicPartition(self._log.prefix + topic, partition, _OFFSETS.get(offset, offset))
        # Right after an assignment the partition's fetcher may not have started yet.
        self._ask(lambda: _patiently(lambda: self._consumer.seek(where), f"seek {topic}/{partition} to {offset}"))

    def pause(self, wanted: Iterable[Where]) -> None:
        partitions = [TopicPartition(self._log.prefix + t, p) for t, p in wanted]
        self._ask(lambda: self._consumer.pause(partitions))

    def resume(self, wanted: Iterable[Where]) -> None:
        partitions = [TopicPartition(self._log.prefix + t, p) for t, p in wanted]
        self._ask(lambda: self._consumer.resume(partitions))

    def _ask(self, call: Callable[[], Any]) -> None:
        if threading.get_ident() == self._owner:
            call()
        else:
            self._asked.append(call)

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        # Where the group has no position the log's first record is meant; anything else out of range is an error.
        known = self.committed([(self._log.plain(p.topic), p.partition) for p in partitions])
        for p in partitions:
            offset = known[self._log.plain(p.topic), p.partition]
            p.offset = OFFSET_BEGINNING if offset is None else offset
        consumer.assign(partitions)
        self._on_assigned([(self._log.plain(p.topic), p.partition) for p in partitions])

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._on_revoked([(self._log.plain(p.topic), p.partition) for p in partitions], False)
        consumer.unassign()

    def _lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._on_revoked([(self._log.plain(p.topic), p.partition) for p in partitions], True)
        consumer.unassign()
