"""RQ on Redis, as it comes and with the worker that does not fork."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.redis_server import RedisPeer

_WORKERS = 2


class Rq(RedisPeer):
    """Two workers, each forking for each job: RQ's default."""

    name = "rq"
    title = "RQ + Redis"
    folder = "rq"
    packages = ("rq==3.0.0", "redis==8.1.0")
    worker_class = "rq.Worker"
    settings = (
        "2 workers, a fork for each job (default); steps are jobs that depend on each other; for the kill "
        "Retry(max=3), worker TTL 20 s, maintenance and monitoring each 2 s"
    )

    def worker_commands(self) -> list[list[str | Path]]:
        command = [
            self.python, "-m", "rq.cli", "worker", "--url", self.environment["PEER_REDIS"],
            "--worker-class", self.worker_class, "--worker-ttl", "20", "--maintenance-interval", "2",
            "--job-monitoring-interval", "2", "--quiet", "bench",
        ]  # fmt: skip
        return [command] * _WORKERS


class RqSimple(Rq):
    """Two workers that run jobs in their own process."""

    name = "rq-simple"
    title = "RQ + Redis, SimpleWorker"
    worker_class = "rq.SimpleWorker"
    workloads = ("W1", "W2", "W3", "W5")
    not_run = {"W4": "see the forking worker; this one's killed jobs are found no sooner"}  # noqa: RUF012
    settings = Rq.settings.replace("a fork for each job (default)", "jobs run in the worker's own process")


PEERS = (Rq(), RqSimple())
