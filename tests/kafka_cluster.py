"""Three real brokers on loopback, each one a controller too: replication 3, and two of the three acknowledge.

Started only by tests that ask for `kafka_cluster`, once for all of them in a process: it takes seconds. A test gets it
whole, and makes it whole again by being one: what it has killed is started before the next test.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from perdure.connectors.embedded_kafka import EmbeddedKafka
from perdure.connectors.kafka_data import HOST, Identity, KafkaData, new_cluster_id
from perdure.connectors.kafka_jars import kafka_jars
from tests.chaos.proxy import free_ports
from tests.integration.stack import until

BROKERS = 3
_START_S = 120.0
_REPLICATED = {
    "default.replication.factor": "3",
    "min.insync.replicas": "2",
    "offsets.topic.replication.factor": "3",
    "transaction.state.log.replication.factor": "3",
    "transaction.state.log.min.isr": "2",
    "unclean.leader.election.enable": "false",
    # Followers are let back into the ISR, and leaders go back to their brokers, within seconds.
    "replica.lag.time.max.ms": "5000",
    "leader.imbalance.check.interval.seconds": "5",
}


def leader_of(bootstrap: str, topic: str, partition: int) -> int:
    """The number of the broker that leads a partition."""
    return _admin(bootstrap).list_topics(topic, 10.0).topics[topic].partitions[partition].leader - 1


def await_replicas(bootstrap: str) -> None:
    """Wait until every partition of the three brokers has three replicas in sync."""
    admin = _admin(bootstrap)

    def whole() -> bool:
        with suppress(KafkaException):
            found = admin.list_topics(timeout=5.0)
            parts = [p for topic in found.topics.values() for p in topic.partitions.values()]
            return len(found.brokers) == BROKERS and all(len(p.isrs) == len(p.replicas) for p in parts)
        return False

    until("all replicas in sync", whole, _START_S)


def _admin(bootstrap: str) -> AdminClient:
    return AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})


class KafkaCluster:
    """Three brokers in folders of their own; addressed by number, 0 to 2."""

    def __init__(self, folder: Path) -> None:
        ports = free_ports(2 * BROKERS)
        clients, controllers = ports[:BROKERS], ports[BROKERS:]
        voters = ",".join(f"{n + 1}@{HOST}:{port}" for n, port in enumerate(controllers))
        cluster_id = new_cluster_id()
        self.brokers: list[EmbeddedKafka] = []
        for n in range(BROKERS):
            own = folder / f"broker-{n}"
            KafkaData(own).settle(Identity(kafka_jars().version, cluster_id, clients[n], controllers[n]))
            settings = {"node.id": str(n + 1), "controller.quorum.voters": voters, **_REPLICATED}
            self.brokers.append(EmbeddedKafka(own, port=clients[n], properties=settings))
        self.bootstrap = ",".join(f"{HOST}:{port}" for port in clients)

    def start(self) -> None:
        """Start the brokers that do not run, and wait until each partition has all its replicas again."""
        away = [broker for broker in self.brokers if not broker.alive()]
        with ThreadPoolExecutor(BROKERS) as pool:  # a majority is needed before the first of them is ready
            list(pool.map(lambda broker: broker.start(_START_S), away))
        self.await_replicas()

    def restart(self, number: int) -> None:
        """Stop one broker as an operator does, start it again, and wait for its replicas."""
        self.brokers[number].stop()
        self.brokers[number].start(_START_S)
        self.await_replicas()

    def kill(self, number: int) -> None:
        """SIGKILL one broker; returns when it is dead."""
        psutil.Process(self.brokers[number].pid).kill()
        until("the broker's end", lambda: not self.brokers[number].alive())

    def leader(self, topic: str, partition: int) -> int:
        """The number of the broker that leads a partition."""
        return leader_of(self.bootstrap, topic, partition)

    def await_replicas(self) -> None:
        """Wait until every partition has three replicas in sync."""
        await_replicas(self.bootstrap)

    def stop(self) -> None:
        """Stop all of them."""
        with ThreadPoolExecutor(BROKERS) as pool:
            list(pool.map(lambda broker: broker.stop(), self.brokers))


class OneOfThree:
    """The broker of a cluster that is broken next, as if it were the only one; another one after each start."""

    def __init__(self, cluster: KafkaCluster) -> None:
        self._cluster, self._number = cluster, 0
        self.bootstrap = cluster.bootstrap

    @property
    def _broker(self) -> EmbeddedKafka:
        return self._cluster.brokers[self._number]

    @property
    def pid(self) -> int:
        """Of its JVM."""
        return self._broker.pid

    @property
    def data_dir(self) -> Path:
        """Where it keeps its data and its log."""
        return self._broker.data_dir

    def alive(self) -> bool:
        """Whether its JVM runs."""
        return self._broker.alive()

    def stop(self) -> None:
        """As an operator does."""
        self._broker.stop()

    def start(self, timeout_s: float = _START_S) -> None:
        """Start it, and wait until every partition has all its replicas again."""
        self._cluster.start()
        self._number = (self._number + 1) % BROKERS


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaCluster]:
    cluster = KafkaCluster(tmp_path_factory.mktemp("cluster"))
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def kafka_cluster(_cluster: KafkaCluster) -> KafkaCluster:
    """The cluster, with all of its brokers up to date."""
    _cluster.start()
    return _cluster
