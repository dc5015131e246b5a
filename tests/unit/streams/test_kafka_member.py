"""What a member does at its assignment, when the broker says where its group stands and when it does not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
from confluent_kafka import OFFSET_BEGINNING, TopicPartition

from perdure.schemas.errors import Unreachable
from perdure.streams import kafka_consumers
from perdure.streams.kafka_connection import Connection
from perdure.streams.kafka_consumers import KafkaMember
from perdure.streams.log import TopicPartition as Where

NOWHERE = "127.0.0.1:1"
FIRST, SECOND = ("task-commands", 0), ("task-commands", 1)


class Broker:
    """What the group's coordinator says, and how often it was asked."""

    def __init__(self, offsets: dict[Where, int | None] | None) -> None:
        self.offsets, self.asked = offsets, 0

    def committed(
        self, _log: Connection, _group: str, wanted: Iterable[Where], *, settled: bool
    ) -> dict[Where, int | None]:
        self.asked += 1
        if self.offsets is None:
            raise Unreachable("no coordinator")
        return {where: self.offsets.get(where) for where in wanted}


class Assigns:
    """Stands in for the client at an assignment: there is no broker that could give one."""

    def __init__(self) -> None:
        self.positions: dict[tuple[str, int], int] = {}

    def assign(self, partitions: list[TopicPartition]) -> None:
        self.positions = {(p.topic, p.partition): p.offset for p in partitions}

    def unassign(self) -> None:
        self.positions = {}


class Assigned:
    """A member that is given two partitions."""

    def __init__(self, broker: Broker) -> None:
        self.told: list[list[Where]] = []
        self.client = Assigns()
        self.member = KafkaMember(
            Connection(NOWHERE, "x.", {}), "engine", ["task-commands"], None, False, 0,
            self.told.append, lambda *_: None,
        )  # fmt: skip
        self.partitions = [TopicPartition(f"x.{topic}", number) for topic, number in (FIRST, SECOND)]
        self.member._assigned(self.client, self.partitions)  # type: ignore[arg-type]


@pytest.fixture
def broker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Broker:
    made = Broker(request.param)
    monkeypatch.setattr(kafka_consumers, "committed", made.committed)
    return made


@pytest.fixture
def assigned(broker: Broker) -> Iterator[Assigned]:
    made = Assigned(broker)
    yield made
    made.member.close()


@pytest.mark.parametrize("broker", [{FIRST: 7}], indirect=True)
def test_what_the_group_says_at_the_assignment_is_not_asked_for_again(broker: Broker, assigned: Assigned) -> None:
    assert assigned.client.positions == {("x.task-commands", 0): 7, ("x.task-commands", 1): OFFSET_BEGINNING}
    assert assigned.told == [[FIRST, SECOND]]
    assert assigned.member.committed([FIRST, SECOND], settled=False) == {FIRST: 7, SECOND: None}
    assert broker.asked == 1
    broker.offsets = {FIRST: 9}
    assert assigned.member.committed([FIRST], settled=True) == {FIRST: 9}, "what has to be settled is asked for"
    assigned.member._revoked(assigned.client, assigned.partitions)  # type: ignore[arg-type]
    assert assigned.member.committed([FIRST], settled=False) == {FIRST: 9}, "others may have moved it since"
    assert broker.asked == 3


@pytest.mark.parametrize("broker", [None], indirect=True)
def test_a_coordinator_that_does_not_answer_ends_no_member(broker: Broker, assigned: Assigned) -> None:
    assert set(assigned.client.positions.values()) == {OFFSET_BEGINNING}
    assert assigned.told == [[FIRST, SECOND]]
    broker.offsets = {FIRST: 7}
    assert assigned.member.committed([FIRST], settled=False) == {FIRST: 7}, "asked again, by who has the partition"
