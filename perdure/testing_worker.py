"""A worker inside the test: one life of a worker process, with user code on strands instead of child processes.

Everything that leaves it is what a real worker says: its sessions and reports are made by the same `Sessions` and
`Reporter`, an attempt is the same `Attempt`. What is left out is what lies between: fork server, sockets, signals.
"""

from __future__ import annotations

import io
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from typing import Any, TextIO

from perdure import channel
from perdure.attempt import HARD, Attempt
from perdure.capture import Lines, LogHandler
from perdure.children import KillLadder, kill_ladder
from perdure.connectors.checkpoints import CheckpointStore
from perdure.connectors.large_values import LargeValues
from perdure.lending import share_out
from perdure.reporter import PROGRESS_MS, Reporter, end_report_of, report_of
from perdure.schemas import codec, topics
from perdure.schemas.commands import HEARS_CHECKPOINTS
from perdure.schemas.common import Usage
from perdure.schemas.errors import InvalidRequest
from perdure.schemas.inbox import CancelAttempt, CheckpointAccepted, PauseAttempt, RevokeAttempt, RunAttempt, StepPage
from perdure.schemas.public import LogLine
from perdure.schemas.reports import AttemptCrashed, AttemptStopped, ReportProgress
from perdure.session import Lane, Session, Sessions, routing_by_partition
from perdure.streams.log import Log, Record
from perdure.tasks import TaskType
from perdure.testing_strands import Dropped, Strand, VirtualClock, VirtualLoop, run_async
from perdure.worker_logs import AttemptLog

SIGKILL = 9
_LAST = (channel.Completed, channel.Failed, channel.Stopped)

Watch = Callable[[str, bool], None]
"""Told (task id, whether it has been said) before and after each thing that an attempt says."""


class InlineAttempt:
    """A grant that is being carried out. To the attempt it is the channel, to the worker what runs on a strand."""

    def __init__(self, worker: InlineWorker, session: Session, grant: RunAttempt, task_type: TaskType) -> None:
        self.key = grant.task_id, grant.epoch
        self.session, self.grant, self.executor = session, grant, session.lane.executor
        self._worker, self._clock = worker, worker.clock
        self.reporting = worker.reporter.open(session, *self.key, grant.token, self._acknowledged)
        self._log = AttemptLog(worker.offer_line, grant, session.partition)
        self._lines = Lines(self._line)
        self._handler = LogHandler(lambda: self._lines)
        self.attempt = Attempt(
            codec.replace(grant, token=b""), task_type, self, worker.store, self._clock, worker.large
        )
        self.strand = Strand(f"perdure-{grant.task_id}", self._run_async if task_type.is_async else self._run)
        self._mail: deque[channel.ToChild] = deque()
        self._until: int | None = self._clock.now
        """When it goes on by itself, if ever."""
        self._listens = False
        """Whether it also goes on when something arrives."""
        self._cancel: Callable[[], object] | None = None
        self._interrupted = False
        self.stop = ""
        """Why it is to stop: paused, cancelled, timed_out or drained."""
        self.ladder: KillLadder | None = None
        self.reported = False
        """Whether its last report has been said."""

    # The worker's side ------------------------------------------------------------------------------------------------

    def due(self) -> int | None:
        """When it can go on."""
        return self._clock.now if self._interrupted or (self._listens and self._mail) else self._until

    def go(self) -> None:
        """Let user code run until it waits or ends."""
        with self._captured():
            self.strand.go()

    def close_log(self) -> None:
        """No more lines: say how many the rate cap has left out."""
        self._log.close(self._clock.now)

    def put(self, frame: channel.ToChild) -> None:
        """What the supervisor tells the child."""
        self._mail.append(frame)

    def interrupt(self) -> None:
        """SIGTERM: the grace of a stop is over, so user code is interrupted where it waits."""
        self._interrupted = True

    @contextmanager
    def _captured(self) -> Iterator[None]:
        """What is printed and logged belongs to this task; it is also shown as the test's own output."""
        root = logging.getLogger()
        out, err = (_Tee(stream, partial(self._lines.write, name)) for stream, name in _standard_streams())
        root.addHandler(self._handler)
        try:
            with redirect_stdout(out), redirect_stderr(err):
                yield
        finally:
            root.removeHandler(self._handler)

    def _line(self, stream: str, level: str, text: str) -> None:
        self._log.line(stream, level, text, self._clock.now, self._clock.now)

    def _acknowledged(self, number: int) -> None:
        self.attempt.receive(channel.Ack(*self.key, number))

    # The strand's side ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._deliver()
        self.attempt.run()

    def _run_async(self) -> None:
        loop = VirtualLoop(self._clock, self._idle)
        run_async(loop, partial(self._main, loop))

    async def _main(self, loop: VirtualLoop) -> None:
        running = loop.create_task(self.attempt.run_async())
        grace_s = self.grant.policy.cancel_grace / 1000
        self._cancel = lambda: loop.call_later(grace_s, running.cancel)
        self._deliver()
        await running

    def send(self, frame: channel.Frame) -> None:
        """See `perdure.exchange.Channel`."""
        if self.strand.unwinding:
            if isinstance(frame, _LAST):
                return  # so ends an attempt that nobody listens to
            raise Dropped
        task_id = self.grant.task_id
        self._worker.watch(task_id, False)
        match frame:
            case channel.Progress():
                self._worker.reporter.progress(self.reporting, ReportProgress(
                    seq=0, fraction=frame.fraction, current_step=frame.current_step, units_done=frame.units_done,
                    units_total=frame.units_total,
                ))  # fmt: skip
            case channel.Completed() | channel.Failed() | channel.Stopped():
                self._lines.close()
                self.reported = True
                usage = Usage(duration_ms=frame.duration_ms)
                self._worker.reporter.end(self.reporting, end_report_of(frame, self.stop, usage))
            case channel.Started() | channel.Step() | channel.Milestone() | channel.Checkpoint() | channel.WantSteps():
                self._worker.reporter.add(self.reporting, report_of(frame, pid=0), frame.number)
                self.poll()  # a process that waits for the acknowledgement would read what else there is
        self._worker.watch(task_id, True)

    def poll(self) -> None:
        """See `perdure.exchange.Channel`."""
        if Strand.current() is self.strand and not self.strand.unwinding:
            self._worker.take()
            self._deliver()

    def wait(self) -> None:
        """See `perdure.exchange.Channel`."""
        self._stand(None, listens=True)
        self._deliver()

    def sleep(self, ms: int) -> None:
        """What `time.sleep` is to a process: only SIGTERM can end it early."""
        end = self._clock.now + ms
        while self._clock.now < end:
            self._stand(end, listens=False)
            if self._interrupted:
                self._interrupted = False
                stop = self.attempt.interrupt()
                if stop is not None:
                    raise stop

    def _idle(self, ms: int | None) -> None:
        self._stand(None if ms is None else self._clock.now + ms, listens=True)
        self._deliver()

    def _stand(self, until: int | None, *, listens: bool) -> None:
        self._until, self._listens = until, listens
        self.strand.stand()

    def _deliver(self) -> None:
        while self._mail:
            frame = self._mail.popleft()
            self.attempt.receive(frame)
            if self._cancel is not None and isinstance(frame, channel.Stop) and frame.why in HARD:
                self._cancel()


class InlineWorker:
    """One life of a worker process, announced to every partition that owns a queue of its types."""

    def __init__(
        self,
        log: Log,
        signer: tuple[str, bytes],
        types: Mapping[str, TaskType],
        versions: Mapping[str, int],
        *,
        clock: VirtualClock,
        store: CheckpointStore,
        large: LargeValues,
        queues: Iterable[str],
        slots: int,
        life: int,
        watch: Watch,
        dropped: list[Strand],
    ) -> None:
        """`versions`: type -> version of its configuration. `life`: counts the lives of this worker id from 1.
        `dropped` takes the strands of what was killed.
        """
        self.clock, self.store, self.large, self.watch = clock, store, large, watch
        self._types = types
        self._logs = log.producer()
        producer = log.producer()
        self.reporter = Reporter(producer, signer, "kit", clock)
        self._sessions = Sessions(producer, signer, self.reporter.release, {HEARS_CHECKPOINTS: "yes"})
        self._attempts: dict[tuple[str, int], InlineAttempt] = {}
        self._dropped = dropped
        self._reader = log.reader()
        routing = routing_by_partition(queues, {}, log.partitions)
        ends = {p: self._reader.bounds(topics.INBOX.name, p)[1] for p in routing}
        self._reader.assign({(topics.INBOX.name, p): end for p, end in ends.items()})
        for executor in ("process", "async"):
            mine = {name: versions[name] for name, t in types.items() if t.policy.executor == executor}
            if not mine:
                continue
            lane = Lane("kit" if executor == "process" else "kit.async", executor, mine, slots)
            lent = share_out(slots, {p: len(keys) for p, keys in routing.items()})
            for partition, keys in routing.items():
                session = f"s-{life:09d}-{executor}"
                self._sessions.begin(lane, partition, session, keys, lent[partition], ends[partition], clock.now)

    # What the kit asks ------------------------------------------------------------------------------------------------

    def take(self) -> bool:
        """Take in what the engine says; False: nothing."""
        records = self._reader.read(1_000, 0)
        for record in records:
            self._take(record)
        return bool(records)

    def next(self) -> InlineAttempt | None:
        """An attempt that can go on now, the one that could do so first."""
        found = self._first()
        return None if found is None or found[0] > self.clock.now else found[1]

    def next_due(self) -> int | None:
        """When an attempt can go on, or is to be signalled."""
        found = self._first()
        dues = [None if found is None else found[0]]
        dues += [a.ladder.due for a in self._attempts.values() if a.ladder is not None]
        return min((due for due in dues if due is not None), default=None)

    def go(self, attempt: InlineAttempt) -> None:
        """Let an attempt run until it waits or ends."""
        attempt.go()
        if attempt.strand.ended and self._attempts.get(attempt.key) is attempt:
            self._end(attempt)

    def tick(self) -> None:
        """What time brings: beats and signals."""
        self._sessions.beat(self.clock.now, lambda session: session.lent - session.running)
        for attempt in list(self._attempts.values()):
            signum = attempt.ladder.signal(self.clock.now) if attempt.ladder is not None else None
            if signum == SIGKILL:
                self._kill(attempt, AttemptStopped(seq=0, why=attempt.stop, usage=Usage()))
            elif signum is not None:
                attempt.interrupt()

    def flush_progress(self) -> bool:
        """Report the progress that waits for half a second to pass, before longer times do; False: none waited."""
        due = self.reporter.next_due()
        if due is not None:
            self.reporter.tick(due + PROGRESS_MS)
        return due is not None

    def lives(self, session_id: str) -> bool:
        """Whether a session is one of this worker's."""
        return any(session.id == session_id for session in self._sessions)

    def running(self) -> list[InlineAttempt]:
        """Attempts that hold a slot."""
        return list(self._attempts.values())

    def find(self, strand: Strand | None) -> InlineAttempt | None:
        """The attempt that runs on a strand."""
        return next((a for a in self._attempts.values() if a.strand is strand), None)

    def kill(self, task_id: str) -> None:
        """The process of a task dies, by SIGKILL. Raises `InvalidRequest` if it has none."""
        attempt = next((a for (found, _), a in self._attempts.items() if found == task_id), None)
        if attempt is None:
            raise InvalidRequest(f"task {task_id} has no process to kill: it does not run now; advance the kit first")
        self._kill(attempt, AttemptCrashed(seq=0, usage=Usage(), signal=SIGKILL))

    def drain(self) -> None:
        """SIGTERM: take no more grants, and ask every attempt to stop at its next boundary."""
        self._sessions.stop("shutdown")
        for attempt in self._attempts.values():
            if attempt.stop in ("", "paused"):
                self._stop(attempt, "drained")

    def give_up(self) -> None:
        """Kill what a drain has left; it is reported as stopped."""
        for attempt in list(self._attempts.values()):
            self._kill(attempt, AttemptStopped(seq=0, why=attempt.stop or "drained", usage=Usage()))

    def die(self) -> None:
        """SIGKILL, with all children: nothing more is said."""
        for attempt in self.running():
            self._drop(attempt)
        self._reader.close()

    # Inside -----------------------------------------------------------------------------------------------------------

    def offer_line(self, partition: int, line: LogLine) -> bool:
        """Append a log line."""
        self._logs.append(topics.LOGS.name, partition, line.task_id.encode(), codec.encode(line))
        return True

    def _first(self) -> tuple[int, InlineAttempt] | None:
        dues = [(due, attempt) for attempt in self._attempts.values() if (due := attempt.due()) is not None]
        return min(dues, key=lambda found: found[0], default=None)

    def _take(self, record: Record) -> None:
        message = codec.decode(record.value or b"")
        session = self._sessions.find(record.partition, message.session)
        if session is None:
            return
        if isinstance(message, RunAttempt):
            session.grants_seen = max(session.grants_seen, message.grant)
            session.take_slot()
            attempt = InlineAttempt(self, session, message, self._types[message.type])
            self._attempts[attempt.key] = attempt
            return
        attempt_or_none = self._attempts.get((message.task_id, message.epoch))
        if attempt_or_none is not None:
            self._tell(attempt_or_none, message)

    def _tell(self, attempt: InlineAttempt, message: Any) -> None:
        match message:
            case StepPage():
                attempt.put(channel.Page(*attempt.key, codec.encode(message)))
            case CheckpointAccepted():
                attempt.put(channel.Accepted(*attempt.key, message.version))
            case PauseAttempt(undo=True):
                if attempt.stop == "paused":
                    attempt.stop = ""
                    attempt.put(channel.Stop(*attempt.key, "paused", undo=True))
            case PauseAttempt():
                self._stop(attempt, "paused")
            case CancelAttempt():
                if attempt.ladder is None:
                    attempt.ladder = kill_ladder(attempt.executor, self.clock.now, message.grace_ms)
                self._stop(attempt, "timed_out" if message.reason.startswith("timed_out") else "cancelled")
            case RevokeAttempt():
                self.reporter.drop(attempt.reporting)
                self._kill(attempt, None)

    def _stop(self, attempt: InlineAttempt, why: str) -> None:
        attempt.stop = why
        attempt.put(channel.Stop(*attempt.key, why))

    def _kill(self, attempt: InlineAttempt, report: AttemptCrashed | AttemptStopped | None) -> None:
        self._drop(attempt)
        if report is not None and not attempt.reported:
            self.reporter.end(attempt.reporting, report)

    def _drop(self, attempt: InlineAttempt) -> None:
        attempt.strand.drop()
        self._dropped.append(attempt.strand)
        self._end(attempt)

    def _end(self, attempt: InlineAttempt) -> None:
        attempt.close_log()
        del self._attempts[attempt.key]
        attempt.session.free_slot()


class _Tee(io.TextIOBase):
    """A standard stream whose text is also somebody else's."""

    def __init__(self, own: TextIO, write: Callable[[str], None]) -> None:
        self._own, self._write = own, write

    def write(self, text: str) -> int:
        """Take text."""
        self._write(text)
        return self._own.write(text)

    def flush(self) -> None:
        """Flush the stream itself."""
        self._own.flush()

    def writable(self) -> bool:
        """True."""
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)  # encoding, buffer and the like


def _standard_streams() -> tuple[tuple[TextIO, str], tuple[TextIO, str]]:
    return (sys.stdout, "stdout"), (sys.stderr, "stderr")
