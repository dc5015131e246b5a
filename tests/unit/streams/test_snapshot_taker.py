"""Copies that are uploaded beside the work: each whole, whoever else is at it."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perdure.connectors.blobs import DirectoryBlobs
from perdure.schemas.errors import ConfigurationError, NotFound
from perdure.streams.shard import AS_OF, CHANGELOG_POSITION
from perdure.streams.snapshot_taker import RETRY_MS, Often, SnapshotDuty, SnapshotTaker
from perdure.streams.snapshots import Place, Snapshots
from perdure.streams.store import RocksStore, is_damaged
from tests.integration.stack import until

PLACE = Place("engine", 0, "changelog-id")
NOBODY = 2**22 + 1
"""Above the greatest pid that Linux gives."""


class Held(Snapshots):
    """Uploads when it is let."""

    def __init__(self, folder: Path) -> None:
        super().__init__(DirectoryBlobs(folder))
        self.begun, self.let = threading.Event(), threading.Event()

    def upload(self, copy: Path, describe: Any) -> Any:
        self.begun.set()
        assert self.let.wait(60)
        return super().upload(copy, describe)


@pytest.fixture
def store(tmp_path: Path) -> RocksStore:
    made = RocksStore(tmp_path / "state" / "0")
    made.apply({b"key": b"value", CHANGELOG_POSITION: (7).to_bytes(8, "big")})
    return made


def duty(taker: SnapshotTaker, store: RocksStore) -> SnapshotDuty:
    """Of a life of the partition in which much has changed at once."""
    shard: Any = SimpleNamespace(
        rows_written=10, bytes_written=0, processor=SimpleNamespace(positions=lambda: {"task-commands": 3})
    )
    return SnapshotDuty(taker, shard, store, PLACE, 0)


def test_a_copy_under_way_is_left_alone_by_the_next_life_of_its_partition(store: RocksStore, tmp_path: Path) -> None:
    snapshots = Held(tmp_path / "blobs")
    taker = SnapshotTaker(snapshots, "test", Often(rows=1))
    duty(taker, store).consider(1_000)
    assert snapshots.begun.wait(60)
    later = duty(taker, store)
    later.consider(2_000)
    assert taker.copies.empty()
    snapshots.let.set()
    until("its end", lambda: not taker.uploading)
    later.consider(3_000)
    until("the next one", lambda: len(snapshots.names(PLACE)) == 2)
    taker.close(10.0)
    store.close()


def test_what_was_left_by_those_who_are_gone_is_swept(store: RocksStore, tmp_path: Path) -> None:
    folder = store.path.parent
    for left in (NOBODY, f"{NOBODY}.tmp", f"{os.getpid()}.tmp", os.getpid(), os.getppid()):
        (folder / f"copy-{left}").mkdir()
    taker = SnapshotTaker(Snapshots(DirectoryBlobs(tmp_path / "blobs")), "test", Often(rows=1))
    duty(taker, store).consider(1_000)
    taker.close(10.0)
    assert [path.name for path in folder.glob("copy-*")] == [f"copy-{os.getppid()}"]
    store.close()


def test_a_copy_that_fails_is_tried_again_after_a_while_and_harms_nothing(store: RocksStore, tmp_path: Path) -> None:
    """Something lies where the copy is to be, which cannot be swept: no damage of the store, though RocksDB names it so."""
    blocked = store.path.parent / f"copy-{os.getpid()}"
    blocked.write_text("no directory")
    snapshots = Snapshots(DirectoryBlobs(tmp_path / "blobs"))
    taker = SnapshotTaker(snapshots, "test", Often(rows=1))
    duty_ = duty(taker, store)
    tried: list[int] = []
    copy_to = store.copy_to

    def counted(path: Path) -> None:
        tried.append(now)
        copy_to(path)

    store.copy_to = counted  # type: ignore[method-assign]
    for now in range(1_000_000, 1_000_000 + 2 * RETRY_MS, 1_000):
        duty_.consider(now)
    assert tried == [1_000_000, 1_000_000 + RETRY_MS]
    assert not is_damaged(store.path)
    blocked.unlink()
    now = 1_000_000 + 2 * RETRY_MS
    duty_.consider(now)
    until("a snapshot", lambda: snapshots.names(PLACE))
    taker.close(10.0)
    store.close()


class Bucket(DirectoryBlobs):
    """One that fails as it is told."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.on_put: Exception | None = None
        self.on_delete: Exception | None = None

    def put(self, name: str, data: bytes) -> None:
        if self.on_put is not None:
            raise self.on_put
        super().put(name, data)

    def delete(self, name: str) -> None:
        if self.on_delete is not None:
            raise self.on_delete
        super().delete(name)


def test_without_the_right_to_delete_snapshots_are_taken_as_often_as_with_it(
    store: RocksStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = Bucket(tmp_path / "blobs")
    bucket.on_delete = ConfigurationError("no access")
    snapshots = Snapshots(bucket)
    taker = SnapshotTaker(snapshots, "test", Often(rows=1))
    for n in range(4):
        store.apply({b"key": b"%d" % n, CHANGELOG_POSITION: (7 + n).to_bytes(8, "big")})
        again = duty(taker, store)
        again.consider(n)
        until("its end", lambda: not taker.uploading)
        again.consider(n + 10 * RETRY_MS)
        until("its end", lambda: not taker.uploading)
    assert len(snapshots.names(PLACE)) == 4
    assert "older snapshots were not deleted: no access" in caplog.text
    taker.close(10.0)
    store.close()


@pytest.mark.parametrize("error", [NotFound("gone"), OSError("full"), RuntimeError("a defect")], ids=str)
def test_whatever_an_upload_ends_with_the_next_one_is_taken(
    store: RocksStore, tmp_path: Path, error: Exception
) -> None:
    bucket = Bucket(tmp_path / "blobs")
    bucket.on_put = error
    snapshots = Snapshots(bucket)
    taker = SnapshotTaker(snapshots, "test", Often(rows=1))
    again = duty(taker, store)
    again.consider(1_000)
    until("its end", lambda: not taker.uploading)
    bucket.on_put = None
    again.consider(1_000 + RETRY_MS)
    until("a snapshot", lambda: snapshots.names(PLACE))
    taker.close(10.0)
    store.close()


def test_a_copy_is_as_old_as_the_last_commit(store: RocksStore, tmp_path: Path) -> None:
    """A machine that slept for days may have lost the partition, and what was deleted meanwhile is gone from the log."""
    store.apply({AS_OF: (5_000).to_bytes(8, "big")})
    snapshots = Snapshots(DirectoryBlobs(tmp_path / "blobs"))
    taker = SnapshotTaker(snapshots, "test", Often(rows=1))
    duty(taker, store).consider(300_000_000)
    until("a snapshot", lambda: snapshots.names(PLACE))
    (name,) = snapshots.names(PLACE)
    assert snapshots.read(name, PLACE, first=0, end=100, oldest=0).created_at == 5_000
    taker.close(10.0)
    store.close()
