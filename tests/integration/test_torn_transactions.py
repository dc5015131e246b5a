"""Commits that arrive late or without an answer: no transaction is torn, and none is executed twice (G2)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from perdure.connectors.embedded_kafka import EmbeddedKafka
from perdure.schemas import topics
from perdure.schemas.errors import InfrastructureError
from perdure.streams import kafka_producers
from perdure.streams.kafka_consumers import KafkaMember
from perdure.streams.kafka_log import KafkaLog
from perdure.streams.kafka_producers import KafkaTransactional
from perdure.streams.log import BEGIN, OutcomeUnknown
from perdure.streams.topology import create_topics
from tests.chaos.proxy import END_TXN, Held, Proxy, proxied_kafka
from tests.integration.stack import until

pytestmark = pytest.mark.kafka
EVENTS, COMMANDS = topics.EVENTS.name, topics.COMMANDS.name
FENCED = {47, 90}
"""INVALID_PRODUCER_EPOCH, PRODUCER_FENCED."""


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EmbeddedKafka, Proxy]]:
    with proxied_kafka(tmp_path_factory.mktemp("proxied")) as made:
        yield made


@dataclass
class Bench:
    """A producer behind the proxy, and a member and a reader that see the broker itself."""

    proxy: Proxy
    producer: KafkaTransactional
    member: KafkaMember
    direct: KafkaLog
    through: KafkaLog

    def begin(self) -> None:
        """Begin a transaction, with a new producer if the present one is good for none."""
        try:
            self.producer.begin()
        except OutcomeUnknown:
            self.producer.close()
            self.producer = self.through.transactional("engine.0")
            self.producer.begin()

    def append(self, value: bytes) -> None:
        """Append in the open transaction; returns when the broker has it."""
        acks: list[Exception | None] = []
        self.producer.append(EVENTS, 0, None, value, lambda _, error: acks.append(error))
        until("an acknowledgement", lambda: self.producer._producer.poll(0.01) is not None and acks)
        assert acks == [None]

    def commit(self, position: int) -> None:
        self.producer.commit(self.member, {(COMMANDS, 0): position})

    def transact(self, value: bytes, position: int) -> None:
        self.begin()
        self.append(value)
        self.commit(position)

    def committed(self) -> list[bytes | None]:
        """What a reader of committed records sees now."""
        reader = self.direct.reader()
        reader.assign({(EVENTS, 0): BEGIN})
        _, end = reader.bounds(EVENTS, 0)
        found: list[bytes | None] = []
        for _ in range(10):
            found += [record.value for record in reader.read(100, 0.1)]
            if reader.caught_up(EVENTS, 0, end):
                break
        reader.close()
        return found

    def position(self) -> int | None:
        return self.member.committed([(COMMANDS, 0)])[COMMANDS, 0]


@pytest.fixture
def bench(broker: tuple[EmbeddedKafka, Proxy], topic_prefix: str) -> Iterator[Bench]:
    kafka, proxy = broker
    create_topics(kafka.bootstrap, topic_prefix, partitions=1)
    direct, through = KafkaLog(kafka.bootstrap, topic_prefix), KafkaLog(proxy.bootstrap, topic_prefix)
    assigned: list[object] = []
    member = direct.member("engine", [COMMANDS], on_assigned=assigned.extend, on_revoked=lambda *_: None)
    until("the assignment", lambda: member.read(1, 0.1) is not None and assigned)
    producer = through.transactional("engine.0")
    made = Bench(proxy, producer, member, direct, through)
    yield made
    made.producer.close()
    member.close()


def arrives_in_the_next_transaction(bench: Bench, end: Callable[[], None]) -> tuple[int, list[bytes | None]]:
    """The first EndTxn is held, its link dropped, and it arrives in the middle of the next transaction.

    Returns the broker's answer to it, and what was committed then.
    """
    held: Held = bench.proxy.hold(END_TXN, matching=b"engine.0")
    bench.begin()
    bench.append(b"1")
    end()
    held.wait()
    bench.begin()
    bench.append(b"2, first half")
    (answer,) = held.release()
    code: int = struct.unpack_from(">iih", answer)[2]
    return code, bench.committed()


def test_a_commit_that_arrives_in_the_next_transaction_is_refused(bench: Bench) -> None:
    code, seen = arrives_in_the_next_transaction(bench, lambda: bench.commit(1))
    assert code in FENCED, "the next transaction has an epoch of its own"
    assert seen == [b"1"]
    bench.append(b"2, second half")
    bench.commit(2)
    assert bench.committed() == [b"1", b"2, first half", b"2, second half"]
    assert bench.position() == 2


def test_an_abort_that_arrives_in_the_next_transaction_is_refused(bench: Bench) -> None:
    code, seen = arrives_in_the_next_transaction(bench, bench.producer.abort)
    assert code in FENCED
    assert seen == []
    bench.append(b"2, second half")
    bench.commit(2)
    assert bench.committed() == [b"2, first half", b"2, second half"]


def test_without_a_new_epoch_it_tears_the_next_transaction(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why a lost connection takes a new producer: what the broker does to one that goes on."""
    monkeypatch.setattr(kafka_producers._Link, "log", lambda *_: None)
    code, seen = arrives_in_the_next_transaction(bench, lambda: bench.commit(1))
    assert code == 0, "the broker takes it for the end of the second transaction"
    assert seen == [b"1", b"2, first half"], "half of a transaction that nobody has committed"
    assert bench.position() == 1, "so it will be executed, and written, again"


def test_a_commit_without_an_answer_is_one_commit(bench: Bench) -> None:
    lost = bench.proxy.lose_answer(END_TXN, 2, matching=b"engine.0")
    bench.transact(b"1", 1)
    lost.wait()
    bench.transact(b"2", 2)
    assert bench.committed() == [b"1", b"2"]
    assert bench.position() == 2


@pytest.mark.slow
@pytest.mark.parametrize("arrives", [False, True], ids=["never arrives", "is never answered"])
def test_a_commit_whose_outcome_stays_unknown_says_so(bench: Bench, arrives: bool) -> None:
    """For a minute, every repetition is lost: a new producer ends it, and the position tells how it ended."""
    lose = bench.proxy.lose_answer if arrives else bench.proxy.hold
    lost = lose(END_TXN, 1_000, matching=b"engine.0")
    with pytest.raises((OutcomeUnknown, InfrastructureError)) as raised:
        bench.transact(b"1", 1)
    print(f"{type(raised.value).__name__}: {raised.value}, after {len(lost.frames)} requests")
    lost.count = 0
    bench.direct.transactional("engine.0").close()
    assert (bench.committed(), bench.position()) == (([b"1"], 1) if arrives else ([], None))
