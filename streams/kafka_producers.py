"""Producers on Kafka: idempotent with `acks=all`, alone or in transactions.

They never buffer for long (`linger.ms=0`, Nagle off): a commit flushes anyway, and a single append should not wait.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicPartition

from perdure.schemas import limits
from perdure.schemas.errors import Fenced, InfrastructureError, Unreachable, ValueTooLarge
from perdure.streams.kafka_connection import CALL_S, Connection, quiet, sorted_error
from perdure.streams.log import OnAck, OutcomeUnknown, TransactionAborted, check_size
from perdure.streams.log import TopicPartition as Where

_SLOW_COMMIT_S = 0.35
"""librdkafka repeats an EndTxn by itself when its connection is lost, and the first one may still arrive: inside the
next transaction, unless a new epoch fences it. Reconnecting takes 0.75 x reconnect.backoff.ms at the least, so a commit
that was repeated was slower than this (docs/decisions/0005)."""
_OFFSETS_S = 3.0
"""How long the group's coordinator may take; see `_Bounded`."""
_INIT_S = 10.0
_PRODUCER: dict[str, Any] = {
    "enable.idempotence": True,
    "acks": "all",
    "linger.ms": 0,
    "partitioner": "murmur2_random",
    "message.max.bytes": limits.TOPIC_RECORD_MAX + 65_536,
    "batch.size": 900_000,  # the broker refuses a batch that is larger than one record may be, and all records in it
    "queue.buffering.max.messages": 500_000,
}


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
            raise sorted_error(error, f"append to {topic}") from error


def _acknowledge(on_ack: OnAck) -> Callable[[KafkaError | None, Message], None]:
    def delivered(error: KafkaError | None, message: Message) -> None:
        if error is None:
            on_ack(message.offset() or 0, None)
        else:
            on_ack(-1, InfrastructureError(f"not appended to {message.topic()}: {error.str()}"))

    return delivered


class KafkaProducer:
    """An idempotent producer and the thread that serves its acknowledgements."""

    def __init__(self, log: Connection) -> None:
        self._log = log
        self._producer = Producer(
            log.config(_PRODUCER, {"message.timeout.ms": 86_400_000, "error_cb": quiet, "linger.ms": 0})
        )
        self._open = True
        self._thread = threading.Thread(target=self._serve, name="kafka-acks", daemon=True)
        self._thread.start()

    def append(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, on_ack: OnAck | None = None
    ) -> None:
        check_size(topic, key, value)
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


class _Bounded:
    """Makes calls on a thread of its own, to give up those that do not return.

    After a broker's outage `send_offsets_to_transaction` waits for ever, whatever timeout it is given, until the next
    outage: librdkafka's issues 5456 and 5511, seen with one producer in six. What is given up stays behind until then.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._ends: SimpleQueue[BaseException | None] = SimpleQueue()
        threading.Thread(target=_serve, args=(self._calls, self._ends), name="kafka-calls", daemon=True).start()
        weakref.finalize(self, self._calls.put, None)  # the thread ends with this object, after a call under way

    def call(self, call: Callable[[], Any], timeout_s: float) -> None:
        """Call. Raises what the call raises, or `OutcomeUnknown`; after that this object is useless."""
        self._calls.put(call)
        try:
            error = self._ends.get(timeout=timeout_s)
        except Empty:
            raise OutcomeUnknown(f"no answer from the group's coordinator within {timeout_s:g} s") from None
        if error is not None:
            raise error


def _serve(calls: SimpleQueue[Callable[[], Any] | None], ends: SimpleQueue[BaseException | None]) -> None:
    while (call := calls.get()) is not None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - it belongs to the thread that asked
            ends.put(error)
        else:
            ends.put(None)
        del call  # it holds the producer, which would keep the caller's end from coming


class KafkaTransactional:
    """A transactional producer; takes a fresh epoch by itself when a commit was slow (see `_SLOW_COMMIT_S`)."""

    def __init__(self, log: Connection, name: str) -> None:
        self._log, self._name = log, name
        self._bounded = _Bounded()
        self._suspect = False
        self._fenced: Fenced | None = None
        self._producer = self._create()

    def _create(self) -> Producer:
        producer = Producer(self._log.config(_PRODUCER, {
            "transactional.id": self._log.prefix + self._name, "transaction.timeout.ms": 15_000,
            "message.timeout.ms": 15_000, "retry.backoff.ms": 10, "reconnect.backoff.ms": 500, "error_cb": quiet,
        }))  # fmt: skip
        try:
            producer.init_transactions(_INIT_S)
        except KafkaException as error:
            raise Unreachable(
                f"no transactions for {self._name} on {self._log.bootstrap}: {error.args[0].str()}"
            ) from error
        return producer

    def begin(self) -> None:
        if self._suspect:
            try:
                self._producer = self._create()
            except Unreachable as error:
                raise TransactionAborted(f"not begun: {error}") from error
            self._suspect = False
        self._call("begin", self._producer.begin_transaction)

    def append(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, on_ack: OnAck | None = None
    ) -> None:
        check_size(topic, key, value)
        _hand_over(self._producer, self._log.prefix + topic, partition, key, value, on_ack)

    def append_all(self, topic: str, partition: int, records: Sequence[tuple[bytes | None, bytes | None]]) -> None:
        messages: list[dict[str, Any]] = []
        for key, value in records:
            check_size(topic, key, value)
            messages.append({"key": key, "value": value})
        if self._producer.produce_batch(self._log.prefix + topic, messages, partition) != len(messages):
            first = next(m["_error"] for m in messages if "_error" in m)
            raise TransactionAborted(f"not all of {len(messages)} records for {topic} could be handed over: {first}")

    def commit(self, member: Any, offsets: Mapping[Where, int]) -> None:
        positions = [TopicPartition(self._log.prefix + t, p, o) for (t, p), o in offsets.items()]
        group = member.group_metadata()
        self._call("send offsets", lambda: self._bounded.call(
            lambda: self._producer.send_offsets_to_transaction(positions, group, CALL_S), _OFFSETS_S
        ))  # fmt: skip
        self._call("flush", lambda: self._producer.flush(15.0))
        began = time.monotonic()
        self._call("commit", lambda: self._producer.commit_transaction(30.0))
        self._suspect = time.monotonic() - began >= _SLOW_COMMIT_S

    def abort(self) -> None:
        began = time.monotonic()
        self._call("abort", lambda: self._producer.abort_transaction(30.0))
        self._suspect = time.monotonic() - began >= _SLOW_COMMIT_S

    def close(self) -> None:
        if self._fenced is None:
            self._producer.purge()
            self._call("close", lambda: self._producer.flush(0.5))

    def _call(self, doing: str, call: Callable[[], Any]) -> None:
        """Call, and again while the error is retriable. Raises ours; once fenced, always fenced."""
        if self._fenced is not None:
            raise self._fenced
        deadline = time.monotonic() + 60.0
        while True:
            try:
                call()
                return
            except KafkaException as error:
                if not (error.args[0].retriable() and time.monotonic() < deadline):
                    ours = sorted_error(error, f"{doing} ({self._name})")
                    self._fenced = ours if isinstance(ours, Fenced) else None
                    raise ours from error
