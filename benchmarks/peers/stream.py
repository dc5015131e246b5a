"""The stream workload: JSON in, a counter and the last payload of each key kept in RocksDB with a changelog, JSON out.

Every application runs as one process on a broker of its own, on the same records. What is timed is what a reader of
committed records can see: from the first output to the last.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, IsolationLevel, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec  # type: ignore[attr-defined]

from benchmarks.peers import cache
from benchmarks.peers.errors import Failed
from benchmarks.peers.processes import Process
from perdure.connectors.embedded_kafka import EmbeddedKafka

PARTITIONS, KEYS, SIZE = 4, 20_000, 155
INPUT, OUTPUT = "input", "output"
STREAM_WORKLOADS = {"S100k": 100_000, "S1M": 1_000_000}
"""Workload -> records."""
_POLL_S = 0.05
_STALLED_S = 120.0
_QUIET_S = 2.0


class StreamPeer:
    """A peer of the stream workload; see `Peer` for what is said alike."""

    name: str
    title: str
    folder: str
    packages: Sequence[str] = ()
    durability: str
    settings: str
    workloads: Sequence[str] = tuple(STREAM_WORKLOADS)
    not_run: Mapping[str, str] = {}
    exactly_once = True

    def __init__(self) -> None:
        self.python = Path()

    def install(self) -> dict[str, str]:
        """Get what is missing; the versions of what there is. Raises `Missing`."""
        self.python = cache.venv(self.folder, self.packages)
        names = [package.partition("[")[0].partition("=")[0] for package in self.packages]
        return {name: cache.version(self.python, name) for name in names}

    def command(self) -> list[str | Path]:
        """The application's."""
        return [self.python, "-m", f"benchmarks.peers.{self.folder}.app"]

    def environment(self) -> dict[str, str]:
        """What it is told beside the addresses."""
        return {}

    def topics(self) -> list[NewTopic]:
        """Topics it needs beside input and output."""
        return []

    def start(self, folder: Path) -> None:
        """Nothing runs between the workloads: each has a broker of its own."""
        self.data = folder

    def warm(self) -> None:
        """A stream application is measured from its start."""

    def stop(self) -> None:
        """Nothing is left."""

    def measure(self, workload: str, _: Any) -> dict[str, float]:
        """Run the application over all records. Raises `Failed`."""
        count = STREAM_WORKLOADS[workload]
        folder = self.data / workload
        folder.mkdir()
        with EmbeddedKafka(folder / "kafka") as kafka:
            create([*(NewTopic(name, PARTITIONS, 1) for name in (INPUT, OUTPUT)), *self.topics()], kafka.bootstrap)
            produce(kafka.bootstrap, count)
            addresses = {"PEER_BOOTSTRAP": kafka.bootstrap, "PEER_STATE": str(folder / "state")}
            began = time.monotonic()
            app = Process(self.command(), folder / "app.log", addresses | self.environment())
            try:
                seen = watch(kafka.bootstrap, count, app)
                used = sum(p.cpu_times().user + p.cpu_times().system for p in app.tree())
                held = sum(p.memory_info().rss for p in app.tree())
            finally:
                app.stop()
            outputs = visible(kafka.bootstrap)
        if outputs < count or (self.exactly_once and outputs != count):
            raise Failed(f"{outputs:,} outputs of {count:,} records")
        figures = {
            f"{workload}_wall_s": seen.last - began,
            f"{workload}_cpu_us": used / count * 1e6,
            f"{workload}_rss_mb": held / 1e6,
        }
        if seen.at_first < count / 2:  # else there is no stretch to take a rate of: it all came with one commit
            figures[f"{workload}_per_s"] = (count - seen.at_first) / (seen.last - seen.first)
        return figures


@dataclass
class Seen:
    """When outputs became visible, monotonic seconds."""

    first: float
    at_first: int
    last: float


def record(number: int) -> tuple[bytes, bytes]:
    """(key, value) of an input record: 155 bytes of JSON."""
    key = f"key-{number * 7919 % KEYS:05}"
    value = {"key": key, "number": number, "amount": number % 1000 / 8, "kind": "measurement", "text": ""}
    size = len(json.dumps(value))
    value["text"] = "x" * (SIZE - size)
    return key.encode(), json.dumps(value).encode()


def create(topics: Sequence[NewTopic], bootstrap: str) -> None:
    """Make topics and wait until they are there."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    for done in admin.create_topics(list(topics)).values():
        done.result(30)


def produce(bootstrap: str, count: int) -> None:
    """Fill the input topic; a key is always in the same partition."""
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 50, "enable.idempotence": True})
    for number in range(count):
        key, value = record(number)
        while True:
            try:
                producer.produce(INPUT, value, key, number * 7919 % KEYS % PARTITIONS)
                break
            except BufferError:
                producer.poll(0.1)
    producer.flush(60)


def watch(bootstrap: str, count: int, app: Process) -> Seen:
    """Poll the end of the committed output until all is there and nothing more comes. Raises `Failed`.

    The end counts transactions' markers too, less than a hundredth; so its last change is what ends the time.
    """
    admin = AdminClient({"bootstrap.servers": bootstrap})
    wanted = {TopicPartition(OUTPUT, p): OffsetSpec.latest() for p in range(PARTITIONS)}  # type: ignore[no-untyped-call]
    seen, end = Seen(0, 0, time.monotonic()), 0
    while True:
        app.check()
        asked = admin.list_offsets(wanted, isolation_level=IsolationLevel.READ_COMMITTED)
        found = sum(future.result(30).offset for future in asked.values())
        at = time.monotonic()
        if found and not end:
            seen.first, seen.at_first = at, found
        if found != end:
            seen.last, end = at, found
        if end >= count and at - seen.last > _QUIET_S:
            return seen
        if at - seen.last > _STALLED_S:
            raise Failed(f"{end:,} of {count:,} outputs, and no more within {_STALLED_S:g} s")
        time.sleep(_POLL_S)


def visible(bootstrap: str) -> int:
    """How many outputs a reader of committed records really gets."""
    reader = Consumer({
        "bootstrap.servers": bootstrap, "group.id": "count", "isolation.level": "read_committed",
        "enable.auto.commit": False, "enable.partition.eof": True,
    })  # fmt: skip
    reader.assign([TopicPartition(OUTPUT, p, 0) for p in range(PARTITIONS)])
    count, ended = 0, 0
    while ended < PARTITIONS:
        for message in reader.consume(10_000, 1.0):
            if message.error() is None:
                count += 1
            else:
                ended += 1
    reader.close()
    return count
