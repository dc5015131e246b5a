"""Temporal's development server: the one that a user starts on a machine like this."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers import cache
from benchmarks.peers.peer import Peer
from benchmarks.peers.processes import Process, free_port, listening

_CLI = "v1.5.1"


class Temporal(Peer):
    """`temporal server start-dev` with a database file."""

    name = "temporal"
    title = "Temporal, dev server"
    folder = "temporal"
    packages = ("temporalio==1.35.0",)
    durability = "SQLite file, default settings of the dev server (one shard; not made for throughput)"
    settings = (
        "tiny tasks are workflows without an activity, 64 at a time; starts and steps are activities; "
        "start_to_close_timeout 10 s, first retry after 0.1 s"
    )

    def install(self) -> dict[str, str]:
        cache.go(f"github.com/temporalio/cli/cmd/temporal@{_CLI}", "temporal")
        return {"temporal-cli": _CLI} | super().install()

    def start_servers(self, folder: Path) -> None:
        binary = cache.go(f"github.com/temporalio/cli/cmd/temporal@{_CLI}", "temporal")
        port, http, metrics = (free_port() for _ in range(3))
        command = [binary, "server", "start-dev", "--headless", "--ip", "127.0.0.1", "--log-level", "error"]
        ports = ["--port", str(port), "--http-port", str(http), "--metrics-port", str(metrics)]
        server = Process([*command, *ports, "--db-filename", folder / "temporal.db"], folder / "temporal.log")
        self.servers.append(server)
        listening(port, server)
        self.environment["PEER_TEMPORAL"] = f"127.0.0.1:{port}"


class TemporalLocal(Temporal):
    """The same with local activities, which the worker runs without a way over the server."""

    name = "temporal-local"
    title = "Temporal, dev server, local activities"
    settings = "local activities: recorded in bulk with their workflow task, not one by one"
    workloads = ("W3",)

    def start_servers(self, folder: Path) -> None:
        super().start_servers(folder)
        self.environment["PEER_LOCAL"] = "1"


PEERS = (Temporal(), TemporalLocal())
