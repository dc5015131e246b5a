"""What a cluster answers while its brokers move is asked again."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from perdure.schemas.errors import InfrastructureError, Unreachable
from perdure.streams import kafka_connection
from perdure.streams.kafka_connection import Connection

NO_LEADER = -1001


class Admin:
    """Answers with these offsets, one after the other; the last one stays."""

    def __init__(self, *offsets: int) -> None:
        self._offsets = list(offsets)

    def list_offsets(self, asked: dict[Any, Any], **_: Any) -> dict[Any, Future[Any]]:
        (where,) = asked
        offset = self._offsets.pop(0) if len(self._offsets) > 1 else self._offsets[0]
        answer: Future[Any] = Future()
        answer.set_result(SimpleNamespace(offset=offset))
        return {where: answer}


def connection(monkeypatch: pytest.MonkeyPatch, admin: Admin) -> Connection:
    made = Connection("127.0.0.1:1", "p.", {})
    monkeypatch.setattr(made, "admin", lambda: admin)
    return made


def test_a_partition_without_a_leader_has_offsets_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer of a partition that changes its leader is no error, and no offset either."""
    assert connection(monkeypatch, Admin(NO_LEADER, 3, NO_LEADER, NO_LEADER, 72)).offsets("events", 1) == (3, 72)


def test_a_partition_that_stays_without_one_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_connection, "CALL_S", 0.1)
    with pytest.raises(Unreachable, match=r"no offsets of p\.events/1"):
        connection(monkeypatch, Admin(NO_LEADER)).offsets("events", 1)


def test_a_client_that_knows_an_old_leader_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = connection(monkeypatch, Admin(NO_LEADER, 3, 72))
    forgotten: list[object] = []
    monkeypatch.setattr(made, "_forget", forgotten.append)
    made.offsets("events", 1)
    assert len(forgotten) == 1


def test_a_right_that_is_missing_is_not_waited_for() -> None:
    def refused() -> None:
        raise KafkaException(KafkaError(KafkaError.GROUP_AUTHORIZATION_FAILED, "not allowed"))

    with pytest.raises(InfrastructureError, match=r"positions: not allowed\. Nothing but a change") as found:
        kafka_connection.patiently(refused, "positions")
    assert not isinstance(found.value, Unreachable)
