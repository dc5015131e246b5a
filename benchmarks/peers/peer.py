"""What the harness knows of a peer that runs tasks."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers import cache, loads
from benchmarks.peers.errors import Failed
from benchmarks.peers.processes import ROOT, Process, last_words

TASK_WORKLOADS = ("W1", "W2", "W3", "W4", "W5")
_CLIENT_S = 600.0


class Peer:
    """A peer of the task workloads: installed once, then started afresh, used and stopped in each round.

    Its folder has `app.py` (the tasks, in the peer's own terms) and `client.py` (a `Driver`), which run in its own
    environment.
    """

    name: str
    title: str
    folder: str
    """Of its `app` and `client`."""
    packages: Sequence[str] = ()
    """pip requirements; the first one's version is shown."""
    durability: str
    settings: str
    workloads: Sequence[str] = TASK_WORKLOADS
    not_run: Mapping[str, str] = {}
    """Workloads that are left out on purpose, and why."""
    kill_limit_s = 150.0
    """How long the next step after a kill is waited for."""

    def __init__(self) -> None:
        self.python = Path()
        self.servers: list[Process] = []
        self.workers: list[Process] = []
        self.environment: dict[str, str] = {}

    # To be said by each -----------------------------------------------------------------------------------------------

    def install(self) -> dict[str, str]:
        """Get what is missing; the versions of what there is. Raises `Missing`."""
        self.python = cache.venv(self.folder, self.packages)
        names = [package.partition("[")[0].partition("=")[0] for package in self.packages]
        return {name: cache.version(self.python, name) for name in names}

    def start_servers(self, folder: Path) -> None:
        """Start what the workers need, on empty data below `folder`, and put its addresses into `environment`."""

    def worker_commands(self) -> list[list[str | Path]]:
        """The command of each worker process."""
        return [[self.python, "-m", f"benchmarks.peers.{self.folder}.app"]]

    # What all do alike ------------------------------------------------------------------------------------------------

    def start(self, folder: Path) -> None:
        """Start servers and workers. Raises `PeerError`."""
        self.data = folder
        self.servers, self.workers, self.environment = [], [], {}
        self.start_servers(folder)
        self.workers = [
            Process(command, folder / f"worker-{number}.log", self.environment)
            for number, command in enumerate(self.worker_commands())
        ]

    def warm(self) -> None:
        """Let whatever compiles, connects or forks at first use do so."""
        self.ask("warm")

    def measure(self, workload: str, counts: loads.Counts) -> dict[str, float]:
        """Do a workload; each figure by its name. Raises `PeerError`."""
        return loads.measure(self, workload, counts)

    def stop(self) -> None:
        """End everything that was started."""
        for process in [*self.workers, *reversed(self.servers)]:
            process.stop()

    def ask(self, workload: str, *argument: str, timeout_s: float = _CLIENT_S) -> Any:
        """Have the client do something and return what it measured. Raises `Failed` with its last words."""
        command = [str(self.python), "-m", f"benchmarks.peers.{self.folder}.client", workload, *argument]
        log = self.data / "client.log"
        try:
            with log.open("ab") as errors:
                done = subprocess.run(
                    command, cwd=ROOT, env=os.environ | self.environment, stdin=subprocess.DEVNULL, check=False,
                    stdout=subprocess.PIPE, stderr=errors, text=True, timeout=timeout_s,
                )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            for worker in self.workers:
                worker.check()
            raise Failed(f"the client had no result within {timeout_s:g} s") from error
        if done.returncode:
            raise Failed(f"the client ended with {done.returncode}: {last_words(log)}")
        return json.loads(done.stdout.splitlines()[-1])

    def kill_workers(self) -> None:
        """SIGKILL for the workers and all below them, and the same again at once."""
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.start()

    def worker_processes(self) -> list[psutil.Process]:
        """The workers, to be weighed."""
        return [p for worker in self.workers for p in worker.tree()]

    def server_processes(self) -> list[psutil.Process]:
        """The servers, to be weighed."""
        return [p for server in self.servers for p in server.tree()]


def load(folder: str) -> list[Any]:
    """The peers that a folder has: its `peer.PEERS`."""
    return list(importlib.import_module(f"benchmarks.peers.{folder}.peer").PEERS)
