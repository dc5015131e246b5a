"""The log on Kafka, by confluent-kafka."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from perdure.streams import topology
from perdure.streams.kafka_connection import Connection
from perdure.streams.kafka_consumers import KafkaMember, KafkaReader
from perdure.streams.kafka_producers import KafkaProducer, KafkaTransactional
from perdure.streams.log import TopicPartition as Where


class KafkaLog(Connection):
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
        super().__init__(bootstrap, prefix, options or {})
        self._partitions = partitions if partitions is not None else topology.pinned_partitions(self)

    @property
    def partitions(self) -> int:
        return self._partitions

    def producer(self) -> KafkaProducer:
        return KafkaProducer(self)

    def transactional(self, name: str) -> KafkaTransactional:
        return KafkaTransactional(self, name)

    def reader(self, *, committed: bool = True, gather_ms: int = 0) -> KafkaReader:
        return KafkaReader(self, committed, gather_ms)

    def member(
        self,
        group: str,
        topics: Iterable[str],
        *,
        instance: str | None = None,
        committed: bool = True,
        gather_ms: int = 0,
        on_assigned: Callable[[list[Where]], None],
        on_revoked: Callable[[list[Where], bool], None],
    ) -> KafkaMember:
        return KafkaMember(self, group, topics, instance, committed, gather_ms, on_assigned, on_revoked)
