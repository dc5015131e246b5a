"""How many inputs one engine process executes per second: records wait in the log, then it is let loose."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Row, percentile, until
from perdure.schemas import codec, commands, events, ids, reports, topics
from perdure.schemas.common import Usage
from perdure.schemas.inbox import RunAttempt
from perdure.schemas.public import ConfigRecord
from perdure.schemas.signing import Keys, signed
from perdure.settings import Settings
from perdure.streams.kafka_log import KafkaLog
from perdure.streams.log import Reader
from perdure.streams.topology import create_topics

_TASKS = 10_000
_BATCH = 50
_TYPE = "bench"


class EngineBench:
    """An engine of one partition in a process of its own, and a worker that only talks."""

    def __init__(self, bootstrap: str, folder: Path) -> None:
        prefix = f"bench{ids.new_local_id()[:13]}."
        create_topics(bootstrap, prefix, partitions=1)
        self.log = KafkaLog(bootstrap, prefix)
        self.keys = Keys.generate()
        self.keys.save(folder / "keys.json")
        self.producer = self.log.producer()
        settings = Settings(
            bootstrap=bootstrap, namespace=prefix, keys_file=folder / "keys.json", state_dir=folder / "state",
            data_dir=folder,
        )  # fmt: skip
        self._engine = subprocess.Popen([sys.executable, "-m", "perdure.cli", "engine"], env=_environment(settings))
        content = b'{"queue": "default", "policy": {}}'
        version = self._append(
            topics.CONFIG.name, codec.encode(ConfigRecord(name=f"type/{_TYPE}", content=content)), f"type/{_TYPE}"
        )
        self.session = ids.new_id("s-")
        self._command(signed(commands.WorkerStarted(
            session=self.session, worker_id="bench", types={_TYPE: version}, queues=["default"], slots=10**7,
        ), *self.keys.newest_worker()))  # fmt: skip
        self._closed = threading.Event()
        threading.Thread(target=self._keep_beating, daemon=True).start()

    def _keep_beating(self) -> None:
        while not self._closed.wait(1.0):
            self._beat()

    def rows(self, runs: int) -> list[Row]:
        """Lifecycle inputs, progress reports, and the latency of a command at rest."""
        self._latency(20)
        progress, lifecycle = [], []
        for _ in range(runs):
            rates = self._lifecycle()
            lifecycle.append(rates[0])
            progress.append(rates[1])
        times = [self._latency(200) for _ in range(runs)]
        return [
            Row("engine: full lifecycle inputs", "/s", ">= 8,000", lifecycle),
            Row("engine: progress reports", "/s", ">= 20,000", progress),
            Row("command to visible event, p50", "ms", "<= 10", [percentile(t, 0.5) for t in times]),
            Row("command to visible event, p99", "ms", "<= 40", [percentile(t, 0.99) for t in times]),
        ]

    def close(self) -> None:
        """End the engine."""
        self._closed.set()
        self._engine.terminate()
        self._engine.wait(30)
        self.producer.close()

    def _lifecycle(self) -> tuple[float, float]:
        """(lifecycle inputs/s, progress reports/s) of one round of tasks."""
        run = ids.new_local_id()[:18]
        grants = self._reader(topics.INBOX.name)
        submits = [codec.encode(commands.SubmitTask(
            command_id=f"{run}-{i}", task_id=f"default/{run}-{i}", type=_TYPE, queue="default", input=b'{"n":1}',
        )) for i in range(_TASKS)]  # fmt: skip
        took = self._release(submits, topics.EVENTS.name, events.TaskGranted, _TASKS)
        runs: list[RunAttempt] = []
        while len(runs) < _TASKS:
            found = (codec.decode(r.value or b"") for r in grants.read(2_000, 5.0))
            runs += [g for g in found if isinstance(g, RunAttempt)]
        grants.close()
        took += self._release(self._batches(runs, lambda: [reports.AttemptStarted(seq=1)]),
                              topics.EVENTS.name, events.AttemptStarted, _TASKS)  # fmt: skip
        moving = [reports.ReportProgress(seq=s, fraction=s / 10, units_done=s, units_total=10) for s in (2, 3)]
        progress = self._release(
            self._batches(runs, lambda: moving), topics.TELEMETRY.name, events.ProgressReported, 2 * _TASKS
        )
        done = [reports.AttemptCompleted(seq=4, result=b"1", usage=Usage())]
        took += self._release(self._batches(runs, lambda: done), topics.EVENTS.name, events.TaskCompleted, _TASKS)
        return 3 * _TASKS / took, 2 * _TASKS / progress

    def _batches(self, runs: Sequence[RunAttempt], say: Callable[[], list[Any]]) -> list[bytes]:
        return [
            signed(reports.ReportBatch(session=self.session, entries=[
                reports.ReportEntry(task_id=r.task_id, epoch=r.epoch, token=r.token, reports=say())
                for r in runs[i : i + _BATCH]
            ]), *self.keys.newest_worker())
            for i in range(0, len(runs), _BATCH)
        ]  # fmt: skip

    def _release(self, records: Sequence[bytes], topic: str, kind: type, count: int) -> float:
        """Seconds from letting the engine go to its last output, as a committed reader sees it."""
        reader = self._reader(topic)
        self._engine.send_signal(signal.SIGSTOP)
        for record in records:
            self._command(record)
        self._beat()
        self.producer.flush(60)
        wanted = codec.header_of(kind)
        began = time.perf_counter()
        self._engine.send_signal(signal.SIGCONT)
        seen = 0
        while seen < count:
            seen += sum((r.value or b"").startswith(wanted) for r in reader.read(5_000, 5.0))
        took = time.perf_counter() - began
        reader.close()
        return took

    def _latency(self, count: int) -> list[float]:
        """Milliseconds from a command's append to its event, one after another."""
        reader = self._reader(topics.EVENTS.name)
        times = []
        for _ in range(count):
            task_id = f"nobody/{ids.new_local_id()}"
            record = codec.encode(
                commands.SubmitTask(command_id=ids.new_id(), task_id=task_id, type="none", queue="nobody")
            )
            self._beat()
            began = time.perf_counter()
            self._command(record)
            until(lambda: any(r.key == task_id.encode() for r in reader.read(100, 1.0)), "the event", pause_s=0)  # noqa: B023
            times.append((time.perf_counter() - began) * 1e3)
        reader.close()
        return times

    def _reader(self, topic: str) -> Reader:
        reader = self.log.reader()
        reader.assign({(topic, 0): reader.bounds(topic, 0)[1]})
        return reader

    def _beat(self) -> None:
        self._command(
            signed(commands.WorkerBeat(session=self.session, grants_seen=10**9, free=1), *self.keys.newest_worker())
        )

    def _command(self, record: bytes) -> None:
        self.producer.append(topics.COMMANDS.name, 0, None, record)

    def _append(self, topic: str, record: bytes, key: str) -> int:
        offsets: list[int] = []
        self.producer.append(topic, 0, key.encode(), record, lambda offset, _: offsets.append(offset))
        self.producer.flush(10)
        return offsets[0]


def _environment(settings: Settings) -> dict[str, str]:
    import os

    return {n: v for n, v in os.environ.items() if not n.startswith("PERDURE_")} | settings.environment()
