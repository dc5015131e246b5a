"""LittleHorse: its server on a Kafka of its own, the same embedded one that Perdure uses."""

from __future__ import annotations

from pathlib import Path

import psutil

from benchmarks.peers import cache
from benchmarks.peers.peer import Peer
from benchmarks.peers.processes import Process, free_port, listening, until
from perdure.connectors.embedded_kafka import EmbeddedKafka

_VERSION = "1.2.1"
_JAVA = 25


class LittleHorse(Peer):
    """One server, one worker with two threads for each task."""

    name = "littlehorse"
    title = "LittleHorse"
    folder = "littlehorse"
    packages = (f"littlehorse-client=={_VERSION}",)
    durability = "Kafka, one broker (as Perdure's), exactly-once Kafka Streams in its server"
    settings = (
        "12 partitions; every workflow has a task, 16 threads submit; for the kill timeout_seconds 2 and 3 retries "
        "(without retries a killed worker's workflow fails)"
    )

    def install(self) -> dict[str, str]:
        self._home = cache.java(_JAVA)
        self._jars = cache.jars("littlehorse", [f"io.littlehorse:littlehorse-server:{_VERSION}"])
        return {"littlehorse-server": _VERSION, "java": cache.java_version(self._home)} | super().install()

    def start_servers(self, folder: Path) -> None:
        self._kafka = EmbeddedKafka(folder / "kafka")
        port, internal, health = (free_port() for _ in range(3))
        settings = {
            "LHS_KAFKA_BOOTSTRAP_SERVERS": self._kafka.start(),
            "LHS_STATE_DIR": str(folder / "littlehorse"),
            "LHS_INSTANCE_ID": "1",
            "LHS_REPLICATION_FACTOR": "1",
            "LHS_CLUSTER_PARTITIONS": "12",
            "LHS_SHOULD_CREATE_TOPICS": "true",
            "LHS_LISTENERS": f"PLAIN:{port}",
            "LHS_LISTENERS_PROTOCOL_MAP": "PLAIN:PLAIN",
            "LHS_ADVERTISED_LISTENERS": f"PLAIN://127.0.0.1:{port}",
            "LHS_INTERNAL_BIND_PORT": str(internal),
            "LHS_INTERNAL_ADVERTISED_HOST": "127.0.0.1",
            "LHS_INTERNAL_ADVERTISED_PORT": str(internal),
            "LHS_HEALTH_SERVICE_PORT": str(health),
        }
        command = [self._home / "bin" / "java", "-cp", self._jars / "*", "io.littlehorse.App"]
        server = Process(command, folder / "littlehorse.log", settings)
        self.servers.append(server)
        listening(port, server)
        self.environment |= {"LHC_API_HOST": "127.0.0.1", "LHC_API_PORT": str(port), "LHW_NUM_WORKER_THREADS": "2"}

    def start(self, folder: Path) -> None:
        super().start(folder)
        until(lambda: all(worker.says("ready") for worker in self.workers), "the worker's start", 150)

    def stop(self) -> None:
        super().stop()
        self._kafka.stop()

    def server_processes(self) -> list[psutil.Process]:
        return [*super().server_processes(), psutil.Process(self._kafka.pid)]


PEERS = (LittleHorse(),)
