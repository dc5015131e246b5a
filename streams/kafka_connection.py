"""A connection to a Kafka cluster, as producers and consumers share it: settings, offsets, errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from confluent_kafka import IsolationLevel, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from perdure.schemas.errors import Fenced, InfrastructureError, Unreachable
from perdure.streams.log import OutcomeUnknown, TransactionAborted

CALL_S = 10.0
"""How long a question to the cluster may take, with all that is tried."""
ASK_S = 3.0
"""How long it is waited for one answer."""
T = TypeVar("T")

_COMMON: dict[str, Any] = {
    "enable.metrics.push": False,
    "socket.nagle.disable": True,
    "reconnect.backoff.ms": 50,
    "reconnect.backoff.max.ms": 1_000,
    "log_level": 0,
}


_STALE = frozenset(
    {
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError._TIMED_OUT,
        KafkaError._NOENT,  # "No leaders found", said again and again after the leaders have come back
    }
)
"""After a broker's restart a client may ask with old leader epochs for minutes, or wait for a coordinator for ever."""


class Connection:
    """A namespace on a cluster. `options` are librdkafka's own and go to every client (SASL, TLS)."""

    def __init__(self, bootstrap: str, prefix: str, options: Mapping[str, Any]) -> None:
        self.bootstrap, self.prefix = bootstrap, prefix
        self._options: dict[str, Any] = {**_COMMON, "bootstrap.servers": bootstrap, **options}
        self._lock = threading.Lock()
        self._admin: AdminClient | None = None

    def topic_id(self, topic: str) -> str:
        name = self.prefix + topic

        def ask(admin: AdminClient) -> str:
            described = admin.describe_topics(TopicCollection([name]), request_timeout=ASK_S)
            return as_kafka_writes(str(described[name].result().topic_id))

        return self.ask(ask, f"no description of topic {name}")

    def admin(self) -> AdminClient:
        """The log's client for topics, offsets and cluster; thread-safe."""
        with self._lock:
            if self._admin is None:
                self._admin = AdminClient({k: v for k, v in self._options.items() if k != "enable.metrics.push"})
            return self._admin

    def ask(self, question: Callable[[AdminClient], T], what: str) -> T:
        """Ask, and again while brokers move or start. Raises `Unreachable` after 10 s."""

        def ask() -> T:
            admin = self.admin()
            try:
                return question(admin)
            except KafkaException as error:
                if error.args[0].code() in _STALE:
                    self._forget(admin)
                raise

        return patiently(ask, f"{what} from {self.bootstrap}")

    def offsets(self, topic: str, partition: int) -> tuple[int, int]:
        """(first offset kept, offset after the last record appended, uncommitted ones included)."""
        where = TopicPartition(self.prefix + topic, partition)

        def ask(spec: OffsetSpec) -> int:
            def question(admin: AdminClient) -> int:
                asked = {where: spec}
                found = admin.list_offsets(
                    asked, isolation_level=IsolationLevel.READ_UNCOMMITTED, request_timeout=ASK_S
                )[where].result()
                if found.offset < 0:  # what a partition that is changing its leader is answered with, and no error
                    raise KafkaException(KafkaError(KafkaError.LEADER_NOT_AVAILABLE))
                return int(found.offset)

            return self.ask(question, f"no offsets of {where.topic}/{partition}")

        first = ask(OffsetSpec.earliest())  # type: ignore[no-untyped-call]
        end = ask(OffsetSpec.latest())  # type: ignore[no-untyped-call]
        return first, end

    def _forget(self, admin: AdminClient) -> None:
        with self._lock:
            if self._admin is admin:
                self._admin = None

    def config(self, *parts: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of one client: the parts, with the user's own on top."""
        merged: dict[str, Any] = {}
        for part in parts:
            merged |= part
        return merged | self._options

    def plain(self, topic: str) -> str:
        """A topic's name without the prefix."""
        return topic[len(self.prefix) :]


def quiet(_: KafkaError) -> None:
    """librdkafka reports every lost connection here and mends it by itself; what fails for good fails its call."""


def sorted_error(error: KafkaException, doing: str) -> InfrastructureError:
    """A Kafka error as one of ours."""
    cause: KafkaError = error.args[0]
    text = f"{doing}: {cause.str()} ({cause.name()})"
    if cause.code() in FORBIDDEN:
        return InfrastructureError(f"{text}. {GRANT}")
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


FORBIDDEN = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    }
)
GRANT = "Nothing but a change of the cluster's access rules helps: make it, and start again"
_PASSING = frozenset(
    {
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.OFFSET_NOT_AVAILABLE,
        KafkaError.UNSTABLE_OFFSET_COMMIT,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.NOT_COORDINATOR,
        KafkaError._TIMED_OUT,
        KafkaError._NOENT,  # "No leaders found", said again and again after the leaders have come back
        KafkaError._TRANSPORT,
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._STATE,
    }
)


def as_kafka_writes(topic_id: str) -> str:
    """A topic id in Kafka's own notation, which is safe in names of files and blobs; librdkafka's has `+` and `/`."""
    return topic_id.replace("+", "-").replace("/", "_")


def patiently(call: Callable[[], T], what: str) -> T:
    """Call, and again while brokers move or start. Raises `Unreachable` after 10 s, and at once where only a person
    helps: another `InfrastructureError` for a right that is missing.
    """
    deadline = time.monotonic() + CALL_S
    while True:
        try:
            return call()
        except KafkaException as error:
            if error.args[0].code() in FORBIDDEN:
                raise InfrastructureError(f"{what}: {error.args[0].str()}. {GRANT}") from error
            if error.args[0].code() not in _PASSING or time.monotonic() > deadline:
                raise Unreachable(f"{what}: {error.args[0].str()}") from error
            time.sleep(0.02)
