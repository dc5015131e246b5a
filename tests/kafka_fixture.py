"""One real broker for the whole test run, shared by every xdist worker, and a fresh topic prefix for every test."""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from perdure.connectors.embedded_kafka import EmbeddedKafka, stop_running
from perdure.connectors.kafka_data import KafkaData


@pytest.fixture(scope="session")
def kafka_bootstrap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The run's broker. The first worker to ask starts it, the last to leave stops it; it also ends with pytest.

    Fails the run when a process of the broker is left. A test that hurts its broker starts one of its own instead.
    """
    worker = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if worker else base) / "shared-kafka"
    folder.mkdir(exist_ok=True)
    with _users(folder) as state:
        if not state["users"]:
            broker = EmbeddedKafka(folder / "data", owner=os.getppid() if worker else None)
            state["bootstrap"] = broker.start(timeout_s=120)
        state["users"] += 1
        bootstrap = state["bootstrap"]
    yield bootstrap
    with _users(folder) as state:
        state["users"] -= 1
        if not state["users"]:
            note = KafkaData(folder / "data").holder()
            stop_running(folder / "data", timeout_s=60)
            left = [note[who] for who in ("pid", "keeper") if who in note and not _gone(note[who])]
            assert not left, f"processes of the test broker are left: {left}"


@pytest.fixture
def topic_prefix() -> str:
    """A prefix such as `t3f9a1c.`, so that tests sharing a broker never share a topic."""
    return f"t{uuid.uuid4().hex[:6]}."


@contextmanager
def _users(folder: Path) -> Iterator[dict[str, Any]]:
    """Hold the workers' common note: how many use the broker, and where it listens."""
    with (folder / "users.json").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        state = json.loads(file.read() or '{"users": 0}')
        try:
            yield state
        finally:
            file.truncate(0)
            file.write(json.dumps(state))


def _gone(pid: int) -> bool:
    """Ended, even if its new parent (a container's first process) has not collected it yet."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
