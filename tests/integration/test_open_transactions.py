"""A killed engine leaves a transaction open; its successor must not wait for the broker to end it."""

from __future__ import annotations

import gc
import threading

import pytest
from confluent_kafka import Producer, TopicPartition

from perdure.schemas import topics
from perdure.streams.kafka_consumers import KafkaMember
from perdure.streams.kafka_log import KafkaLog
from perdure.streams.topology import create_topics
from tests.integration.stack import until

pytestmark = pytest.mark.kafka
GROUP = "engine"


def test_a_partition_is_taken_over_while_its_position_is_in_an_open_transaction(
    kafka_bootstrap: str, topic_prefix: str
) -> None:
    create_topics(kafka_bootstrap, topic_prefix, partitions=1)
    log = KafkaLog(kafka_bootstrap, topic_prefix)
    where = (topics.COMMANDS.name, 0)
    killed = _joined(log)
    producer = Producer({
        "bootstrap.servers": kafka_bootstrap, "transactional.id": f"{topic_prefix}engine.0", "log_level": 0,
    })  # fmt: skip
    producer.init_transactions(30.0)
    producer.begin_transaction()
    position = TopicPartition(topics.COMMANDS.on(topic_prefix), 0, 7)
    producer.send_offsets_to_transaction([position], killed.group_metadata(), 30.0)

    successor = _joined(log)
    log.transactional("engine.0").close()  # ends what is open
    assert successor.committed([where]) == {where: None}
    successor.close()


def test_a_producer_that_nobody_has_any_more_leaves_no_thread(kafka_bootstrap: str, topic_prefix: str) -> None:
    """While a broker is away, one after the other is made and given up."""
    create_topics(kafka_bootstrap, topic_prefix, partitions=1)
    log = KafkaLog(kafka_bootstrap, topic_prefix)
    before = threading.active_count()
    for _ in range(3):
        log.transactional("engine.0")
    gc.collect()
    until("the end of their threads", lambda: threading.active_count() <= before)


def _joined(log: KafkaLog) -> KafkaMember:
    """A member that has the partition, as the process of one static identity."""
    assigned: list[object] = []
    member = log.member(
        GROUP, [topics.COMMANDS.name], instance="host-0", on_assigned=assigned.extend, on_revoked=lambda *_: None
    )
    until("the assignment", lambda: member.read(1, 0.1) is not None and assigned)
    return member
