"""What may be wrong with a changelog ends in the right state, or in a refusal that names it: never in silence (G5)."""

from __future__ import annotations

from pathlib import Path

import pytest

from perdure.schemas import codec, topics
from perdure.schemas.errors import ConfigurationError, LogTruncated, RestoreStuck, Unreachable
from perdure.streams import restore_watch
from perdure.streams.local_engine import engine_kind
from perdure.streams.memory_log import MemoryLog, MemoryTransactional, _Partition
from perdure.streams.runner import Runner
from perdure.streams.store import META
from tests.world import KEYS, World

CHANGELOG = topics.CHANGELOG.name


@pytest.fixture
def world() -> World:
    """An engine of one partition that has accepted some tasks."""
    world = World(partitions=1)
    for _ in range(20):
        world.submit()
    return world


def end_of(world: World) -> int:
    return world.log.reader().bounds(CHANGELOG, 0)[1]


def rows(world: World) -> dict[bytes, bytes]:
    found = {key: value for key, value in world.stores[0].scan(b"") if not key.startswith(META)}
    assert len(found) >= 20
    return found


def open_transaction(world: World) -> MemoryTransactional:
    """Another program's, on the changelog; it changes nothing if it is aborted."""
    foreign = world.log.transactional("foreign")
    foreign.begin()
    foreign.append(CHANGELOG, 0, b"\xfeforeign", b"")
    return foreign


def test_records_deleted_before_they_were_read_are_a_refusal(world: World) -> None:
    world.log.truncate(CHANGELOG, 0, end_of(world) - 1)
    with pytest.raises(LogTruncated, match=r"engine-changelog/0 begins at .* has read only up to 0"):
        world.restart("empty")


def test_records_deleted_after_they_were_read_are_no_loss(world: World) -> None:
    before = rows(world)
    world.log.truncate(CHANGELOG, 0, end_of(world))
    world.restart()
    assert rows(world) == before
    world.submit(task_id="default/later")
    assert world.task("default/later").state == "PENDING"


def test_a_log_deleted_to_its_end_is_not_an_empty_state(world: World) -> None:
    """Nothing to read and an end that is not zero: to a lazy reader, a log that was read to its end."""
    world.log.truncate(CHANGELOG, 0, end_of(world))
    with pytest.raises(LogTruncated, match="what was deleted before it was read is missing"):
        world.restart("empty")


def test_a_log_of_undone_transactions_alone_is_an_empty_state() -> None:
    world = World(partitions=1)
    world.log._data[CHANGELOG, 0] = _Partition()
    world.log._offsets.clear()
    open_transaction(world).abort()
    assert end_of(world) == 1
    world.restart("empty")
    assert world.task(world.submit()).state == "PENDING"


@pytest.mark.parametrize("kept", [0, 10])
def test_a_log_that_has_lost_its_end_is_a_refusal(world: World, kept: int) -> None:
    """Replaced by an empty one, or truncated: the commands would be executed and recorded a second time."""
    del world.log._data[CHANGELOG, 0].entries[kept:]
    with pytest.raises(LogTruncated, match="replaced, or has lost its end"):
        world.restart("empty")


def test_a_store_that_is_ahead_of_its_log_is_a_refusal(world: World) -> None:
    del world.log._data[CHANGELOG, 0].entries[10:]
    with pytest.raises(LogTruncated, match="ends at 10, but the local store has read up to"):
        world.restart()


def test_input_that_has_lost_its_end_is_a_refusal(world: World) -> None:
    del world.log._data[topics.COMMANDS.name, 0].entries[3:]
    with pytest.raises(LogTruncated, match="ends at 3, but engine has executed it up to"):
        world.restart()


def test_input_that_has_lost_its_end_and_grown_again_is_a_refusal(world: World) -> None:
    """Workers go on beating. What they and others say before the engine's position would never be executed."""
    entries = world.log._data[topics.COMMANDS.name, 0].entries
    executed = len(entries)
    del entries[3:]
    world.now += 1
    while len(entries) <= executed:
        world.append(b"{}", 0)
    with pytest.raises(LogTruncated, match=f"its record {executed - 1} is 1 ms younger than all that engine has"):
        world.restart()


def test_a_position_of_the_group_that_is_gone_is_no_loss(world: World) -> None:
    """A group's positions expire; the state has its own."""
    world.log._offsets.clear()
    world.restart("empty")
    events = len(world.log.records(topics.EVENTS.name))
    world.pump()
    assert len(world.log.records(topics.EVENTS.name)) == events, "nothing is executed again"


def test_an_open_transaction_of_others_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = rows(world)
    foreign = open_transaction(world)
    stuck = restore_watch.RestoreWatch.is_stuck

    def ends(self: restore_watch.RestoreWatch) -> bool:
        foreign.abort()
        return stuck(self)

    monkeypatch.setattr(restore_watch.RestoreWatch, "is_stuck", ends)
    world.restart("empty")
    assert rows(world) == before


def test_an_open_transaction_of_others_is_not_waited_for_without_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_transaction(world)
    monkeypatch.setattr(restore_watch, "_STUCK_S", 0.0)
    with pytest.raises(RestoreStuck, match="a transaction of another program has been left open"):
        world.restart("empty")


def test_a_partition_beyond_the_pinned_count_stops_the_engine(tmp_path: Path) -> None:
    log = MemoryLog(lambda: 0, 2)
    runner = Runner(log, engine_kind(2, KEYS), tmp_path)
    log._partitions = 1
    with pytest.raises(ConfigurationError, match="deals out partition 1, but the namespace is pinned to 1"):
        runner.run()


def test_a_broker_that_is_away_when_a_schema_is_looked_for_ends_no_engine(world: World) -> None:
    """The record is executed again, and is then set aside: nobody has published its schema."""
    asked: list[str] = []

    def ask(fingerprint: str) -> None:
        asked.append(fingerprint)
        if len(asked) == 1:
            raise Unreachable("the broker is away")

    unlearn = codec.learn_from(ask)
    try:
        world.send(codec.MARKER + b"12345678" + b"body", 0)
    finally:
        unlearn()
    assert len(asked) >= 2
    assert [q.cause for q in world.quarantined()] == ["unknown_schema"]
    world.submit(task_id="default/later")
    assert world.task("default/later").state == "PENDING"
