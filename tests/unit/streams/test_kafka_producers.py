"""Corners of producers that no broker can be brought to on purpose."""

from __future__ import annotations

from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from perdure.schemas import errors
from perdure.streams import kafka_producers
from perdure.streams.kafka_connection import Connection
from perdure.streams.kafka_producers import KafkaProducer, KafkaTransactional

FENCED = KafkaException(KafkaError(KafkaError._FENCED, "fenced", fatal=True))


class Fenced:
    """A producer that learns while it is flushed that another one has its name: a call that was given up has ended."""

    purged = False

    def __init__(self, in_one_go: bool) -> None:
        self._in_one_go = in_one_go

    def purge(self) -> None:
        self.purged = True

    def flush(self, timeout_s: float) -> int:
        if self._in_one_go:
            raise SystemError("a callback returned a result with an exception set") from FENCED
        raise FENCED


@pytest.fixture(params=[False, True], ids=["by itself", "with an acknowledgement"])
def fenced(request: pytest.FixtureRequest) -> KafkaTransactional:
    producer = KafkaTransactional.__new__(KafkaTransactional)
    producer._fenced, producer._name = None, "engine.0"
    producer._producer = Fenced(request.param)
    return producer


def test_letting_go_of_a_producer_is_no_question_of_who_has_its_name(fenced: KafkaTransactional) -> None:
    fenced.close()
    assert fenced._producer.purged


def test_a_fatal_error_that_comes_with_an_acknowledgement_is_that_error(fenced: KafkaTransactional) -> None:
    with pytest.raises(errors.Fenced, match="another producer of this name has taken over"):
        fenced._call("flush", lambda: fenced._producer.flush(1.0))


class Broken:
    """A producer that has failed for good, with a record under way."""

    def __init__(self, *_: object) -> None:
        made.append(self)
        self.waiting: list[Any] = []
        self.broken = len(made) == 1

    def __len__(self) -> int:
        return len(self.waiting)

    def produce(self, topic: str, *, on_delivery: Any, **_: Any) -> None:
        self.waiting.append(on_delivery)

    def purge(self) -> None:
        self.broken = False

    def poll(self, timeout_s: float) -> int:
        if self.broken and self.waiting:
            raise KafkaException(KafkaError(KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, "out of order", fatal=True))
        while self.waiting:
            failed = None if self is not made[0] else KafkaError(KafkaError._PURGE_QUEUE)
            self.waiting.pop()(failed, SimpleNamespace(offset=lambda: 7, topic=lambda: "commands"))
        return 0

    def flush(self, timeout_s: float) -> int:
        return 0


made: list[Broken] = []


def test_a_producer_that_has_failed_for_good_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    made.clear()
    monkeypatch.setattr(kafka_producers, "Producer", Broken)
    producer = KafkaProducer(Connection("127.0.0.1:1", "p.", {}))
    heard: SimpleQueue[tuple[int, bool]] = SimpleQueue()
    for expected in ((-1, True), (7, False)):
        producer.append("task-commands", 0, None, b"", lambda offset, error: heard.put((offset, error is not None)))
        assert heard.get(timeout=60) == expected
    producer.close()
    assert len(made) == 2
