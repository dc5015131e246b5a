"""The three brokers of `docker-compose.yml`, each in a container, with the settings that stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
from docker.models.containers import Container
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network

from tests.chaos.proxy import free_ports
from tests.containers.kafka_image import kafka_image
from tests.kafka_cluster import BROKERS, await_replicas, leader_of

_COMPOSE = Path(__file__).parents[2] / "docker-compose.yml"
# Its helper that removes what a killed test leaves is an image of its own, which has to come from a registry.
testcontainers_config.ryuk_disabled = True


class ComposeBrokers:
    """Addressed by number, 0 to 2. Their ports on this machine are free ones; all else is as in the file."""

    def __init__(self) -> None:
        services = msgspec.yaml.decode(_COMPOSE.read_bytes())["services"]
        ports = free_ports(BROKERS)
        self.bootstrap = ",".join(f"localhost:{port}" for port in ports)
        self._network = Network()
        self._names = [f"kafka-{n + 1}" for n in range(BROKERS)]
        image = kafka_image()
        self._brokers = [
            DockerContainer(image)
            .with_envs(**_environment(services[name], port))
            .with_network(self._network)
            .with_network_aliases(name)
            .with_kwargs(hostname=name)
            for name, port in zip(self._names, ports, strict=True)
        ]
        for broker, port in zip(self._brokers, ports, strict=True):
            broker.ports = {f"{port}/tcp": ("127.0.0.1", port)}  # `with_bind_ports` would listen on every address

    def start(self) -> None:
        """Start all of them; returns when they have found each other."""
        self._network.create()
        for broker in self._brokers:
            broker.start()
        self.await_whole()

    def stop(self) -> None:
        """Remove them, their data and their network."""
        for broker in self._brokers:
            broker.stop()
        self._network.remove()

    def container(self, number: int) -> Container:
        """A broker's container: to be paused, killed, stopped and started as Docker does it."""
        return self._brokers[number].get_wrapped_container()

    def cut_off(self, number: int) -> None:
        """Take a broker out of the network, with its connections as they stand."""
        self._network._unwrap_network.disconnect(self.container(number))

    def join(self, number: int) -> None:
        """Bring it back."""
        self._network.connect(str(self.container(number).id), [self._names[number]])

    def leader(self, topic: str, partition: int) -> int:
        """The number of the broker that leads a partition."""
        return leader_of(self.bootstrap, topic, partition)

    def await_whole(self) -> None:
        """Wait until every partition has three replicas in sync. Raises `AssertionError` with the brokers' words."""
        try:
            await_replicas(self.bootstrap)
        except AssertionError as error:
            words = [b"\n".join(broker.get_logs()).decode(errors="replace")[-2_000:] for broker in self._brokers]
            raise AssertionError("\n\n".join(words)) from error


def _environment(service: dict[str, Any], port: int) -> dict[str, str]:
    told = {key: str(value) for key, value in service["environment"].items()}
    for key in ("KAFKA_LISTENERS", "KAFKA_ADVERTISED_LISTENERS"):
        told[key] = re.sub(r"(HOST://\w*):\d+", rf"\1:{port}", told[key])
    return told
