"""Corners of producers that no broker can be brought to on purpose."""

from __future__ import annotations

import time
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from perdure.schemas import errors
from perdure.streams import kafka_producers
from perdure.streams.kafka_connection import Connection
from perdure.streams.kafka_producers import KafkaProducer, KafkaTransactional
from tests.integration.stack import until

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
    """The first one made does what a case says; the next ones are sound."""

    how = ""

    def __init__(self, *_: object) -> None:
        made.append(self)
        self.waiting: list[Any] = []
        self.broken, self.purged = len(made) == 1, False

    def __len__(self) -> int:
        return len(self.waiting)

    def produce(self, topic: str, *, on_delivery: Any, **_: Any) -> None:
        if self.broken and self.how == "has failed before":
            raise KafkaException(KafkaError(KafkaError._FATAL, "it has failed"))
        self.waiting.append(on_delivery)

    def purge(self) -> None:
        self.broken, self.purged = self.how == "gives nothing back", True

    def poll(self, timeout_s: float) -> int:
        if self.broken and self.how in ("stands still", "gives nothing back"):
            time.sleep(min(timeout_s, 0.01))
            return 0
        if self.broken and self.waiting and self.how == "fails":
            raise KafkaException(KafkaError(KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, "out of order", fatal=True))
        while self.waiting:
            failed = KafkaError(KafkaError._PURGE_QUEUE) if self.purged else None
            self.waiting.pop()(failed, SimpleNamespace(offset=lambda: 7, topic=lambda: "commands"))
        return 0

    def flush(self, timeout_s: float) -> int:
        return 0


made: list[Broken] = []
Heard = tuple[int, bool]


class Cluster(Connection):
    """Whose leaders answer, or do not."""

    def __init__(self, *, answers: bool) -> None:
        super().__init__("127.0.0.1:1", "p.", {})
        self.answers, self.asked = answers, 0

    def offsets(self, topic: str, partition: int) -> tuple[int, int]:
        self.asked += 1
        if not self.answers:
            raise errors.Unreachable("no leader")
        return 0, 0


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    made.clear()
    monkeypatch.setattr(kafka_producers, "Producer", Broken)
    monkeypatch.setattr(kafka_producers, "_LATE_S", 0.05)
    monkeypatch.setattr(kafka_producers, "_GRACE_S", 0.05)
    monkeypatch.setattr(kafka_producers, "_DRAIN_S", 0.2)


def appended(producer: KafkaProducer) -> SimpleQueue[Heard]:
    heard: SimpleQueue[Heard] = SimpleQueue()
    producer.append("task-commands", 0, None, b"", lambda offset, error: heard.put((offset, error is not None)))
    return heard


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("how", ["fails", "stands still", "gives nothing back"])
def test_a_producer_that_is_good_for_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(Broken, "how", how)
    producer = KafkaProducer(Cluster(answers=True))
    assert appended(producer).get(timeout=60) == (-1, True)
    assert appended(producer).get(timeout=60) == (7, False)
    producer.close()
    assert len(made) == 2


@pytest.mark.usefixtures("broken")
def test_one_that_waits_for_a_broker_that_is_away_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Broken, "how", "stands still")
    cluster = Cluster(answers=False)
    producer = KafkaProducer(cluster)
    heard = appended(producer)
    until("it has asked again and again", lambda: cluster.asked > 3)
    assert (len(made), heard.empty()) == (1, True)
    made[0].broken = False
    assert heard.get(timeout=60) == (7, False)
    producer.close()


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("how", ["fails", "stands still"])
def test_who_is_told_that_nobody_knows_may_append_at_once(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """As workers do: the next batch of reports goes out when the one before was heard of."""
    monkeypatch.setattr(Broken, "how", how)
    producer = KafkaProducer(Cluster(answers=True))
    heard: SimpleQueue[SimpleQueue[Heard]] = SimpleQueue()
    told: list[Exception | None] = []

    def again(_: int, error: Exception | None) -> None:
        told.append(error)
        heard.put(appended(producer))

    producer.append("task-commands", 0, None, b"", again)
    assert heard.get(timeout=60).get(timeout=60) == (7, False)
    (error,) = told
    assert isinstance(error, errors.Unreachable)
    assert "only with the same id or key" in str(error)
    producer.close()


@pytest.mark.usefixtures("broken")
def test_what_is_handed_over_after_a_failure_goes_to_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Broken, "how", "has failed before")
    producer = KafkaProducer(Cluster(answers=True))
    assert appended(producer).get(timeout=60) == (7, False)
    producer.close()
    assert len(made) == 2


@pytest.mark.usefixtures("broken")
def test_a_defect_of_who_is_told_keeps_nobody_else_waiting(caplog: pytest.LogCaptureFixture) -> None:
    producer = KafkaProducer(Cluster(answers=True))
    producer.append("task-commands", 0, None, b"", lambda *_: 1 / 0)  # type: ignore[arg-type, return-value]
    until("it is said", lambda: "ZeroDivisionError" in caplog.text)
    assert appended(producer).get(timeout=60) == (7, False)
    producer.close()
