"""Four ways to a partition's state, and one result (G5); and what is refused on the way.

Histories are random lives of a whole deployment, with crashes; the store of each recovery is a real RocksDB.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perdure.connectors.blobs import DirectoryBlobs
from perdure.schemas import codec, commands, topics
from perdure.schemas.errors import EventsIncomplete, InfrastructureError, LogTruncated
from perdure.streams import recovery, tables
from perdure.streams.generations import Generations
from perdure.streams.local_engine import LocalEngine, engine_kind
from perdure.streams.log import Record
from perdure.streams.rebuild import fold_partition, rebuild
from perdure.streams.shard import AS_OF, CHANGELOG_POSITION, Shard
from perdure.streams.snapshots import FORMAT, GivenUp, Manifest, Place, Snapshots
from perdure.streams.store import META, MemoryStore, RocksStore, StoreDamaged, is_damaged
from tests.simulation.simulator import a_life
from tests.world import HOUR, KEYS, MINUTE, ScriptedWorker, World

DAY = 24 * HOUR
Rows = dict[bytes, bytes]


class Host:
    """A machine with a state directory, on which the engine of one partition is to start."""

    def __init__(self, world: World, folder: Path, partition: int = 0) -> None:
        self.world, self.partition = world, partition
        self.kind = engine_kind(world.partitions, KEYS)
        self.place = Place("engine", partition, world.log.topic_id(topics.CHANGELOG.name))
        self.generations = Generations(folder / "state" / str(partition))
        self.snapshots = Snapshots(DirectoryBlobs(folder / "blobs"))

    def has_store(self, rows: Rows, as_of: int) -> None:
        """Leave a store behind, as a killed process does."""
        store = self.generations.begin()
        store.apply({**rows, AS_OF: as_of.to_bytes(8, "big")})
        store.close()

    def has_snapshot(self, rows: Rows, created_at: int, folder: Path) -> Manifest:
        """Upload a snapshot of a store with these rows."""
        store = RocksStore(folder / "source")
        store.apply({**rows, AS_OF: created_at.to_bytes(8, "big")})
        store.copy_to(folder / "copy")
        store.close()
        offset = int.from_bytes(rows[CHANGELOG_POSITION], "big")
        return self.snapshots.upload(
            folder / "copy", lambda files: Manifest(FORMAT, self.place, offset, {}, created_at, "test", files)
        )

    def start(self) -> Rows:
        """Open the store, read the tail, and say what is in it."""
        log = self.world.log
        store = recovery.open_store(log, self.kind, self.place, self.generations, self.snapshots, self.world.now)
        member = log.member("engine", self.kind.inputs, on_assigned=lambda _: None, on_revoked=lambda *_: None)
        shard = Shard(
            self.kind, self.partition, log=log, store=store, member=member,
            transactional_id=f"engine.{self.partition}",
        )  # fmt: skip
        while not shard.restore_some():
            pass
        found = plain(store.scan(b""))
        shard.close()
        member.close()
        return found


def plain(rows: Iterator[tuple[bytes, bytes]]) -> Rows:
    return {key: value for key, value in rows if not key.startswith(META)}


def durable(rows: Rows) -> Rows:
    return {key: value for key, value in rows.items() if tables.is_durable(key)}


def earlier(world: World, partition: int, part: float) -> Rows:
    """What a store was when so much of the changelog was written, position included."""
    records = world.log.records(topics.CHANGELOG.name, partition)
    until = records[int(len(records) * part)].offset
    rows: dict[bytes, bytes | None] = {r.key: r.value for r in records if r.offset < until and r.key is not None}
    kept = {key: value for key, value in rows.items() if value is not None}
    return kept | {CHANGELOG_POSITION: until.to_bytes(8, "big")}


@pytest.mark.parametrize("seed", range(4))
def test_four_recoveries_have_one_result(seed: int, tmp_path: Path) -> None:
    world = a_life(seed)
    world.engine.close()
    for partition in range(world.partitions):
        truth = plain(iter(world.rows(partition).items()))
        assert truth

        local = Host(world, tmp_path / "local", partition)
        local.has_store(earlier(world, partition, 0.9), world.now)
        assert local.start() == truth

        remote = Host(world, tmp_path / f"remote-{partition}", partition)
        manifest = remote.has_snapshot(earlier(world, partition, 0.4), world.now, tmp_path / f"remote-{partition}")
        assert 0 < manifest.changelog_offset < len(world.log.records(topics.CHANGELOG.name, partition))
        assert remote.start() == truth

        assert Host(world, tmp_path / "nothing", partition).start() == truth

        folded = MemoryStore()
        fold_partition(world.log, partition, folded)
        assert durable(plain(folded.scan(b""))) == durable(truth)


def test_after_a_rebuild_everything_goes_on(tmp_path: Path) -> None:
    """Running tasks go back to the queue, answers are the same, new work runs."""
    world = World(2)
    worker = ScriptedWorker(world, beating=True).start()
    running, waiting = world.submit(), world.submit("unknown type")
    first = world.do(commands.PauseTask, waiting, command_id="pause it")
    worker.run(running)
    world.advance(MINUTE)
    rebuild(world.log, tmp_path, lambda: world.log.replace(topics.CHANGELOG.name), lambda _: None)
    world.restart("empty")
    world.advance(MINUTE)
    assert world.task(waiting).state == "PAUSED"
    assert world.do(commands.PauseTask, waiting, command_id="pause it") == replace(first, at=world.now)
    assert world.task(running).state == "PENDING"
    assert "AttemptLost" in world.kinds(running)[-2:]
    again = ScriptedWorker(world, "w2", beating=True).start()
    assert again.grant(running).epoch == 2
    assert world.submit() in [g.task_id for g in again.grants()]
    assert world.events(partition=0)[0].seq == 1, "the events are those of always"


def test_an_interrupted_rebuild_is_refused_and_can_be_done_again(tmp_path: Path) -> None:
    world = World(1)
    world.submit()
    world.log.replace(topics.CHANGELOG.name)
    with pytest.raises(LogTruncated, match=r"the changelog was replaced.*perdure rebuild"):
        LocalEngine(world.log, KEYS, lambda: world.now)
    rebuild(world.log, tmp_path, lambda: world.log.replace(topics.CHANGELOG.name), lambda _: None)
    world.restart("empty")
    world.advance(MINUTE)
    assert ScriptedWorker(world, beating=True).start().grants()


def test_an_engine_that_wakes_up_during_a_rebuild_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perdure.streams.shard.REVOCATION_S", 0.0)
    world = World(1)
    world.submit()
    awake = iter((True,))

    def wakes_up(_: str) -> None:
        if next(awake, False):
            world.submit()

    with pytest.raises(InfrastructureError, match="an engine wrote events while they were folded"):
        rebuild(world.log, tmp_path / "first", lambda: pytest.fail("nothing may be touched"), wakes_up)
    rebuild(world.log, tmp_path / "again", lambda: world.log.replace(topics.CHANGELOG.name), lambda _: None)


def test_events_without_their_beginning_rebuild_nothing(tmp_path: Path) -> None:
    world = World(1)
    task_id = world.submit()
    world.engine.close()
    world.log.truncate(topics.EVENTS.name, 0, 2)
    with pytest.raises(EventsIncomplete, match=task_id):
        rebuild(world.log, tmp_path, lambda: pytest.fail("nothing may be touched"), lambda _: None)


# What is passed over, by name ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> World:
    made = a_life(7)
    made.engine.close()
    return made


def test_a_store_older_than_the_tombstones_is_not_used(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A row whose deletion the changelog has forgotten would come back."""
    host = Host(world, tmp_path)
    ghost = earlier(world, 0, 0.9) | {b"t-ghost": b"deleted long ago"}
    host.has_store(ghost, world.now - 2 * DAY)
    with caplog.at_level(logging.WARNING, "perdure"):
        assert host.start() == plain(iter(world.rows(0).items()))
    assert "so old that deletions made since may be gone" in caplog.text


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("old", "is too old by"),
        ("ahead", "ends at"),
        ("flipped", "is damaged"),
        ("missing", "is missing"),
        ("cut", "is no manifest that this build reads"),
        ("future", "format 2"),
        ("foreign", "is of another state"),
        ("moved", "somebody has moved it"),
        ("escaping", "is no file of a snapshot"),
        ("lying", "the store in it says otherwise"),
        ("not a store", "cannot be opened"),
    ],
)
def test_a_snapshot_that_cannot_be_trusted_is_passed_over(
    harm: str, says: str, world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host = Host(world, tmp_path)
    rows = earlier(world, 0, 0.6)
    if harm == "ahead":
        rows[CHANGELOG_POSITION] = (10**9).to_bytes(8, "big")
    created_at = world.now - (2 * DAY if harm == "old" else 0)
    manifest = host.has_snapshot(rows, created_at, tmp_path)
    do_harm(harm, host, manifest, tmp_path)
    with caplog.at_level(logging.WARNING, "perdure"):
        assert host.start() == plain(iter(world.rows(0).items())), "the whole changelog is the next way"
    assert says in caplog.text


def do_harm(harm: str, host: Host, manifest: Manifest, folder: Path) -> None:
    blobs = DirectoryBlobs(folder / "blobs")
    text = blobs.get(manifest.name).decode()
    table = next(f for f in manifest.files if f.name.endswith(".sst"))
    file = f"{host.place.folder}/files/{table.sha256}"
    match harm:
        case "flipped":
            data = bytearray(blobs.get(file))
            data[len(data) // 2] ^= 1
            blobs.put(file, bytes(data))
        case "missing":
            blobs.delete(file)
        case "cut":
            blobs.put(manifest.name, text[: len(text) // 2].encode())
        case "future":
            blobs.put(manifest.name, text.replace('"format":1', '"format":2').encode())
        case "foreign":
            blobs.put(manifest.name, text.replace(host.place.changelog_id, "another").encode())
        case "moved":
            blobs.delete(manifest.name)
            blobs.put(manifest.name.replace(f"{manifest.changelog_offset:020d}", f"{1:020d}"), text.encode())
        case "escaping":
            blobs.put(manifest.name, text.replace(table.name, "../out.sst").encode())
        case "lying":
            blobs.delete(manifest.name)
            other = replace(manifest, changelog_offset=manifest.changelog_offset - 1)
            other_text = text.replace(
                f'"changelog_offset":{manifest.changelog_offset}', f'"changelog_offset":{other.changelog_offset}'
            )
            blobs.put(other.name, other_text.encode())
        case "not a store":
            listed = ",".join(
                f'{{"name":"{f.name}","size":{f.size},"sha256":"{f.sha256}"}}' for f in manifest.files if f != table
            )
            blobs.put(manifest.name, (text[: text.index('"files"')] + f'"files":[{listed}]}}').encode())


def test_the_older_snapshot_is_used_when_the_newest_is_damaged(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host = Host(world, tmp_path)
    for name, part in (("a", 0.3), ("b", 0.8)):
        (tmp_path / name).mkdir()
        manifest = host.has_snapshot(earlier(world, 0, part), world.now, tmp_path / name)
    do_harm("flipped", host, manifest, tmp_path)
    with caplog.at_level(logging.INFO, "perdure"):
        assert host.start() == plain(iter(world.rows(0).items()))
    assert caplog.text.count("is fetched from") == 2


def test_a_changelog_without_its_beginning_needs_a_store_or_a_snapshot(tmp_path: Path) -> None:
    world = a_life(3)
    world.engine.close()
    truth = plain(iter(world.rows(0).items()))
    rows, too_early = earlier(world, 0, 0.8), earlier(world, 0, 0.4)
    first = int.from_bytes(rows[CHANGELOG_POSITION], "big")
    world.log.truncate(topics.CHANGELOG.name, 0, first)

    host = Host(world, tmp_path / "snapshot")
    host.has_snapshot(rows, world.now, tmp_path / "snapshot")
    assert host.start() == truth

    stale = Host(world, tmp_path / "stale")
    stale.has_store(too_early, world.now)
    with pytest.raises(LogTruncated, match=rf"begins at {first}.*rebuild --from-events"):
        stale.start()


def test_snapshots_are_incremental_and_the_oldest_go(world: World, tmp_path: Path) -> None:
    host = Host(world, tmp_path)
    blobs = DirectoryBlobs(tmp_path / "blobs")
    store = RocksStore(tmp_path / "source")
    store.apply({b"k%d" % n: bytes(1_000) for n in range(100)})
    names = []
    for n in range(4):
        store.apply({b"more%d" % n: b"x", CHANGELOG_POSITION: n.to_bytes(8, "big")})
        store.copy_to(tmp_path / f"copy-{n}")
        made = host.snapshots.upload(
            tmp_path / f"copy-{n}",
            lambda files, n=n: Manifest(FORMAT, host.place, n, {}, world.now + n, "test", files),  # type: ignore[misc]
        )
        names.append(made.name)
    store.close()
    shared = {f.sha256 for f in made.files} & {
        b.name.rpartition("/")[2] for b in blobs.list(f"{host.place.folder}/files")
    }
    assert shared
    before = len(blobs.list(f"{host.place.folder}/files"))
    host.snapshots.collect(host.place, now=min(b.modified for b in blobs.list(f"{host.place.folder}/files")))
    assert host.snapshots.names(host.place) == names[:1:-1], "the newest two are kept"
    assert len(blobs.list(f"{host.place.folder}/files")) == before, "young files may belong to an upload under way"
    later = max(b.modified for b in blobs.list(f"{host.place.folder}/files")) + 2 * HOUR
    host.snapshots.collect(host.place, now=later)
    assert len(blobs.list(f"{host.place.folder}/files")) < before
    for name in host.snapshots.names(host.place):
        (tmp_path / name[-20:]).mkdir()
        found = host.snapshots.read(name, host.place, first=0, end=10, oldest=0)
        host.snapshots.download(found, tmp_path / name[-20:])


def test_without_its_manifest_an_upload_was_never_there(world: World, tmp_path: Path) -> None:
    host = Host(world, tmp_path)
    manifest = host.has_snapshot(earlier(world, 0, 0.6), world.now, tmp_path)
    DirectoryBlobs(tmp_path / "blobs").delete(manifest.name)
    assert host.snapshots.names(host.place) == []
    assert host.start() == plain(iter(world.rows(0).items()))


# Stores on this host -------------------------------------------------------------------------------------------------


def test_a_store_that_somebody_holds_is_not_waited_for(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perdure.streams.generations.LOCK_WAIT_S", 0.1)
    host = Host(world, tmp_path)
    host.has_store(earlier(world, 0, 0.9), world.now)
    holder = host.generations.open()
    assert holder is not None
    assert host.start() == plain(iter(world.rows(0).items()))
    assert "a new one is made" in caplog.text
    holder.close()
    assert host.start() == plain(iter(world.rows(0).items()))
    assert len(list(host.generations.directory.iterdir())) == 1, "the one that was held is gone once it is free"


def test_a_store_whose_first_rows_are_damaged_gives_way_at_once(world: World, tmp_path: Path) -> None:
    host = Host(world, tmp_path)
    host.has_store({CHANGELOG_POSITION: bytes(8)}, world.now)
    flip_every_table(host.generations.directory, most=16)  # in rows: what opens it is sound
    assert host.start() == plain(iter(world.rows(0).items()))


def long_before(rows: Rows) -> Rows:
    """Rows in front of these, so many that the first half of the table has no others."""
    return rows | {b"\x00%d" % n: random.Random(n).randbytes(1_000) for n in range(100)}


def test_a_damaged_store_is_never_served(world: World, tmp_path: Path) -> None:
    """Met later, the damage ends this start; the next one does without the store."""
    host = Host(world, tmp_path)
    host.has_store(long_before(earlier(world, 0, 0.9)), world.now)
    flip_every_table(host.generations.directory)
    with pytest.raises(StoreDamaged, match="the next start rebuilds it"):
        host.start()
    assert host.start() == plain(iter(world.rows(0).items()))


def uploads_rot(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a disk has changed what is uploaded, before its digest is taken."""
    upload = Snapshots.upload

    def rotten(snapshots: Snapshots, copy: Path, describe: Any) -> Manifest:
        flip_tables(copy)
        return upload(snapshots, copy, describe)

    monkeypatch.setattr(Snapshots, "upload", rotten)


def test_a_snapshot_of_what_was_damaged_before_is_used_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are those that were uploaded: only reading them shows that a disk had changed them."""
    host = Host(world, tmp_path)
    uploads_rot(monkeypatch)
    host.has_snapshot(long_before(earlier(world, 0, 0.6)), world.now, tmp_path / "rotten")
    with pytest.raises(StoreDamaged, match="the next start rebuilds it"):
        host.start()
    assert host.start() == plain(iter(world.rows(0).items()))


@pytest.mark.parametrize("whole", [True, False])
def test_snapshots_with_the_same_damage_are_not_tried_in_turn_for_ever(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are incremental: what had rotted before the older of them is in the newer one too."""
    world = a_life(3)
    world.engine.close()
    truth = plain(iter(world.rows(0).items()))
    host = Host(world, tmp_path)
    uploads_rot(monkeypatch)
    rows = earlier(world, 0, 0.5)
    for n in range(2):
        host.has_snapshot(long_before(rows), world.now + n, tmp_path / f"rotten-{n}")
    if not whole:
        world.log.truncate(topics.CHANGELOG.name, 0, int.from_bytes(rows[CHANGELOG_POSITION], "big"))
    with pytest.raises(StoreDamaged):
        host.start()
    if whole:
        assert host.start() == truth
        return
    with pytest.raises(StoreDamaged):
        host.start()
    for _ in range(2):
        with pytest.raises(LogTruncated, match="rebuild --from-events"):
            host.start()


@pytest.mark.parametrize("marked", [True, False])
def test_a_bad_sector_is_damage_too(marked: bool, tmp_path: Path) -> None:
    store = RocksStore(tmp_path / "store")
    sound = store._db

    class Bad:
        def get(self, _: bytes) -> bytes:
            raise Exception("IO error: While pread offset 0 len 4096: /x/000009.sst: Input/output error")  # noqa: TRY002 - as rocksdict does

    store._db = Bad()
    if not marked:
        (tmp_path / "store").rename(tmp_path / "elsewhere")  # nothing can be written where it was
    with pytest.raises(StoreDamaged, match="Input/output error"):
        store.get(b"key")
    assert is_damaged(tmp_path / "store") == marked
    store._db = sound
    store.close()


def flip_every_table(folder: Path, most: int = 1 << 30) -> None:
    """Have every SST of a store on the disk, and not as it was written."""
    (found,) = folder.iterdir()
    store = RocksStore(found)
    store.copy_to(folder.parent / "written out")
    store.close()
    flip_tables(folder.parent / "written out", most)
    for file in found.iterdir():
        file.unlink()
    for file in (folder.parent / "written out").iterdir():
        file.rename(found / file.name)


def flip_tables(folder: Path, most: int = 1 << 30) -> None:
    """Damage the first half of each, or its first bytes."""
    for table in folder.glob("*.sst"):
        data = bytearray(table.read_bytes())
        end = min(len(data) // 2, most)
        data[:end] = bytes(end)
        table.unlink()
        table.write_bytes(bytes(data))


def test_a_store_that_fails_blames_no_record(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record at hand is neither quarantined nor passed over: the partition stops."""
    store = MemoryStore()
    engine = engine_kind(1, KEYS).open(store, 0)

    def fails(_: bytes) -> bytes | None:
        raise StoreDamaged("a block does not have its checksum")

    monkeypatch.setattr(store, "get", fails)
    command = codec.encode(commands.PauseTask(command_id="c", task_id="default/x"))
    with pytest.raises(StoreDamaged):
        engine.execute(Record(topics.COMMANDS.name, 0, 0, world.now, None, command))
    assert engine.take_out() == []


def test_who_is_not_wanted_any_more_stops_fetching_a_snapshot(world: World, tmp_path: Path) -> None:
    """No other way is tried in its place, and the next start finds nothing half."""
    host = Host(world, tmp_path)
    host.has_snapshot(earlier(world, 0, 0.5), world.now, tmp_path / "snapshot")
    answers = iter((True, False))
    with pytest.raises(GivenUp):
        recovery.open_store(
            world.log, host.kind, host.place, host.generations, host.snapshots, world.now, go_on=lambda: next(answers)
        )
    assert host.start() == plain(iter(world.rows(0).items()))
