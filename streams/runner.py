"""Runs a processor on the partitions that its consumer group gives to this process.

One thread reads and hands records out; each partition has a lane. While one transaction is under way, the next records
gather: under load they share it, idle they do not wait. A lane's failure ends the runner, and `run` raises it. A
partition that is refused does not, as long as there are others; but who begins alone and is refused one ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from perdure.schemas import limits
from perdure.schemas.errors import ConfigurationError, Fenced, LogTruncated, PartitionRefused, Unreachable
from perdure.streams.join_watch import JoinWatch
from perdure.streams.lane import Lane, ShardDuties
from perdure.streams.log import Log, Member, Record, TopicPartition
from perdure.streams.processor import Kind
from perdure.streams.shard import Shard
from perdure.streams.snapshot_taker import SnapshotTaker
from perdure.streams.standbys import Standbys

_BUFFER_RECORDS = 80_000
_BUFFER_LEAST = 5_000
"""Records that wait to be executed before no more are fetched: in a process, and for a partition in any case. To stop
and begin again is dear: what the consumer has fetched ahead is thrown away, and fetched once more."""
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
_TELL_AGAIN_S = 30.0
"""How often it is told all of it again: what is told may come to nothing."""
LOG = logging.getLogger("perdure")
_REJOIN_S = 60.0
_LEAVE_S = 2.0
"""How long an old member may take to close before its successor joins, or the process ends, without its end."""


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
        self._dealt = 0
        self.rounds = 0
        """How often what was read has been handed out."""
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._lanes: dict[int, Lane] = {}
        self._told: dict[TopicPartition, int] = {}
        self._told_at = self._retold_at = time.monotonic()
        self._new_member = partial(
            log.member, kind.name, kind.inputs, instance=instance, committed=committed, gather_ms=kind.gather_ms
        )
        self._fenced_at = self._truncated_at = -_REJOIN_S
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
                self.rounds += 1
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
            opening = not all(lane.ready or lane.refused for lane in self._lanes.values())
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
        except LogTruncated as error:
            # All that was read with it is lost: every partition begins again where it stands, and this one is refused.
            if time.monotonic() - self._truncated_at < _REJOIN_S:
                raise
            LOG.error("%s: %s", self.kind.name, error)
            self._truncated_at, self._put_out = time.monotonic(), True
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

    def refused(self) -> dict[int, PartitionRefused]:
        """Partition -> why it is not worked on."""
        found = {number: lane.refused for number, lane in self._lanes.copy().items()}
        return {number: error for number, error in found.items() if error is not None}

    @property
    def began_alone(self) -> bool:
        """Whether all partitions were given to this process when it began, and nothing has been dealt out since."""
        return self._dealt == 1 and len(self._lanes) == self.log.partitions

    def refuse(self, error: PartitionRefused) -> None:
        """A lane cannot go on, and the others may. A runner that can do nothing at all fails: that is seen sooner."""
        lanes = self._lanes.copy().values()
        if lanes and all(lane.resting for lane in lanes):
            self.fail(error)

    def wake(self) -> None:
        """Something outside of the log has changed that duties depend on."""
        for lane in list(self._lanes.values()):
            lane.wake()

    def _assigned(self, partitions: list[TopicPartition]) -> None:
        self._joining.inside()
        self._dealt += 1
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
        fresh = {number: Lane(self, number) for number in numbers if number not in self._lanes}
        self._lanes |= fresh
        for lane in fresh.values():  # once all are known: what is refused first is not all there is
            lane.start()
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
        if self._told_at - self._retold_at >= _TELL_AGAIN_S:  # what was told may have come to nothing
            self._retold_at = self._told_at
            self._told.clear()
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
            elif lane.ready and lane.paused and lane.is_nearly_empty(most):
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
