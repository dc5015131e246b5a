"""Takes snapshots of this process's partitions, off the path of records.

The copy is made between two transactions, by the thread that makes those: links to files, and what is in memory
written out. Hashing and uploading is done by a thread of its own, one partition after the other.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from perdure.schemas.errors import InfrastructureError, PerdureError
from perdure.streams.shard import AS_OF, Shard, position_of
from perdure.streams.snapshots import FORMAT, File, Manifest, Place, Snapshots
from perdure.streams.store import RocksStore

_COPY = "copy-"
RETRY_MS = 60_000
"""How long a snapshot that could not be taken is left alone."""
LOG = logging.getLogger("perdure")


@dataclass(frozen=True)
class Often:
    """When another snapshot is due: after so much change, or so much time in which anything has changed."""

    rows: int = 200_000
    bytes: int = 64 * 1024 * 1024
    ms: int = 6 * 3_600_000


@dataclass(frozen=True)
class _Copy:
    owner: SnapshotDuty
    path: Path
    changelog_offset: int
    inputs: dict[str, int]
    at: int
    """When it was made, wall time, ms."""
    as_of: int
    """Of when it has all of the changelog, by the last commit: who slept since may have lost the partition."""


class SnapshotTaker:
    """The thread of a process that uploads copies."""

    def __init__(self, snapshots: Snapshots, build: str, often: Often = Often()) -> None:
        self.snapshots, self.often, self._build = snapshots, often, build
        self.uploading: set[Path] = set()
        """Copies that wait to be uploaded, or are."""
        self.copies: SimpleQueue[_Copy | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._upload_all, name="snapshots", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Finish the uploads that were begun, if they take no longer than that."""
        self.copies.put(None)
        self._thread.join(timeout_s)

    def _upload_all(self) -> None:
        while (copy := self.copies.get()) is not None:
            place = copy.owner.place
            try:
                manifest = self.snapshots.upload(copy.path, self._describe(copy))
                LOG.info("partition %s: snapshot %s", place.partition, manifest.name)
                self._collect(place, copy.at)
            except Exception as error:  # noqa: BLE001 - the snapshots of the other partitions go on
                copy.owner.failed(error, copy.at)
            finally:
                shutil.rmtree(copy.path, ignore_errors=True)
                self.uploading.discard(copy.path)

    def _collect(self, place: Place, at: int) -> None:
        """What cannot be deleted is only too much: another snapshot would not help."""
        try:
            self.snapshots.collect(place, at)
        except (PerdureError, OSError) as error:
            LOG.warning("partition %s: older snapshots were not deleted: %s", place.partition, error)

    def _describe(self, copy: _Copy) -> Callable[[list[File]], Manifest]:
        return lambda files: Manifest(
            FORMAT, copy.owner.place, copy.changelog_offset, copy.inputs, copy.as_of, self._build, files
        )


class SnapshotDuty:
    """When snapshots of one partition are taken, for as long as this process has it."""

    def __init__(self, taker: SnapshotTaker, shard: Shard, store: RocksStore, place: Place, now: int) -> None:
        self.place = place
        self._taker, self._shard, self._store = taker, shard, store
        self._path = store.path.parent / f"{_COPY}{os.getpid()}"
        """This process's alone: another one of this host may be uploading its own, of a life before."""
        self._rows = self._bytes = 0
        self._at = now
        self._not_before = now

    def consider(self, now: int) -> None:
        """Take a snapshot if one is due; `now`: wall time, ms. Blocks for the copy only. Raises nothing: recovery has
        other ways, and another attempt follows.
        """
        if self._path in self._taker.uploading or now < self._not_before or not self._is_due(now):
            return
        shard = self._shard
        try:
            self._sweep()
            self._store.copy_to(self._path)
        except InfrastructureError as error:
            self.failed(error, now)
            return
        self._rows, self._bytes, self._at = shard.rows_written, shard.bytes_written, now
        offset, as_of = position_of(self._store), self._store.get(AS_OF)
        fresh = now if as_of is None else min(now, int.from_bytes(as_of, "big"))
        self._taker.uploading.add(self._path)
        self._taker.copies.put(_Copy(self, self._path, offset, shard.processor.positions(), now, fresh))

    def _sweep(self) -> None:
        """Delete what interrupted uploads have left: of this process, and of those that are gone."""
        for path in self._path.parent.glob(f"{_COPY}*"):
            pid = path.name.removeprefix(_COPY).removesuffix(".tmp")  # as RocksDB calls a copy that is being made
            if pid.isdecimal() and (int(pid) == os.getpid() or not _lives(int(pid))):
                shutil.rmtree(path, ignore_errors=True)

    def failed(self, error: Exception, at: int) -> None:
        """Try again, but not at once. `at`: wall time of the copy, ms."""
        self._rows = self._shard.rows_written - self._taker.often.rows
        self._not_before = at + RETRY_MS
        LOG.warning("partition %s: no snapshot was taken, one will be later: %s", self.place.partition, error)

    def _is_due(self, now: int) -> bool:
        often, rows = self._taker.often, self._shard.rows_written - self._rows
        if rows >= often.rows or self._shard.bytes_written - self._bytes >= often.bytes:
            return True
        return rows > 0 and now - self._at >= often.ms


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True
