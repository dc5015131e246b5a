"""How each event changes state: the only writer of durable rows, live and on recovery alike.

An event's own `at` and the clock row say what time it is; nothing else does. Session rows are updated where they exist:
a fold of task-events has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from perdure.schemas import events, limits, rows
from perdure.schemas.codec import replace
from perdure.schemas.common import CheckpointRef, ErrorInfo
from perdure.schemas.rows import TaskState
from perdure.streams import policies, tables
from perdure.streams.state import State
from perdure.streams.task_lifecycle import LEGAL


class IllegalTransition(Exception):
    """An event does not fit the state: a defect of a decision. Never leaves the core."""


def evolve(s: State, event: Any) -> None:
    """Apply one event. Raises `IllegalTransition` for one that no decision may make."""
    handler = _HANDLERS[type(event)]
    if getattr(event, "task_id", None) is None:
        _expect(event.seq == s.counter("events") + 1, f"partition event {event.seq} after {s.counter('events')}")
        s.put(tables.COUNTERS, b"events", rows.Counter(value=event.seq))
        handler(s, event)
        return
    if type(event) is not events.TaskSubmitted:
        t = s.task(event.task_id)
        _expect(t is not None and event.seq == t.seq + 1, f"event {event.seq} of {event.task_id} out of sequence")
    handler(s, event)
    _remember_answer(s, event)


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise IllegalTransition(otherwise)


def _remember_answer(s: State, event: Any) -> None:
    """The first event a command brings about is its answer."""
    command_id = event.cause.command_id
    if command_id is None or s.task(event.task_id) is None:
        return
    scope, suffix = tables.task(event.task_id), tables.answer(command_id)
    if s.get(scope, suffix) is not None:
        return
    refused = isinstance(event, events.CommandRejected)
    s.put(scope, suffix, rows.Answer(
        accepted=not refused, reason=event.reason if refused else "", field=event.field if refused else None, at=event.at,
    ))  # fmt: skip


class _Task:
    """A task's state while an event changes it: rows that hang on it are written at once, the state itself by `save`."""

    def __init__(self, s: State, event: Any) -> None:
        self.s, self.event, self.id = s, event, event.task_id
        row = s.task(self.id)
        _expect(row is not None, f"no task {self.id}")
        assert row is not None
        self.row: TaskState = row
        self.changes: dict[str, Any] = {"seq": event.seq, "updated_at": event.at}

    def save(self, **changes: Any) -> None:
        """Write the state with everything that has changed."""
        self.changes |= changes
        self.s.put(tables.task(self.id), tables.STATE, replace(self.row, **self.changes))

    def move(self, state: str, **changes: Any) -> None:
        """To another state, if the table allows it."""
        _expect(state in LEGAL[self.row.state], f"{type(self.event).__name__}: {self.row.state} to {state} of {self.id}")
        self.changes |= {"state": state, "reason": "", "stopping": "none"} | changes

    def arm(self, kind: str, due: int) -> None:
        """Set a timer, in place of an older one of the kind."""
        self.disarm(kind)
        timer = rows.Timer(task_id=self.id, kind=kind)
        suffix = tables.timer(due, kind, self.id)
        self.s.put(tables.TIMERS, suffix, timer)
        if self.s.clock.unconfirmed:
            self.s.put(tables.WINDOW, suffix, timer)
        self.changes["timers"] = self._timers() | {kind: due}

    def disarm(self, *kinds: str) -> None:
        """Take timers back."""
        timers = self._timers()
        for kind in kinds:
            due = timers.pop(kind, None)
            if due is not None:
                self.s.put(tables.TIMERS, tables.timer(due, kind, self.id), None)
                if self.s.clock.unconfirmed or self.s.clock.shift:
                    self.s.put(tables.WINDOW, tables.timer(due, kind, self.id), None)
        self.changes["timers"] = timers

    def disarm_all(self) -> None:
        """Take every timer back."""
        self.disarm(*self._timers())

    def _timers(self) -> dict[str, int]:
        return dict(self.changes.get("timers", self.row.timers))

    def time(self) -> int:
        """Partition time of the event."""
        return self.s.partition_time(self.event.at)

    def due(self, delay: int) -> int:
        """Partition time `delay` after the event."""
        return self.s.due(self.event.at, delay)

    def spec(self) -> rows.TaskSpec:
        return self.s.spec(self.id)

    def place(self, row: TaskState) -> tuple[bytes, bytes]:
        """Key of the task's place in the ready queue."""
        spec = self.spec()
        return tables.ready(spec.queue, spec.type), tables.place(spec.priority, row.order)

    def leave_queue(self) -> None:
        """Off the ready queue; the queue clock stands."""
        if self.row.ready:
            scope, suffix = self.place(self.row)
            self.s.put(scope, suffix, None)
            used = self.row.queue_used + self.time() - self.row.clock_since
            self.changes |= {"ready": False, "queue_used": max(0, used)}
        self.disarm("queue")

    def end_epoch(self) -> None:
        """The grant is over: lease, slot and running clocks are given back."""
        t = self.row
        if not t.session:
            return
        self.s.put(tables.leases(t.session), tables.number(t.grant), None)
        session = self.s.sessions.get(t.session)
        if session is not None:
            self.s.put(tables.SESSIONS, t.session.encode(), replace(session, running=max(0, session.running - 1)))
        used = t.run_used + (self.time() - t.clock_since if t.started else 0)
        self.disarm("run", "start")
        self.changes |= {"session": "", "started": False, "run_used": max(0, used)}


# Submit, queue, grant ------------------------------------------------------------------------------------------------

_SPEC_FIELDS = (
    "task_id", "type", "queue", "input", "content_hash", "input_hash", "policy", "policy_version", "priority", "key",
    "user", "concurrency_key", "after", "resources", "estimated_duration", "agent_config", "callback_url", "labels",
    "notify", "overrides", "submitted_by",
)  # fmt: skip


def _submitted(s: State, e: events.TaskSubmitted) -> None:
    _expect(s.task(e.task_id) is None, f"{e.task_id} exists already")
    scope = tables.task(e.task_id)
    s.put(scope, tables.SPEC, rows.TaskSpec(**{f: getattr(e, f) for f in _SPEC_FIELDS}, submitted_at=e.at))
    s.put(scope, tables.STATE, TaskState(state="PENDING", seq=e.seq, order=e.order, updated_at=e.at))
    if e.policy is None:
        s.put(tables.unbound(e.type), e.task_id.encode(), rows.Ready(task_id=e.task_id))
    total = policies.effective(s, e.task_id).total_timeout
    if total is not None:
        task = _Task(s, e)
        task.arm("total", task.due(total))
        task.save()


def _policy_bound(s: State, e: events.TaskPolicyBound) -> None:
    task = _Task(s, e)
    spec = task.spec()
    s.put(tables.task(e.task_id), tables.SPEC, replace(spec, policy=e.policy, policy_version=e.policy_version))
    s.put(tables.unbound(spec.type), e.task_id.encode(), None)
    begun = s.partition_time(spec.submitted_at)
    if e.policy.total_timeout is not None and "total" not in task.row.timers:
        task.arm("total", begun + e.policy.total_timeout)
    if task.row.ready and e.policy.queue_timeout is not None:
        task.arm("queue", task.row.clock_since - task.row.queue_used + e.policy.queue_timeout)
    task.save()


def _queued(s: State, e: events.TaskQueued) -> None:
    task = _Task(s, e)
    if task.row.state == "PAUSED":
        task.move("PENDING")
    _expect(task.row.state in ("PENDING", "PAUSED"), f"TaskQueued in {task.row.state}")
    if e.due is not None:
        task.arm("due", e.due)
        task.save(reason=e.reason, due=e.due)
        return
    task.disarm("due")
    scope, suffix = task.place(task.row)
    s.put(scope, suffix, rows.Ready(task_id=e.task_id))
    resumed = task.row.state == "PAUSED"
    used = task.row.queue_used if resumed else 0
    timeout = policies.effective(s, e.task_id).queue_timeout
    if timeout is not None:
        task.arm("queue", task.due(timeout - used))
    task.save(reason=e.reason, due=None, ready=True, clock_since=task.due(0), queue_used=used)


def _granted(s: State, e: events.TaskGranted) -> None:
    task = _Task(s, e)
    task.leave_queue()
    task.move("RUNNING")
    fresh = not task.row.charged
    task.arm("start", task.due(limits.START_DEADLINE_MS))
    s.put(
        tables.leases(e.session),
        tables.number(e.grant),
        rows.Lease(task_id=e.task_id, epoch=e.epoch, granted=task.due(0)),
    )
    session = s.sessions.get(e.session)
    if session is not None:
        changed = replace(session, grants=e.grant, running=session.running + 1)
        s.put(tables.SESSIONS, e.session.encode(), changed)
    _put_live(s, e.task_id, epoch=e.epoch, report_seq=0, active=task.due(0))
    task.save(
        epoch=e.epoch, attempt=e.attempt, charged=True, session=e.session, worker_id=e.worker_id, grant=e.grant,
        started=False, queue_used=0, due=None, run_used=0 if fresh else task.row.run_used,
    )  # fmt: skip


def _started(s: State, e: events.AttemptStarted) -> None:
    task = _Task(s, e)
    task.disarm("start")
    policy = policies.effective(s, e.task_id)
    if policy.run_timeout is not None:
        task.arm("run", task.due(max(1, policy.run_timeout - task.row.run_used)))
    if policy.no_progress_timeout is not None:
        _arm_progress(s, e.task_id, task.due(policy.no_progress_timeout))
    _put_live(s, e.task_id, active=task.due(0))
    first = task.row.started_at if task.row.started_at is not None else e.at
    task.save(started=True, clock_since=task.due(0), started_at=first)


def _arm_progress(s: State, task_id: str, due: int) -> None:
    """No-progress timers are of the session class: they follow progress, which is no event."""
    s.put(tables.SOFT_TIMERS, tables.timer(due, "progress", task_id), rows.Timer(task_id=task_id, kind="progress"))


def _put_live(s: State, task_id: str, **changes: Any) -> None:
    live = s.live(task_id) or rows.Live(epoch=0)
    s.put(tables.task(task_id), tables.LIVE, replace(live, **changes))


# Steps, milestones, checkpoints --------------------------------------------------------------------------------------


def _step_started(s: State, e: events.StepStarted) -> None:
    task = _Task(s, e)
    step = rows.Step(function=e.function, code_version="", args_hash=e.args_hash, result=None)
    _put_step(task, e.step_id, step)
    task.save()


def _step_completed(s: State, e: events.StepCompleted) -> None:
    task = _Task(s, e)
    step = rows.Step(function=e.function, code_version=e.code_version, args_hash=e.args_hash, result=e.result)
    _put_step(task, e.step_id, step)
    _put_live(s, e.task_id, active=task.due(0))
    task.save(steps_completed=task.row.steps_completed + 1, crashes=0, sessions_lost=0)


def _put_step(task: _Task, step_id: str, step: rows.Step) -> None:
    scope, suffix = tables.task(task.id), tables.step(step_id)
    if task.s.get(scope, suffix) is None:
        task.changes["steps_kept"] = task.row.steps_kept + 1
    task.s.put(scope, suffix, step)


def _step_failed(s: State, e: events.StepFailed) -> None:
    task = _Task(s, e)
    scope, suffix = tables.task(e.task_id), tables.step(e.step_id)
    known = s.get(scope, suffix)
    if known is not None and known.result is None:
        s.put(scope, suffix, None)
        task.changes["steps_kept"] = task.row.steps_kept - 1
    task.save()


def _steps_retired(s: State, e: events.StepsRetired) -> None:
    task = _Task(s, e)
    scope = tables.task(e.task_id)
    gone = 0
    for suffix, _ in list(s.scan(scope, start=tables.step(e.from_step), prefix=tables.STEPS)):
        if suffix > tables.step(e.up_to_step):
            break
        s.put(scope, suffix, None)
        gone += 1
    _expect(gone == e.count, f"StepsRetired: {gone} steps in the range, {e.count} said")
    task.save(steps_kept=task.row.steps_kept - gone)


def _milestone(s: State, e: events.MilestoneReached) -> None:
    task = _Task(s, e)
    _put_live(s, e.task_id, active=task.due(0))
    task.save(milestones=[*task.row.milestones, e.name])


def _checkpoint(s: State, e: events.CheckpointRecorded) -> None:
    task = _Task(s, e)
    ref = CheckpointRef(version=e.version, uri=e.uri, sha256=e.sha256, size=e.size, positions=e.positions)
    _put_live(s, e.task_id, active=task.due(0))
    task.save(checkpoint=ref, crashes=0, sessions_lost=0)


# Pause, resume, cancel, stop -----------------------------------------------------------------------------------------


def _pause_requested(s: State, e: events.PauseRequested) -> None:
    _Task(s, e).save(stopping="pausing")


def _cancel_requested(s: State, e: events.CancelRequested) -> None:
    _Task(s, e).save(stopping="cancelling", stop_detail=e.reason)


def _timeout_reached(s: State, e: events.TimeoutReached) -> None:
    task = _Task(s, e)
    task.disarm(e.which)
    if task.row.stopping == "cancelling" or (task.row.stopping == "timing_out" and e.which != "total"):
        task.save()
    else:
        task.save(stopping="timing_out", stop_detail=e.which)


def _drain_requested(s: State, e: events.DrainRequested) -> None:
    _Task(s, e).save(stopping="draining")


def _paused(s: State, e: events.TaskPaused) -> None:
    task = _Task(s, e)
    task.leave_queue()
    task.end_epoch()
    task.disarm("due")
    task.move("PAUSED", reason="shutdown" if e.why == "shutdown" else "")
    task.save(due=e.due)


def _resumed(s: State, e: events.TaskResumed) -> None:
    task = _Task(s, e)
    task.save(**({"stopping": "none"} if task.row.state == "RUNNING" else {}))


# Ends ----------------------------------------------------------------------------------------------------------------


def _attempt_lost(s: State, e: events.AttemptLost) -> None:
    task = _Task(s, e)
    task.end_epoch()
    task.move("PENDING")
    crashed = e.why == "crashed"
    gone = e.why in ("session_ended", "superseded", "unseen", "not_started")
    task.save(crashes=task.row.crashes + crashed, sessions_lost=task.row.sessions_lost + gone)


def _attempt_failed(s: State, e: events.AttemptFailed) -> None:
    task = _Task(s, e)
    task.end_epoch()
    task.save(error=e.error, charged=False, crashes=0, run_used=0)


def _retry_scheduled(s: State, e: events.RetryScheduled) -> None:
    task = _Task(s, e)
    task.move("PENDING", reason="retry_backoff")
    task.arm("due", e.due)
    task.save(due=e.due)


def _end(task: _Task, state: str, **changes: Any) -> None:
    """The task has ended: nothing of it waits any more."""
    task.leave_queue()
    task.end_epoch()
    task.disarm_all()
    task.move(state)
    if state in ("COMPLETED", "CANCELLED"):
        task.arm("retain", task.due(limits.RETAIN_MS))
    task.save(finished_at=task.event.at, due=None, **changes)
    spec = task.spec()
    if spec.policy is None:
        task.s.put(tables.unbound(spec.type), task.id.encode(), None)


def _completed(s: State, e: events.TaskCompleted) -> None:
    s.put(tables.task(e.task_id), tables.RESULT, rows.TaskResult(result=e.result))
    _end(_Task(s, e), "COMPLETED", error=None)


def _failed(s: State, e: events.TaskFailed) -> None:
    _end(_Task(s, e), "FAILED", error=e.error)


def _timed_out(s: State, e: events.TaskTimedOut) -> None:
    error = ErrorInfo(type="timeout", message=f"the {e.which.replace('_', '-')} timeout ran out", error_types=["timeout"])
    _end(_Task(s, e), "TIMED_OUT", error=error, stop_detail=e.which)


def _cancelled(s: State, e: events.TaskCancelled) -> None:
    _end(_Task(s, e), "CANCELLED", stop_detail=e.reason)


def _dead_lettered(s: State, e: events.TaskDeadLettered) -> None:
    _Task(s, e).save(dead_letter=True)


def _redriven(s: State, e: events.TaskRedriven) -> None:
    task = _Task(s, e)
    spec = task.spec()
    if e.input is not None:
        s.put(tables.task(e.task_id), tables.SPEC, replace(spec, input=e.input))
    if spec.policy is None:
        s.put(tables.unbound(spec.type), e.task_id.encode(), rows.Ready(task_id=e.task_id))
    task.disarm_all()
    task.move("PENDING")
    total = policies.effective(s, e.task_id).total_timeout
    if total is not None:
        task.arm("total", task.due(total))
    task.save(attempt=0, charged=False, order=e.order, dead_letter=False, finished_at=None, queue_used=0, run_used=0,
              crashes=0, sessions_lost=0, stop_detail="")  # fmt: skip


def _discarded(s: State, e: events.DeadLetterDiscarded) -> None:
    task = _Task(s, e)
    task.arm("retain", task.due(limits.RETAIN_MS))
    task.save(dead_letter=False)


def _answers_forgotten(s: State, e: events.AnswersForgotten) -> None:
    task = _Task(s, e)
    scope = tables.task(e.task_id)
    for i, (suffix, _) in enumerate(list(s.scan(scope, prefix=tables.ANSWERS))):
        if i < e.count:
            s.put(scope, suffix, None)
    task.save()


def _retired(s: State, e: events.TaskRetired) -> None:
    task = _Task(s, e)
    task.disarm_all()
    scope = tables.task(e.task_id)
    for suffix in (tables.SPEC, tables.STATE, tables.RESULT, tables.LIVE):
        if s.get(scope, suffix) is not None:
            s.put(scope, suffix, None)


def _rejected(s: State, e: events.CommandRejected | events.ReportRejected) -> None:
    if e.task_id is not None:
        _Task(s, e).save()


# Events of the partition ---------------------------------------------------------------------------------------------


def _config_applied(s: State, e: events.ConfigApplied) -> None:
    s.put(tables.CONFIG, e.name.encode(), rows.Config(version=e.version, content=e.content))


def _forward_queued(s: State, e: events.ForwardQueued) -> None:
    s.put(tables.COUNTERS, f"sent/{e.target}".encode(), rows.Counter(value=e.number))
    s.put(tables.outbox(e.target), tables.number(e.number), rows.Outbox(record=e.record))


def _forward_taken(s: State, e: events.ForwardTaken) -> None:
    s.put(tables.COUNTERS, f"taken/{e.source}".encode(), rows.Counter(value=e.number))


def _forward_acknowledged(s: State, e: events.ForwardAcknowledged) -> None:
    scope = tables.outbox(e.target)
    for suffix, _ in list(s.scan(scope)):
        if suffix > tables.number(e.up_to):
            break
        s.put(scope, suffix, None)


SHIFT_CHUNK = 200


def _clock_adjusted(s: State, e: events.ClockAdjusted) -> None:
    """The clock row, and the next few timers that were set while a jump was in doubt: moved back, or let stand."""
    s.put(tables.CLOCK, b"", rows.Clock(offset=e.offset, unconfirmed=e.unconfirmed, shift=e.shift))
    if e.unconfirmed:
        return
    for i, (suffix, timer) in enumerate(list(s.scan(tables.WINDOW))):
        if i >= SHIFT_CHUNK:
            break
        s.put(tables.WINDOW, suffix, None)
        if e.shift:
            _shift(s, suffix, timer, e.shift)


def _shift(s: State, suffix: bytes, timer: rows.Timer, back: int) -> None:
    t = s.task(timer.task_id)
    due = tables.timer_due(suffix)
    if t is None or t.timers.get(timer.kind) != due:
        return
    s.put(tables.TIMERS, suffix, None)
    s.put(tables.TIMERS, tables.timer(due - back, timer.kind, timer.task_id), timer)
    changes: dict[str, Any] = {"timers": t.timers | {timer.kind: due - back}}
    if timer.kind == "due" and t.due is not None:
        changes["due"] = t.due - back
    s.put(tables.task(timer.task_id), tables.STATE, replace(t, **changes))


_HANDLERS: dict[type, Callable[[State, Any], None]] = {
    events.TaskSubmitted: _submitted,
    events.TaskPolicyBound: _policy_bound,
    events.TaskQueued: _queued,
    events.TaskGranted: _granted,
    events.AttemptStarted: _started,
    events.StepStarted: _step_started,
    events.StepCompleted: _step_completed,
    events.StepFailed: _step_failed,
    events.StepsRetired: _steps_retired,
    events.MilestoneReached: _milestone,
    events.CheckpointRecorded: _checkpoint,
    events.PauseRequested: _pause_requested,
    events.TaskPaused: _paused,
    events.TaskResumed: _resumed,
    events.CancelRequested: _cancel_requested,
    events.TaskCancelled: _cancelled,
    events.TimeoutReached: _timeout_reached,
    events.DrainRequested: _drain_requested,
    events.AttemptLost: _attempt_lost,
    events.AttemptFailed: _attempt_failed,
    events.RetryScheduled: _retry_scheduled,
    events.TaskCompleted: _completed,
    events.TaskFailed: _failed,
    events.TaskTimedOut: _timed_out,
    events.TaskDeadLettered: _dead_lettered,
    events.TaskRedriven: _redriven,
    events.DeadLetterDiscarded: _discarded,
    events.TaskRetired: _retired,
    events.AnswersForgotten: _answers_forgotten,
    events.CommandRejected: _rejected,
    events.ReportRejected: _rejected,
    events.ConfigApplied: _config_applied,
    events.ForwardQueued: _forward_queued,
    events.ForwardTaken: _forward_taken,
    events.ForwardAcknowledged: _forward_acknowledged,
    events.ClockAdjusted: _clock_adjusted,
}
HANDLED = frozenset(_HANDLERS)
