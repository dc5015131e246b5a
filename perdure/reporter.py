"""Reports on their way to the log: numbered, gathered into signed batches, acknowledged to the child that made them.

Each session has at most one batch in flight. Whatever is reported meanwhile is gathered and leaves with the next one
(group commit); with nothing in flight a report leaves at once. A batch that cannot be appended is appended again,
unchanged, before anything later: reports are never lost or reordered, and the engine drops repeats by their number.

Thread-safe. Batches are built on the thread that reports, or on the log's own thread when an acknowledgement frees the
way; acknowledgements reach the child straight from there. No lock is held during an append or a callback.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar, assert_never

from perdure import channel
from perdure.schemas import codec, limits, signing, topics
from perdure.schemas.common import ErrorInfo, Usage
from perdure.schemas.errors import InfrastructureError
from perdure.schemas.reports import (
    AttemptCompleted,
    AttemptCrashed,
    AttemptFailed,
    AttemptStarted,
    AttemptStopped,
    Report,
    ReportBatch,
    ReportCheckpoint,
    ReportEntry,
    ReportMilestone,
    ReportProgress,
    ReportStep,
    SendSteps,
)
from perdure.session import Session
from perdure.streams.log import Producer

PROGRESS_MS = 500
"""Least time between two progress reports of an attempt."""
RETRY_MS = 1_000
"""Pause before a batch that could not be appended is appended again."""
BATCH_REPORTS = 500
BATCH_BYTES = limits.COMMAND_MAX
_FIXED = 64
"""Upper bound of what a record or field adds to the sizes of its parts."""

LOG = logging.getLogger("perdure.worker")

T = TypeVar("T")
Said = channel.Started | channel.Step | channel.Milestone | channel.Checkpoint | channel.WantSteps
"""What a child says in the course of an attempt, and waits to see acknowledged."""
LastFrame = channel.Completed | channel.Failed | channel.Stopped
EndReport = AttemptCompleted | AttemptFailed | AttemptStopped | AttemptCrashed


class Coalescer(Generic[T]):
    """Lets the newest of many values through, one per interval. Times in ms."""

    def __init__(self, interval_ms: int) -> None:
        self._interval = interval_ms
        self._waiting: T | None = None
        self.due = 0
        """From when on a value may pass."""

    def offer(self, value: T, now: int) -> T | None:
        """`value`, if it may pass now; else it waits, in place of any that waited before."""
        self._waiting = value
        return self.take(now) if now >= self.due else None

    def take(self, now: int) -> T | None:
        """The value that waits, let through."""
        value, self._waiting = self._waiting, None
        if value is not None:
            self.due = now + self._interval
        return value


class Reporting:
    """The reports of one attempt. Made by `Reporter.open`; its fields belong to the reporter."""

    def __init__(
        self, session: Session, task_id: str, epoch: int, token: bytes, acknowledged: Callable[[int], None]
    ) -> None:
        self.session, self.task_id, self.epoch, self.token = session, task_id, epoch, token
        self.acknowledged = acknowledged
        self.seq = 0
        self.dropped = False
        self.progress: Coalescer[ReportProgress] = Coalescer(PROGRESS_MS)
        self.progress_timed = False
        self.progress_in_line: _Item | None = None


class _Item:
    """A report in line, with the child's frame that it acknowledges (0: none)."""

    __slots__ = ("number", "report", "reporting")

    def __init__(self, reporting: Reporting, report: Report, number: int) -> None:
        self.reporting, self.report, self.number = reporting, report, number

    def size(self) -> int:
        """See `size_of`."""
        return size_of(self.reporting.task_id, self.report)


class _Batch(NamedTuple):
    """A signed record, and the reports in it."""

    outbox: _Outbox
    value: bytes
    items: list[_Item]


class _Outbox:
    """What one session has to report."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.pending: deque[_Item] = deque()
        self.in_flight = False
        self.pumping = False
        self.failed: _Batch | None = None
        self.retry_at = 0
        self.held: dict[Reporting, int] = {}

    def busy(self) -> bool:
        """Whether something is not in the log yet."""
        return bool(self.pending or self.in_flight or self.failed)


class Reporter:
    """Everything this worker reports."""

    def __init__(self, producer: Producer, signer: tuple[str, bytes], worker_id: str, clock: Callable[[], int]) -> None:
        self._producer, self._signer, self._key, self._clock = producer, signer, worker_id.encode(), clock
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._outboxes: dict[Session, _Outbox] = {}
        self._progress_due: list[tuple[int, int, Reporting]] = []
        self._count = itertools.count()

    # What attempts say -----------------------------------------------------------------------------------------------

    def open(
        self, session: Session, task_id: str, epoch: int, token: bytes, acknowledged: Callable[[int], None]
    ) -> Reporting:
        """Begin to report on an attempt; `acknowledged(number)` follows when the child's frames up to it are logged."""
        return Reporting(session, task_id, epoch, token, acknowledged)

    def add(self, reporting: Reporting, report: Report, number: int = 0) -> None:
        """Report; the report's `seq` is set here. Returns at once."""
        with self._lock:
            if reporting.dropped:
                return
            self._enqueue(reporting, report, number)
            ready = self._ready(reporting.session)
        self._pump(ready)

    def end(self, reporting: Reporting, report: Report) -> None:
        """The attempt's last report; progress that still waits goes before it."""
        with self._lock:
            if reporting.dropped:
                return
            waiting = reporting.progress.take(self._clock())
            if waiting is not None:
                self._enqueue_progress(reporting, waiting)
            self._enqueue(reporting, report, 0)
            ready = self._ready(reporting.session)
        self._pump(ready)

    def progress(self, reporting: Reporting, report: ReportProgress) -> None:
        """Report where the attempt stands, at most twice a second; the newest one wins."""
        now = self._clock()
        with self._lock:
            passed = reporting.progress.offer(report, now)
            if passed is None:
                if not reporting.progress_timed:
                    reporting.progress_timed = True
                    heapq.heappush(self._progress_due, (reporting.progress.due, next(self._count), reporting))
                return
            self._enqueue_progress(reporting, passed)
            ready = self._ready(reporting.session)
        self._pump(ready)

    def drop(self, reporting: Reporting) -> None:
        """The grant is over: nothing more is said about it."""
        with self._lock:
            reporting.dropped = True
            outbox = self._outboxes.get(reporting.session)
            if outbox is not None:
                outbox.pending = deque(item for item in outbox.pending if item.reporting is not reporting)
                outbox.held.pop(reporting, None)

    def close(self, session: Session) -> None:
        """The session is over; what it had in line is dropped."""
        with self._lock:
            self._outboxes.pop(session, None)

    # What time and the lease say -------------------------------------------------------------------------------------

    def tick(self, now: int) -> None:
        """Send progress whose time has come, and batches that failed."""
        sessions: set[Session] = set()
        with self._lock:
            while self._progress_due and self._progress_due[0][0] <= now:
                _, _, reporting = heapq.heappop(self._progress_due)
                reporting.progress_timed = False
                report = reporting.progress.take(now)
                if report is not None and not reporting.dropped:
                    self._enqueue_progress(reporting, report)
                    sessions.add(reporting.session)
            sessions |= {s for s, outbox in self._outboxes.items() if outbox.failed and outbox.retry_at <= now}
            ready = [self._ready(session) for session in sessions]
        for batch in ready:
            self._pump(batch)

    def next_due(self) -> int | None:
        """When `tick` has something to do; None: nothing is known."""
        with self._lock:
            due = [outbox.retry_at for outbox in self._outboxes.values() if outbox.failed]
            if self._progress_due:
                due.append(self._progress_due[0][0])
            return min(due, default=None)

    def release(self, session: Session) -> None:
        """The lease is known to hold again: pass on what was acknowledged meanwhile."""
        with self._lock:
            outbox = self._outboxes.get(session)
            if outbox is None or session.stale(self._clock()):
                return
            held, outbox.held = outbox.held, {}
        for reporting, number in held.items():
            reporting.acknowledged(number)

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything reported is in the log; False if `timeout_s` ran out first."""
        with self._changed:
            return self._changed.wait_for(lambda: not any(o.busy() for o in self._outboxes.values()), timeout_s)

    # Inside ----------------------------------------------------------------------------------------------------------

    def _enqueue(self, reporting: Reporting, report: Report, number: int) -> _Item:
        reporting.seq += 1
        outbox = self._outboxes.get(reporting.session)
        if outbox is None:
            outbox = self._outboxes[reporting.session] = _Outbox(reporting.session)
        item = _Item(reporting, codec.replace(report, seq=reporting.seq), number)
        outbox.pending.append(item)
        return item

    def _enqueue_progress(self, reporting: Reporting, report: ReportProgress) -> None:
        """Progress takes the place of progress still in line: an outage of the broker lets no line grow."""
        item = reporting.progress_in_line
        if item is None:
            reporting.progress_in_line = self._enqueue(reporting, report, 0)
        else:
            item.report = codec.replace(report, seq=item.report.seq)

    def _ready(self, session: Session) -> _Batch | None:
        """The next batch of a session, if its turn has come; one thread at a time then appends."""
        outbox = self._outboxes.get(session)
        if outbox is None or outbox.pumping:
            return None
        batch = self._next_batch(outbox)
        outbox.pumping = batch is not None
        return batch

    def _pump(self, batch: _Batch | None) -> None:
        """Append what `_ready` gave, and what follows, until a batch is in flight."""
        while batch is not None:
            self._append(batch)
            with self._lock:
                batch.outbox.pumping = False
                batch = self._ready(batch.outbox.session)

    def _next_batch(self, outbox: _Outbox) -> _Batch | None:
        if outbox.in_flight:
            return None
        if outbox.failed is not None:
            if outbox.retry_at > self._clock():
                return None
            batch, outbox.failed = outbox.failed, None
            outbox.in_flight = True
            return batch
        if not outbox.pending:
            return None
        outbox.in_flight = True
        items = _gather(outbox.pending)
        for item in items:
            if item is item.reporting.progress_in_line:
                item.reporting.progress_in_line = None
        return _Batch(outbox, self._signed(outbox.session.id, items), items)

    def _signed(self, session: str, items: list[_Item]) -> bytes:
        try:
            return signing.signed(ReportBatch(session=session, entries=_entries(items)), *self._signer)
        except (ValueError, TypeError):
            # A report that cannot be written costs its own attempt, not the worker: the engine ends what has failed.
            for item in items:
                item.report = _writable(item.report)
        return signing.signed(ReportBatch(session=session, entries=_entries(items)), *self._signer)

    def _append(self, batch: _Batch) -> None:
        outbox = batch.outbox

        def on_ack(_offset: int, error: InfrastructureError | None) -> None:
            if error is None:
                self._acknowledged(outbox, batch.items)
                return
            LOG.warning("reports to partition %s go again: %s", outbox.session.partition, error)
            with self._lock:
                outbox.in_flight = False
                outbox.failed = batch
                outbox.retry_at = self._clock() + RETRY_MS

        self._producer.append(topics.COMMANDS.name, outbox.session.partition, self._key, batch.value, on_ack)

    def _acknowledged(self, outbox: _Outbox, items: list[_Item]) -> None:
        """Tell the children first: they go on while the next batch is made."""
        marks: dict[Reporting, int] = {}
        with self._lock:
            for item in items:
                if item.number and not item.reporting.dropped:
                    marks[item.reporting] = item.number
            if outbox.session.stale(self._clock()):
                outbox.held.update(marks)
                marks = {}
        for reporting, number in marks.items():
            reporting.acknowledged(number)
        with self._lock:
            outbox.in_flight = False
            self._changed.notify_all()
            ready = self._ready(outbox.session)
        self._pump(ready)


def report_of(frame: Said, pid: int) -> Report:
    """The report that a child's frame becomes; `seq` is set when it gets in line."""
    match frame:
        case channel.Started():
            return AttemptStarted(seq=0, pid=pid)
        case channel.Step():
            return ReportStep(
                seq=0, step_id=frame.step_id, name=frame.name, function=frame.function,
                code_version=frame.code_version, args_hash=frame.args_hash, result=frame.result,
                error=_error(frame), duration_ms=frame.duration_ms, begun=frame.begun,
            )  # fmt: skip
        case channel.Milestone():
            return ReportMilestone(seq=0, name=frame.name)
        case channel.Checkpoint():
            return ReportCheckpoint(
                seq=0, version=frame.version, uri=frame.uri, sha256=frame.sha256, size=frame.size,
                positions=frame.positions,
            )  # fmt: skip
        case channel.WantSteps():
            return SendSteps(seq=0, after=frame.after)
        case _:
            assert_never(frame)


def end_report_of(frame: LastFrame, stop: str, usage: Usage) -> EndReport:
    """The report that a child's last frame becomes; `stop` says why the supervisor had asked it to stop."""
    match frame:
        case channel.Completed():
            return AttemptCompleted(seq=0, result=frame.result, usage=usage)
        case channel.Failed():
            return AttemptFailed(
                seq=0, error_types=frame.error_types, message=frame.message, traceback=frame.traceback, usage=usage,
                final=frame.final,
            )  # fmt: skip
        case channel.Stopped():
            return AttemptStopped(seq=0, why=stop or frame.why, usage=usage)
        case _:
            assert_never(frame)


def _error(frame: channel.Step) -> ErrorInfo | None:
    if frame.error_types is None:
        return None
    return ErrorInfo(
        type=next(iter(frame.error_types), "error"), message=frame.error_message, error_types=frame.error_types,
        traceback=frame.error_traceback,
    )  # fmt: skip


def _writable(report: Report) -> Report:
    """The report, or in its place the word that it could not be made."""
    try:
        codec.encode(report)
    except (ValueError, TypeError) as error:
        text = f"a {type(report).__name__} of this attempt cannot be written: {error}"
        return AttemptFailed(
            seq=report.seq, error_types=["unwritable"], message=text, traceback="", usage=Usage(), final=True
        )
    return report


def _gather(pending: deque[_Item]) -> list[_Item]:
    """Take the next reports in line, as many as one batch may hold."""
    items = [pending.popleft()]
    if pending:  # a report alone always fits: nobody has to know its size
        room = BATCH_BYTES - items[0].size()
        while pending and len(items) < BATCH_REPORTS and (size := pending[0].size()) <= room:
            items.append(pending.popleft())
            room -= size
    return items


def _entries(items: list[_Item]) -> list[ReportEntry]:
    reports: dict[Reporting, list[Report]] = {}
    for item in items:
        reports.setdefault(item.reporting, []).append(item.report)
    return [ReportEntry(task_id=r.task_id, epoch=r.epoch, token=r.token, reports=said) for r, said in reports.items()]


def size_of(task_id: str, report: Report) -> int:
    """An upper bound of the bytes that a report takes in a batch, its entry's id and token included."""
    return _size(task_id) + _FIXED + _size(report)


def _size(value: Any) -> int:
    kind = type(value)
    if kind is str:
        return (len(value) if value.isascii() else 4 * len(value)) + 10
    if kind is bytes:
        return len(value) + 10
    if kind is list:
        return 10 + sum(map(_size, value))
    if kind is dict:
        return 10 + sum(_size(key) + _size(item) for key, item in value.items())
    if hasattr(kind, "avro_name"):
        return _FIXED + sum(map(_size, value.__dict__.values()))
    return 10
