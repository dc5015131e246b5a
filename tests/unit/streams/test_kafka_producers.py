"""Corners of producers that no broker can be brought to on purpose."""

from __future__ import annotations

import pytest
from confluent_kafka import KafkaError, KafkaException

from perdure.schemas import errors
from perdure.streams.kafka_producers import KafkaTransactional

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
