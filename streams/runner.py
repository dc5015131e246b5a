"""Runs a processor on the partitions that its consumer group gives to this process.

One thread reads and hands records out; each partition has a lane: a thread that restores the partition's store and then
executes batch after batch. While one transaction is under way, the next records gather: under load they share it, idle
they do not wait. A lane's failure ends the runner, and `run` raises it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from perdure.schemas import limits
from perdure.schemas.errors import ConfigurationError, Fenced, Unreachable
from perdure.streams.crash_marks import CrashMarks
from perdure.streams.generations import Generations
from perdure.streams.join_watch import JoinWatch
from perdure.streams.log import BEGIN, Log, Member, Record, TopicPartition
from perdure.streams.processor import Kind
from perdure.streams.recovery import open_store
from perdure.streams.shard import AGAIN_S, Shard
from perdure.streams.snapshot_taker import SnapshotDuty, SnapshotTaker
from perdure.streams.snapshots import GivenUp, Place
from perdure.streams.standbys import Standbys
from perdure.streams.store import RocksStore

_BUFFER_RECORDS = 80_000
_BUFFER_LEAST = 5_000
"""Records that wait to be executed before no more are fetched: in a process, and for a partition in any case. To stop
and begin again is dear: what the consumer has fetched ahead is thrown away, and fetched once more."""
_BUFFER_BYTES = 32 * 1024 * 1024
_READ_S = 0.2
_OPENING_READ_S = 0.02
"""While partitions are being opened: what they ask of the member is done between two reads."""
_GATHER_S = 0.005
"""How long reading waits for a transaction under way: what comes meanwhile has to wait for its end anyway, and is then
fetched with one request in place of one for each record."""
_JOIN_S = 60.0
"""How long partitions that are taken away may take to end what is under way, all together."""
_TELL_S = 1.0
"""How often the group is told how far its partitions are, where they know it by themselves."""
LOG = logging.getLogger("perdure")
_REJOIN_S = 60.0
_LEAVE_S = 2.0
"""How long an old member may take to close before its successor joins, or the process ends, without its end."""
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


class Runner:
    """A processor's share of the work in this process. `run` blocks until `stop`, or until something fails."""

    def __init__(
        self,
        log: Log,
        kind: Kind,
        directory: Path,
        *,
        instance: str | None = None,
        committed: bool = True,
        duties: Callable[[Shard], ShardDuties] | None = None,
        taker: SnapshotTaker | None = None,
        standbys: Standbys | None = None,
        on_ready: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.log, self.kind, self.directory = log, kind, directory
        self.duties, self.taker, self.standbys, self.on_ready = duties, taker, standbys, on_ready
        self.finished = threading.Event()
        """Set whenever a lane has ended a transaction."""
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._lanes: dict[int, Lane] = {}
        self._told: dict[TopicPartition, int] = {}
        self._told_at = time.monotonic()
        self._new_member = partial(
            log.member, kind.name, kind.inputs, instance=instance, committed=committed, gather_ms=kind.gather_ms
        )
        self._fenced_at = -_REJOIN_S
        self._put_out = False
        self._joining = JoinWatch(kind.name)
        self.member: Member = self._join()

    def _join(self) -> Member:
        """A new member, the only one whose word counts from now on. What the last one told may never have arrived."""
        self._put_out = False
        self._told.clear()
        self._current = mine = object()

        def on_assigned(partitions: list[TopicPartition]) -> None:
            if self._current is mine:
                self._assigned(partitions)

        def on_revoked(partitions: list[TopicPartition], lost: bool) -> None:
            if self._current is mine:
                self._revoked(partitions, lost)

        return self._new_member(on_assigned=on_assigned, on_revoked=on_revoked)

    def stop(self) -> None:
        """Ask `run` to end: transactions under way are finished first."""
        self._stopping.set()

    def run(self) -> None:
        """Read and hand out records until `stop`. Raises what a lane failed with."""
        try:
            while not self._stopping.is_set():
                self._hand_out(self._read())
                self._balance()
                if time.monotonic() - self._told_at >= _TELL_S:
                    self._tell(self._lanes.values())
        finally:
            self._close_lanes(list(self._lanes))
            self._leave()
        if self._failure is not None:
            raise self._failure

    def _hand_out(self, records: list[Record]) -> None:
        self.finished.clear()
        busy = False
        for number, group in by_partition(records).items():
            if number in self._lanes:
                busy = self._lanes[number].hand_over(group) or busy
        if busy and len(records) < limits.BATCH_RECORDS:  # else more is at hand already
            self.finished.wait(_GATHER_S)

    def _read(self) -> list[Record]:
        try:
            opening = not all(lane.ready for lane in self._lanes.values())
            records = self.member.read(limits.BATCH_RECORDS, _OPENING_READ_S if opening else _READ_S)
        except Fenced as error:
            # A broker that stood still may take a member for its own successor. Soon again, it is another process that
            # goes by the same name, and one of the two has to end.
            if time.monotonic() - self._fenced_at < _REJOIN_S:
                raise Fenced(
                    f"{error}. Another process has its name: two hosts work on copies of one state directory. Remove "
                    f"`host-id` from the state directory of one of them, and it gets a name of its own"
                ) from error
            self._fenced_at, self._put_out = time.monotonic(), True
            records = []
        overdue = self._joining.look()
        if self._put_out or overdue:
            self._rejoin()
        return records

    def _rejoin(self) -> None:
        """Go on as a new member. One that has lost its session waits for what it has told its group before, which gets
        it fenced once it arrives, or never comes to an end (librdkafka 2.16: docs/decisions/0015)."""
        self._close_lanes(list(self._lanes), tell=False)
        self._joining.outside()
        self._leave()
        self.member = self._join()

    def _leave(self) -> None:
        """Close the member, and go on without its end where that does not come. What it still says does not count."""
        self._current = None
        leaving = threading.Thread(target=self.member.close, name="leaving", daemon=True)
        leaving.start()
        leaving.join(_LEAVE_S)

    def fail(self, error: BaseException) -> None:
        """A lane cannot go on."""
        self._failure = self._failure or error
        self._stopping.set()

    def wake(self) -> None:
        """Something outside of the log has changed that duties depend on."""
        for lane in list(self._lanes.values()):
            lane.wake()

    def _assigned(self, partitions: list[TopicPartition]) -> None:
        self._joining.inside()
        self.member.pause(partitions)
        numbers = sorted({p for _, p in partitions})
        if numbers and numbers[-1] >= self.log.partitions:
            self.fail(
                ConfigurationError(
                    f"{self.kind.name}: the group deals out partition {numbers[-1]}, but the namespace is pinned to "
                    f"{self.log.partitions}: adding partitions would send routing keys elsewhere. Use a new namespace"
                )
            )
            return
        for number in numbers:
            if number not in self._lanes:
                self._lanes[number] = Lane(self, number)
        self._stand_by()

    def _revoked(self, partitions: list[TopicPartition], lost: bool) -> None:
        # To the lanes it is one: what they still commit is refused once the partition's next owner has taken the
        # transactional id.
        self._joining.outside()
        self._put_out = self._put_out or lost
        self._close_lanes(sorted({p for _, p in partitions}), tell=not lost)
        self._stand_by()

    def _stand_by(self) -> None:
        if self.standbys is not None:
            self.standbys.keep(set(range(self.log.partitions)) - self._lanes.keys())

    def _close_lanes(self, numbers: list[int], *, tell: bool = True) -> None:
        lanes = [self._lanes.pop(n) for n in numbers if n in self._lanes]
        for lane in lanes:
            lane.ask_to_stop()
        deadline = time.monotonic() + _JOIN_S
        joined = [lane.join(deadline - time.monotonic()) for lane in lanes]
        if tell:
            self._tell(lanes)
        if not all(joined):
            # Its store stays locked, and its transaction may be open: only the process's end puts that right.
            self.fail(Unreachable(f"{self.kind.name}: a partition was not given up within {_JOIN_S:g} s"))

    def _tell(self, lanes: Iterable[Lane]) -> None:
        """Let the group's offsets show how far its partitions are, for lags and to notice a lost changelog."""
        if self.kind.plain_changelog:
            return  # part of each transaction there
        self._told_at = time.monotonic()
        reached = {where: offset for lane in lanes for where, offset in lane.reached.copy().items()}
        news = dict(reached.items() - self._told.items())
        if news:
            self.member.tell(news)
            self._told |= news

    def _balance(self) -> None:
        """Stop fetching for lanes that are behind, and fetch again for those that have caught up."""
        most = most_waiting(len(self._lanes))
        for number, lane in self._lanes.items():
            where = [(topic, number) for topic in self.kind.inputs]
            if lane.ready and not lane.paused and lane.is_full(most):
                lane.paused = True
                self.member.pause(where)
            elif lane.paused and lane.is_nearly_empty(most):
                lane.paused = False
                self.member.resume(where)


def by_partition(records: Iterable[Record]) -> dict[int, list[Record]]:
    """Records by partition; within one they keep their order."""
    groups: dict[int, list[Record]] = {}
    for record in records:
        groups.setdefault(record.partition, []).append(record)
    return groups


def most_waiting(partitions: int) -> int:
    """Records of one partition that may wait, in a process that has so many."""
    return max(_BUFFER_LEAST, _BUFFER_RECORDS // max(1, partitions))


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
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"{runner.kind.name}-{partition}", daemon=True)
        self._thread.start()

    def hand_over(self, records: list[Record]) -> bool:
        """More records of the partition; whether they have to wait for the end of a transaction."""
        with self._changed:
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
        try:
            place = self._patiently(self._place)
            warm = None if self._runner.standbys is None else self._runner.standbys.take(self._partition)
            store = None if place is None else self._patiently(lambda: self._open_store(place, warm))
            if place is None or store is None:
                return
            shard = self._patiently(lambda: self._open(store))
            if shard is None:
                store.close()
                return
            try:
                if self._restore(shard):
                    self._work(shard, store, place)
            except BaseException as error:  # noqa: BLE001 - said first: closing may fail by the same cause, and tell less
                self._runner.fail(error)
            finally:
                shard.close()
        except BaseException as error:  # noqa: BLE001 - whatever ends a lane ends the runner, which raises it
            self._runner.fail(error)

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
        for topic, offset in positions.items():
            self._runner.member.seek(topic, self._partition, BEGIN if offset is None else offset)
        self._runner.member.resume([(topic, self._partition) for topic in self._runner.kind.inputs])
        self.ready = True
        self._runner.on_ready(self._partition)
        return True

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
