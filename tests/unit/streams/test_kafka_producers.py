"""Corners of producers that no broker can be brought to on purpose."""

from __future__ import annotations

from confluent_kafka import KafkaError, KafkaException

from perdure.streams.kafka_producers import KafkaTransactional


class Fenced:
    """A producer that learns while it is flushed that another one has its name: a call that was given up has ended."""

    purged = False

    def purge(self) -> None:
        self.purged = True

    def flush(self, timeout_s: float) -> int:
        raise KafkaException(KafkaError(KafkaError._FENCED, "fenced", fatal=True))


def test_letting_go_of_a_producer_is_no_question_of_who_has_its_name() -> None:
    producer = KafkaTransactional.__new__(KafkaTransactional)
    producer._fenced = None
    producer._producer = fenced = Fenced()
    producer.close()
    assert fenced.purged
