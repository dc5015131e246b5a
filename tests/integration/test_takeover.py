"""Two hosts on real Kafka that both believe a partition to be theirs (G2); see also the unit tests of that name."""

from __future__ import annotations

import pytest

from perdure.schemas import codec, topics
from perdure.schemas.public import Quarantined
from perdure.schemas.signing import Keys
from perdure.streams.kafka_log import KafkaLog
from perdure.streams.kafka_producers import KafkaTransactional
from perdure.streams.local_engine import engine_kind
from perdure.streams.log import BEGIN, Member, Record, records_of
from perdure.streams.shard import Shard
from perdure.streams.store import MemoryStore
from perdure.streams.topology import create_topics

pytestmark = pytest.mark.kafka
INPUTS = 6
KEYS = Keys.generate()


@pytest.fixture
def log(kafka_bootstrap: str, topic_prefix: str) -> KafkaLog:
    """Records that nobody can read: each execution of one leaves a record in quarantine."""
    create_topics(kafka_bootstrap, topic_prefix, partitions=1)
    made = KafkaLog(kafka_bootstrap, topic_prefix)
    producer = made.producer()
    for n in range(INPUTS):
        producer.append(topics.COMMANDS.name, 0, None, f"garbage {n}".encode())
    assert producer.flush(30)
    producer.close()
    return made


def host(log: KafkaLog, member: Member) -> Shard:
    """An engine that takes the partition, with a disk of its own."""
    made = Shard(
        engine_kind(1, KEYS), 0, log=log, store=MemoryStore(), member=member, transactional_id="engine.0"
    )  # fmt: skip
    while not made.restore_some():
        pass
    return made


def inputs(log: KafkaLog) -> list[Record]:
    return list(records_of(log, topics.COMMANDS.name, 0, first=BEGIN))


def executed(log: KafkaLog) -> list[int]:
    """Offsets of the inputs that were executed, in order."""
    found = records_of(log, topics.QUARANTINE.name, 0)
    return [codec.decode_as(Quarantined, r.value or b"").offset for r in found]


def test_who_stood_still_in_a_commit_does_not_take_the_partition_back_unread(log: KafkaLog) -> None:
    """Its connection is lost, so it needs a new epoch; with one, nothing at the broker would stop it."""
    member = log.member("engine", [topics.COMMANDS.name], on_assigned=lambda _: None, on_revoked=lambda *_: None)
    stopped = host(log, member)
    held = inputs(log)  # in its memory
    assert stopped.run_batch(held[:1])
    assert isinstance(stopped._producer, KafkaTransactional)
    stopped._producer._suspect = True  # as a loss, or a commit of more than 10 s, leaves it
    successor = host(log, member)
    assert successor.run_batch(held[:5])
    assert stopped.run_batch(held[1:3]), "committed by the other"
    assert executed(log) == list(range(5))
    assert stopped.run_batch(held[3:])
    assert executed(log) == list(range(INPUTS))
    for shard in (stopped, successor):
        shard.close()
    member.close()
