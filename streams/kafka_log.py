"""The log on Kafka, by confluent-kafka."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from confluent_kafka.admin import AdminClient

from perdure.streams import topology
from perdure.streams.kafka_connection import ASK_S, Connection
from perdure.streams.kafka_consumers import KafkaMember, KafkaReader, committed
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

    def committed(self, group: str, wanted: Iterable[Where]) -> dict[Where, int | None]:
        return committed(self, self.prefix + group, wanted)

    def members(self, group: str) -> list[str]:
        """Who is in a group: instance ids, or member ids where there is none. Blocks; raises `Unreachable`."""
        name = self.prefix + group

        def ask(admin: AdminClient) -> list[str]:
            found = admin.describe_consumer_groups([name], request_timeout=ASK_S)[name].result()
            return sorted(m.group_instance_id or m.member_id for m in found.members)

        return self.ask(ask, f"no description of group {name}")
