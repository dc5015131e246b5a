"""Celery's tasks and worker: prefork, late acknowledgement, results kept in Redis."""

from __future__ import annotations

import os

from celery import Celery

from benchmarks.peers import work

URL = os.environ["PEER_REDIS"]
app = Celery("peers", broker=URL, backend=URL)
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    broker_transport_options={"visibility_timeout": 5},
    broker_connection_retry_on_startup=True,
)


@app.task
def tiny() -> None:
    """Nothing."""


@app.task
def first_line() -> int:
    """When its first line ran."""
    return work.now()


@app.task
def step(first: int | None) -> int:
    """A link of a chain: the first passes on when it began."""
    return first or work.now()


@app.task
def last_step(first: int) -> tuple[int, int]:
    """The last link of a chain."""
    return first, work.now()


@app.task
def slow_step(number: int, witness: str) -> int:
    """A link of a slow chain."""
    return work.slow_step(number, witness)
