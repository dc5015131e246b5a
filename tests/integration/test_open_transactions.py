"""A killed engine leaves a transaction open; its successor must not wait for the broker to end it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from perdure.schemas import topics
from perdure.schemas.errors import Unreachable
from perdure.streams import kafka_connection
from perdure.streams.kafka_consumers import KafkaMember
from perdure.streams.kafka_log import KafkaLog
from perdure.streams.log import OutcomeUnknown
from perdure.streams.topology import create_topics
from tests.chaos.proxy import proxied_kafka
from tests.integration.stack import Stack, stack_on, until

pytestmark = pytest.mark.kafka
GROUP = "engine"


@pytest.fixture
def stack(kafka_bootstrap: str, topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    with stack_on(kafka_bootstrap, topic_prefix, tmp_path) as made:
        yield made


def test_a_partition_is_taken_over_while_its_position_is_in_an_open_transaction(
    kafka_bootstrap: str, topic_prefix: str, monkeypatch: pytest.MonkeyPatch
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
    monkeypatch.setattr(kafka_connection, "CALL_S", 1.0)
    with pytest.raises(Unreachable, match="a transaction that has not ended"):
        successor.committed([where])
    monkeypatch.undo()
    log.transactional("engine.0").close()  # ends what is open
    assert successor.committed([where]) == {where: None}
    successor.close()


def test_an_engine_starts_although_its_position_is_pending_for_ever(stack: Stack) -> None:
    """So a group coordinator may hold it after a broker's restart; the state in the changelog knows its own position."""
    stranger = Producer({
        "bootstrap.servers": stack.bootstrap, "transactional.id": f"{stack.prefix}stranger", "log_level": 0,
        "transaction.timeout.ms": 600_000,
    })  # fmt: skip
    stranger.init_transactions(30.0)
    stranger.begin_transaction()
    group = Consumer({"bootstrap.servers": stack.bootstrap, "group.id": stack.prefix + GROUP, "log_level": 0})
    positions = [TopicPartition(topics.COMMANDS.on(stack.prefix), p, 0) for p in range(stack.log.partitions)]
    stranger.send_offsets_to_transaction(positions, group.consumer_group_metadata(), 30.0)
    group.close()
    engine = stack.engine()
    stack.worker(name="w")
    assert stack.result(stack.submit("add", {"a": 1, "b": 2})) == 3
    stranger.abort_transaction(30.0)
    stack.check_store(engine)


def test_a_producer_that_nobody_has_any_more_leaves_no_thread(kafka_bootstrap: str, topic_prefix: str) -> None:
    """While a broker is away, one after the other is made and given up."""
    create_topics(kafka_bootstrap, topic_prefix, partitions=1)
    log = KafkaLog(kafka_bootstrap, topic_prefix)
    before = threading.active_count()
    for _ in range(3):
        log.transactional("engine.0")
    gc.collect()
    until("the end of their threads", lambda: threading.active_count() <= before)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("end", ["commit", "abort"])
def test_a_transaction_whose_broker_says_nothing_is_given_up(tmp_path: Path, end: str) -> None:
    """After an outage a producer may never find its coordinator again; waiting for it held a partition for 75 s."""
    with proxied_kafka(tmp_path) as (kafka, proxy):
        create_topics(kafka.bootstrap, "t.", partitions=1)
        member = _joined(KafkaLog(kafka.bootstrap, "t."))
        producer = KafkaLog(proxy.bootstrap, "t.").transactional("engine.0")
        producer.begin()
        producer.append(topics.EVENTS.name, 0, b"key", b"value")
        told = producer._bounded.call

        def then_silence(call: Callable[[], Any], timeout_s: float) -> None:
            told(call, timeout_s)
            proxy.blackhole()

        producer._bounded.call = then_silence  # type: ignore[method-assign]
        with pytest.raises(OutcomeUnknown):
            if end == "commit":
                producer.commit(member, {(topics.COMMANDS.name, 0): 1})
            else:
                producer._bounded.call(lambda: producer._producer.flush(10.0), 10.0)
                producer.abort()
        proxy.heal()
        KafkaLog(proxy.bootstrap, "t.").transactional("engine.0").close()
        member.close()


def _joined(log: KafkaLog) -> KafkaMember:
    """A member that has the partition, as the process of one static identity."""
    assigned: list[object] = []
    member = log.member(
        GROUP, [topics.COMMANDS.name], instance="host-0", on_assigned=assigned.extend, on_revoked=lambda *_: None
    )
    until("the assignment", lambda: member.read(1, 0.1) is not None and assigned)
    return member
