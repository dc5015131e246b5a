"""Dramatiq's actors and broker."""

from __future__ import annotations

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from benchmarks.peers import work

URL = os.environ["PEER_REDIS"]
broker = RedisBroker(url=URL, heartbeat_timeout=2_000, maintenance_chance=1_000_000)
broker.add_middleware(Results(backend=RedisBackend(url=URL)))
dramatiq.set_broker(broker)


@dramatiq.actor(store_results=True)
def tiny() -> bool:
    """Nothing; an empty result would look like none."""
    return True


@dramatiq.actor(store_results=True)
def first_line() -> int:
    """When its first line ran."""
    return work.now()


@dramatiq.actor(store_results=True)
def step(first: int | None) -> int:
    """A link of a pipeline: the first passes on when it began."""
    return first or work.now()


@dramatiq.actor(store_results=True)
def last_step(first: int) -> list[int]:
    """The last link of a pipeline."""
    return [first, work.now()]


@dramatiq.actor
def slow_step(number: int, witness: str) -> None:
    """A link of a slow pipeline."""
    work.slow_step(number, witness)
