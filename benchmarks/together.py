"""How many tasks run at the same time on one machine: processes, and async tasks in one process."""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import psutil

from benchmarks.hosts import Hosts
from benchmarks.measure import Row, until
from perdure.client import Client
from perdure.connectors.embedded_kafka import EmbeddedKafka
from perdure.schemas import codec, events, ids, topics

_QUEUE = "bench"
_WATCHED_S = 30.0


def rows(processes: int = 200, tasks: int = 10_000) -> list[Row]:
    """Both kinds, one after the other, on a Kafka of their own."""
    found: list[Row] = []
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="perdure-many-", ignore_cleanup_errors=True))
        kafka = stack.enter_context(EmbeddedKafka(Path(name) / "kafka"))
        for kind, task_type, count in (("processes", "held", processes), ("async tasks", "held_async", tasks)):
            bench = _Bench(kafka.bootstrap, Path(name) / task_type)
            try:
                found += bench.rows(kind, task_type, count)
            finally:
                bench.close()
    return found


class _Bench:
    def __init__(self, bootstrap: str, folder: Path) -> None:
        self._hosts = Hosts(bootstrap, folder, 4)
        self._gate = folder / "gate"
        self._where = (topics.EVENTS.name, ids.partition_of(_QUEUE, 4))

    def rows(self, kind: str, task_type: str, count: int) -> list[Row]:
        self._hosts.start("engine", "engine")
        self._hosts.await_words("engine", "is up to date", 4)
        self._hosts.start(
            "worker",
            "worker",
            "-m",
            "benchmarks.tasks",
            "--slots",
            str(count),
            "--async-slots",
            str(count),
            "--name",
            "w",
        )
        self._hosts.await_words("worker", "runs")
        client = Client(self._hosts.log)
        began = time.perf_counter()
        handles = [client.submit(task_type, {"gate": str(self._gate)}) for _ in range(count)]
        self._await(events.AttemptStarted, count)
        all_run = time.perf_counter() - began
        memory = self._hosts.memory("worker")
        load = self._load()
        lost = self._count(events.AttemptLost)
        self._gate.touch()
        began = time.perf_counter()
        self._await(events.TaskCompleted, count)
        all_ended = time.perf_counter() - began
        assert handles[-1].result(timeout=60) is None
        client.close()
        name = f"{count:,} {kind} at the same time"
        said = [
            Row(f"{name}: from the first submit until all run", "s", "", [all_run]),
            Row(f"{name}: memory of the worker and all below it", "MB", "", [memory]),
            Row(f"{name}: CPU while they wait, engine and worker", "% of a core", "", [load]),
            Row(f"{name}: leases lost meanwhile", "", "0", [lost]),
            Row(f"{name}: from the open gate until all have ended", "s", "", [all_ended]),
        ]
        for row in said:
            print(f"{row.name}: {row.median:,.1f} {row.unit}", file=sys.stderr, flush=True)
        return said

    def close(self) -> None:
        self._hosts.close()

    def _load(self) -> float:
        """CPU of engine, worker and all children for some time, in % of a core."""
        begun = _cpu(self._hosts.pids())
        time.sleep(_WATCHED_S)
        return (_cpu(self._hosts.pids()) - begun) / _WATCHED_S * 100

    def _await(self, kind: type, count: int) -> None:
        reader = self._hosts.log.reader()
        reader.assign({self._where: 0})
        header, seen = codec.header_of(kind), 0

        def look() -> bool:
            nonlocal seen
            seen += sum((r.value or b"").startswith(header) for r in reader.read(5_000, 0.2))
            return seen >= count

        until(look, f"{count} {kind.__name__}", timeout_s=900, pause_s=0)
        reader.close()

    def _count(self, kind: type) -> int:
        reader = self._hosts.log.reader()
        reader.assign({self._where: 0})
        _, end = reader.bounds(*self._where)
        header, seen = codec.header_of(kind), 0
        while not reader.caught_up(*self._where, end):
            seen += sum((r.value or b"").startswith(header) for r in reader.read(5_000, 0.2))
        reader.close()
        return seen


def _cpu(pids: list[int]) -> float:
    total = 0.0
    for pid in pids:
        times = psutil.Process(pid).cpu_times()
        total += times.user + times.system
    return total
