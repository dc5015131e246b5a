"""A real Kafka broker in a child process, for development and tests: one node, loopback only, one data folder.

    with EmbeddedKafka(Path(".perdure/kafka")) as kafka:
        print(kafka.bootstrap)

It needs a Java (`java.py`) and Kafka's jars (`kafka_jars.py`), keeps its data and its port over restarts, and ends with
its owner unless it is detached (`kafka_keeper.py` says how). It is no production broker: one copy of everything.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import psutil
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from perdure.connectors.java import Java, find_java
from perdure.connectors.kafka_data import HOST, Identity, KafkaData
from perdure.connectors.kafka_jars import KafkaJars, cache_folder, kafka_jars
from perdure.connectors.lost_groups import LostGroups
from perdure.schemas.errors import ConfigurationError, InfrastructureError, Unreachable

_JVM_FLAGS = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData", "-Xms64m", "-Xmx384m")
_KEEPER = Path(__file__).with_name("kafka_keeper.py")
_LOG_SETTINGS = Path(__file__).with_name("kafka_log4j2.properties")
_AOT_CACHE_MAJOR = 25  # from here on Java's own AOT cache does more than a class-data archive
_PORT_ATTEMPTS = 3
_POLL_S = 0.02
_KILL_S = 10.0
_FULL_BYTES = 1_000_000
_TROUBLE = re.compile("ERROR|FATAL|Exception|Error")
_T = TypeVar("_T")
_SILENT = logging.getLogger("perdure.kafka.probe")
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False


@dataclass(frozen=True, slots=True)
class RunningKafka:
    """A broker that answered: where it listens, its JVM's process id, and whose data it serves."""

    bootstrap: str
    pid: int
    cluster_id: str
    kafka_version: str
    data_dir: Path


class _PortTaken(ConfigurationError):
    """Somebody took the port between our look and the broker's bind."""


class EmbeddedKafka:
    """Starts and stops one broker on one data folder; not for use from several threads at once.

    port: of the broker; default the one this folder had before, else a free one. log: called with lines for a person
    (downloads). properties: broker settings that win over ours. owner: the process whose end, however it comes, ends
    the broker; default this one. detached: the broker stays until somebody stops it.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int | None = None,
        log: Callable[[str], None] | None = None,
        properties: Mapping[str, str] | None = None,
        detached: bool = False,
        owner: int | None = None,
    ) -> None:
        self._data = KafkaData(Path(data_dir))
        self._port = port
        self._log = log
        self._properties = dict(properties or {})
        self._detached = detached
        self._owner = owner
        self._identity: Identity | None = None
        self._jvm: psutil.Process | None = None
        self._keeper: psutil.Process | None = None
        self._groups = LostGroups(self._data.broker_log)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def data_dir(self) -> Path:
        """The data folder, as an absolute path."""
        return self._data.folder

    @property
    def pid(self) -> int:
        """The JVM's process id. Raises InfrastructureError before `start`."""
        return int(self._started(self._jvm).pid)

    @property
    def cluster_id(self) -> str:
        """Kafka's cluster id, the same for the life of the data folder. Raises InfrastructureError before `start`."""
        return self._started(self._identity).cluster_id

    @property
    def bootstrap(self) -> str:
        """`127.0.0.1:PORT`. Raises InfrastructureError before `start`."""
        return f"{HOST}:{self._started(self._identity).port}"

    def alive(self) -> bool:
        """Whether the JVM runs; it may still be starting. Never blocks."""
        return self._jvm is not None and _lives(self._jvm)

    def lost_groups(self) -> list[str]:
        """What the broker has logged of consumer groups that nothing but its restart brings back; see `LostGroups`."""
        return self._groups.look()

    def start(self, timeout_s: float = 60) -> str:
        """Start the broker, wait until it serves this cluster, and return its bootstrap address.

        Blocks for seconds; fetches Kafka's jars first if they are not here yet, outside `timeout_s`. Raises
        ConfigurationError (no Java, a bad jar, port taken, disk full, folder in use, foreign or not writable),
        Unreachable (jars cannot be fetched, not ready in time) or InfrastructureError (the broker ended); nothing is
        left running then.
        """
        java, jars = find_java(), kafka_jars(say=self._log)
        deadline = time.monotonic() + timeout_s
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            self._launch(java, jars)
            try:
                self._await_ready(deadline, timeout_s)
                return self.bootstrap
            except _PortTaken:
                self.stop()
                if self._port is not None or attempt == _PORT_ATTEMPTS:
                    raise
            except BaseException:
                self.stop()
                raise
        raise AssertionError("the last attempt returns or raises")

    def stop(self, timeout_s: float = 30) -> None:
        """Stop the broker cleanly; kill it when that takes longer. Returns when its processes are gone.

        The first clean stop on a machine may take some seconds more: the JVM then writes its class-data archive.
        Raises InfrastructureError when even the kill does not end them.
        """
        if self._jvm is not None and self._keeper is not None:
            _end(self._keeper, self._jvm, timeout_s)

    @staticmethod
    def _started(value: _T | None) -> _T:
        if value is None:
            raise InfrastructureError("the embedded Kafka has not been started")
        return value

    def _launch(self, java: Java, jars: KafkaJars) -> None:
        """Start the keeper and, through it, the JVM; the folder's lock goes over to them."""
        with self._data.file_trouble_told(), self._data.locked() as lock_fd:
            self._identity = self._data.claim(jars.version, self._port)
            self._data.write_properties(self._identity, self._properties)
            self._data.fresh_logs()
            self._groups = LostGroups(self._data.broker_log)
            archive = _class_archive(java, jars)
            if not self._data.is_formatted():
                self._format(java, jars, archive, lock_fd)
            owner = 0 if self._detached else self._owner or os.getpid()
            new_archive = self._data.folder / "class-archive.new"
            learns = archive is not None and not archive.exists()
            jvm = self._java(java, jars, archive, new_archive if learns else None)
            keeper = [sys.executable, "-I", "-S", _KEEPER, lock_fd, owner, new_archive, archive if learns else ""]
            with self._data.jvm_log.open("ab") as output:
                answer = subprocess.run(
                    [str(part) for part in (*keeper, *jvm, "kafka.Kafka", self._data.properties_file)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    cwd=self._data.folder,
                    pass_fds=(lock_fd,),
                    start_new_session=True,
                    check=False,
                ).stdout
        try:
            pids = json.loads(answer)
            self._jvm, self._keeper = psutil.Process(pids["pid"]), psutil.Process(pids["keeper"])
        except (ValueError, psutil.NoSuchProcess) as error:
            raise self._failure("ended at once") from error

    def _format(self, java: Java, jars: KafkaJars, archive: Path | None, lock_fd: int) -> None:
        """Write the cluster id into the folder (Kafka's storage tool, about a second).

        The tool holds the lock too: if we are killed meanwhile, nobody starts a broker on what it is still writing.
        """
        identity = self._started(self._identity)
        tool = ("kafka.tools.StorageTool", "format", "--ignore-formatted", f"--cluster-id={identity.cluster_id}")
        command = [*self._java(java, jars, archive, None), *tool, "--config", self._data.properties_file]
        with self._data.jvm_log.open("ab") as output:
            done = subprocess.run(
                [str(part) for part in command], stdout=output, stderr=output, pass_fds=(lock_fd,), check=False
            )
        if done.returncode:
            raise self._failure("could not be formatted")

    def _java(self, java: Java, jars: KafkaJars, archive: Path | None, new_archive: Path | None) -> list[str | Path]:
        """The JVM's command line up to the main class; it uses an archive that is there or writes a new one."""
        aot = java.major >= _AOT_CACHE_MAJOR
        sharing = []
        if archive is not None and archive.exists():
            sharing = [f"-XX:{'AOTCache' if aot else 'SharedArchiveFile'}={archive}"]
        elif new_archive is not None:
            sharing = [f"-XX:{'AOTCacheOutput' if aot else 'ArchiveClassesAtExit'}={new_archive}"]
        logs = (f"-Dperdure.kafka.logs={self._data.logs}", f"-Dlog4j2.configurationFile={_LOG_SETTINGS}")
        return [java.path, *_JVM_FLAGS, *sharing, *logs, "-cp", os.pathsep.join(map(str, jars.class_path))]

    def _await_ready(self, deadline: float, timeout_s: float) -> None:
        """An open port proves nothing, it may be another's: only an answer with our cluster id does."""
        identity = self._started(self._identity)
        client = _probe(self.bootstrap)
        while _cluster_id(client, 0.5) != identity.cluster_id:
            if not self.alive():
                raise self._failure("ended while it was starting")
            if time.monotonic() > deadline:
                raise Unreachable(f"Kafka was not ready in {timeout_s:g} s: see {self._data.broker_log}")

    def _failure(self, what: str) -> InfrastructureError:
        """Say why the broker ended, if need be with the last error in its own words since this start."""
        words = self._data.words()
        if any("Address already in use" in line for line in words):
            return _PortTaken(f"port {self.bootstrap.rpartition(':')[2]} is taken: ask for another port")
        if shutil.disk_usage(self._data.folder).free < _FULL_BYTES:  # then the logs may have no word of it
            return ConfigurationError(f"Kafka {what}: the disk of {self._data.folder} is full: make room there")
        last = next((line.strip() for line in reversed(words) if _TROUBLE.search(line)), "no error was logged")
        return InfrastructureError(f"Kafka {what}: {last} (logs: {self._data.logs})")


def running(data_dir: Path, timeout_s: float = 3) -> RunningKafka | None:
    """Return the broker that runs on this folder and answers with its cluster id, else None.

    Blocks up to `timeout_s` when a broker is there but does not answer, as in its first second.
    Raises ConfigurationError when the folder holds data that are not ours or cannot be read.
    """
    data = KafkaData(Path(data_dir))
    with data.file_trouble_told():
        holder = data.holder()
        if not holder or not data.is_locked():
            return None
        identity = data.identity()
    if identity is None:
        return None
    bootstrap = f"{HOST}:{identity.port}"
    if _cluster_id(_probe(bootstrap), timeout_s) != identity.cluster_id:
        return None
    return RunningKafka(bootstrap, holder["pid"], identity.cluster_id, identity.kafka_version, data.folder)


def stop_running(data_dir: Path, timeout_s: float = 30) -> bool:
    """Stop the broker that runs on this folder, whoever started it; False when there is none.

    Blocks until its processes are gone: a clean stop, then, after `timeout_s`, a kill. Raises InfrastructureError when
    even that does not end them, ConfigurationError when the folder cannot be read.
    """
    data = KafkaData(Path(data_dir))
    with data.file_trouble_told():
        while data.is_locked():
            holder = data.holder()
            if holder:
                with suppress(psutil.NoSuchProcess):
                    _end(psutil.Process(holder["keeper"]), psutil.Process(holder["pid"]), timeout_s)
                return True
            time.sleep(_POLL_S)  # somebody is preparing a broker: a second or two
    return False


def _class_archive(java: Java, jars: KafkaJars) -> Path | None:
    """Where the archive for this Java and these jars is or would be; None when the cache cannot be written."""
    key = hashlib.sha256(f"{java.build} {_JVM_FLAGS}".encode()).hexdigest()[:12]
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    archive = folder / f"{jars.version}-{jars.id}-{key}.archive"
    return archive if archive.exists() or os.access(folder, os.W_OK) else None


def _probe(bootstrap: str) -> AdminClient:
    quick = {"reconnect.backoff.ms": 20, "reconnect.backoff.max.ms": 100, "log_level": 0}
    return AdminClient({"bootstrap.servers": bootstrap, **quick}, logger=_SILENT)


def _cluster_id(client: AdminClient, timeout_s: float) -> str | None:
    """The answering cluster's id; None while nobody answers, or nobody who can serve yet."""
    try:
        metadata = client.list_topics(timeout=timeout_s)
    except KafkaException:
        return None
    return metadata.cluster_id if metadata.brokers else None


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _end(keeper: psutil.Process, jvm: psutil.Process, timeout_s: float) -> None:
    """Ask the keeper to stop the JVM; at the deadline kill the JVM, which lets the keeper end by itself."""
    with suppress(psutil.NoSuchProcess):
        keeper.send_signal(signal.SIGTERM)
    if not _ended(keeper, jvm, timeout_s):
        with suppress(psutil.NoSuchProcess):
            jvm.kill()
        if not _ended(keeper, jvm, _KILL_S):
            raise InfrastructureError(f"Kafka (pid {jvm.pid}, keeper {keeper.pid}) does not end, even when killed")


def _ended(keeper: psutil.Process, jvm: psutil.Process, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while _lives(keeper) or _lives(jvm):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
