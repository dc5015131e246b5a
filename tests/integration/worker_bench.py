"""A log in memory, the engine on a thread, and workers with real children: the test submits and watches."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil

from perdure.forkserver import ForkServer
from perdure.schemas import codec, ids
from perdure.schemas.commands import CancelTask, PauseTask, ResumeTask, SubmitTask
from perdure.schemas.public import LogLine
from perdure.schemas.signing import Keys
from perdure.streams.local_engine import LocalEngine
from perdure.streams.memory_log import MemoryLog
from perdure.worker import Worker

TASKS = str(Path(__file__).with_name("worker_tasks.py"))
DEADLINE_S = 60.0
T = TypeVar("T")


def wall() -> int:
    """Now, in ms."""
    return time.time_ns() // 1_000_000


def until(what: str, found: Callable[[], T | None], timeout_s: float = DEADLINE_S) -> T:
    """Wait until `found` returns something true; that."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        value = found()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"not within {timeout_s} s: {what}")


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class RunningWorker:
    """A worker on a thread of the test."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.outcome: list[int | Exception] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.outcome.append(self.worker.run())
        except Exception as error:  # noqa: BLE001 - raised again by join
            self.outcome.append(error)

    def ended(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> int:
        """Wait for the worker's end; its exit code."""
        self._thread.join(DEADLINE_S)
        assert self.ended(), "the worker does not end"
        (outcome,) = self.outcome
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def stop(self) -> int:
        """Drain, and the exit code."""
        self.worker.request_stop()
        return self.join()


class Bench:
    """What a test has in its hands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys = Keys.generate()
        self.log = MemoryLog(wall)
        self._producer = self.log.producer()
        self._stopped = threading.Event()
        self._engine = threading.Thread(target=self._pump)
        self._engine.start()
        self._decoded: dict[tuple[str, int, int], Any] = {}
        self.workers: list[RunningWorker] = []

    def _pump(self) -> None:
        engine = LocalEngine(self.log, self.keys, wall)
        while not self._stopped.is_set():
            if not engine.step():
                self._stopped.wait(0.002)
        engine.close()

    def close(self) -> None:
        for worker in self.workers:
            if not worker.ended():
                worker.worker.request_stop()
                worker.worker.request_stop()
        for worker in self.workers:
            worker.join()
        self._stopped.set()
        self._engine.join()

    def start(self, max_tasks: int = 100, **options: Any) -> RunningWorker:
        """A worker with the test tasks; returns when its sessions have begun."""
        settings: dict[str, Any] = {
            "slots": 2,
            "state_dir": self.folder / "state",
            "checkpoint_dir": self.folder / "checkpoints",
        }
        before = len(self.messages("task-commands", "WorkerStarted"))
        forks = ForkServer([TASKS], max_tasks=max_tasks)
        worker = RunningWorker(Worker(self.log, self.keys, forks, **(settings | options)))
        self.workers.append(worker)
        until(
            "the worker is registered",
            lambda: worker.ended() or len(self.messages("task-commands", "WorkerStarted")) >= before + 2,
        )
        return worker

    def submit(self, task_type: str, local_id: str = "1", **values: Any) -> str:
        task_id = f"etl/{local_id}"
        self._command(
            SubmitTask(command_id=ids.new_id(), task_id=task_id, type=task_type, input=json.dumps(values).encode())
        )
        return task_id

    def pause(self, task_id: str) -> None:
        self._command(PauseTask(command_id=ids.new_id(), task_id=task_id))

    def resume(self, task_id: str) -> None:
        self._command(ResumeTask(command_id=ids.new_id(), task_id=task_id))

    def cancel(self, task_id: str) -> None:
        self._command(CancelTask(command_id=ids.new_id(), task_id=task_id, reason="enough"))

    def _command(self, command: Any) -> None:
        partition = ids.partition_of("etl", self.log.partitions)
        self._producer.append("task-commands", partition, None, codec.encode(command))

    def messages(self, topic: str, *kinds: str) -> list[Any]:
        """Every record of these kinds, decoded."""
        found = []
        for record in self.log.records(topic):
            place = (topic, record.partition, record.offset)
            if record.value is not None and place not in self._decoded:
                self._decoded[place] = codec.decode(record.value)
            found.append(self._decoded.get(place))
        return [m for m in found if m is not None and (not kinds or type(m).__name__ in kinds)]

    def events(self, task_id: str, *kinds: str) -> list[Any]:
        return [e for e in self.messages("task-events", *kinds) if getattr(e, "task_id", None) == task_id]

    def await_event(self, task_id: str, kind: str, count: int = 1) -> Any:
        """The `count`th event of the kind, once it is there."""
        found = until(f"{kind} of {task_id}", lambda: self._enough(task_id, kind, count))
        return found[count - 1]

    def _enough(self, task_id: str, kind: str, count: int) -> list[Any] | None:
        found = self.events(task_id, kind)
        return found if len(found) >= count else None

    def lines(self, task_id: str) -> list[LogLine]:
        return [m for m in self.messages("task-logs") if m.task_id == task_id]

    def witnessed(self, beginning: str = "") -> list[str]:
        path = self.folder / "witness"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(beginning)]


@contextmanager
def bench_in(folder: Path) -> Iterator[Bench]:
    """A bench that leaves nothing behind."""
    bench = Bench(folder)
    try:
        yield bench
    finally:
        bench.close()
