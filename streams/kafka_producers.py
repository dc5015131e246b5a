"""Producers on Kafka: idempotent with `acks=all`, alone or in transactions.

They never buffer for long (`linger.ms=0`, Nagle off): a commit flushes anyway, and a single append should not wait.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicPartition

from perdure.schemas import limits
from perdure.schemas.errors import Fenced, InfrastructureError, Unreachable, ValueTooLarge
from perdure.streams import failpoints
from perdure.streams.kafka_connection import CALL_S, FORBIDDEN, Connection, quiet, sorted_error
from perdure.streams.log import OnAck, OutcomeUnknown, TransactionAborted, check_size
from perdure.streams.log import TopicPartition as Where

LOG = logging.getLogger("perdure")
T = TypeVar("T")
_Delivered = Callable[[KafkaError | None, Message], None]
_LATE_S = 2.0
"""A plain producer that has heard nothing for so long may stand still for good."""
_GRACE_S = 4.0
"""How long one may take to append again once the leader answers; the slowest of 400 took 3.1 s."""
_GRACE_MOST_S = 60.0
_DRAIN_S = 5.0
"""How long a producer that is good for nothing may take to give back what it was handed."""
_UNCERTAIN = frozenset({KafkaError._PURGE_INFLIGHT, KafkaError._PURGE_QUEUE, KafkaError._FATAL})
_MAY_ARRIVE = "; it may still be there, so repeat a submit only with the same id or key"
_SLOW_COMMIT_S = 10.0
"""Nobody knows what has become of a request for so long."""
_LOST = frozenset({"FAIL", "REQTMOUT"})
_NEVER_MADE = "in state CONNECT"
"""What librdkafka calls the loss of a connection, and how its word ends if nothing was ever sent on it."""
_OFFSETS_S = 3.0
"""How long the group's coordinator may take; see `_Bounded`."""
_INIT_S = 10.0
_INIT_ASK_S = 0.05
"""After this the coordinator is asked again, unless its answer is still to come. A predecessor's transaction is aborted
within milliseconds; left alone, librdkafka asks again only after 500."""
_END_S = 5.0
"""How long the records of a transaction may take to get out, and then its end. After a broker's outage one producer in
four did neither for ever (the issues of `_Bounded`); a new one settles what has become of the transaction at once."""
_PRODUCER: dict[str, Any] = {
    "enable.idempotence": True,
    "acks": "all",
    "linger.ms": 0,
    "partitioner": "murmur2_random",
    "message.max.bytes": limits.TOPIC_RECORD_MAX + 65_536,
    "batch.size": 900_000,  # the broker refuses a batch that is larger than one record may be, and all records in it
    "queue.buffering.max.messages": 500_000,
}


class _Landing:
    """What one producer was handed and has not acknowledged. For any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._records: dict[int, tuple[Where, OnAck | None]] = {}
        self._heard: dict[Where, tuple[int, float]] = {}
        """Partition -> records that wait, and since when none of them was heard of."""
        self.landed: set[Where] = set()
        """Partitions that something has landed in."""

    def __len__(self) -> int:
        return len(self._records)

    def handed(self, where: Where, on_ack: OnAck | None) -> int:
        """One more; its number."""
        with self._lock:
            number = next(self._numbers)
            self._records[number] = where, on_ack
            count, since = self._heard.get(where, (0, time.monotonic()))
            self._heard[where] = count + 1, since
            return number

    def heard(self, number: int, *, landed: bool = False) -> OnAck | None:
        """One less: who is to be told of it. None, too, if he was told before."""
        with self._lock:
            where, on_ack = self._records.pop(number, (None, None))
            if where is None:
                return None
            if landed:
                self.landed.add(where)
            count, _ = self._heard.pop(where)
            if count > 1:
                self._heard[where] = count - 1, time.monotonic()
            return on_ack

    def late(self) -> list[tuple[Where, float]]:
        """Partitions that were not heard of for long, and since when: the longest first."""
        end = time.monotonic() - _LATE_S
        with self._lock:
            found = [(where, since) for where, (_, since) in self._heard.items() if since < end]
        return sorted(found, key=lambda late: late[1])

    def give_up(self) -> None:
        """Tell everybody who still waits that nobody knows what has become of his record."""
        for number in list(self._records):
            on_ack = self.heard(number)
            try:
                if on_ack is not None:
                    on_ack(-1, Unreachable(f"an append was not heard of again{_MAY_ARRIVE}"))
            except Exception:
                LOG.exception("what was to be done after an append has failed")


def _hand_over(
    producer: Producer, topic: str, partition: int, key: bytes | None, value: bytes | None, callback: _Delivered | None
) -> None:
    """Produce, waiting while the local queue is full. Raises `ValueTooLarge`."""
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


def _acknowledge(on_ack: OnAck) -> _Delivered:
    def delivered(error: KafkaError | None, message: Message) -> None:
        if error is None:
            on_ack(message.offset() or 0, None)
        elif error.code() in _UNCERTAIN:
            on_ack(-1, Unreachable(f"not acknowledged by {message.topic()}: {error.str()}{_MAY_ARRIVE}"))
        else:
            on_ack(-1, InfrastructureError(f"not appended to {message.topic()}: {error.str()}"))

    return delivered


class KafkaProducer:
    """An idempotent producer and the thread that serves its acknowledgements.

    It is replaced when it is good for nothing any more: when it has failed for good, as after a broker has lost what it
    had acknowledged; and when it stands still although the partition's leader answers, as now and then after a broker
    was away. Who waits for records of the old one is told so, `Unreachable`: they may be in the log.
    """

    def __init__(self, log: Connection) -> None:
        self._log = log
        self._changing = threading.Lock()
        self._producer, self._landing = self._create(), _Landing()
        self._looking = threading.Event()
        self._graces: dict[Where, float] = {}
        self._open = True
        self._thread = threading.Thread(target=self._serve, name="kafka-acks", daemon=True)
        self._thread.start()

    def append(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, on_ack: OnAck | None = None
    ) -> None:
        check_size(topic, key, value)
        producer = self._producer
        try:
            self._append(topic, partition, key, value, on_ack)
        except OutcomeUnknown as error:
            cause = error.__cause__
            if not isinstance(cause, KafkaException) or cause.args[0].code() != KafkaError._FATAL:
                raise
            self._replace(producer, str(error))  # it has failed for good before, and has taken nothing
            self._append(topic, partition, key, value, on_ack)

    def _append(self, topic: str, partition: int, key: bytes | None, value: bytes | None, on_ack: OnAck | None) -> None:
        with self._changing:  # whoever replaces this producer waits for what was handed to it
            producer, landing = self._producer, self._landing
            number = landing.handed((topic, partition), on_ack)

        def delivered(error: KafkaError | None, message: Message) -> None:
            told = landing.heard(number, landed=error is None)
            if told is not None:
                _acknowledge(told)(error, message)

        try:
            _hand_over(producer, self._log.prefix + topic, partition, key, value, delivered)
        except BaseException:
            landing.heard(number)
            raise

    def flush(self, timeout_s: float) -> bool:
        return int(self._producer.flush(timeout_s)) == 0

    def close(self) -> None:
        self._producer.flush(5.0)
        self._open = False
        self._thread.join(5.0)

    def _create(self) -> Producer:
        return Producer(
            self._log.config(_PRODUCER, {"message.timeout.ms": 86_400_000, "error_cb": quiet, "linger.ms": 0})
        )

    def _serve(self) -> None:
        while self._open:
            try:
                self._turn()
            except Exception:  # of who is told, or of a machine without threads: the others are still to be told
                self._looking.clear()
                LOG.exception("what was to be done after an append has failed")

    def _turn(self) -> None:
        producer, landing = self._producer, self._landing
        try:
            _plainly(lambda: producer.poll(0.2))
        except KafkaException as error:
            self._replace(producer, error.args[0].str())
        if landing.late() and not self._looking.is_set():
            self._looking.set()
            threading.Thread(target=self._look, args=(producer, landing), name="kafka-stall", daemon=True).start()

    def _look(self, producer: Producer, landing: _Landing) -> None:
        """Whether it is the producer alone that stands still: a leader answers, and yet nothing is heard of."""
        try:
            for where, since in landing.late():
                if self._answers(where):
                    # It has to find its way back by itself. If the last one did no better, the leader has reasons.
                    patience = min(2 * self._graces.get(where, _GRACE_S / 2), _GRACE_MOST_S)
                    self._graces[where] = _GRACE_S if where in landing.landed else patience
                    time.sleep(self._graces[where])
                    if (where, since) in landing.late() and self._open:
                        self._replace(producer, f"nothing was heard of {where[0]}/{where[1]}, whose leader answers")
                    return
        finally:
            self._looking.clear()

    def _answers(self, where: Where) -> bool:
        try:
            self._log.offsets(where[0], max(0, where[1]))
        except (InfrastructureError, KafkaException) as error:
            LOG.debug("%s/%d cannot be appended to: %s", *where, error)
            return False
        return True

    def _replace(self, old: Producer, why: str) -> None:
        """Go on with a new producer, unless another thread has done so."""
        with self._changing:
            if self._producer is not old:
                return
            LOG.warning("a producer is replaced: %s", why)
            landing = self._landing
            self._producer, self._landing = self._create(), _Landing()
        # On a thread of its own: the one that finds out may be in the middle of an acknowledgement of the old one.
        threading.Thread(target=_drain, args=(old, landing), name="kafka-drain", daemon=True).start()


def _drain(old: Producer, landing: _Landing) -> None:
    """Have everybody told who waits for a producer that is good for nothing any more, each of them once."""
    deadline = time.monotonic() + _DRAIN_S
    while len(landing) and time.monotonic() < deadline:
        try:
            old.purge()  # again: somebody may just have handed it a record
            _plainly(lambda: old.poll(0.1))
        except KafkaException as error:
            LOG.debug("a producer that is replaced: %s", error)
        except Exception:
            LOG.exception("what was to be done after an append has failed")
    landing.give_up()


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


def _plainly(call: Callable[[], T]) -> T:
    """Call. Raises `KafkaException` also where a fatal error and an acknowledgement came in one go.

    The client library raises the first and calls back for the second all the same, which Python does not allow.
    """
    try:
        return call()
    except SystemError as error:
        if isinstance(error.__cause__, KafkaException):
            raise error.__cause__ from error
        raise


class _Link:
    """Whether a producer has lost a connection, and with it requests that may still arrive. Stands in for its logger.

    librdkafka repeats an EndTxn by itself, and commits successfully; but when the first one arrives as well, inside
    the next transaction, the broker ends that one, unless it has a newer epoch. Every loss is logged before what was
    lost is repeated; the same one is logged only once in 30 s, so a producer that has seen one is not used again
    (docs/decisions/0005).
    """

    def __init__(self) -> None:
        self.lost = False

    def log(self, level: int, form: str, facility: str, client: str, text: str) -> None:  # noqa: ARG002
        """Called by `poll` with each line of librdkafka's log."""
        self.lost = self.lost or (facility in _LOST and _NEVER_MADE not in text)


class KafkaTransactional:
    """A transactional producer; good for no further transaction once it has lost a connection (see `_Link`)."""

    def __init__(self, log: Connection, name: str) -> None:
        self._log, self._name = log, name
        self._bounded = _Bounded()
        self._suspect = False
        self._fenced: Fenced | None = None
        self._link = _Link()
        self._producer = self._create()

    def _create(self) -> Producer:
        self._link = _Link()
        producer = Producer(self._log.config(_PRODUCER, {
            "transactional.id": self._log.prefix + self._name, "transaction.timeout.ms": 15_000,
            "message.timeout.ms": 15_000, "retry.backoff.ms": 10, "error_cb": quiet,
        }) | {"logger": self._link, "log_level": 6})  # fmt: skip
        deadline = time.monotonic() + _INIT_S
        while True:
            try:
                producer.init_transactions(_INIT_ASK_S)
                return producer
            except KafkaException as error:
                if error.args[0].code() in FORBIDDEN:
                    raise sorted_error(error, f"transactions for {self._name}") from error
                if time.monotonic() > deadline or not error.args[0].retriable():
                    raise Unreachable(
                        f"no transactions for {self._name} on {self._log.bootstrap}: {error.args[0].str()}"
                    ) from error

    def begin(self) -> None:
        if self._suspect:
            # Only who reads what was committed before may go on under a fresh epoch: while this process stood still
            # another one may have taken over, and the epoch would take the partition back from it unseen.
            raise OutcomeUnknown(f"a connection of {self._name} was lost, or its last commit took long: what was sent "
                                 f"may still arrive, so a new producer has to take over")  # fmt: skip
        self._call("begin", self._producer.begin_transaction)

    def append(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, on_ack: OnAck | None = None
    ) -> None:
        check_size(topic, key, value)
        told = None if on_ack is None else _acknowledge(on_ack)
        _hand_over(self._producer, self._log.prefix + topic, partition, key, value, told)

    def append_all(self, topic: str, partition: int, records: Sequence[tuple[bytes | None, bytes | None]]) -> None:
        messages: list[dict[str, Any]] = []
        for key, value in records:
            check_size(topic, key, value)
            messages.append({"key": key, "value": value})
        if self._producer.produce_batch(self._log.prefix + topic, messages, partition) != len(messages):
            first = next(m["_error"] for m in messages if "_error" in m)
            raise TransactionAborted(f"not all of {len(messages)} records for {topic} could be handed over: {first}")

    def commit(self, member: Any, offsets: Mapping[Where, int]) -> None:
        if offsets:
            positions = [TopicPartition(self._log.prefix + t, p, o) for (t, p), o in offsets.items()]
            group = member.group_metadata()
            self._call("send offsets", lambda: self._bounded.call(
                lambda: self._producer.send_offsets_to_transaction(positions, group, CALL_S), _OFFSETS_S
            ))  # fmt: skip
        failpoints.passed("after-offsets")
        if self._call("flush", lambda: self._producer.flush(_END_S)):
            raise OutcomeUnknown(f"the records of {self._name} have not got out within {_END_S:g} s")
        failpoints.entered("in-commit")
        self._end("commit", lambda: self._producer.commit_transaction(_END_S))

    def abort(self) -> None:
        self._end("abort", lambda: self._producer.abort_transaction(_END_S))

    def _end(self, doing: str, call: Callable[[], Any]) -> None:
        """Commit or abort, and find out whether the request was sent more than once."""
        began = time.monotonic()
        self._call(doing, call, _END_S)
        self._call(doing, lambda: self._producer.poll(0))
        self._suspect = self._link.lost or time.monotonic() - began >= _SLOW_COMMIT_S

    def close(self) -> None:
        self._producer.purge()
        # A call that was given up may end now, and may have been fenced: that is said here, and concerns nobody.
        with suppress(InfrastructureError):
            self._call("close", lambda: self._producer.flush(0.5))

    def _call(self, doing: str, call: Callable[[], T], patience_s: float = 60.0) -> T:
        """Call, and again while the error is retriable. Raises ours; once fenced, always fenced."""
        if self._fenced is not None:
            raise self._fenced
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return _plainly(call)
            except KafkaException as error:
                if not (error.args[0].retriable() and time.monotonic() < deadline):
                    ours = sorted_error(error, f"{doing} ({self._name})")
                    self._fenced = ours if isinstance(ours, Fenced) else None
                    raise ours from error
