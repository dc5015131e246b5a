"""Worker processes on a real broker, with the engine as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from perdure.connectors.embedded_kafka import EmbeddedKafka
from perdure.schemas import codec, ids
from perdure.schemas.commands import CancelTask, SubmitTask
from perdure.schemas.signing import Keys
from perdure.streams.kafka_log import KafkaLog
from perdure.streams.topology import create_topics
from perdure.worker import SUPERSEDED
from tests.integration.worker_bench import TASKS, alive, until

pytestmark = pytest.mark.kafka
END_S = 60


class Stack:
    """An engine and workers as processes, and what they write to the log."""

    def __init__(self, bootstrap: str, prefix: str, folder: Path) -> None:
        self.folder = folder
        create_topics(bootstrap, prefix, partitions=4)
        Keys.generate().save(folder / "keys.json")
        self._environment = os.environ | {
            "PERDURE_BOOTSTRAP": bootstrap, "PERDURE_NAMESPACE": prefix, "PERDURE_KEYS_FILE": str(folder / "keys.json"),
            "PERDURE_STATE_DIR": str(folder / "state"),
        }  # fmt: skip
        self.log = KafkaLog(bootstrap, prefix)
        self.partition = ids.partition_of("etl", self.log.partitions)
        self._producer = self.log.producer()
        self._reader = self.log.reader()
        topics = ("task-events", "task-commands", "task-logs")
        self._reader.assign({(topic, self.partition): 0 for topic in topics})
        self._seen: list[tuple[str, Any]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._run("engine")

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait(END_S)
        self._producer.close()
        self._reader.close()

    def _run(self, *arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-m", "perdure.cli", *arguments], env=self._environment)
        self._processes.append(process)
        return process

    def worker(self, *options: str) -> subprocess.Popen[bytes]:
        """A worker process; returns when it has announced itself."""
        before = len(self.seen("task-commands", "WorkerStarted"))
        process = self._run("worker", "-m", TASKS, "--slots", "2", *options)
        until("the worker is registered", lambda: len(self.seen("task-commands", "WorkerStarted")) >= before + 2)
        return process

    def submit(self, task_type: str, local_id: str = "1", **values: Any) -> str:
        task_id = f"etl/{local_id}"
        value = json.dumps(values).encode()
        self._command(SubmitTask(command_id=ids.new_id(), task_id=task_id, type=task_type, input=value))
        return task_id

    def cancel(self, task_id: str) -> None:
        self._command(CancelTask(command_id=ids.new_id(), task_id=task_id))

    def _command(self, command: Any) -> None:
        self._producer.append("task-commands", self.partition, None, codec.encode(command))

    def seen(self, topic: str, kind: str, task_id: str | None = None) -> list[Any]:
        for record in self._reader.read(1_000, 0.05):
            if record.value is not None:
                self._seen.append((record.topic, codec.decode(record.value)))
        found = [m for t, m in self._seen if t == topic and type(m).__name__ == kind]
        return [m for m in found if task_id is None or m.task_id == task_id]

    def await_event(self, task_id: str, kind: str) -> Any:
        return until(f"{kind} of {task_id}", lambda: self.seen("task-events", kind, task_id))[-1]

    def witnessed(self, beginning: str) -> list[str]:
        path = self.folder / "witness"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(beginning)]


@pytest.fixture
def stack(kafka_bootstrap: str, topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    made = Stack(kafka_bootstrap, topic_prefix, tmp_path)
    try:
        yield made
    finally:
        made.close()


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def _none_lives(processes: list[psutil.Process]) -> bool:
    return not any(alive(p.pid) and p.is_running() for p in processes)


def test_tasks_run_and_sigterm_ends_the_worker_with_0(stack: Stack) -> None:
    worker = stack.worker()
    assert stack.await_event(stack.submit("add", a=1, b=2), "TaskCompleted").result == b"3"
    talk = stack.submit("talk", "talk", number=7)
    stack.await_event(talk, "TaskCompleted")
    until("its lines", lambda: len(stack.seen("task-logs", "LogLine", talk)) == 6)
    family = _family(worker)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(END_S) == 0
    until("nobody is left", lambda: _none_lives(family))
    assert stack.seen("task-commands", "WorkerStopping")


def test_sigterm_hands_tasks_back_and_the_next_worker_goes_on(stack: Stack) -> None:
    worker = stack.worker()
    task = stack.submit("files", folder=str(stack.folder), count=40)
    until("some files", lambda: len(stack.witnessed("file")) > 3)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(END_S) == 0
    until("it is handed back", lambda: "drained" in [e.reason for e in stack.seen("task-events", "TaskQueued", task)])
    stack.worker()
    stack.await_event(task, "TaskCompleted")
    assert sorted(stack.witnessed("file")) == sorted(f"file {n}" for n in range(40))


def test_a_killed_supervisor_leaves_nobody_behind_and_its_successor_takes_over_at_once(stack: Stack) -> None:
    worker = stack.worker()
    task = stack.submit("stubborn", folder=str(stack.folder))
    (line,) = until("the task runs", lambda: stack.witnessed("pids"))
    family = _family(worker)
    assert {int(pid) for pid in line.split()[1:]} <= {p.pid for p in family}
    worker.kill()
    worker.wait(END_S)
    until("no child and no grandchild is left", lambda: _none_lives(family), timeout_s=5)
    stack.worker()
    until("the task runs again", lambda: len(stack.witnessed("pids")) == 2)
    assert [e.why for e in stack.seen("task-events", "AttemptLost", task)] == ["superseded"], "before its lease ended"
    stack.cancel(task)
    stack.await_event(task, "TaskCancelled")


def test_a_killed_fork_server_ends_the_worker(stack: Stack) -> None:
    worker = stack.worker()
    stack.submit("stubborn", folder=str(stack.folder))
    until("the task runs", lambda: stack.witnessed("pids"))
    family = _family(worker)
    (server,) = psutil.Process(worker.pid).children()
    server.kill()
    assert worker.wait(END_S) not in (0, SUPERSEDED)
    until("nobody is left", lambda: _none_lives(family))


def test_two_unnamed_workers_of_one_host_and_one_that_takes_a_name_over(stack: Stack) -> None:
    stack.worker()
    stack.worker()
    old = stack.worker("--name", "same")
    stack.worker("--name", "same")
    assert old.wait(END_S) == SUPERSEDED
    names = {m.worker_id for m in stack.seen("task-commands", "WorkerStarted")}
    assert {name.split("-", 1)[1] for name in names if "same" not in name} == {"w0", "w0.async", "w1", "w1.async"}


def test_a_frozen_supervisor_loses_its_tasks_to_another_and_begins_anew(stack: Stack) -> None:
    frozen = stack.worker("--name", "frozen")
    task = stack.submit("files", folder=str(stack.folder), count=100)
    until("some files", lambda: len(stack.witnessed("file")) > 3)
    children = _family(frozen)
    frozen.send_signal(signal.SIGSTOP)
    until("its task waits for an acknowledgement", _standstill(stack))
    stack.worker("--name", "other")
    done = stack.await_event(task, "TaskCompleted")
    assert [e.worker_id for e in stack.seen("task-events", "TaskGranted", task)] == ["frozen", "other"]
    assert done.result == str(sum(range(100))).encode()
    frozen.send_signal(signal.SIGCONT)
    until("it has begun anew", lambda: len(_sessions(stack, "frozen")) == 2)
    executed = stack.witnessed("file")
    assert set(executed) == {f"file {n}" for n in range(100)}
    assert len(executed) <= 101, "only the step that was under way has run twice"
    steps = [e.step_id for e in stack.seen("task-events", "StepCompleted", task)]
    assert len(steps) == len(set(steps)) == 100
    until("the child that waited is gone", lambda: any(not alive(p.pid) for p in children))
    frozen.send_signal(signal.SIGTERM)
    assert frozen.wait(END_S) == 0


def _sessions(stack: Stack, worker_id: str) -> set[str]:
    return {m.session for m in stack.seen("task-commands", "WorkerStarted") if m.worker_id == worker_id}


def test_an_outage_of_the_broker_kills_no_task_and_repeats_no_step(tmp_path: Path, topic_prefix: str) -> None:
    with EmbeddedKafka(tmp_path / "kafka") as broker:
        stack = Stack(broker.bootstrap, topic_prefix, tmp_path)
        try:
            stack.worker()
            task = stack.submit("files", folder=str(tmp_path), count=150)
            until("some files", lambda: len(stack.witnessed("file")) > 3)
            os.kill(broker.pid, signal.SIGSTOP)
            quiet = len(until("the task waits for an acknowledgement", _standstill(stack)))
            assert quiet < 150
            os.kill(broker.pid, signal.SIGCONT)
            stack.await_event(task, "TaskCompleted")
            assert stack.witnessed("file") == [f"file {n}" for n in range(150)]
            assert stack.seen("task-events", "AttemptLost", task) == []
        finally:
            stack.close()


def _standstill(stack: Stack) -> Any:
    """True once the witness file has not grown for 3 s."""
    since = [time.monotonic(), 0.0]

    def found() -> list[str] | None:
        lines = stack.witnessed("file")
        if len(lines) != since[1]:
            since[:] = [time.monotonic(), len(lines)]
        return lines if time.monotonic() - since[0] > 3 else None

    return found
