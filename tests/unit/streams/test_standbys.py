"""Warm copies of partitions: always those of the others, never older than what is there, never half (G5)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from perdure.schemas import topics
from perdure.schemas.errors import LogTruncated
from perdure.streams import recovery
from perdure.streams.generations import Generations
from perdure.streams.local_engine import engine_kind
from perdure.streams.shard import AS_OF, CHANGELOG_POSITION
from perdure.streams.snapshots import Place
from perdure.streams.standbys import Standbys
from perdure.streams.store import META, RocksStore
from tests.integration.stack import until
from tests.world import HOUR, KEYS, ScriptedWorker, World


class Host:
    """A machine that keeps warm copies of a world's partitions, and may have to take them over."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.kind = engine_kind(world.partitions, KEYS)
        self.now = world.now
        self.standbys = Standbys(world.log, self.kind, folder / "standby", None, lambda: self.now)

    def place(self, partition: int) -> Place:
        return Place("engine", partition, self.world.log.topic_id(topics.CHANGELOG.name))

    def own(self, partition: int) -> Generations:
        """The stores that it has had of a partition."""
        return Generations(self.folder / "partition" / str(partition))

    def take_over(self, partition: int) -> RocksStore:
        """The store that an engine starts with here."""
        warm = self.standbys.take(partition)
        place, own = self.place(partition), self.own(partition)
        return recovery.open_store(self.world.log, self.kind, place, own, None, self.world.now, warm)

    def is_warm(self, partition: int) -> bool:
        """Whether a copy has all of the changelog as it is now."""
        copy = self.standbys._copies.get(partition)
        end = self.world.log.reader().bounds(topics.CHANGELOG.name, partition)[1]
        return copy is not None and copy.position >= end


@pytest.fixture
def world() -> World:
    made = World(2)
    ScriptedWorker(made, beating=True).start()
    for _ in range(20):
        made.submit()
    return made


@pytest.fixture
def host(world: World, tmp_path: Path) -> Iterator[Host]:
    made = Host(world, tmp_path)
    yield made
    made.standbys.close(5.0)


def rows(store: RocksStore) -> dict[bytes, bytes]:
    """What is in it besides its own notes; it is closed."""
    found = {key: value for key, value in store.scan(b"") if not key.startswith(META)}
    store.close()
    return found


def truth(world: World, partition: int) -> dict[bytes, bytes]:
    return {key: value for key, value in world.rows(partition).items() if not key.startswith(META)}


def test_who_takes_a_partition_over_has_all_of_it(world: World, host: Host) -> None:
    host.standbys.keep({0, 1})
    until("copies", lambda: host.is_warm(0) and host.is_warm(1))
    for _ in range(20):
        world.submit()
    until("the rest", lambda: host.is_warm(0) and host.is_warm(1))
    store = host.take_over(0)
    end = world.log.reader().bounds(topics.CHANGELOG.name, 0)[1]
    assert int.from_bytes(store.get(CHANGELOG_POSITION) or b"", "big") >= end
    assert store.path.parent == host.own(0).directory
    assert rows(store) == truth(world, 0) != {}


def test_a_partition_that_comes_and_goes_has_a_new_copy_each_time(world: World, host: Host) -> None:
    for _ in range(3):
        host.standbys.keep({0, 1})
        until("the copies", lambda: host.is_warm(0) and host.is_warm(1))
        host.take_over(0).close()
        host.standbys.keep({0, 1})
        for _ in range(5):
            world.submit()
        until("the copies again", lambda: host.is_warm(0) and host.is_warm(1))
        assert rows(host.take_over(1)) == truth(world, 1)
        host.standbys.keep({0})


def test_only_what_is_wanted_is_copied(world: World, host: Host) -> None:
    host.standbys.keep({1})
    until("the copy", lambda: host.is_warm(1))
    assert host.standbys.take(0) is None
    assert host.standbys.take(1) is not None
    assert host.standbys.take(1) is None


def test_the_local_store_is_taken_when_it_is_newer(world: World, host: Host) -> None:
    host.standbys.keep({0})
    until("the copy", lambda: host.is_warm(0))
    warm = host.standbys.take(0)
    local = host.own(0).begin()
    end = world.log.reader().bounds(topics.CHANGELOG.name, 0)[1]
    local.apply({CHANGELOG_POSITION: (end + 1).to_bytes(8, "big"), AS_OF: world.now.to_bytes(8, "big")})
    local.close()
    store = recovery.open_store(world.log, host.kind, host.place(0), host.own(0), None, world.now, warm)
    assert store.path == local.path
    store.close()


def test_a_copy_that_was_cut_off_for_too_long_is_not_used(world: World, host: Host) -> None:
    """Deletions made meanwhile may be gone from the changelog."""
    host.standbys.keep({0})
    until("the copy", lambda: host.is_warm(0))
    warm = host.standbys.take(0)
    later = world.now + 48 * HOUR
    store = recovery.open_store(world.log, host.kind, host.place(0), host.own(0), None, later, warm)
    assert store.get(CHANGELOG_POSITION) is None, "an empty store: the whole changelog follows"
    store.close()


def test_a_copy_stays_young_while_nothing_happens(world: World, host: Host) -> None:
    host.standbys.keep({0})
    until("the copy", lambda: host.is_warm(0) and host.standbys._copies[0].warm)
    host.now = world.now + 48 * HOUR

    def said() -> int:
        with host.standbys._lock:
            return int.from_bytes(host.standbys._copies[0].store.get(AS_OF) or b"", "big")

    until("a new date", lambda: said() == host.now)


def test_a_changelog_that_lost_records_makes_copies_anew(
    world: World, host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("perdure.streams.standbys._PAUSE_S", 0.01)
    host.standbys.keep({0})
    until("the copy", lambda: host.is_warm(0))
    first = host.standbys._copies[0]

    def broken(_records: object) -> None:
        monkeypatch.undo()
        raise LogTruncated("told to")

    monkeypatch.setattr(first, "take_in", broken)
    world.submit("noop", task_id="etl/one")
    for _ in range(20):
        world.submit()
    until("another copy", lambda: host.standbys._copies.get(0) not in (None, first) and host.is_warm(0))
    assert "made anew: told to" in caplog.text
    assert rows(host.take_over(0)) == truth(world, 0)


@pytest.mark.parametrize("why", ["log", "disk"])
def test_a_partition_that_cannot_have_a_copy_keeps_no_other_from_it(world: World, host: Host, why: str) -> None:
    if why == "log":
        world.log.truncate(topics.CHANGELOG.name, 0, 5)
    else:
        place = host.place(0)
        in_the_way = host.folder / "standby" / place.kind / place.changelog_id / "0"
        in_the_way.parent.mkdir(parents=True)
        in_the_way.write_text("a file where a directory is to be")
    host.standbys.keep({0, 1})
    until("the other one", lambda: host.is_warm(1))
    first = host.standbys._copies[1]
    until("the refusal", lambda: 0 in host.standbys._not_before)
    world.submit()
    until("what came since", lambda: host.is_warm(1))
    assert host.standbys._copies[1] is first
    assert host.standbys.take(0) is None
