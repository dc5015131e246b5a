"""Brokers in containers, as the installation by compose has them: one at a time is paused, killed, stopped (G1, G2)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from perdure.schemas import topics
from tests.containers.compose_brokers import ComposeBrokers
from tests.containers.daemon import needs_docker
from tests.integration.stack import prove, stack_on
from tests.integration.traffic import traffic_on

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(900), needs_docker]
COUNT = 300


@pytest.fixture
def brokers() -> Iterator[ComposeBrokers]:
    made = ComposeBrokers()
    try:
        made.start()
        yield made
    finally:
        made.stop()


def test_one_container_at_a_time_is_away(brokers: ComposeBrokers, topic_prefix: str, tmp_path: Path) -> None:
    with stack_on(brokers.bootstrap, topic_prefix, tmp_path, replication=3) as stack:
        engine = stack.engine()
        worker = stack.worker("--slots", "1", name="w")
        steps = stack.submit("files", {"witness": str(stack.witness), "count": COUNT})

        def leads() -> int:
            return brokers.leader(topics.COMMANDS.on(stack.prefix), stack.home())

        with traffic_on(stack, engine, worker) as traffic:
            traffic.flows()
            frozen = brokers.container(leads())
            frozen.pause()
            traffic.flows()
            frozen.unpause()
            brokers.await_whole()
            killed = brokers.container(leads())
            killed.kill()
            traffic.flows()
            killed.start()
            brokers.await_whole()
            alone = leads()
            brokers.cut_off(alone)
            traffic.flows()
            brokers.join(alone)
            brokers.await_whole()
            stopped = brokers.container(leads())
            stopped.stop(timeout=60)
            traffic.flows()
            stopped.start()
            brokers.await_whole()
            traffic.stop()
        assert stack.result(steps) == sum(range(COUNT))
        prove(stack, steps.id, COUNT, kills=0)
        assert [p.runs() for p in (engine, worker)] == [True, True]
        stack.check_store(engine)
