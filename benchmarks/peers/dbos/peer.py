"""DBOS on PostgreSQL: within the application, and with a worker of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from pathlib import Path

from benchmarks.peers import cache
from benchmarks.peers.errors import Failed
from benchmarks.peers.peer import Peer
from benchmarks.peers.processes import Process, free_port, listening, until


class DbosQueue(Peer):
    """A client, a queue in the database, and a worker process."""

    name = "dbos-queue"
    title = "DBOS + PostgreSQL, client and queue"
    folder = "dbos"
    packages = ("dbos==3.4.0", "psycopg==3.3.9")
    durability = "PostgreSQL with fsync and synchronous_commit on (default)"
    settings = "one worker process; the queue is polled each 0.05 s (its default is 1 s)"

    def install(self) -> dict[str, str]:
        version = subprocess.run(
            [cache.postgres() / "postgres", "--version"], capture_output=True, text=True, check=True
        ).stdout.split()[2]
        return {"postgresql": version} | super().install()

    def start_servers(self, folder: Path) -> None:
        programs, data, port = cache.postgres(), folder / "postgres", free_port()
        data.mkdir()
        as_user = _as_another_user(data)
        made = subprocess.run(
            [*as_user, programs / "initdb", "-D", data, "-U", "bench", "-A", "trust"], capture_output=True, text=True,
            check=False, cwd="/",
        )  # fmt: skip
        if made.returncode:
            raise Failed(f"initdb: {made.stderr.strip()[-300:]}")
        server = Process(
            [*as_user, programs / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", data],
            folder / "postgres.log", cwd=Path("/"),
        )  # fmt: skip
        self.servers.append(server)
        listening(port, server)
        self.environment["PEER_POSTGRES"] = f"postgresql+psycopg://bench@127.0.0.1:{port}/bench_dbos"

    def start(self, folder: Path) -> None:
        super().start(folder)
        until(lambda: all(worker.says("ready") for worker in self.workers), "the worker's start")


class Dbos(DbosQueue):
    """The application itself runs the workflows that it starts."""

    name = "dbos"
    title = "DBOS + PostgreSQL, in process"
    settings = "the application starts and runs its workflows itself, no queue"
    workloads = ("W1", "W2", "W3")

    def start_servers(self, folder: Path) -> None:
        super().start_servers(folder)
        self.environment["PEER_IN_PROCESS"] = "1"

    def worker_commands(self) -> list[list[str | Path]]:
        return []


def _as_another_user(data: Path) -> list[str]:
    """PostgreSQL refuses to run as root: what its command begins with."""
    if os.geteuid() != 0:
        return []
    user = pwd.getpwnam("postgres")
    shutil.chown(data, user.pw_uid, user.pw_gid)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


PEERS = (Dbos(), DbosQueue())
