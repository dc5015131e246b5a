"""Dramatiq on Redis."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.redis_server import RedisPeer


class Dramatiq(RedisPeer):
    """One process with two threads."""

    name = "dramatiq"
    title = "Dramatiq + Redis"
    folder = "dramatiq"
    packages = ("dramatiq[redis]==2.2.1", "redis==8.1.0")
    settings = (
        "1 process, 2 threads, results in Redis; steps are a pipeline; heartbeat_timeout 2 s and maintenance at every "
        "chance, for the kill (with its defaults a killed worker's task waits for minutes)"
    )

    def worker_commands(self) -> list[list[str | Path]]:
        return [[self.python, "-m", "dramatiq", "benchmarks.peers.dramatiq.app", "-p", "1", "-t", "2"]]


PEERS = (Dramatiq(),)
