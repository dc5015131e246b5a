"""Warm copies of the partitions that other members of the group have: who takes one over has only its tail to read.

One thread reads the changelogs of all partitions that this process does not have into stores beside its own. It costs
what executing them costs without the deciding, and their size on disk once more; so it is asked for, not the rule.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from perdure.schemas.errors import InfrastructureError, Unreachable
from perdure.streams.generations import Generations
from perdure.streams.log import Log, Reader, Record
from perdure.streams.processor import Kind
from perdure.streams.recovery import open_store
from perdure.streams.shard import AS_OF, CHANGELOG_POSITION, RESTORE_BATCH, position_of
from perdure.streams.snapshots import GivenUp, Place, Snapshots
from perdure.streams.store import RocksStore

FRESH_MS = 60_000
"""How often a copy is compared with the end of its changelog."""
_READ_S = 0.2
_PAUSE_S = 5.0
"""After something went wrong."""
_REFUSED_MS = 60_000
"""After a copy that could not be opened, as where its changelog begins too late: the others are not to suffer."""
LOG = logging.getLogger("perdure")


class _Copy:
    """The copy of one partition. Its reader's position is that of the store: records come in order."""

    def __init__(self, partition: int, store: RocksStore) -> None:
        self.partition, self.store = partition, store
        self.warm = False
        """Whether it has once been where the changelog ended."""
        self.compared_at = 0
        self.target: tuple[int, int] | None = None
        """(where the changelog ended, when), until the copy has got there."""

    @property
    def position(self) -> int:
        return position_of(self.store)

    def take_in(self, records: list[Record]) -> None:
        writes: dict[bytes, bytes | None] = {r.key: r.value for r in records if r.key is not None}
        self.store.apply(writes | {CHANGELOG_POSITION: (records[-1].offset + 1).to_bytes(8, "big")})

    def has_reached(self, end: int, at: int) -> None:
        """It has all of a changelog that ended at `end` at the wall time `at`, ms."""
        self.target = None
        self.store.apply({CHANGELOG_POSITION: max(self.position, end).to_bytes(8, "big"), AS_OF: at.to_bytes(8, "big")})


class Standbys:
    """The copies of one process. `directory` is this process's alone; `wall` is wall time, ms."""

    def __init__(
        self, log: Log, kind: Kind, directory: Path, snapshots: Snapshots | None, wall: Callable[[], int]
    ) -> None:
        assert kind.changelog is not None, "without a changelog there is nothing to copy"
        self._log, self._kind, self._directory, self._snapshots, self._wall = log, kind, directory, snapshots, wall
        self._changelog = kind.changelog
        self._lock = threading.Lock()
        self._wanted: frozenset[int] = frozenset()
        self._copies: dict[int, _Copy] = {}
        self._assigned: frozenset[_Copy] = frozenset()
        """Those that are being read, from where they were when they joined."""
        self._not_before: dict[int, int] = {}
        """Partition whose copy could not be opened -> when to try again, wall ms."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="standbys", daemon=True)
        self._thread.start()

    def keep(self, partitions: Iterable[int]) -> None:
        """Have copies of these partitions from now on. Those of others stay until they are taken. Does not block."""
        with self._lock:
            self._wanted = frozenset(partitions)

    def take(self, partition: int) -> Path | None:
        """Let go of a partition's copy; the directory of its store, for the caller to move. None: there is no copy."""
        with self._lock:
            self._wanted -= {partition}
            copy = self._copies.pop(partition, None)
            if copy is None:
                return None
            copy.store.close()
            return copy.store.path

    def close(self, timeout_s: float) -> None:
        """End; a copy that is being fetched is given up. Waits for the thread."""
        self._closing.set()
        self._thread.join(timeout_s)

    # The thread ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        reader = self._log.reader(committed=True)
        try:
            while not self._closing.is_set():
                try:
                    self._turn(reader)
                except Unreachable as error:
                    LOG.warning("warm copies wait for the broker: %s", error)
                    self._closing.wait(_PAUSE_S)
                except (InfrastructureError, OSError) as error:
                    # A copy is worth nothing that is not certain; the partitions themselves have their own recovery.
                    LOG.warning("warm copies are made anew: %s", error)
                    self._drop_all()
                    self._closing.wait(_PAUSE_S)
        finally:
            reader.close()
            self._drop_all()

    def _turn(self, reader: Reader) -> None:
        self._begin_one()
        with self._lock:
            held = frozenset(self._copies.values())
            positions = {(self._changelog, p): copy.position for p, copy in self._copies.items()}
        if held != self._assigned:
            reader.assign(positions)
            self._assigned = held
        if not held:
            self._closing.wait(_READ_S)
            return
        self._take_in(reader.read(RESTORE_BATCH, _READ_S))
        self._compare(reader)

    def _begin_one(self) -> None:
        """Open one of the copies that are wanted and not there."""
        now = self._wall()
        with self._lock:
            wanted = self._wanted - self._copies.keys()
        missing = min((p for p in wanted if now >= self._not_before.get(p, 0)), default=None)
        if missing is None:
            return
        place = Place(self._kind.name, missing, self._log.topic_id(self._changelog))
        try:
            generations = Generations(self._directory / place.kind / place.changelog_id / str(missing))
            store = open_store(
                self._log, self._kind, place, generations, self._snapshots, self._wall(),
                go_on=lambda: missing in self._wanted and not self._closing.is_set(),
            )  # fmt: skip
        except GivenUp:
            return
        except Unreachable:
            raise
        except (InfrastructureError, OSError) as error:
            LOG.warning("partition %d has no warm copy here for a while: %s", missing, error)
            self._not_before[missing] = self._wall() + _REFUSED_MS
            return
        with self._lock:
            if missing in self._wanted:
                self._copies[missing] = _Copy(missing, store)
            else:
                store.close()

    def _take_in(self, records: list[Record]) -> None:
        by_partition: dict[int, list[Record]] = defaultdict(list)
        for record in records:
            by_partition[record.partition].append(record)
        with self._lock:
            for partition, found in by_partition.items():
                if partition in self._copies:  # it may have been taken while the records were fetched
                    self._copies[partition].take_in(found)

    def _compare(self, reader: Reader) -> None:
        """Note of each copy, now and then, that it has all of the changelog: one that looks old is not used."""
        now = self._wall()
        for copy in list(self._copies.values()):
            if copy.target is None and now - copy.compared_at >= FRESH_MS:
                copy.compared_at = now
                copy.target = reader.bounds(self._changelog, copy.partition)[1], now
            if copy.target is None or not reader.caught_up(self._changelog, copy.partition, copy.target[0]):
                continue
            with self._lock:
                if self._copies.get(copy.partition) is not copy:
                    continue
                copy.has_reached(*copy.target)
                if not copy.warm:
                    copy.warm = True
                    LOG.info("partition %d has a warm copy here", copy.partition)

    def _drop_all(self) -> None:
        with self._lock:
            for copy in self._copies.values():
                copy.store.close()
            self._copies.clear()
            self._assigned = frozenset()
