"""A namespace on the embedded Kafka, and its engine, worker and server as the processes that users run.

    with stack_on(bootstrap, prefix, folder) as stack:
        stack.engine()
        stack.worker(name="w")
        task = stack.submit("add", {"a": 1, "b": 2})
        stack.await_event(task, "TaskCompleted")

Everything is killed and stopped by process id, and nothing is left at the end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil
from confluent_kafka import Producer

from perdure.audit_reader import AuditReader
from perdure.cli_run import OWNER
from perdure.client import Client
from perdure.connectors.large_values import LargeValues
from perdure.handle import Handle
from perdure.projections.audit import Audit
from perdure.schemas import codec, ids, topics
from perdure.schemas.errors import DecodeError
from perdure.schemas.public import WorkerMetrics
from perdure.schemas.signing import Keys
from perdure.settings import SETTINGS, Settings
from perdure.streams.generations import Generations
from perdure.streams.kafka_log import KafkaLog
from perdure.streams.log import BEGIN, Record
from perdure.streams.store import META
from perdure.streams.topology import create_topics

TASKS = str(Path(__file__).with_name("stack_tasks.py"))
FAULTY = str(Path(__file__).with_name("faulty_engine.py"))
QUEUE = "etl"
DEADLINE_S = 120.0
_STOP_S = 60.0
T = TypeVar("T")


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


def tree(pid: int) -> list[int]:
    """A process and all its descendants, parents first."""
    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Processes as if the machine had stopped: SIGSTOP to all of them, SIGCONT at the end. One may end meanwhile."""

    def tell(number: signal.Signals) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    tell(signal.SIGSTOP)
    try:
        yield
    finally:
        tell(signal.SIGCONT)


class Process:
    """One process of the stack through all its lives; what it says is in `text`."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._command, self._environment, self._log = command, environment, log
        self._running: subprocess.Popen[bytes] | None = None
        self._begins = 0

    @property
    def pid(self) -> int:
        """Of the present life, or of the last one."""
        assert self._running is not None, "it was never started"
        return self._running.pid

    def start(self, **environment: str) -> Self:
        """Begin a life, with more in its environment than the others have; returns at once."""
        assert self._running is None or self._running.poll() is not None, "it runs"
        self._begins = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as output:
            self._running = subprocess.Popen(
                self._command, env=self._environment | environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, cwd=self._log.parent, start_new_session=True,
            )  # fmt: skip
        return self

    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._running is not None and self._running.poll() is None

    def fatal(self) -> int | None:
        """The signal that a defect in foreign code has ended it by."""
        code = None if self._running is None else self._running.poll()
        return -code if code in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS) else None

    def text(self) -> str:
        """What it has said in its present life."""
        return self._log.read_bytes()[self._begins :].decode(errors="replace")

    def kill(self) -> None:
        """SIGKILL; returns when it is dead. What it started is not touched."""
        assert self._running is not None
        self._running.kill()
        self._running.wait(_STOP_S)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self._running is not None
        self._running.send_signal(number)

    def ended(self, timeout_s: float = _STOP_S) -> int:
        """The exit code, once it has ended by itself."""
        assert self._running is not None
        try:
            return self._running.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it goes on after {timeout_s} s: {self.text()[-2_000:]}") from None

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.signal(signal.SIGTERM)
        return self.ended()

    def await_text(self, text: str, count: int = 1) -> None:
        """Wait until it has said something, `count` times in this life."""
        self.reaches(repr(text), lambda: self.text().count(text) >= count)

    def reaches(self, what: str, found: Callable[[], bool]) -> None:
        """Wait for something that only happens while it runs."""

        def look() -> bool:
            ran = self.runs()
            if found():
                return True
            assert ran, f"it ended before {what}: {self.text()[-2_000:]}"
            return False

        until(what, look)


@dataclass(frozen=True)
class Seen:
    """A record, and what it holds: None if it cannot be decoded (or has no value)."""

    record: Record
    message: Any


class Tail:
    """All of a topic, from its beginning, as it grows."""

    def __init__(self, log: KafkaLog, topic: topics.Topic) -> None:
        self._topic = topic.name
        self._partitions = range(log.partitions if topic.partitioned else 1)
        self._reader = log.reader()
        self._reader.assign({(topic.name, p): BEGIN for p in self._partitions})
        self.seen: list[Seen] = []

    def look(self) -> list[Seen]:
        """All that has arrived; does not wait for anything."""
        while records := self._reader.read(2_000, 0.02):
            self.seen += [Seen(r, _decoded(r)) for r in records]
        return self.seen

    def whole(self) -> list[Seen]:
        """All that is in the topic at this moment; waits for transactions under way."""
        ends = {p: self._reader.bounds(self._topic, p)[1] for p in self._partitions}
        until(
            f"the end of {self._topic}",
            lambda: self.look() is not None and all(self._reader.caught_up(self._topic, p, e) for p, e in ends.items()),
        )
        return self.seen

    def close(self) -> None:
        self._reader.close()


def _decoded(record: Record) -> Any:
    try:
        return None if record.value is None else codec.decode(record.value)
    except DecodeError:
        return None


class Stack:
    """The namespace and its processes; see `stack_on`."""

    def __init__(self, bootstrap: str, prefix: str, folder: Path, partitions: int, replication: int = 1) -> None:
        self.bootstrap, self.prefix, self.folder = bootstrap, prefix, folder
        create_topics(bootstrap, prefix, partitions=partitions, replication=replication)
        self.log = KafkaLog(bootstrap, prefix)
        self.keys = Keys.generate()
        self.keys.save(folder / "keys.json")
        self.blobs = folder / "blobs"
        self.large_place = Settings(blobs=str(self.blobs)).large_place(self.log.topic_id)
        self.witness = folder / "witness"
        self.witness.touch()
        self._processes: list[Process] = []
        self._tails: dict[str, Tail] = {}
        self._client: Client | None = None
        self.environment: dict[str, str] = {}
        """More settings for processes that are started from now on."""
        self._kcat = Producer({"bootstrap.servers": bootstrap, "enable.metrics.push": False, "log_level": 0})

    def close(self) -> None:
        """End everything, the workers' children included, and forget the topics."""
        pids = [pid for process in self._processes if process.runs() for pid in tree(process.pid)]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            process.ended()
        for tail in self._tails.values():
            tail.close()
        if self._client is not None:
            self._client.close()
        self.log.admin().delete_topics([t.on(self.prefix) for t in topics.ALL])
        until("the end of every process", lambda: not any(map(alive, pids)))

    # Processes -------------------------------------------------------------------------------------------------------

    def process(self, name: str, *command: str, host: str = "state", bootstrap: str = "") -> Process:
        """A process with the stack's settings in its environment; not started yet.

        host: the folder that is its state directory; processes with other ones are on other machines, as far as they
        know. bootstrap: another way to the same broker.
        """
        ours = {f"PERDURE_{field.upper()}" for field in SETTINGS}
        kept = {n: v for n, v in os.environ.items() if n not in ours and not n.startswith("PERDURE_")}
        settings = Settings(
            bootstrap=bootstrap or self.bootstrap, namespace=self.prefix, keys_file=self.folder / "keys.json",
            data_dir=self.folder, state_dir=self.folder / host, checkpoint_dir=self.folder / "checkpoints",
            blobs=str(self.blobs),
        )  # fmt: skip
        environment = kept | settings.environment() | {OWNER: str(os.getpid())} | self.environment
        made = Process([sys.executable, *command], environment, self.folder / f"{name}.log")
        self._processes.append(made)
        return made

    def engine(self, *options: str, program: tuple[str, ...] = ("-m", "perdure.cli")) -> Process:
        """An engine that has all partitions; returns when all are up to date."""
        engine = self.process("engine", *program, "engine", *options).start()
        self.await_engine(engine)
        return engine

    def check_store(self, engine: Process, host: str = "state") -> None:
        """Stop the engine; what its stores hold then is what its changelog says (G5), and the log holds G1 to G6."""
        assert engine.stop() == 0
        self.audit()
        folder = self.folder / host / "partition" / "engine" / self.log.topic_id(topics.CHANGELOG.name)
        rows = self.changelog()
        for partition in range(self.log.partitions):
            store = Generations(folder / str(partition)).open()
            assert store is not None
            held = {key: value for key, value in store.scan(b"") if not key.startswith(META)}
            store.close()
            assert held == rows[partition], f"store and changelog of partition {partition} differ"

    def audit(self) -> Audit:
        """What the auditor finds in the topics: nothing."""
        reader = AuditReader(self.bootstrap, self.prefix, {}, progress=lambda _: None)
        for _ in range(2):
            reader.round()
        reader.close()
        assert not reader.audit.violations, "\n".join(v.line() for v in reader.audit.violations[:20])
        return reader.audit

    def changelog(self) -> dict[int, dict[bytes, bytes]]:
        """The engine's state, as the changelog has it: partition -> key -> row."""
        rows: dict[int, dict[bytes, bytes]] = {p: {} for p in range(self.log.partitions)}
        for s in self.tail(topics.CHANGELOG.name).whole():
            assert s.record.key is not None
            if s.record.value is None:
                rows[s.record.partition].pop(s.record.key, None)
            else:
                rows[s.record.partition][s.record.key] = s.record.value
        return rows

    def await_engine(self, engine: Process) -> None:
        """Wait until all partitions of a (re)started engine are up to date."""
        engine.await_text("is up to date", self.log.partitions)

    def worker(self, *options: str, name: str | None = None, log: str = "worker") -> Process:
        """A worker with the tasks of `stack_tasks`; returns when it has begun to work."""
        named = [] if name is None else ["--name", name]
        command = ["-m", "perdure.cli", "worker", "-m", TASKS, *named, *options]
        worker = self.process(log, *command).start()
        self.await_worker(worker)
        return worker

    def await_worker(self, worker: Process) -> None:
        """Wait until a (re)started worker has begun to work."""
        worker.reaches("its first metrics", lambda: self._measured(worker))

    def _measured(self, worker: Process) -> bool:
        found = self.tail(topics.METRICS.name).look()
        return any(isinstance(s.message, WorkerMetrics) and s.message.pid == worker.pid for s in found)

    def server(self) -> str:
        """The HTTP API and the projections; its address."""
        server = self.process("server", "-m", "perdure.cli", "server", "--port", "0").start()
        server.await_text("the API answers at ")
        return server.text().partition("the API answers at ")[2].split()[0]

    # What tests say --------------------------------------------------------------------------------------------------

    @property
    def client(self) -> Client:
        """A client of the namespace."""
        if self._client is None:
            self._client = Client(self.log, large_values=LargeValues.at(self.large_place))
        return self._client

    def submit(self, task_type: str, input: Any = None, **options: Any) -> Handle:
        """Submit to the tests' queue, whether or not the type is known yet."""
        return self.client.submit(task_type, input, **({"queue": QUEUE} | options))

    def produce(
        self, value: bytes | dict[str, Any], *, partition: int = -1, key: bytes | None = None,
        placed: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        """What kcat does: a record on task-commands, by a plain producer with librdkafka's default partitioner.

        partition: -1 leaves it to the partitioner. `placed` is told partition and offset. Call `flush` to have everything acknowledged.
        """

        def delivered(error: Any, message: Any) -> None:
            assert error is None, error
            if placed is not None:
                placed(message.partition(), message.offset())

        data = json.dumps(value).encode() if isinstance(value, dict) else value
        while True:
            try:
                self._kcat.produce(
                    topics.COMMANDS.on(self.prefix), data, key, partition=partition, on_delivery=delivered
                )
                return
            except BufferError:
                self._kcat.poll(0.1)

    def flush(self) -> None:
        """Wait until all that was produced is in the log."""
        assert self._kcat.flush(DEADLINE_S) == 0

    def home(self, routing_key: str = QUEUE) -> int:
        """The partition that owns a routing key."""
        return ids.partition_of(routing_key, self.log.partitions)

    # What tests see --------------------------------------------------------------------------------------------------

    def tail(self, topic: str) -> Tail:
        """A topic as it grows."""
        if topic not in self._tails:
            self._tails[topic] = Tail(self.log, topics.BY_NAME[topic])
        return self._tails[topic]

    def messages(self, topic: str, *kinds: str) -> list[Any]:
        """All records of these kinds that are in a topic at this moment, in the order of their partitions."""
        return _of_kinds(self.tail(topic).whole(), kinds)

    def events(self, task_id: str, *kinds: str) -> list[Any]:
        """All that has happened to a task until now."""
        return _of_task(self.messages(topics.EVENTS.name, *kinds), task_id)

    def await_event(self, task_id: str, kind: str, count: int = 1, timeout_s: float = DEADLINE_S) -> Any:
        """The `count`th event of a kind, once it is there."""

        def look() -> list[Any] | None:
            self._no_crash()
            found = _of_task(_of_kinds(self.tail(topics.EVENTS.name).look(), (kind,)), task_id)
            return found if len(found) >= count else None

        return until(f"{kind} of {task_id}", look, timeout_s)[count - 1]

    def result(self, handle: Handle) -> Any:
        """The task's result once it has ended, however long the engine is away meanwhile."""
        ends = ("TaskCompleted", "TaskFailed", "TaskCancelled", "TaskTimedOut")
        tail = self.tail(topics.EVENTS.name)

        def look() -> list[Any]:
            self._no_crash()
            return _of_task(_of_kinds(tail.look(), ends), handle.id)

        until(f"the end of {handle.id}", look)
        return handle.result(timeout=DEADLINE_S)

    def _no_crash(self) -> None:
        """Nothing is waited for that cannot come: no process has died of a defect in foreign code."""
        for process in self._processes:
            assert process.fatal() is None, f"signal {process.fatal()}: {process.text()[-8_000:]}"

    def witnessed(self, *words: str) -> list[Execution]:
        """What the tasks have written down, where it begins with these words."""
        found = [Execution.of(line) for line in self.witness.read_text().splitlines()]
        return [e for e in found if tuple(e.words[: len(words)]) == words]

    def await_witness(self, *words: str, count: int = 1) -> Execution:
        """The `count`th such line, once it is there."""
        found = until(f"{words} in the witness", lambda: self.witnessed(*words)[count - 1 : count])
        return found[0]


@dataclass(frozen=True)
class Execution:
    """A line of the witness file, which nothing of Perdure ever reads."""

    at: int
    """ms."""
    pid: int
    words: tuple[str, ...]

    @classmethod
    def of(cls, line: str) -> Execution:
        at, pid, *words = line.split()
        return cls(int(at), int(pid), tuple(words))


def _of_kinds(seen: Iterable[Seen], kinds: tuple[str, ...]) -> list[Any]:
    return [s.message for s in seen if s.message is not None and (not kinds or type(s.message).__name__ in kinds)]


def _of_task(messages: Iterable[Any], task_id: str) -> list[Any]:
    return [m for m in messages if getattr(m, "task_id", None) == task_id]


def prove(stack: Stack, task_id: str, count: int, kills: int) -> None:
    """CONTRACT section 5 for a task of type `files`: each step recorded once, and none executed after that."""
    recorded = Counter(int(e.result) for e in stack.events(task_id, "StepCompleted"))
    assert recorded == Counter(range(count)), "exactly one StepCompleted per file"
    recorded_at = {int(e.result): e.at for e in stack.events(task_id, "StepCompleted")}
    executions = stack.witnessed("file", task_id)
    assert {int(e.words[2]) for e in executions} == set(range(count))
    assert len(executions) <= count + kills, f"{len(executions)} executions of {count} files after {kills} kills"
    late = [e for e in executions if e.at > recorded_at[int(e.words[2])]]
    assert not late, "executed after it was recorded"


@contextmanager
def stack_on(
    bootstrap: str, prefix: str, folder: Path, *, partitions: int = 4, replication: int = 1
) -> Iterator[Stack]:
    """A namespace of its own that leaves nothing behind."""
    stack = Stack(bootstrap, prefix, folder, partitions, replication)
    try:
        yield stack
    finally:
        stack.close()
