"""One partition of a processor: its store, its transactional producer, and the one transaction at a time between them.

A batch goes through numbered steps:
  1. execute each record that is new to the state, on top of what is committed (the overlay);
  2. begin a transaction and write outputs and changelog, the input position among its rows;
  3. commit it;
  4. write the overlay to the store, changelog position included, in one batch.
Without a changelog and without outputs there is nothing to commit: the store alone says how far it is.
A crash between 3 and 4 leaves the store behind the changelog, never ahead: `recover` reads the rest. An aborted
transaction drops the overlay and executes the same records again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping

from perdure.schemas.errors import (
    Fenced,
    InfrastructureError,
    LogTruncated,
    RestoreStuck,
    Unreachable,
)
from perdure.streams import failpoints
from perdure.streams.crash_marks import CrashMarks
from perdure.streams.log import (
    Log,
    Member,
    OutcomeUnknown,
    Reader,
    Record,
    TopicPartition,
    TransactionAborted,
    Transactional,
    time_of,
)
from perdure.streams.processor import Kind, Out, changelog_rows
from perdure.streams.restore_watch import RestoreWatch
from perdure.streams.store import META, Store

CHANGELOG_POSITION = META + b"changelog"
AS_OF = META + b"as of"
"""Wall time, ms, at which the store had all of the changelog: tombstones of later deletions it may never see."""
_REFRESH_MS = 3_600_000
RESTORE_BATCH = 2_000
_RESTORE_GATHER_MS = 10
"""How long the broker waits for more at the end of a changelog, which is where most restores begin."""
LOG = logging.getLogger("perdure")
AGAIN_S = 0.2
"""Between two attempts at what the broker has just refused to do."""
REVOCATION_S = 3.0
"""Within this the group tells a member that its partition is another's: three heartbeats."""


def position_of(store: Store) -> int:
    """Up to where a store has read its changelog."""
    return int.from_bytes(store.get(CHANGELOG_POSITION) or b"", "big")


def by_topic(out: Iterable[Out]) -> dict[str, list[tuple[bytes | None, bytes | None]]]:
    """Records by topic; within a topic they keep their order."""
    groups: dict[str, list[tuple[bytes | None, bytes | None]]] = {}
    for o in out:
        groups.setdefault(o.topic, []).append((o.key, o.value))
    return groups


def unexecuted(records: Iterable[Record], positions: Mapping[str, int]) -> list[Record]:
    """The records from the positions on, each once: another host may have had the partition meanwhile, and has moved
    on; and what was read before a seek may come again.
    """
    known = dict(positions)
    found = []
    for record in records:
        if record.offset >= known.get(record.topic, 0):
            known[record.topic] = record.offset + 1
            found.append(record)
    return found


def _wait(seconds: float, while_: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while while_() and time.monotonic() < end:
        time.sleep(0.05)


class Shard:
    """One partition of a processor, opened on a store. Used by one thread at a time."""

    def __init__(
        self,
        kind: Kind,
        partition: int,
        *,
        log: Log,
        store: Store,
        member: Member,
        transactional_id: str,
        crash_marks: CrashMarks | None = None,
    ) -> None:
        self.kind, self.partition = kind, partition
        self._log, self._store, self._member = log, store, member
        self._id = transactional_id
        self.record_cpu_s = 0.0
        """What a record of the last transaction took to execute, s of CPU time."""
        self.reached: dict[TopicPartition, int] = {}
        """Input -> up to where it is executed, by what the state says and what was committed here since."""
        self._said: dict[str, int] = {}
        """Of a kind without a changelog: input -> up to where what it brings about was written, here or elsewhere."""
        self._marks = crash_marks
        self._producer: Transactional = log.transactional(transactional_id)
        self._changelog_next: int | None = None
        self._as_of = 0
        self.rows_written = self.bytes_written = 0
        """Changes of the store so far, those of the restore included."""
        self._reader: Reader | None = None
        self._target = 0
        self.processor = kind.open(store, partition)
        try:
            self._begin_restore()
        except BaseException:
            self._producer.close()
            raise

    # Recovery --------------------------------------------------------------------------------------------------------

    def _begin_restore(self) -> None:
        if self.kind.changelog is None:
            return
        begin = position_of(self._store)
        reader = self._log.reader(committed=True, gather_ms=_RESTORE_GATHER_MS)
        # The target is the end with uncommitted records: this producer's creation has ended every older transaction.
        try:
            first, self._target = reader.bounds(self.kind.changelog, self.partition)
        except BaseException:
            reader.close()
            raise
        if begin > self._target:
            reader.close()
            raise LogTruncated(
                f"{self.kind.changelog}/{self.partition} ends at {self._target}, but the local store has read up to "
                f"{begin}: the topic was truncated or replaced. Restore the topic, or remove the local store to rebuild"
            )
        if begin < first:
            # Compaction leaves a log's start where it is: somebody has deleted records, and rows with them.
            reader.close()
            raise LogTruncated(
                f"{self.kind.changelog}/{self.partition} begins at {first}, but the local store has read only up to "
                f"{begin}: what was deleted before it was read is missing in the state. Restore the topic, or start "
                f"on a host whose store is newer"
            )
        reader.assign({(self.kind.changelog, self.partition): begin})
        self._watch = RestoreWatch(f"{self.kind.changelog}/{self.partition}", begin, self._target)
        self._reader = reader

    def restore_some(self) -> bool:
        """Read the next slice of the changelog into the store; True once the store is up to date.

        Blocks for 0.2 s. Raises `RestoreStuck` when nothing has come for minutes, `LogTruncated` when records were
        deleted before they were read.
        """
        reader = self._reader
        if reader is None or self.kind.changelog is None:
            return True
        if not reader.caught_up(self.kind.changelog, self.partition, self._target):
            records = reader.read(RESTORE_BATCH, 0.2)
            if records:
                writes: dict[bytes, bytes | None] = {r.key: r.value for r in records if r.key is not None}
                self._write(writes | {CHANGELOG_POSITION: (records[-1].offset + 1).to_bytes(8, "big")})
                failpoints.passed("in-restore")
                self._watch.advanced(records[-1].offset + 1)
            elif self._watch.is_stuck():
                self._refuse_to_wait(reader, self.kind.changelog)
            return False
        reader.close()
        self._reader = None
        self._apply({CHANGELOG_POSITION: self._target.to_bytes(8, "big")})
        self.processor.rolled_back()
        return True

    def _refuse_to_wait(self, reader: Reader, changelog: str) -> None:
        """Raise `RestoreStuck`, unless it is the broker that is away."""
        try:
            _, end = reader.bounds(changelog, self.partition)
        except Unreachable:
            self._watch.excuse()
        else:
            raise RestoreStuck(self._watch.why_stuck(end))

    def start_positions(self) -> dict[str, int | None]:
        """Input topic -> offset to read from; None: from the first record. Raises `LogTruncated`.

        The state's own position is the truth; where the state keeps none (`plain_changelog`) the group's is.
        """
        known: dict[str, int] = self.processor.positions()
        # Only to compare with, where the state says it: a broker that has restarted may hold offsets as pending for
        # ever although their transaction has ended in the log. What the group is told next puts that right.
        wanted = [(topic, self.partition) for topic in self.kind.inputs]
        group = self._member.committed(wanted, settled=self.kind.plain_changelog)
        positions: dict[str, int | None] = {}
        reader = self._log.reader(committed=False)
        try:
            for topic in self.kind.inputs:
                committed = group[topic, self.partition]
                stated = self._of_the_group(reader, committed) if self.kind.plain_changelog else known.get(topic)
                self._require_all_of_the_state(topic, stated, committed)
                if self.kind.changelog is None:
                    self._said[topic] = committed or 0
                if stated is not None:
                    stated = self._in_the_log(reader, topic, stated)
                    self.reached[topic, self.partition] = max(stated, self._said.get(topic, 0))
                positions[topic] = stated
        finally:
            reader.close()
        return positions

    def _of_the_group(self, reader: Reader, committed: int | None) -> int | None:
        """The group's position belongs to a changelog. One that was made anew and is still empty begins with it."""
        assert self.kind.changelog is not None
        _, end = reader.bounds(self.kind.changelog, self.partition)
        if committed and not end:
            LOG.warning("%s/%d is empty: it is made again from the beginning", self.kind.changelog, self.partition)
        return committed if end else None

    def _in_the_log(self, reader: Reader, topic: str, stated: int) -> int:
        """Where to read on: what comes there has to come after all that was executed. Raises `LogTruncated`."""
        where = f"{topic}/{self.partition}"
        first, end = reader.bounds(topic, self.partition)
        if not first <= stated <= end and topic in self.kind.skippable:
            return first
        if stated < first:
            raise LogTruncated(
                f"{where} begins at {first}, but {self.kind.name} has executed only up to {stated}: {first - stated} "
                f"records were deleted before they were read. Nothing is skipped: extend the topic's retention, and "
                f"set the position by hand only if the loss is accepted"
            )
        if stated > end:
            raise LogTruncated(
                f"{where} ends at {end}, but {self.kind.name} has executed it up to {stated}: it has lost its end, or "
                f"was replaced. What is appended now would be taken for executed. Stop all that writes to it and "
                f"restore the topic"
            )
        latest = self.processor.latest()
        at = None if latest is None else time_of(reader, topic, self.partition, stated - 1)
        if latest is not None and at is not None and at > latest:
            raise LogTruncated(
                f"{where} had lost its end, or was replaced, and has grown again: its record {stated - 1} is "
                f"{at - latest} ms younger than all that {self.kind.name} has executed. What stands before it was "
                f"never executed. Restore the topic"
            )
        return stated

    def _require_all_of_the_state(self, topic: str, stated: int | None, committed: int | None) -> None:
        """State and position are committed as one: a state that is behind has lost something. Raises `LogTruncated`."""
        if self.kind.positions_in_changelog and committed is not None and (stated is None or stated < committed):
            raise LogTruncated(
                f"{self.kind.changelog}/{self.partition} holds the state after {topic} {stated or 0}, but "
                f"{self.kind.name} has executed up to {committed}: the changelog was replaced, or has lost its end. "
                f"Executing those records again would record them twice. Restore the topic, or "
                f"rebuild the state from task-events by `perdure rebuild --from-events`"
            )

    # Batches ---------------------------------------------------------------------------------------------------------

    def run_batch(self, records: list[Record], still_mine: Callable[[], bool] = lambda: True) -> bool:
        """Execute records and commit; False if the partition was taken away before the commit.

        Goes on while the broker is away. A producer that is fenced may have been slow, not replaced: the broker fences
        the producer of a transaction that outlives its timeout. Who has lost the partition learns it from the group.
        """
        failures = 0
        while still_mine():
            try:
                self._transact(records)
                return True
            except (TransactionAborted, Unreachable) as error:  # unreachable: who knows the schema of another build
                self.processor.rolled_back()
                failures += 1
                if failures > 1:  # one is soon over; what lasts, as a right that was taken away, has to be said
                    LOG.warning("%s/%d tries again, the broker refuses: %s", self.kind.name, self.partition, error)
                    _wait(min(1.0, failures * AGAIN_S), still_mine)
                continue
            except OutcomeUnknown:
                pass
            except Fenced:
                _wait(REVOCATION_S, still_mine)
            self.processor.rolled_back()
            if self._found_committed(records[-1], still_mine):
                return True
        return False

    def _transact(self, records: list[Record]) -> None:
        """The four steps of the module's text. Raises `TransactionAborted`, `OutcomeUnknown` or `Fenced`."""
        # 1
        records = unexecuted(records, self.processor.positions())
        began = time.thread_time()
        out, writes = self._execute_all(records)
        self.record_cpu_s = (time.thread_time() - began) / max(1, len(records))
        positions = self.processor.positions()
        reached = {(t, self.partition): max(positions[t], self._said.get(t, 0)) for t in {r.topic for r in records}}
        # 2, 3
        if out or self.kind.changelog is not None:
            self._commit(out, writes, reached)
        # 4
        if self._changelog_next is not None:
            writes[CHANGELOG_POSITION] = self._changelog_next.to_bytes(8, "big")
        self._apply(writes)
        self.processor.committed()
        self.reached.update(reached)

    def _commit(self, out: list[Out], writes: dict[bytes, bytes | None], reached: Mapping[TopicPartition, int]) -> None:
        producer = self._producer
        failpoints.passed("before-begin")
        producer.begin()
        try:
            for topic, group in by_topic(out).items():
                producer.append_all(topic, self.partition, group)
            if self.kind.changelog is not None and (rows := list(changelog_rows(writes).items())):
                producer.append_all(self.kind.changelog, self.partition, rows[:-1])
                producer.append(self.kind.changelog, self.partition, *rows[-1], self._noted)
            failpoints.passed("after-produce")
            producer.commit(self._member, {} if self.kind.positions_in_changelog else reached)
        except TransactionAborted:
            producer.abort()
            raise
        failpoints.passed("after-commit-before-write")

    def _apply(self, writes: dict[bytes, bytes | None]) -> None:
        """Write what makes the store equal to the changelog as it is now."""
        self._as_of = time.time_ns() // 1_000_000
        self._write(writes | {AS_OF: self._as_of.to_bytes(8, "big")})

    def _write(self, writes: dict[bytes, bytes | None]) -> None:
        self._store.apply(writes)
        self.rows_written += len(writes)
        self.bytes_written += sum(len(key) + len(value or b"") for key, value in writes.items())

    def stay_fresh(self, now: int) -> None:
        """Note once an hour that nothing has changed: a store that looks old is not used again. `now`: wall ms.

        Not after a much longer time: a host that has slept may have lost the partition, and only a commit shows that it
        has not.
        """
        if _REFRESH_MS < now - self._as_of < 2 * _REFRESH_MS:
            self._apply({})

    def _noted(self, offset: int, error: Exception | None) -> None:
        if error is None:
            self._changelog_next = offset + 1

    def _execute_all(self, records: list[Record]) -> tuple[list[Out], dict[bytes, bytes | None]]:
        """What the records bring about: output records and changes of state."""
        for record in records:
            self._execute(record)
            self._unsaid(record)
        try:
            return self.processor.take_out(), self.processor.writes()
        except (ValueError, TypeError):
            # One of them has made a row that cannot be written. Executed with care, it alone is set aside.
            self.processor.rolled_back()
        for record in records:
            self._execute(record, careful=True)
            self._unsaid(record)
        return self.processor.take_out(), self.processor.writes()

    def _unsaid(self, record: Record) -> None:
        """Keep nothing of what a record brings about if it was written before: what followed it would be undone."""
        if record.offset < self._said.get(record.topic, 0):
            self.processor.take_out()

    def _execute(self, record: Record, *, careful: bool = False) -> None:
        if self._marks is None:
            self.processor.execute(record, careful=careful)
            return
        inputs = self.kind.inputs
        mark = record.offset * len(inputs) + inputs.index(record.topic)
        if self._marks.is_killer(mark):
            self.processor.set_aside_unread(record, "executing this record has ended the process three times")
        else:
            self._marks.enter(mark)
            try:
                self.processor.execute(record, careful=careful)
            except InfrastructureError:
                self._marks.leave()  # the record is not to blame; for what else may end the process it is
                raise
            self._marks.leave()

    def _found_committed(self, last: Record, still_mine: Callable[[], bool]) -> bool:
        """A new producer ends what the old one left open, and the changelog tells what has become of it."""
        self._producer.close()
        while still_mine():
            try:
                self._producer = self._log.transactional(self._id)
                self._begin_restore()
                while not self.restore_some():
                    if not still_mine():
                        return False
                return self._is_committed(last)
            except Unreachable as error:
                LOG.warning("%s/%d waits for the broker: %s", self.kind.name, self.partition, error)
                _wait(AGAIN_S, still_mine)
        return False

    def _is_committed(self, last: Record) -> bool:
        if self.kind.plain_changelog:
            where = (last.topic, self.partition)
            committed = self._member.committed([where])[where]
        else:
            committed = self.processor.positions().get(last.topic)
        return committed is not None and committed > last.offset

    def close(self) -> None:
        """Drop what is not committed and let go of store and producer."""
        if self._reader is not None:
            self._reader.close()
        self._producer.close()
        self._store.close()
        if self._marks is not None:
            self._marks.close()
