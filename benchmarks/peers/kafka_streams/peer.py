"""Kafka Streams in Java."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers import cache
from benchmarks.peers.stream import StreamPeer

_COORDINATES = ("org.apache.kafka:kafka-streams:4.3.1", "com.fasterxml.jackson.core:jackson-databind:2.21.2")
_SOURCE = Path(__file__).with_name("App.java")


class KafkaStreams(StreamPeer):
    """One thread, no cache before the store."""

    name = "kafka-streams"
    title = "Kafka Streams (Java)"
    folder = "kafka_streams"
    durability = "exactly_once_v2, RocksDB, changelog"
    settings = "one thread, commit each 100 ms (default), no store cache"

    def install(self) -> dict[str, str]:
        self._home = cache.java(17)
        self._classes = cache.classes(self._home, _SOURCE, cache.jars("kafka-streams", _COORDINATES))
        return {"kafka-streams": "4.3.1", "java": cache.java_version(self._home)}

    def command(self) -> list[str | Path]:
        return [self._home / "bin" / "java", "-cp", self._classes, "App"]


PEERS = (KafkaStreams(),)
