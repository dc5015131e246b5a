"""Celery on Redis."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.redis_server import RedisPeer


class Celery(RedisPeer):
    """One prefork worker with two children, late acknowledgement."""

    name = "celery"
    title = "Celery + Redis"
    folder = "celery"
    packages = ("celery[redis]==5.7.0", "redis==8.1.0")
    settings = (
        "prefork, 2 children, acks_late, results in Redis; steps are a chain; for the kill visibility_timeout is 5 s "
        "(its default of an hour is how long a killed worker's task waits)"
    )

    def worker_commands(self) -> list[list[str | Path]]:
        return [[self.python, "-m", "celery", "-A", "benchmarks.peers.celery.app", "worker", "-c", "2",
                 "--loglevel", "WARNING"]]  # fmt: skip


PEERS = (Celery(),)
