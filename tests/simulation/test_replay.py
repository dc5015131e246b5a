"""Real input decided again gives the events that are in the log (G5), and the first one that differs is found."""

from __future__ import annotations

import random
from typing import Any

import pytest

from perdure.schemas import codec, events, topics
from perdure.schemas.public import Quarantined
from perdure.streams.log import Record
from perdure.streams.memory_log import MemoryLog
from perdure.streams.redecide import Redecider
from perdure.streams.replay import Comparison, Divergence, advance, inputs_of, replay
from tests.simulation.faults import FAULTS
from tests.simulation.simulator import a_life
from tests.world import KEYS, World


@pytest.fixture(scope="module")
def world() -> World:
    """Without transactions that come to nothing: the tests take an event's offset for its place among all of them."""
    return a_life(11, faults=frozenset(FAULTS) - {"transactions", "crash", "take over"})


def copy(world: World, change: Any = None) -> MemoryLog:
    """The log with its events changed: `change(record)` gives the records instead of one."""
    made = MemoryLog(lambda: world.now, world.partitions)
    producer = made.producer()
    for topic in (topics.COMMANDS, topics.EVENTS, topics.QUARANTINE):
        for record in world.log.records(topic.name):
            for r in change(record) if change and topic is topics.EVENTS else [record]:
                producer.append(topic.name, r.partition, r.key, r.value)
    return made


def compared(world: World, log: Any, partition: int, first: int = 0) -> Comparison:
    decider = Redecider(partition, world.partitions, KEYS)
    # Time is of the record: that of the world's own log, whatever the copy's clock said.
    advance(decider, inputs_of(world.log, partition, 0, first))
    comparison = Comparison(partition, other_build=False)
    replay(_Timed(world, log), decider, comparison, first, world.executed(partition))
    return comparison


class _Timed:
    """A copy of a log whose inputs have the times of the original."""

    def __init__(self, world: World, log: MemoryLog) -> None:
        self._world, self._log = world, log

    def reader(self, *, committed: bool = True, gather_ms: int = 0) -> Any:
        return _TimedReader(self._world, self._log.reader(committed=committed))


class _TimedReader:
    def __init__(self, world: World, reader: Any) -> None:
        self._world, self._reader = world, reader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def read(self, most: int, timeout_s: float) -> list[Record]:
        found = self._reader.read(most, timeout_s)
        for r in found:
            if r.topic == topics.COMMANDS.name:
                r.at = self._world.log.records(r.topic, r.partition)[r.offset].at
        return list(found)


def test_the_same_build_makes_the_same_events_from_any_place_on(world: World) -> None:
    draw = random.Random(1)
    for partition in range(world.partitions):
        executed = world.executed(partition)
        for first in (0, draw.randrange(executed), executed):
            found = compared(world, world.log, partition, first)
            assert found.divergence is None
            assert found.tally.inputs == executed - first
            logged = [world.decode(r) for r in world.log.records(topics.EVENTS.name, partition)]
            assert found.tally.events == sum(e.cause.offset >= first for e in logged)


def event_at(world: World, partition: int, kind: type) -> int:
    """Offset of some event of a kind."""
    found = world.log.records(topics.EVENTS.name, partition)
    return next(r.offset for r in found[len(found) // 3 :] if isinstance(world.decode(r), kind))


def diverged(world: World, partition: int, change: Any) -> Divergence:
    found = compared(world, copy(world, lambda r: change(r) if r.partition == partition else [r]), partition).divergence
    assert found is not None
    return found


def busy(world: World) -> int:
    return max(range(world.partitions), key=lambda p: len(world.log.records(topics.EVENTS.name, p)))


def test_a_changed_event_is_found_field_by_field(world: World) -> None:
    partition = busy(world)
    target = event_at(world, partition, events.TaskGranted)

    def change(record: Record) -> list[Record]:
        e = world.decode(record)
        value = codec.encode(codec.replace(e, worker_id="else")) if record.offset == target else record.value
        return [Record(record.topic, record.partition, record.offset, record.at, record.key, value)]

    found = diverged(world, partition, change)
    event = world.decode(world.log.records(topics.EVENTS.name, partition)[target])
    assert (found.partition, found.event, found.input) == (partition, target, event.cause.offset)
    assert found.fields == {"worker_id": ("else", event.worker_id)}


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_missing_and_a_foreign_event_are_found_where_they_are(world: World, where: str) -> None:
    partition = busy(world)
    found = world.log.records(topics.EVENTS.name, partition)
    target = {"first": 0, "middle": event_at(world, partition, events.StepCompleted), "last": len(found) - 1}[where]
    cause = world.decode(found[target]).cause.offset

    missing = diverged(world, partition, lambda r: [] if r.offset == target else [r])
    assert missing.input == cause
    extra = diverged(world, partition, lambda r: [r, r] if r.offset == target else [r])
    assert extra.event == target + 1


def test_the_build_of_another_build_is_no_difference(world: World) -> None:
    partition = busy(world)
    log = _Timed(world, copy(world, lambda r: [_of_build(world, r)]))
    for other_build in (False, True):
        comparison = Comparison(partition, other_build=other_build)
        replay(log, Redecider(partition, world.partitions, KEYS), comparison, 0, world.executed(partition))  # type: ignore[arg-type]
        assert (comparison.divergence is None) == other_build


def test_an_input_that_was_passed_over_unread_is_passed_over_again(world: World) -> None:
    """That it killed its process is known from the quarantine alone."""
    partition = busy(world)
    executed = world.executed(partition)
    submits = [e.cause.offset for e in world.of_kind(events.TaskSubmitted) if e.cause.partition == partition]
    killer = submits[len(submits) // 2]
    decider = Redecider(partition, world.partitions, KEYS)
    made = [
        event
        for batch in inputs_of(world.log, partition, 0, executed)
        for event in decider.decide([(record, record.offset == killer) for record, _ in batch])
    ]
    log = copy(world, lambda _: [])
    producer = log.producer()
    for _, event in made:
        producer.append(topics.EVENTS.name, partition, None, event)

    def divergence() -> Divergence | None:
        comparison = Comparison(partition, other_build=False)
        replay(_Timed(world, log), Redecider(partition, world.partitions, KEYS), comparison, 0, executed)  # type: ignore[arg-type]
        return comparison.divergence

    found = divergence()
    assert found is not None
    assert found.input == killer
    q = Quarantined(
        topic="task-commands", partition=partition, offset=killer, at=0, reader="engine", cause="killer", detail=""
    )
    producer.append(topics.QUARANTINE.name, partition, None, codec.encode(q))
    assert divergence() is None


def _of_build(world: World, record: Record) -> Record:
    value = codec.encode(codec.replace(world.decode(record), build="other", feature_level=9))
    return Record(record.topic, record.partition, record.offset, record.at, record.key, value)
