"""A partition as it was: its durable rows folded from task-events up to some point, its workers from their words.

Tasks, queues, leases and timers are exact. Sessions are of no event: they are put together from what workers said on
task-commands (a session is taken for live while its last word is younger than a lease), as far as that topic reaches
back. A point in time includes the last input whose log time is not later, and all before it: where the log's clock was
ahead for a while, what it wrote then does not hide what came after.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import Any

from perdure.schemas import codec, commands, events, limits, topics
from perdure.schemas.codec import replace
from perdure.schemas.common import Cause
from perdure.schemas.errors import DecodeError
from perdure.schemas.public import Quarantined
from perdure.schemas.rows import Live, Session, TaskState
from perdure.streams import clock, describe, tables
from perdure.streams.decision import Moment
from perdure.streams.event_fold import EventFold, Headless
from perdure.streams.log import Log, Record, records_of
from perdure.streams.state import State
from perdure.streams.store import MemoryStore

_OF_SESSIONS = (commands.WorkerStarted, commands.WorkerBeat, commands.WorkerStopping)
_SILENT_MS = limits.LEASE_MS + limits.BEAT_MS
"""So long after its last word a session is over, if nothing holds its engine up."""
_IN_PART = frozenset({"defect", "too_large"})
"""Causes for which an input may be in quarantine that has had its effect."""


@dataclass(frozen=True, slots=True)
class Point:
    """Where a partition's past ends; what is given includes the record itself. A time is looked for first; else the
    earliest holds."""

    at: int | None = None
    """Log time of task-commands, ms."""
    command: int | None = None
    """Offset of task-commands."""
    event: int | None = None
    """Offset of task-events."""

    def leaves_out_event(self, record: Record, event: Any) -> bool:
        """Whether an event is later than the point."""
        return _passed(self.event, record.offset) or _passed(self.command, event.cause.offset)

    def leaves_out_command(self, record: Record) -> bool:
        """Whether an input is later than the point."""
        return _passed(self.command, record.offset)


def _passed(last: int | None, here: int) -> bool:
    return last is not None and here > last


class Past:
    """One partition as it was at a point. Reads task-events and task-commands; blocks while it does.

    Raises `EventsIncomplete`, `DecodeError` or `Unreachable`.
    """

    def __init__(self, log: Log, partition: int, point: Point) -> None:
        self.partition = partition
        self.event: int | None = None
        """Offset of the last event that is included."""
        self.command: int | None = None
        """Offset of the last input that is included, as far as task-commands still tells."""
        self.at = point.at or 0
        """Log time of the point, ms: as given, else that of the last input that is included."""
        self.unknown_workers = 0
        """Live sessions that began before task-commands does: what they served is not known."""
        self._log, self._store = log, MemoryStore()
        self._fold = EventFold(self._store, partition, log.partitions)
        self._refused: set[int] = set()
        point = point if point.at is None else self._located(point.at)
        caused = self._fold_events(point)
        bound = point if point.event is None else with_changes(point, command=min(_or_end(point.command), caused))
        self._find_workers(bound)

    # Reading ---------------------------------------------------------------------------------------------------------

    def _located(self, at: int) -> Point:
        """The last input until a time; where task-commands does not reach back so far, the last event."""
        last = None
        for record in records_of(self._log, topics.COMMANDS.name, self.partition, committed=False):
            if record.at <= at:
                last = record.offset
        if last is not None:
            return Point(at=at, command=last)
        last = -1
        for record, event in decoded(records_of(self._log, topics.EVENTS.name, self.partition)):
            if event.at <= at:
                last = record.offset
        return Point(at=at, event=last)

    def _fold_events(self, point: Point) -> int:
        """Fold up to the point; the offset of the last input that brought an event about."""
        caused = -1
        for record, event in decoded(records_of(self._log, topics.EVENTS.name, self.partition)):
            if point.leaves_out_event(record, event):
                break
            self._fold.apply(event)
            self.event, caused = record.offset, event.cause.offset
            if point.at is None:
                self.at = event.at
            if isinstance(event, events.ReportRejected):
                self._refused.add(caused)
        self._fold.flush()
        return caused

    def _find_workers(self, point: Point) -> None:
        found: dict[str, Session] = {}
        strangers: dict[str, int] = {}
        unheard = {offset for offset, cause in set_aside(self._log, self.partition).items() if cause not in _IN_PART}
        passed_over = self._refused | unheard
        for record in records_of(self._log, topics.COMMANDS.name, self.partition, committed=False):
            if point.leaves_out_command(record):
                break
            self.command = record.offset
            if point.at is None:
                self.at = record.at
            if record.offset not in passed_over:
                said = codec.decode_if(_OF_SESSIONS, record.value or b"")
                if said is not None:
                    _hear(found, strangers, said, record.at)
        running = Counter(t.session for _, t in self._rows() if t.session)
        for session in found.values():
            silent = self.at - session.beat
            if silent < _SILENT_MS:
                state = "suspect" if silent >= limits.LEASE_MS and session.state == "live" else session.state
                row = replace(session, state=state, running=running[session.session])
                self.state.put(tables.SESSIONS, session.session.encode(), row)  # for `describe` to look at
        self.unknown_workers = sum(self.at - beat < _SILENT_MS for beat in strangers.values())

    # What can be seen ------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """The partition's rows."""
        return self._fold.state

    @property
    def headless(self) -> dict[str, Headless]:
        """Tasks that are left out because their first events are no longer in the log."""
        return self._fold.headless

    @property
    def workers(self) -> list[Session]:
        """Sessions that were live, stopping or suspect."""
        return list(self.state.sessions.values())

    def tasks(self) -> Iterator[tuple[str, TaskState]]:
        """Every task that the engine knew."""
        return self._rows()

    def _rows(self) -> Iterator[tuple[str, TaskState]]:
        for key, row in self._store.scan(b"t"):
            scope, task_id = tables.task_of(key)
            if key == scope + tables.STATE:
                yield task_id, codec.decode(row)

    def status(self, task_id: str) -> dict[str, Any]:
        """What `status` said of a task that the engine knew, but for its progress; see `recall_progress`."""
        moment = Moment(self.at, clock.now(self.state, self.at), Cause(partition=self.partition, offset=-1))
        return describe.status(self.state, moment, task_id)

    def recall_progress(self, task_id: str) -> None:
        """Find a task's last progress before the point, as long as task-telemetry keeps it. Blocks."""
        key, t = task_id.encode(), self.state.known(task_id)
        for _, p in decoded(r for r in records_of(self._log, topics.TELEMETRY.name, self.partition) if r.key == key):
            if (p.at > self.at) if self.command is None else (p.cause.offset > self.command):
                return
            if p.epoch <= t.epoch:  # a new grant shows the progress of the last one until it has its own
                live = Live(epoch=p.epoch, fraction=p.fraction, current_step=p.current_step, units_done=p.units_done,
                            units_total=p.units_total, progress_at=p.at)  # fmt: skip
                self.state.put(tables.task(task_id), tables.LIVE, live)


def _or_end(offset: int | None) -> int:
    return (1 << 62) if offset is None else offset


def _hear(found: dict[str, Session], strangers: dict[str, int], said: Any, at: int) -> None:
    """Take in what a session says of itself. `strangers`: session -> its last word, where its beginning is unknown."""
    known = found.get(said.session)
    match said:
        case commands.WorkerStarted():
            for old in [s for s, row in found.items() if row.worker_id == said.worker_id]:
                del found[old]
            found[said.session] = Session(
                session=said.session, worker_id=said.worker_id, types=said.types, queues=said.queues, slots=said.slots,
                labels=said.labels, host=said.host, pid=said.pid, since=at, beat=at,
            )  # fmt: skip
        case commands.WorkerBeat() if known is not None:
            slots = said.slots if said.slots > 0 else known.slots
            found[said.session] = replace(known, beat=at, full=said.free <= 0, slots=slots)
        case commands.WorkerStopping() if known is not None:
            found[said.session] = replace(known, beat=at, state="stopping")
        case _:
            strangers[said.session] = at


def set_aside(log: Log, partition: int) -> dict[int, str]:
    """Inputs of a partition that its engine has put into quarantine: offset -> cause. Blocks while it reads."""
    found = {}
    for record in records_of(log, topics.QUARANTINE.name, partition):
        try:
            q = codec.decode_as(Quarantined, record.value or b"")
        except DecodeError:
            continue  # not the engine's
        if (q.topic, q.partition, q.reader) == (topics.COMMANDS.name, partition, "engine"):
            found[q.offset] = q.cause
    return found


def decoded(records: Iterator[Record]) -> Iterator[tuple[Record, Any]]:
    """Records with what they hold. Raises `DecodeError` naming the first that cannot be read."""
    for record in records:
        try:
            message = codec.decode(record.value or b"")
        except DecodeError as error:
            where = f"{record.topic}/{record.partition} at offset {record.offset}"
            raise type(error)(f"{where}: {error}; read it with the build that wrote it, or a later one") from error
        yield record, message
