"""Perdure: `perdure dev`, the whole of it on this machine."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import psutil
from confluent_kafka.admin import NewTopic  # type: ignore[attr-defined]

from benchmarks.peers.peer import Peer
from benchmarks.peers.perdure.stream import CHANGELOG
from benchmarks.peers.processes import kill
from benchmarks.peers.stream import PARTITIONS, StreamPeer
from perdure.cli_dev import launch
from perdure.connectors import embedded_kafka
from perdure.connectors.kafka_jars import kafka_jars
from perdure.dev import stop_running


class Perdure(Peer):
    """The dev stack: embedded Kafka, engine, server with projections, a worker with two slots."""

    name = "perdure"
    title = "Perdure"
    folder = "perdure"
    durability = "Kafka, acks=all, one broker, flushed by the system (Kafka's default)"
    settings = "perdure dev: Kafka, engine, server, one worker with 2 slots; tiny tasks are async, 64 submits at a time"

    def install(self) -> dict[str, str]:
        self.python = Path(sys.executable)
        return {"perdure": version("perdure"), "kafka": kafka_jars().version}

    def start(self, folder: Path) -> None:
        self.data = folder
        self._stack = launch(folder / "stack", ("benchmarks.peers.perdure.tasks",), slots=2, port=None)
        self.environment = {"PERDURE_BOOTSTRAP": self._stack.bootstrap}

    def stop(self) -> None:
        stop_running(self.data / "stack")

    def kill_workers(self) -> None:
        """The dev stack starts the worker again by itself."""
        kill(self.worker_processes())

    def worker_processes(self) -> list[psutil.Process]:
        for child in psutil.Process(self._stack.pid).children():
            if "worker" in child.cmdline()[2:5]:
                return [child, *child.children(recursive=True)]
        return []

    def server_processes(self) -> list[psutil.Process]:
        stack = psutil.Process(self._stack.pid)
        kafka = embedded_kafka.running(self.data / "stack" / "kafka")
        everyone = {stack, *stack.children(recursive=True)} | ({psutil.Process(kafka.pid)} if kafka else set())
        return list(everyone - set(self.worker_processes()))


class PerdureStream(StreamPeer):
    """The shell that carries the engine, in one process with a thread for each partition."""

    name = "perdure-stream"
    title = "Perdure's stream shell"
    folder = "perdure"
    durability = "exactly-once transactions, RocksDB, changelog"
    settings = (
        "one process, a thread for each partition; a transaction takes what has come, as far as 50 ms of CPU are "
        "enough for it"
    )

    def install(self) -> dict[str, str]:
        self.python = Path(sys.executable)
        return {"perdure": version("perdure")}

    def command(self) -> list[str | Path]:
        return [self.python, "-m", "benchmarks.peers.perdure.stream"]

    def topics(self) -> list[NewTopic]:
        return [NewTopic(CHANGELOG, PARTITIONS, 1, config={"cleanup.policy": "compact"})]


PEERS = (Perdure(), PerdureStream())
