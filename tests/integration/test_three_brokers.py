"""Three brokers of which one at a time is away: what was accepted is done once, and nothing stands still (G1, G2)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from perdure.schemas import topics
from tests.integration.stack import Stack, prove, stack_on
from tests.integration.traffic import traffic_on
from tests.kafka_cluster import BROKERS, KafkaCluster

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(900)]
COUNT = 300


@pytest.fixture
def stack(kafka_cluster: KafkaCluster, topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    with stack_on(kafka_cluster.bootstrap, topic_prefix, tmp_path, replication=3) as made:
        yield made
        kafka_cluster.start()  # the topics are deleted by a whole cluster


def test_restarts_one_by_one_and_a_kill_under_load(kafka_cluster: KafkaCluster, stack: Stack) -> None:
    engine = stack.engine()
    worker = stack.worker("--slots", "1", name="w")
    steps = stack.submit("files", {"witness": str(stack.witness), "count": COUNT})
    with traffic_on(stack, engine, worker) as traffic:
        traffic.flows()
        for number in range(BROKERS):
            kafka_cluster.restart(number)
            traffic.flows()
        kafka_cluster.kill(kafka_cluster.leader(topics.COMMANDS.on(stack.prefix), stack.home()))
        traffic.flows()
        kafka_cluster.start()
        traffic.flows()
        traffic.stop()
    assert stack.result(steps) == sum(range(COUNT))
    prove(stack, steps.id, COUNT, kills=0)
    assert [p.runs() for p in (engine, worker)] == [True, True]
    stack.check_store(engine)
