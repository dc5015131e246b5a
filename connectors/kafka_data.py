"""The data folder of an embedded broker: its lock, its identity, its ports, its settings file.

- `broker.lock`: locked while a broker lives; holds the process ids
- `broker.json`: whose data this is: Kafka version, cluster id, ports
- `server.properties`: written at every start
- `data/`: Kafka's logs; `logs/`: `broker.log`, `jvm.log`
"""

from __future__ import annotations

import base64
import errno
import fcntl
import json
import os
import random
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from perdure.schemas.errors import ConfigurationError

HOST = "127.0.0.1"
# Below the kernel's range for outgoing connections: a client that reconnects while the broker is down can neither be
# given the broker's port nor, connecting to it from that same port, talk to itself. Kafka's usual ports are left alone.
_PORTS = range(20_000, 32_000)
_PROBE_S = 1.0
_CHANGING_S = 40.0


@dataclass(frozen=True, slots=True)
class Identity:
    """What stays the same over restarts of one data folder; ports change only when they are taken."""

    kafka_version: str
    cluster_id: str
    port: int = 0
    controller_port: int = 0


@contextmanager
def file_trouble_told(folder: Path, remedy: str) -> Iterator[None]:
    """Turn what the system refuses to do with files (no permission, no space, a file in the way) into one line.

    Raises ConfigurationError, which names the file, or else the folder, and what to do.
    """
    try:
        yield
    except OSError as error:
        raise ConfigurationError(f"{error.filename or folder}: {error.strerror or error}: {remedy}") from error


class KafkaData:
    """One data folder; nothing is created or read before a method is called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.logs = self.folder / "logs"
        self.broker_log = self.logs / "broker.log"
        self.jvm_log = self.logs / "jvm.log"
        self.properties_file = self.folder / "server.properties"
        self._lock_file = self.folder / "broker.lock"
        self._identity_file = self.folder / "broker.json"
        self._kafka_logs = self.folder / "data"

    def file_trouble_told(self) -> AbstractContextManager[None]:
        """Around work on the folder: what the system refuses is a ConfigurationError that names the file."""
        return file_trouble_told(self.folder, "make room there, or use a data folder that you may write to")

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Hold the folder for a new broker; yields the locked descriptor, which a child may inherit and so keep.

        Waits for a broker that is stopping or being prepared, at most 40 s; raises ConfigurationError, naming the
        process, for one that runs.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            began = time.monotonic()
            while not _try_lock(fd, fcntl.LOCK_EX):
                holder = self.holder()
                runs = holder and not holder.get("stopping")
                if time.monotonic() - began > (_PROBE_S if runs else _CHANGING_S):
                    who = f"pid {holder['pid']}" if holder else "just being started"
                    raise ConfigurationError(
                        f"a broker already runs on {self.folder} ({who}): stop it with "
                        f"`perdure kafka stop --data-dir {self.folder}`, or use another data folder"
                    )
                time.sleep(0.02)
            os.ftruncate(fd, 0)
            yield fd
        finally:
            os.close(fd)

    def is_locked(self) -> bool:
        """Whether a broker, or a process that starts one, holds the folder."""
        try:
            fd = os.open(self._lock_file, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            return not _try_lock(fd, fcntl.LOCK_SH)
        finally:
            os.close(fd)

    def holder(self) -> dict[str, int]:
        """The lock's note: `pid` of the JVM, `keeper`, perhaps `stopping`; empty while a broker is being prepared."""
        try:
            note = json.loads(self._lock_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        return note if isinstance(note, dict) else {}

    def identity(self) -> Identity | None:
        """Whose data this is; None for a new folder. Raises ConfigurationError when it is not a folder of ours."""
        try:
            return Identity(**json.loads(self._identity_file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            for foreign in (self.folder / "meta.properties", self._kafka_logs / "meta.properties"):
                if foreign.exists():
                    raise ConfigurationError(
                        f"{self.folder} holds data of a Kafka that Perdure did not set up: use another data folder"
                    ) from None
            return None
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"{self._identity_file} is damaged ({error}): use another data folder") from error

    def claim(self, kafka_version: str, port: int | None) -> Identity:
        """Return the identity for this start, with free ports, and write it down. Only while locked.

        Ports of an earlier start are used again if they are free. Raises ConfigurationError when the port asked for is
        taken or the data belong to another Kafka.
        """
        found = self.identity() or Identity(kafka_version, new_cluster_id())
        if found.kafka_version != kafka_version:
            raise ConfigurationError(
                f"{self.folder} was written by Kafka {found.kafka_version}, this is Kafka {kafka_version}: "
                f"use another data folder, or set PERDURE_KAFKA_HOME to a Kafka {found.kafka_version}"
            )
        written = self._written_cluster_id()
        if written not in (None, found.cluster_id):
            raise ConfigurationError(
                f"{self.folder} holds data of cluster {written}, not of {found.cluster_id}: use another data folder"
            )
        if port is not None and not is_free(port):
            raise ConfigurationError(f"port {port} is taken: stop what listens there or ask for another port")
        chosen = port or _free_port(found.port, apart_from=found.controller_port)
        identity = replace(found, port=chosen, controller_port=_free_port(found.controller_port, apart_from=chosen))
        self.settle(identity)
        return identity

    def settle(self, identity: Identity) -> None:
        """Write down whose data this is. Before the first start: which cluster and ports a new broker is to have."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self._identity_file, json.dumps(asdict(identity)))

    def is_formatted(self) -> bool:
        """Whether Kafka's storage was prepared; only meaningful after `claim`."""
        return self._written_cluster_id() is not None

    def write_properties(self, identity: Identity, extra: Mapping[str, str]) -> None:
        """Write the broker's settings; `extra` wins."""
        settings = broker_settings(identity, self._kafka_logs) | dict(extra)
        _write(self.properties_file, "".join(f"{key}={_escaped(value)}\n" for key, value in settings.items()))

    def fresh_logs(self) -> None:
        """Set the logs of the last run aside as `*.previous`, so that what is there next was written by this one."""
        for log in (self.broker_log, self.jvm_log):
            with suppress(FileNotFoundError):
                log.replace(log.with_name(f"{log.name}.previous"))

    def words(self) -> list[str]:
        """Every line that the present run has logged, Kafka's own after Java's."""
        lines: list[str] = []
        for log in (self.jvm_log, self.broker_log):
            with suppress(FileNotFoundError):
                lines += log.read_text(encoding="utf-8", errors="replace").splitlines()
        return lines

    def _written_cluster_id(self) -> str | None:
        with suppress(FileNotFoundError):
            for line in (self._kafka_logs / "meta.properties").read_text(encoding="utf-8").splitlines():
                key, _, value = line.partition("=")
                if key == "cluster.id":
                    return value
        return None


def broker_settings(identity: Identity, kafka_logs: Path) -> dict[str, str]:
    """The settings of a broker that is its own controller, on loopback, sized for one machine."""
    client, controller = f"{HOST}:{identity.port}", f"{HOST}:{identity.controller_port}"
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@{controller}",
        "controller.listener.names": "CONTROLLER",
        "listeners": f"PLAINTEXT://{client},CONTROLLER://{controller}",
        "advertised.listeners": f"PLAINTEXT://{client}",
        "log.dirs": str(kafka_logs),
        "auto.create.topics.enable": "false",
        "default.replication.factor": "1",
        "min.insync.replicas": "1",
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "4",
        "offsets.retention.minutes": str(365 * 24 * 60),  # a laptop may be off for weeks; Kafka's default is one
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "4",
        # Coordinators read these two topics whole when a broker starts, and only closed segments are compacted: Kafka's
        # own 100 MB hold hundreds of thousands of transactions, and each restart takes longer than the one before. A
        # load that takes long may also lose the groups (`lost_groups`). 1 MB is the least that Kafka takes.
        "offsets.topic.segment.bytes": str(1024 * 1024),
        "transaction.state.log.segment.bytes": str(1024 * 1024),
        # Each transaction that sends offsets leaves a marker beside them, which outlives compaction for so long: with
        # Kafka's day a coordinator reads millions. The topics of Perdure say for themselves how long they keep theirs.
        "log.cleaner.delete.retention.ms": "60000",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        "share.coordinator.state.topic.num.partitions": "1",
        "group.initial.rebalance.delay.ms": "0",
        "group.min.session.timeout.ms": "1000",
        "message.max.bytes": str(2 * 1024 * 1024),
        "log.cleaner.dedupe.buffer.size": "2097152",
        "num.network.threads": "2",
        "num.io.threads": "4",
        "background.threads": "2",
        "num.recovery.threads.per.data.dir": "2",
        # After a kill the controller lets the same broker back in only when its old session is over: with Kafka's
        # 9 s a restart takes 11 s. A stall beyond the session fences the broker for a moment; producers just go on.
        "broker.session.timeout.ms": "1500",
        "broker.heartbeat.interval.ms": "500",
        "metadata.max.idle.interval.ms": "0",  # no empty records twice a second: an idle broker stays idle
    }


def new_cluster_id() -> str:
    """A random Kafka id: 22 characters that do not begin with a dash, which Kafka's tools would take for an option."""
    while True:
        text = base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()
        if not text.startswith("-"):
            return text


def is_free(port: int) -> bool:
    """Whether a server could listen on this loopback port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


def _free_port(preferred: int, *, apart_from: int) -> int:
    if preferred and preferred != apart_from and is_free(preferred):
        return preferred
    for port in random.sample(_PORTS, 200):
        if port != apart_from and is_free(port):
            return port
    raise ConfigurationError(f"no free port between {_PORTS.start} and {_PORTS.stop} on {HOST}")


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _escaped(value: str) -> str:
    """As a Java properties file wants it."""
    return value.replace("\\", "\\\\").replace("\n", "\\n")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.new")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
