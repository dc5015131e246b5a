"""How long an engine with a great state takes to come back, and what it holds in memory.

Tasks are submitted to all partitions and stay pending; then the engine is stopped and comes back with its own store, on
a new disk with snapshots at hand, and on a new disk with nothing but the changelog. A recovery ends when every
partition has answered a question that was asked before the engine was started.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from benchmarks.hosts import Hosts
from benchmarks.measure import Row, until
from perdure.connectors.embedded_kafka import EmbeddedKafka
from perdure.schemas import codec, commands, ids, topics

_PARTITIONS = 4
_READY = "is up to date"


def rows(tasks: int) -> list[Row]:
    """All of them, on a Kafka of their own."""
    with tempfile.TemporaryDirectory(prefix="perdure-cold-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with EmbeddedKafka(folder / "kafka") as kafka:
            bench = ColdBench(kafka.bootstrap, folder / "hosts")
            try:
                return bench.rows(tasks)
            finally:
                bench.close()


class ColdBench:
    """One engine process and many pending tasks."""

    def __init__(self, bootstrap: str, folder: Path) -> None:
        self._hosts = Hosts(bootstrap, folder, _PARTITIONS)
        self._blobs = folder / "blobs"
        self._log = self._hosts.log

    def rows(self, tasks: int) -> list[Row]:
        """Load, and come back in three ways."""
        self._engine(snapshots=True)
        loading = self._load(tasks)
        loaded = self._hosts.most_memory("engine")
        self._hosts.stop("engine")
        found = [
            Row(f"{tasks:,} tasks: submits executed, one engine process", "/s", "", [tasks / loading]),
            Row(f"{tasks:,} tasks: memory of the engine at the most while they came", "MB", "<= 1,000", [loaded]),
        ]
        for what, wanted, lost, snapshots in (
            ("own store", "", False, True),
            ("new disk, snapshots", "<= 30", True, True),
            ("new disk, changelog only", "<= 120", True, False),
        ):
            if lost:
                self._hosts.forget("engine")
            took = self._recovery(snapshots)
            memory = self._hosts.most_memory("engine")
            self._hosts.stop("engine")
            found.append(Row(f"{tasks:,} tasks: recovery, {what}", "s", wanted, [took]))
            found.append(Row(f"{tasks:,} tasks: memory of the engine at the most, {what}", "MB", "<= 1,000", [memory]))
            print(f"{found[-2].name}: {took:,.1f} s, {memory:,.0f} MB", file=sys.stderr, flush=True)
        return found

    def close(self) -> None:
        """End the engine."""
        self._hosts.close()

    def _engine(self, *, snapshots: bool) -> None:
        self._hosts.start("engine", "engine", **({"PERDURE_BLOBS": str(self._blobs)} if snapshots else {}))

    def _load(self, tasks: int) -> float:
        """Submit them as fast as they can be appended; seconds until the last one is executed."""
        self._hosts.await_words("engine", _READY, _PARTITIONS)
        producer = self._log.producer()
        began = time.perf_counter()
        for n in range(tasks):
            queue = f"q{n % 64}"
            submit = commands.SubmitTask(
                command_id=f"c-{n}", task_id=ids.join(queue, f"{n * 2654435761 % 2**32:08x}-{n}"), type="none",
                queue=queue, input=b'{"n":1}',
            )  # fmt: skip
            producer.append(topics.COMMANDS.name, ids.partition_of(queue, _PARTITIONS), None, codec.encode(submit))
        producer.flush(600)
        producer.close()
        self._await_answers(self._ask())
        return time.perf_counter() - began

    def _recovery(self, snapshots: bool) -> float:
        asked = self._ask()
        began = time.perf_counter()
        self._engine(snapshots=snapshots)
        self._await_answers(asked)
        return time.perf_counter() - began

    def _ask(self) -> dict[int, int]:
        """Ask every partition something; partition -> where its next answer will be."""
        reader, producer = self._log.reader(), self._log.producer()
        ends = {p: reader.bounds(topics.REPLIES.name, p)[1] for p in range(_PARTITIONS)}
        for partition in ends:
            ask = commands.FindTasks(command_id=ids.new_id(), prefix="no-such-task", reply_to="cold")
            producer.append(topics.COMMANDS.name, partition, None, codec.encode(ask))
        producer.flush(60)
        producer.close()
        reader.close()
        return ends

    def _await_answers(self, ends: dict[int, int]) -> None:
        reader = self._log.reader()
        reader.assign({(topics.REPLIES.name, p): end for p, end in ends.items()})
        answered: set[int] = set()

        def look() -> bool:
            answered.update(r.partition for r in reader.read(100, 0.05))
            return len(answered) == len(ends)

        until(look, "answers of all partitions", timeout_s=3_600, pause_s=0)
        reader.close()
