"""The engine dies once at each named point of its transaction; nothing is lost, and nothing happens twice (G1, G2, G3, G5)."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from perdure.schemas import topics
from perdure.streams.failpoints import POINTS, VARIABLE
from tests.integration.stack import Process, Stack, prove, stack_on

pytestmark = pytest.mark.kafka
COUNT = 12
WHILE_WORKING = [point for point in POINTS if point != "in-restore"]


@pytest.fixture
def stack(kafka_bootstrap: str, topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    with stack_on(kafka_bootstrap, topic_prefix, tmp_path, partitions=1) as made:
        yield made


def test_a_death_at_every_point_costs_nothing(stack: Stack) -> None:
    stack.environment = {"PERDURE_BLOBS": str(stack.folder / "blobs"), "PERDURE_SNAPSHOT_ROWS": "10"}
    engine = stack.engine()
    stack.worker("--slots", "2", name="w")
    for point in WHILE_WORKING:
        handle = stack.submit("files", {"witness": str(stack.witness), "count": COUNT, "seconds": 0.02})
        stack.await_witness("file", handle.id, count=3)
        _dies_at(engine, point)
        assert stack.await_event(handle.id, "TaskCompleted").result == b"%d" % sum(range(COUNT))
        prove(stack, handle.id, COUNT, kills=0)
        assert [e.epoch for e in stack.events(handle.id, "TaskGranted")] == [1], (
            "the engine's death costs nobody anything"
        )
    engine.kill()
    shutil.rmtree(stack.folder / "state" / "partition")
    _dies_at(engine, "in-restore")
    assert stack.await_event(stack.submit("add", {"a": 1, "b": 2}).id, "TaskCompleted").result == b"3"
    assert stack.messages(topics.QUARANTINE.name) == []
    stack.await_engine(engine)
    stack.check_store(engine)


def _dies_at(engine: Process, point: str) -> None:
    """The engine's next life ends at the first passing of the point; then it lives on."""
    if engine.runs():
        engine.kill()
    engine.start(**{VARIABLE: f"{point}=kill"})
    assert engine.ended() == -signal.SIGKILL
    engine.start()
