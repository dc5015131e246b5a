"""Children and what runs in them: which child takes an attempt, how an attempt is stopped, and how it ends.

For the main thread alone. An attempt ends for the engine when nothing of it runs any more: its child has said that it
is idle or has ended, and both pipes have been read to their end. So a task seen as PAUSED or FAILED has no process.

Process attempts have a child of their own, taken from a few idle ones that are kept ready. Async attempts share one
child; when that one dies, the attempt it was killed for counts, or, when it died by itself, the one that started last.
"""

from __future__ import annotations

import errno
import logging
import signal
from collections import deque
from collections.abc import Callable
from functools import partial

from perdure import channel
from perdure.children import Events, KillLadder, Link, Pipes, io_of, kill_ladder, peak_rss_of, reset_peak_rss
from perdure.forkserver import ChildExit, ForkServer
from perdure.reporter import EndReport, LastFrame, Reporter, Said, end_report_of, report_of
from perdure.schemas import codec
from perdure.schemas.common import Usage
from perdure.schemas.errors import InfrastructureError
from perdure.schemas.inbox import CancelAttempt, CheckpointAccepted, PauseAttempt, RunAttempt, StepPage
from perdure.schemas.public import LogLine
from perdure.schemas.reports import (
    AttemptCrashed,
    AttemptDeclined,
    AttemptStopped,
    ReportProgress,
)
from perdure.session import Session
from perdure.worker_logs import AttemptLog

SPARE = 4
"""Idle children kept ready for the next grants."""
FINISH_MS = 5_000
"""How long a child may take from the end of its attempt until it is idle or gone."""
STRICT_GRACE_MS = 1_000
"""How long an async attempt under `strict_lease` may take to stop; its child is killed then."""
SPAWN_AGAIN_MS, SPAWN_AGAIN_MOST_MS = 1_000, 30_000
"""Pause after a child could not be started."""
LOG = logging.getLogger("perdure.worker")

Key = tuple[str, int]


class Attempt:
    """A grant that this worker has taken."""

    def __init__(
        self, session: Session, grant: RunAttempt, executor: str, log: AttemptLog, reporter: Reporter, now: int
    ) -> None:
        self.session, self.grant, self.executor, self.log = session, grant, executor, log
        self.key: Key = grant.task_id, grant.epoch
        self.reporting = reporter.open(session, *self.key, grant.token, self.acknowledged)
        self.child: ChildState | None = None
        self.pipes: Pipes | None = None
        self.early: list[channel.Page] = []
        """Pages that came before a child had it."""
        self.since = now
        self.order = 0
        """The place of its start among all starts; 0: user code has not begun."""
        self.stop = ""
        """Why it is to stop: paused, cancelled, timed_out, drained or revoked."""
        self.ladder: KillLadder | None = None
        self.signalled = False
        self.dropped = False
        """Whether the grant is over and nothing is said about it any more."""
        self.report: EndReport | None = None
        """How it ended, kept until nothing of it runs any more."""
        self.io_before = 0, 0

    def acknowledged(self, number: int) -> None:
        """Tell the child that its frames up to `number` are in the log. For any thread."""
        if self.child is not None:
            self.child.link.send_if(self._listens, channel.Ack(*self.key, number))

    def _listens(self) -> bool:
        return self.report is None and not self.dropped


class ChildState:
    """What the supervisor knows of a child."""

    def __init__(self, executor: str, link: Link) -> None:
        self.executor, self.link = executor, link
        self.pid = 0
        self.attempts: dict[Key, Attempt] = {}
        self.cpu_spent = 0.0
        """CPU seconds of attempts that have ended."""
        self.killed = False
        self.gone = False
        self.used = False
        """Whether it has been handed an attempt."""


class Slots:
    """The children of this worker and the attempts in them."""

    def __init__(
        self,
        server: ForkServer,
        events: Events,
        reporter: Reporter,
        offer_line: Callable[[int, LogLine], bool],
        executors: dict[str, str],
        capacity: dict[str, int],
        freed: Callable[[str], None],
        clock: Callable[[], int],
        wall: Callable[[], int],
    ) -> None:
        """`executors`: task type -> process or async. `capacity`: executor -> attempts at the same time.

        `freed` is called with the executor that has a slot more.
        """
        self._server, self._events, self._reporter, self._offer_line = server, events, reporter, offer_line
        self._executors, self._freed = executors, freed
        self._capacity = {e: most if e in executors.values() else 0 for e, most in capacity.items()}
        self._clock, self._wall = clock, wall
        self._children: dict[str, ChildState] = {}
        self._idle: dict[str, list[ChildState]] = {"process": [], "async": []}
        self._waiting: dict[str, deque[Attempt]] = {"process": deque(), "async": deque()}
        self._attempts: dict[Key, Attempt] = {}
        self._taken = {"process": 0, "async": 0}
        self._timed: set[Attempt] = set()
        """Attempts that `tick` has to look at."""
        self._starts = 0
        self._spawn_at: int | None = None
        """Until when no child is started, after one could not be."""
        self._spawn_pause = SPAWN_AGAIN_MS
        self.stopping = False

    # What the worker asks --------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Fork the first children."""
        self._events.watch(self._server.fileno(), self._take_exits)
        self._fill()

    def running(self) -> list[str]:
        """Ids of the tasks that hold a slot."""
        return [task_id for task_id, _ in self._attempts]

    def idle(self, executor: str) -> int:
        """Slots that nothing runs in. While no child can be started: those that there is a child for."""
        idle = self._capacity[executor] - self._taken[executor]
        if self._spawn_at is None:
            return idle
        children = [c for c in self._children.values() if c.executor == executor]
        if executor == "async":
            return idle if children else 0
        coming = sum(child.pid == 0 for child in children)
        return max(0, min(idle, len(self._idle[executor]) + coming - len(self._waiting[executor])))

    def free(self, session: Session) -> int:
        """Idle slots that the session's partition may use."""
        return max(0, min(session.lent - session.running, self.idle(session.lane.executor)))

    def take(self, session: Session, grant: RunAttempt) -> None:
        """Run the grant, or decline it."""
        session.grants_seen = max(session.grants_seen, grant.grant)
        if (grant.task_id, grant.epoch) in self._attempts:
            return
        executor = self._executors.get(grant.type, "")
        log = AttemptLog(self._offer_line, grant, session.partition)
        attempt = Attempt(session, grant, executor, log, self._reporter, self._clock())
        reason = self._reason_to_decline(executor)
        if reason:
            session.declined = True
            self._reporter.end(attempt.reporting, AttemptDeclined(seq=0, reason=reason))
            return
        self._attempts[attempt.key] = attempt
        self._taken[executor] += 1
        session.take_slot()
        if grant.policy.strict_lease:
            self._timed.add(attempt)
        self._waiting[executor].append(attempt)
        self._fill()

    def page(self, page: StepPage) -> None:
        """Hand recorded steps to the attempt's child."""
        attempt = self._attempts.get((page.task_id, page.epoch))
        if attempt is None:
            return
        frame = channel.Page(page.task_id, page.epoch, codec.encode(page))
        if attempt.child is None:
            attempt.early.append(frame)
        else:
            attempt.child.link.send(frame)

    def pause(self, order: PauseAttempt) -> None:
        """Ask an attempt to stop at its next boundary, or to go on after all. It may take as long as it needs."""
        attempt = self._attempts.get((order.task_id, order.epoch))
        if attempt is None or (order.undo and attempt.stop != "paused"):
            return
        if not order.undo:
            self._stop(attempt, "paused", "")
        elif attempt.child is not None:
            attempt.stop = ""
            attempt.child.link.send(channel.Stop(*attempt.key, "paused", undo=True))

    def accepted(self, told: CheckpointAccepted) -> None:
        """Let an attempt know that a checkpoint of it is recorded."""
        attempt = self._attempts.get((told.task_id, told.epoch))
        if attempt is not None and attempt.child is not None:
            attempt.child.link.send(channel.Accepted(*attempt.key, told.version))

    def cancel(self, order: CancelAttempt) -> None:
        """Stop an attempt for good: cooperatively, then by SIGTERM, then by SIGKILL."""
        attempt = self._attempts.get((order.task_id, order.epoch))
        if attempt is None:
            return
        if attempt.ladder is None:
            self._time(attempt, kill_ladder(attempt.executor, self._clock(), order.grace_ms))
        self._stop(attempt, "timed_out" if order.reason.startswith("timed_out") else "cancelled", order.reason)

    def revoke(self, task_id: str, epoch: int) -> None:
        """The grant is over: stop at once and say nothing."""
        attempt = self._attempts.get((task_id, epoch))
        if attempt is None:
            return
        attempt.dropped = True
        self._reporter.drop(attempt.reporting)
        self._release(attempt)
        if attempt.child is None:
            self._end(attempt)
        elif attempt.executor == "async":
            self._time(attempt, kill_ladder("async", self._clock(), attempt.grant.policy.cancel_grace))
            attempt.child.link.send(channel.Stop(*attempt.key, "cancelled", "the grant is over"))
        else:
            self._signal(attempt, attempt.child, signal.SIGKILL)

    def give_up(self, session: Session) -> None:
        """Every grant of the session is over."""
        for attempt in [a for a in self._attempts.values() if a.session is session]:
            self.revoke(*attempt.key)

    def drain(self) -> None:
        """Take no more grants; ask every attempt to stop at its next boundary."""
        self.stopping = True
        for attempt in list(self._attempts.values()):
            if not attempt.stop:
                self._stop(attempt, "drained", "the worker shuts down")

    def kill(self) -> None:
        """Kill what has not stopped; it is reported as stopped."""
        now = self._clock()
        for attempt in self._attempts.values():
            attempt.stop = attempt.stop or "drained"
            self._time(attempt, KillLadder((now, signal.SIGKILL)))
        self.tick(now)

    def tick(self, now: int) -> None:
        """Send the signals that are due, and start children where that failed before."""
        for attempt in list(self._timed):
            strict = attempt.grant.policy.strict_lease and attempt.stop != "revoked" and not attempt.dropped
            if strict and attempt.session.stale(now):
                grace = STRICT_GRACE_MS if attempt.executor == "async" else 0
                self._time(attempt, KillLadder((now + grace, signal.SIGKILL)))
                self._stop(attempt, "revoked", "the lease may be over")
            signum = attempt.ladder.signal(now) if attempt.ladder else None
            if signum is not None and attempt.child is not None:
                self._signal(attempt, attempt.child, signum)
        if self._spawn_at is not None and self._spawn_at <= now:
            self._spawn_at = None
            self._fill()

    def next_due(self) -> int | None:
        """When `tick` has something to do; None: nothing is known."""
        due = [a.ladder.due if a.ladder else a.session.stale_at for a in self._timed]
        due.append(self._spawn_at)
        return min((at for at in due if at is not None), default=None)

    def close(self) -> None:
        """End the fork server and all children. Blocks until they are gone, 10 s at the most."""
        self._events.unwatch(self._server.fileno())
        self._server.stop()
        for child in self._children.values():
            child.link.close()
            for attempt in child.attempts.values():
                if attempt.pipes is not None:
                    attempt.pipes.close()

    # Children --------------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Have as many children as are needed soon, and give them what waits."""
        if self._spawn_at is None and not self.stopping:
            processes = [c for c in self._children.values() if c.executor == "process"]
            busy = sum(bool(c.attempts) for c in processes)
            wanted = min(self._capacity["process"], busy + len(self._waiting["process"]) + SPARE)
            for _ in range(wanted - len(processes)):
                self._spawn("process")
            if self._capacity["async"] and not any(c.executor == "async" for c in self._children.values()):
                self._spawn("async")
        for executor, waiting in self._waiting.items():
            while waiting and self._idle[executor]:
                self._start(waiting.popleft(), self._idle[executor].pop())

    def _spawn(self, executor: str) -> None:
        child = self._server.spawn(executor)
        link = Link(child, self._events, self._said, self._broken)
        self._children[child.name] = ChildState(executor, link)

    def _start(self, attempt: Attempt, child: ChildState) -> None:
        run = channel.Run(*attempt.key, codec.encode(codec.replace(attempt.grant, token=b"")))
        attempt.child = child
        child.attempts[attempt.key] = attempt
        if attempt.executor == "async":
            self._idle["async"].append(child)  # it takes any number
            child.link.send(run)
        else:
            attempt.io_before = io_of(child.pid)
            reset_peak_rss(child.pid)
            try:
                outputs = child.link.start(run)
            except OSError as error:  # it has not had the attempt: another child takes it
                self._unfit(child, error)
                del child.attempts[attempt.key]
                attempt.child = None
                self._waiting["process"].appendleft(attempt)
                return
            assert outputs is not None, "a process child gets pipes with each attempt"
            attempt.pipes = Pipes(self._events, outputs, partial(self._wrote, attempt))
        if not child.used:
            child.used, self._spawn_pause = True, SPAWN_AGAIN_MS
        for page in attempt.early:
            child.link.send(page)
        attempt.early.clear()
        attempt.grant = codec.replace(attempt.grant, input=None)

    def _unfit(self, child: ChildState, error: OSError) -> None:
        """A child has died while it was idle; or we are out of descriptors, and whoever comes next is no better off."""
        if error.errno not in (errno.EPIPE, errno.ECONNRESET):
            LOG.error("child %s cannot be handed a task: %s", child.link.child.name, error)
            self._wait_with_children()
        self._server.kill(child.link.child, signal.SIGKILL)

    def _said(self, link: Link, frame: channel.FromChild) -> None:
        child = self._children[link.child.name]
        if isinstance(frame, (channel.Hello, channel.Idle)):  # a union would be made anew for each frame
            if isinstance(frame, channel.Hello):
                child.pid = frame.pid
            for ended in list(child.attempts.values()):
                self._end(ended)
            if not child.gone:
                self._idle[child.executor].append(child)
                self._fill()
            return
        attempt = child.attempts.get((frame.task_id, frame.epoch))
        if attempt is None or attempt.report is not None:
            return
        if isinstance(frame, (channel.Completed, channel.Failed, channel.Stopped)):
            self._finished(child, attempt, frame)
        elif not attempt.dropped:
            self._reported(child, attempt, frame)

    def _reported(self, child: ChildState, attempt: Attempt, frame: Said | channel.Progress | channel.Line) -> None:
        match frame:
            case channel.Progress():
                report = ReportProgress(
                    seq=0, fraction=frame.fraction, current_step=frame.current_step,
                    units_done=frame.units_done, units_total=frame.units_total,
                )  # fmt: skip
                self._reporter.progress(attempt.reporting, report)
            case channel.Line():
                attempt.log.line(frame.stream, frame.level, frame.text, frame.at, self._wall())
            case _:
                if isinstance(frame, channel.Started):
                    self._starts += 1
                    attempt.order = self._starts
                self._reporter.add(attempt.reporting, report_of(frame, child.pid), frame.number)

    def _finished(self, child: ChildState, attempt: Attempt, frame: LastFrame) -> None:
        """User code has ended. A process child still has to give up its pipes and be idle, or gone."""
        child.cpu_spent += frame.cpu_seconds
        usage = Usage(duration_ms=frame.duration_ms, cpu_seconds=frame.cpu_seconds)
        if attempt.pipes is not None:
            read, written = io_of(child.pid)
            usage = codec.replace(
                usage, peak_rss=peak_rss_of(child.pid), read_bytes=max(0, read - attempt.io_before[0]),
                written_bytes=max(0, written - attempt.io_before[1]),
            )  # fmt: skip
        attempt.report = end_report_of(frame, attempt.stop, usage)
        if attempt.pipes is None:
            self._end(attempt)
        else:
            self._time(attempt, KillLadder((self._clock() + FINISH_MS, signal.SIGKILL)))

    def _wrote(self, attempt: Attempt, stream: str, data: bytes) -> None:
        attempt.log.write(stream, data, self._wall())

    def _broken(self, link: Link, error: InfrastructureError) -> None:
        LOG.error("child %s is killed: %s", link.child.name, error)
        self._server.kill(link.child, signal.SIGKILL)

    def _take_exits(self) -> None:
        for ended in self._server.exits():
            child = self._children[ended.child]
            child.gone = True
            child.link.drain()
            del self._children[ended.child]
            self._idle[child.executor] = [c for c in self._idle[child.executor] if c is not child]
            if child.pid == 0 or (ended.exit_code and not child.used):
                self._could_not_start(child, ended)
            last = max(child.attempts.values(), key=lambda a: a.order, default=None)
            for attempt in list(child.attempts.values()):
                if attempt.report is None:
                    innocent = child.executor == "async" and (child.killed or attempt is not last)
                    attempt.report = self._death(child, attempt, ended, innocent)
                else:
                    usage = codec.replace(attempt.report.usage, exit_code=ended.exit_code)
                    attempt.report = codec.replace(attempt.report, usage=usage)
                self._end(attempt)
        self._fill()

    def _death(self, child: ChildState, attempt: Attempt, ended: ChildExit, innocent: bool) -> EndReport:
        """How an attempt ended whose child said nothing about it."""
        usage = Usage(exit_code=ended.exit_code, duration_ms=self._clock() - attempt.since)
        if child.executor == "process":
            cpu = max(0.0, ended.cpu_seconds - child.cpu_spent)
            usage = codec.replace(usage, cpu_seconds=cpu, peak_rss=ended.peak_rss)
        if attempt.signalled or (attempt.stop and ended.signal == signal.SIGTERM):
            return AttemptStopped(seq=0, why=attempt.stop, usage=usage)
        LOG.warning("child %s died under task %s: exit code %s, signal %s", ended.child, attempt.key[0],
                    ended.exit_code, ended.signal)  # fmt: skip
        return AttemptCrashed(seq=0, usage=usage, exit_code=ended.exit_code, signal=ended.signal, innocent=innocent)

    def _could_not_start(self, child: ChildState, ended: ChildExit) -> None:
        """Nothing to run attempts in, for now: others may have."""
        LOG.error(
            "a child could not be started: %s", ended.detail or f"exit code {ended.exit_code}, signal {ended.signal}"
        )
        self._wait_with_children()
        for attempt in list(self._waiting[child.executor]):
            attempt.session.declined = True
            self._end(attempt, AttemptDeclined(seq=0, reason="unloadable"))

    def _wait_with_children(self) -> None:
        """Start none for a while, and for longer each time until one has begun to work."""
        if self._spawn_at is not None:
            return
        self._spawn_at = self._clock() + self._spawn_pause
        self._spawn_pause = min(self._spawn_pause * 2, SPAWN_AGAIN_MOST_MS)

    # Attempts --------------------------------------------------------------------------------------------------------

    def _reason_to_decline(self, executor: str) -> str:
        if self.stopping:
            return "stopping"
        if not executor:
            return "unknown_type"
        if self._taken[executor] >= self._capacity[executor]:
            return "full"
        return "" if self.idle(executor) > 0 else "unloadable"

    def _stop(self, attempt: Attempt, why: str, reason: str) -> None:
        """Ask the child to stop the attempt at its next boundary."""
        attempt.stop = why
        if attempt.child is None:
            self._end(attempt, AttemptStopped(seq=0, why=why, usage=Usage()))
        elif attempt.report is None:
            asked = "cancelled" if why == "revoked" else why
            attempt.child.link.send(channel.Stop(*attempt.key, asked, reason))

    def _time(self, attempt: Attempt, ladder: KillLadder) -> None:
        attempt.ladder = ladder
        self._timed.add(attempt)

    def _signal(self, attempt: Attempt, child: ChildState, signum: int) -> None:
        attempt.signalled = True
        child.killed = True
        self._server.kill(child.link.child, signum)

    def _end(self, attempt: Attempt, report: EndReport | AttemptDeclined | None = None) -> None:
        """Nothing of the attempt runs any more: report it, and free its slot."""
        if attempt.pipes is not None:
            attempt.pipes.close()
        attempt.log.close(self._wall())
        self._timed.discard(attempt)
        if attempt.child is None:
            self._waiting[attempt.executor].remove(attempt)
        else:
            del attempt.child.attempts[attempt.key]
        if not attempt.dropped:
            report = report or attempt.report
            assert report is not None, "an attempt ends with its last report"
            self._reporter.end(attempt.reporting, report)
            self._release(attempt)

    def _release(self, attempt: Attempt) -> None:
        del self._attempts[attempt.key]
        self._taken[attempt.executor] -= 1
        attempt.session.free_slot()
        self._freed(attempt.executor)
