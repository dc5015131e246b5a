"""One partition's thread: it restores the partition's store and then executes batch after batch.

A partition that cannot be gone on with is refused, and tried again now and then: somebody may have put right what is
wrong with it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from perdure.schemas import limits
from perdure.schemas.errors import InfrastructureError, LogTruncated, PartitionRefused, Unreachable
from perdure.streams.crash_marks import CrashMarks
from perdure.streams.generations import Generations
from perdure.streams.log import BEGIN, Record, TopicPartition
from perdure.streams.recovery import open_store
from perdure.streams.shard import AGAIN_S, Shard
from perdure.streams.snapshot_taker import SnapshotDuty
from perdure.streams.snapshots import GivenUp, Place
from perdure.streams.store import RocksStore

if TYPE_CHECKING:
    from perdure.streams.runner import Runner

_BUFFER_BYTES = 32 * 1024 * 1024
_REFUSED_S = 60.0
"""How long a refused partition is left alone."""
_ALONE_S = 10.0
"""How long others may take to join a process that has begun with all partitions, and is refused one."""
_ROUND_S = 0.2
LOG = logging.getLogger("perdure")
T = TypeVar("T")


def wall_clock() -> int:
    """The host's wall clock, ms."""
    return time.time_ns() // 1_000_000


class ShardDuties(Protocol):
    """What a host does for a partition outside of transactions; see `duties.Duties`."""

    def after_commit(self, now: int) -> None:
        """Do what the committed records ask for."""

    def perform(self, now: int) -> None:
        """Do what is due."""

    def next_due(self, now: int) -> int:
        """Host time, ms, of the next thing to do."""


def most_records(record_cpu_s: float) -> int:
    """Records for one transaction, when each takes `record_cpu_s` to execute."""
    if record_cpu_s <= 0:
        return limits.BATCH_RECORDS
    return max(limits.BATCH_RECORDS, min(int(limits.BATCH_CPU_MS / 1_000 / record_cpu_s), limits.BATCH_RECORDS_QUICK))


class Lane:
    """One partition's thread."""

    def __init__(self, runner: Runner, partition: int) -> None:
        self._runner, self._partition = runner, partition
        self._records: deque[Record] = deque()
        self._bytes = 0
        self._halt = threading.Event()
        self._woken = self._busy = False
        self.ready = self.paused = False
        """Whether it takes records; whether it has so many that no more are fetched."""
        self.reached: dict[TopicPartition, int] = {}
        """Input -> up to where it is executed."""
        self.refused: PartitionRefused | None = None
        """Why it is left alone, or was when it was tried last."""
        self.resting = False
        """Whether it waits for its next trial."""
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"{runner.kind.name}-{partition}", daemon=True)

    def start(self) -> None:
        """Begin to restore."""
        self._thread.start()

    def hand_over(self, records: list[Record]) -> bool:
        """More records of the partition; whether they have to wait for the end of a transaction."""
        with self._changed:
            if not self.ready:  # refused meanwhile: it reads them again
                return False
            self._records.extend(records)
            self._bytes += sum(len(record.value or b"") for record in records)
            self._changed.notify()
            return self._busy

    def wake(self) -> None:
        """Look at the duties now."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def is_full(self, most: int) -> bool:
        """Whether records come faster than they are executed: `most` of them wait."""
        return len(self._records) >= most or self._bytes >= _BUFFER_BYTES

    def is_nearly_empty(self, most: int) -> bool:
        """Whether more may come, up to `most`."""
        return len(self._records) < most // 2 and self._bytes < _BUFFER_BYTES // 2

    def ask_to_stop(self) -> None:
        """Finish the transaction under way and end."""
        with self._changed:
            self._halt.set()
            self._changed.notify()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; False if it has not come: a call to the broker does not return."""
        self._thread.join(max(0.0, timeout_s))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._halt.is_set():
            try:
                self._live()
                return
            except PartitionRefused as error:
                self._refuse(error.with_traceback(None))  # or all that it was working on is kept with it
            except BaseException as error:  # noqa: BLE001 - whatever else ends a lane ends the runner, which raises it
                self._runner.fail(error)
                return

    def _refuse(self, error: PartitionRefused) -> None:
        """Take no more records until the next trial, and wait for it."""
        runner = self._runner
        LOG.error("%s/%d is refused: %s", runner.kind.name, self._partition, error)
        with self._changed:  # later, what is left here or still comes would be taken for the next ones
            self.ready = self._busy = False
            self._records.clear()
            self._bytes = 0
        runner.member.pause([(topic, self._partition) for topic in runner.kind.inputs])
        rounds = runner.rounds
        self.refused, self.resting = error, True
        runner.refuse(error)
        at_start = not self.reached and runner.began_alone
        if at_start and not self._halt.wait(_ALONE_S) and runner.began_alone:
            runner.fail(error)  # nobody else is there to go on with the others, and somebody has to look
        self._halt.wait(_REFUSED_S)
        while runner.rounds < rounds + 2 and not self._halt.is_set():  # what was read before the pause is handed out
            self._halt.wait(_ROUND_S)
        self.resting = False

    def _live(self) -> None:
        """Restore the partition and work on it until it is taken away. Raises what makes that impossible."""
        place = self._patiently(self._place)
        warm = None if self._runner.standbys is None else self._runner.standbys.take(self._partition)
        store = None if place is None else self._patiently(lambda: self._open_store(place, warm))
        if place is None or store is None:
            return
        try:
            shard = self._patiently(lambda: self._open(store))
        except BaseException:
            store.close()
            raise
        if shard is None:
            store.close()
            return
        try:
            if self._restore(shard):
                self._work(shard, store, place)
        except BaseException as error:
            try:
                shard.close()
            except InfrastructureError as after:  # by the same cause, perhaps, and it tells less
                error.add_note(f"closing failed as well: {after}")
            raise
        shard.close()

    def _patiently(self, call: Callable[[], T]) -> T | None:
        """Call, and again while the broker is away; None if the partition was taken away meanwhile."""
        while not self._halt.is_set():
            try:
                return call()
            except Unreachable as error:
                LOG.warning("%s/%d waits for the broker: %s", self._runner.kind.name, self._partition, error)
                self._halt.wait(AGAIN_S)
            except GivenUp:
                break
        return None

    def _place(self) -> Place:
        kind = self._runner.kind
        return Place(kind.name, self._partition, self._runner.log.topic_id(kind.changelog or kind.inputs[0]))

    def _open_store(self, place: Place, warm: Path | None) -> RocksStore:
        runner = self._runner
        generations = Generations(runner.directory / place.kind / place.changelog_id / str(place.partition))
        snapshots = None if runner.taker is None else runner.taker.snapshots
        return open_store(
            runner.log, runner.kind, place, generations, snapshots, wall_clock(), warm, lambda: not self._halt.is_set()
        )

    def _open(self, store: RocksStore) -> Shard:
        runner = self._runner
        return Shard(
            runner.kind, self._partition, log=runner.log, store=store, member=runner.member,
            transactional_id=f"{runner.kind.name}.{self._partition}",
            crash_marks=CrashMarks(store.path / "executing"),
        )  # fmt: skip

    def _restore(self, shard: Shard) -> bool:
        """Bring the store up to date and begin to read; False if the partition was taken away meanwhile."""
        while not self._halt.is_set():
            if shard.restore_some():
                break
        positions = self._patiently(shard.start_positions)
        if positions is None:
            return False
        self._require_no_less(positions)
        with self._changed:
            self.paused, self.ready, self.refused = False, True, None
        for topic, offset in positions.items():
            self._runner.member.seek(topic, self._partition, BEGIN if offset is None else offset)
        self._runner.member.resume([(topic, self._partition) for topic in self._runner.kind.inputs])
        self._runner.on_ready(self._partition)
        return True

    def _require_no_less(self, positions: Mapping[str, int | None]) -> None:
        """What the group was told may be older than what this lane has executed. Raises `LogTruncated`."""
        for (topic, _), reached in self.reached.items() if self._runner.kind.positions_in_changelog else ():
            if (positions.get(topic) or 0) < reached:
                raise LogTruncated(
                    f"{self._runner.kind.changelog}/{self._partition} holds the state after {topic} "
                    f"{positions.get(topic) or 0}, but this process has executed up to {reached}: it has lost its end"
                )

    def _work(self, shard: Shard, store: RocksStore, place: Place) -> None:
        duties = self._runner.duties(shard) if self._runner.duties is not None else None
        taker = self._runner.taker
        snapshots = None if taker is None else SnapshotDuty(taker, shard, store, place, wall_clock())
        self.reached = shard.reached
        if duties is not None:
            duties.perform(wall_clock())
        while not self._halt.is_set():
            due = None if duties is None else duties.next_due(wall_clock())
            batch = self._take(due, most_records(shard.record_cpu_s))
            if batch:
                if not shard.run_batch(batch, still_mine=lambda: not self._halt.is_set()):
                    return
                self._busy = False
                self._runner.finished.set()
                if duties is not None:
                    duties.after_commit(wall_clock())
            elif duties is not None:
                duties.perform(wall_clock())
            shard.stay_fresh(wall_clock())
            if snapshots is not None:
                snapshots.consider(wall_clock())

    def _take(self, due: int | None, most: int) -> list[Record]:
        """The records at hand, `most` at the most, or what comes until `due` (host ms)."""
        with self._changed:
            if not self._records and not self._halt.is_set() and not self._woken:
                wait = 1.0 if due is None else max(0.0, (due - wall_clock()) / 1000)
                self._changed.wait(min(wait, 1.0))
            self._woken = False
            batch: list[Record] = []
            size = 0
            while self._records and len(batch) < most and size < limits.BATCH_BYTES:
                record = self._records.popleft()
                size += len(record.value or b"")
                batch.append(record)
            self._bytes -= size
            self._busy = bool(batch)
            return batch
