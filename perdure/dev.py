"""The dev stack: Kafka, engine, worker and server on this machine, started, watched over and stopped together.

One process (`perdure dev`) holds the data directory's lock, owns the others and is owned by a person. Whatever ends it,
nothing stays: the kernel kills the processes whose parent dies, and Kafka's keeper watches it too. The processes have
sessions of their own, so that Ctrl-C reaches only this one, which then stops them in order.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, NoReturn

import psutil

from perdure.cli_run import OWNER
from perdure.client import Client
from perdure.connectors.embedded_kafka import EmbeddedKafka
from perdure.schemas import codec, topics
from perdure.schemas.errors import ConfigurationError, DecodeError, InfrastructureError, Unreachable
from perdure.schemas.public import WorkerMetrics
from perdure.settings import SETTINGS, DevStack, Settings, dev_blobs, dev_file, shared_keys
from perdure.streams.kafka_log import KafkaLog
from perdure.streams.log import Reader
from perdure.streams.topology import create_topics

_READY_S = 60.0
_POLL_S = 0.1
_DRAIN_S = 10
_STOP_S = {"worker": _DRAIN_S + 5.0, "server": 10.0, "engine": 10.0}
"""How long each may take to stop, in the order of stopping; then it is killed."""
_HEALTHY_S = 30.0
_WORDS = 4_096
"""Bytes of a log that may hold its last line."""
_RESTART_S = (0.0, 0.0, 0.0, 0.5, 1.0, 2.0, 5.0)
"""Pauses before a process that keeps dying before it has come up is started again; the last one stays."""
_LAST = 10
"""Nice value of what only shows: a burst of tasks goes through by a quarter faster, and is shown a little later."""
_GROUPS_S = 5.0
"""How often Kafka's log is read for groups that it has lost."""
_HOST = "127.0.0.1"

Say = Callable[[str], None]


class _Stopped(BaseException):
    """Somebody asked for the end; not an error, and not to be caught as one."""


@dataclass
class Process:
    """One process of the stack, through all its lives."""

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    log: Path
    running: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    due: float = 0.0
    deaths: int = 0
    gives_way: bool = False
    """Whether the others come first where they all want the same processors."""

    def start(self) -> None:
        """Run it, with all it says in its log file."""
        with self.log.open("ab") as output:
            self.running = subprocess.Popen(
                [sys.executable, "-m", "perdure.cli", *self.command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if self.gives_way:
            _let_others_first(self.running.pid)
        self.began = time.monotonic()

    def ended(self) -> int | None:
        """The exit code once it has ended."""
        return None if self.running is None else self.running.poll()

    def signal(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self.running is not None and self.running.poll() is None:
            self.running.send_signal(number)

    def last_words(self) -> str:
        """The last line of its log."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - _WORDS))
                lines = file.read().decode(errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


@dataclass
class Stack:
    """What `perdure dev` runs; use `run` once, in the main thread. port: the API's, none takes a free one."""

    data_dir: Path
    namespace: str
    modules: Sequence[str]
    slots: int | None
    port: int | None
    say: Say
    processes: dict[str, Process] = field(default_factory=dict)
    _hurry: bool = False
    _lost: set[str] = field(default_factory=set)
    _groups_due: float = 0.0

    def run(self, ready: Callable[[DevStack], None]) -> None:
        """Start everything, tell `ready`, and watch over it until SIGTERM or SIGINT; then stop everything.

        A second signal stops it without waiting. Raises `ConfigurationError` (one runs on this data directory, no
        Java), `Unreachable`, or `InfrastructureError` when a part does not come up; nothing is left running then.
        """
        with _locked(self.data_dir):
            (self.data_dir / "logs").mkdir(exist_ok=True)
            (self.data_dir / ".gitignore").write_text("*\n")
            kafka = EmbeddedKafka(self.data_dir / "kafka", log=self.say)
            try:
                self._listen_to_signals()
                stack = self._start(kafka)
                _write(dev_file(self.data_dir), stack)
                ready(stack)
                self._watch(kafka)
            except _Stopped:
                self.say("stopping")
            finally:
                dev_file(self.data_dir).unlink(missing_ok=True)
                self._stop()
                kafka.stop(*([1.0] if self._hurry else []))

    # Start -----------------------------------------------------------------------------------------------------------

    def _start(self, kafka: EmbeddedKafka) -> DevStack:
        keys_file = shared_keys(self.data_dir)
        bootstrap = kafka.start()
        self.say(f"Kafka is ready on {bootstrap}")
        create_topics(bootstrap, self.namespace)
        api = f"http://{_HOST}:{self.port or _free_port()}"
        stack = DevStack(bootstrap=bootstrap, api=api, data_dir=self.data_dir, pid=os.getpid(), keys_file=keys_file)
        log = KafkaLog(bootstrap, self.namespace)
        metrics = _from_here(log)
        for name, command in self._commands(api).items():
            self.processes[name] = Process(
                name, command, self._environment(stack), _fresh(self.data_dir / "logs" / f"{name}.log"),
                gives_way=name == "server",
            )  # fmt: skip
            self.processes[name].start()
        with Client(log) as client:
            self._await("engine", lambda: _answers(client))
            self._await("server", lambda: _serves(api))
            if "worker" in self.processes:
                self._await("worker", lambda: self._works(metrics))
        metrics.close()
        return stack

    def _commands(self, api: str) -> dict[str, list[str]]:
        port = api.rpartition(":")[2]
        found = {"engine": ["engine"], "server": ["server", "--port", port]}
        if self.modules:
            modules = [part for module in self.modules for part in ("-m", module)]
            slots = [] if self.slots is None else ["--slots", str(self.slots)]
            found["worker"] = ["worker", *modules, *slots, "--drain-timeout", f"{_DRAIN_S}s"]
        return found

    def _environment(self, stack: DevStack) -> dict[str, str]:
        """The environment of every process: this stack's addresses, and none of another broker's settings."""
        ours = {f"PERDURE_{name.upper()}" for name in SETTINGS}
        kept = {n: v for n, v in os.environ.items() if n not in ours and not n.startswith("PERDURE_KAFKA__")}
        settings = Settings(
            bootstrap=stack.bootstrap,
            api=stack.api,
            namespace=self.namespace,
            keys_file=stack.keys_file,
            data_dir=self.data_dir,
            state_dir=self.data_dir / "state",
            checkpoint_dir=self.data_dir / "checkpoints",
            blobs=dev_blobs(self.data_dir),
        )
        return kept | settings.environment() | {OWNER: str(os.getpid())}

    def _await(self, name: str, is_ready: Callable[[], bool]) -> None:
        process = self.processes[name]
        deadline = time.monotonic() + _READY_S
        while not is_ready():
            if process.ended() is not None:
                raise InfrastructureError(
                    f"the {name} ended at once: {process.last_words()} (all of it: {process.log})"
                )
            if time.monotonic() > deadline:
                raise Unreachable(f"the {name} was not ready within {_READY_S:g} s: see {process.log}")
        self.say(f"{name} is ready")

    def _works(self, metrics: Reader) -> bool:
        """Whether the worker has said that it works: its first metrics come when its sessions have begun."""
        running = self.processes["worker"].running
        for record in metrics.read(100, _POLL_S):
            with suppress(DecodeError):
                said = codec.decode_as(WorkerMetrics, record.value or b"")
                if running is not None and said.pid == running.pid:
                    return True
        return False

    # Watch and stop --------------------------------------------------------------------------------------------------

    def _watch(self, kafka: EmbeddedKafka) -> None:
        """Start again whatever dies, until a signal comes."""
        while True:
            if not kafka.alive():
                self.say("Kafka ended by itself; it is started again")
                kafka.start()
            self._look_after_groups(kafka, time.monotonic())
            for process in self.processes.values():
                self._look_after(process, time.monotonic())
            self._await_a_death()

    def _look_after_groups(self, kafka: EmbeddedKafka, now: float) -> None:
        """Start Kafka again if it has lost consumer groups, and has not found them by the next look."""
        if now < self._groups_due:
            return
        lost = kafka.lost_groups()
        if still := set(lost) & self._lost:
            self.say(f"Kafka has lost consumer groups, so it is started again: {min(still)}")
            kafka.stop()
            kafka.start()
        self._lost, self._groups_due = set(lost) - still, now + _GROUPS_S

    def _await_a_death(self) -> None:
        """Wait until one of the processes ends, `_POLL_S` at the most."""
        ends = [os.pidfd_open(p.running.pid) for p in self.processes.values() if p.running is not None]
        poller = select.poll()
        try:
            for end in ends:
                poller.register(end, select.POLLIN)
            poller.poll(_POLL_S * 1000)
        finally:
            for end in ends:
                os.close(end)

    def _look_after(self, process: Process, now: float) -> None:
        code = process.ended()
        if code is not None:
            process.deaths = 0 if now - process.began > _HEALTHY_S else process.deaths + 1
            pause = _RESTART_S[min(process.deaths, len(_RESTART_S) - 1)]
            process.running, process.due = None, now + pause
            again = f"again in {pause:g} s" if pause else "again"
            self.say(f"the {process.name} ended with code {code} ({process.last_words()}); it is started {again}")
        if process.running is None and now >= process.due:
            process.start()

    def _stop(self) -> None:
        for name, patience_s in _STOP_S.items():
            if name not in self.processes:
                continue
            process = self.processes[name]
            process.signal(signal.SIGTERM)
            deadline = time.monotonic() + patience_s
            while process.running is not None and process.ended() is None:
                if self._hurry or time.monotonic() > deadline:
                    process.signal(signal.SIGKILL)
                time.sleep(_POLL_S / 2)

    def _listen_to_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._asked_to_stop)

    def _asked_to_stop(self, *_: object) -> NoReturn:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._asked_again)
        raise _Stopped

    def _asked_again(self, *_: object) -> None:
        self._hurry = True


def stop_running(data_dir: Path, timeout_s: float = 60.0) -> bool:
    """Stop the stack that runs on a data directory; False when none does. Blocks until its process is gone.

    Raises `Unreachable` when it does not end in time.
    """
    pid = _holder(data_dir)
    if pid is None:
        return False
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.terminate()
        deadline = time.monotonic() + timeout_s
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                raise Unreachable(f"the dev stack (pid {pid}) does not end: see {data_dir / 'logs'}")
            time.sleep(_POLL_S)
    return True


@contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    """Hold the data directory; the lock goes with the process, however it ends."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with _lock_file(data_dir).open("a+") as file:
        if not _try_lock(file):
            pid = _holder(data_dir)
            raise ConfigurationError(
                f"a dev stack already runs on {data_dir} (pid {pid}): stop it with "
                f"`perdure dev stop --data-dir {data_dir}`"
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _holder(data_dir: Path) -> int | None:
    """The process that holds a data directory."""
    try:
        with _lock_file(data_dir).open("r+") as file:
            return None if _try_lock(file) else int(file.read())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigurationError(f"a dev stack is just being started on {data_dir}: try again") from error


def _lock_file(data_dir: Path) -> Path:
    return data_dir / "dev.lock"


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(path: Path, stack: DevStack) -> None:
    """Write the lock file whole or not at all: a reader may look at any moment."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps({name: str(v) if isinstance(v, Path) else v for name, v in asdict(stack).items()}))
    fresh.rename(path)


def _let_others_first(pid: int) -> None:
    """Lower the priority of a process that leads a session of its own. Linux shares processors among sessions first,
    and among their processes then (sched(7), autogroup): without the former the latter does nothing between ours.
    """
    with suppress(OSError):  # it has ended already, which the watch will notice
        last = max(_LAST, os.getpriority(os.PRIO_PROCESS, pid))  # of all that was started as nice as that, or nicer
        os.setpriority(os.PRIO_PROCESS, pid, last)
    with suppress(OSError):  # a kernel without such groups, or one that was asked for another a moment ago
        Path(f"/proc/{pid}/autogroup").write_text(str(_LAST))


def _fresh(log: Path) -> Path:
    """An empty log; what it held before stays beside it."""
    if log.exists():
        log.rename(log.with_name(log.name + ".before"))
    return log


def _from_here(log: KafkaLog) -> Reader:
    reader = log.reader()
    name = topics.METRICS.name
    reader.assign({(name, p): reader.bounds(name, p)[1] for p in range(log.partitions)})
    return reader


def _answers(client: Client) -> bool:
    """Whether every partition's engine answers."""
    try:
        client.find("whether all partitions answer")
    except Unreachable:
        return False
    return True


def _serves(api: str) -> bool:
    """Whether the server answers, in whatever health."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(f"{api}/health", timeout=1).close()
    except urllib.error.HTTPError as error:
        error.close()
    except OSError:
        time.sleep(_POLL_S)
        return False
    return True


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as listener:
        return int(listener.getsockname()[1])
