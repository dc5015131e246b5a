"""RQ's client; a task of many steps is a row of jobs, each depending on the one before."""

from __future__ import annotations

import os
from typing import Any

from redis import Redis
from rq import Queue, Retry
from rq.job import Job

from benchmarks.peers import drive
from benchmarks.peers.rq import app

_WAIT_S = 600


def _result(job: Job) -> Any:
    result = job.latest_result(timeout=_WAIT_S)
    if result is None:
        raise TimeoutError(f"job {job.id} has no result after {_WAIT_S} s")
    return result.return_value


class RqDriver(drive.Driver):
    def __init__(self) -> None:
        self._queue = Queue("bench", connection=Redis.from_url(os.environ["PEER_REDIS"], socket_timeout=None))

    def tiny(self, count: int) -> None:
        for job in [self._queue.enqueue(app.tiny) for _ in range(count)]:
            _result(job)

    def start(self) -> int:
        return int(_result(self._queue.enqueue(app.first_line)))

    def steps(self, count: int) -> tuple[int, int]:
        jobs: list[Job] = []
        for _ in range(count):
            jobs.append(self._queue.enqueue(app.first_line, depends_on=jobs[-1] if jobs else None))
        last = _result(jobs[-1])
        return _result(jobs[0]), last

    def slow(self, count: int, witness: str) -> None:
        before: Job | None = None
        for number in range(count):
            before = self._queue.enqueue(app.slow_step, number, witness, depends_on=before, retry=Retry(max=3))


if __name__ == "__main__":
    drive.main(RqDriver())
