"""Silence proves nothing: a machine that stood still and a broker that was away cost no attempt and no child (G3, G4)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from perdure.connectors.embedded_kafka import EmbeddedKafka
from perdure.handle import Handle
from perdure.schemas import limits
from perdure.schemas.errors import Unreachable
from tests.integration.stack import Process, Stack, prove, stack_on, stopped, tree, until

pytestmark = pytest.mark.kafka
STILL_S = 15.0
AWAY_S = 12.0
COUNT = 60


@pytest.fixture
def kafka(tmp_path: Path) -> Iterator[EmbeddedKafka]:
    """A broker of the test's own."""
    with EmbeddedKafka(tmp_path / "kafka") as own:
        yield own


@pytest.fixture
def stack(kafka: EmbeddedKafka, topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    (tmp_path / "stack").mkdir()
    with stack_on(kafka.bootstrap, topic_prefix, tmp_path / "stack") as made:
        yield made


class Work:
    """Two tasks in the middle of their work: one goes from step to step, the other is in one long step."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self.engine = stack.engine("--processes", "2")
        self.worker = stack.worker("--slots", "2", name="w")
        self._gate = stack.folder / "gate"
        witness = str(stack.witness)
        self._steps: Handle = stack.submit("files", {"witness": witness, "count": COUNT})
        self._long: Handle = stack.submit("gated", {"witness": witness, "gate": str(self._gate)})
        stack.await_witness("gate", self._long.id)
        stack.await_witness("file", self._steps.id, count=15)
        assert AWAY_S * 1000 > limits.LEASE_MS, "longer than a lease lasts"

    def check(self) -> None:
        """Both tasks end as if nothing had happened: by the same children, in the first epoch, each step once."""
        stack = self._stack
        self._gate.touch()
        until("an answer of the engine, which may have to take its partitions again first", self._is_answered)
        assert stack.result(self._steps) == sum(range(COUNT))
        assert stack.result(self._long) == 1
        prove(stack, self._steps.id, COUNT, kills=0)
        assert len({e.pid for e in stack.witnessed("file")}) == len({e.pid for e in stack.witnessed("gate")}) == 1
        assert [e.epoch for e in stack.messages("task-events", "TaskGranted")] == [1, 1]
        assert stack.messages("task-events", "AttemptLost", "ReportRejected", "CommandRejected") == []
        assert stack.messages("quarantine") == []
        until("an idle task afterwards", lambda: stack.result(stack.submit("add", {"a": 1, "b": 2})) == 3)

    def _is_answered(self) -> bool:
        try:
            return self._steps.status() is not None
        except Unreachable:
            return False


def test_a_machine_that_stood_still_has_lost_nothing(kafka: EmbeddedKafka, stack: Stack) -> None:
    work = Work(stack)
    with stopped(kafka.pid, *tree(work.engine.pid), *tree(work.worker.pid)):
        time.sleep(STILL_S)  # the fault itself
    work.check()
    _alive_and_equal(stack, work)


def test_a_broker_that_stood_still_has_cost_nothing(kafka: EmbeddedKafka, stack: Stack) -> None:
    work = Work(stack)
    with stopped(kafka.pid):
        time.sleep(STILL_S)  # the fault itself
    work.check()
    _alive_and_equal(stack, work)


def test_a_broker_that_was_away_has_cost_nothing(kafka: EmbeddedKafka, stack: Stack) -> None:
    work = Work(stack)
    bootstrap = kafka.bootstrap
    began = time.monotonic()
    kafka.stop()
    time.sleep(max(0.0, AWAY_S - (time.monotonic() - began)))  # the fault itself
    assert kafka.start(timeout_s=120) == bootstrap
    work.check()
    _alive_and_equal(stack, work)


def test_a_broker_that_is_killed_and_back_at_once_has_cost_nothing(kafka: EmbeddedKafka, stack: Stack) -> None:
    work = Work(stack)
    _kill(kafka)
    kafka.start(timeout_s=120)
    work.check()
    _alive_and_equal(stack, work)


def _kill(kafka: EmbeddedKafka) -> None:
    broker = psutil.Process(kafka.pid)
    broker.kill()
    until("the broker's end", lambda: not kafka.alive())


def _alive_and_equal(stack: Stack, work: Work) -> None:
    processes: list[Process] = [work.engine, work.worker]
    assert [p.runs() for p in processes] == [True, True]
    stack.check_store(work.engine)
