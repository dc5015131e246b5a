"""How each event of a task changes its rows.

An event's own `at` and the clock row say what time it is; nothing else does. Session rows are updated where they exist:
a fold of task-events has none.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice, takewhile
from typing import Any

from perdure.schemas import events, ids, limits, rows
from perdure.schemas.codec import replace
from perdure.schemas.common import CheckpointRef, ErrorInfo
from perdure.schemas.rows import TaskState
from perdure.streams import policies, tables
from perdure.streams.state import State
from perdure.streams.task_change import IllegalTransition, TaskChange, expect
from perdure.streams.task_lifecycle import DEAD, ENDED, LEGAL


def apply(s: State, event: Any) -> None:
    """Apply an event of a task. Raises `IllegalTransition` for one that no decision may make."""
    misfit = _misfit(s.task(event.task_id), event)
    if misfit is not None:
        raise IllegalTransition(f"{type(event).__name__} {event.seq} of {event.task_id} {misfit}")
    HANDLERS[type(event)](s, event)


def _misfit(t: TaskState | None, event: Any) -> str | None:
    """Why the event cannot be the task's next one; None if it can."""
    kind = type(event)
    if t is None:
        return None if kind is events.TaskSubmitted and event.seq == 1 else "of a task that is unknown"
    if kind is events.TaskSubmitted or event.seq != t.seq + 1:
        return f"after {t.seq}"
    if t.state not in _IN.get(kind, LEGAL):
        return f"in {t.state}"
    if kind in _OF_THE_GRANT and event.epoch != t.epoch:
        return f"of epoch {event.epoch} in epoch {t.epoch}"
    return None


# Submit, queue, grant ------------------------------------------------------------------------------------------------

_SPEC_FIELDS = (
    "task_id", "type", "queue", "input", "content_hash", "input_hash", "policy", "policy_version", "priority", "key",
    "user", "concurrency_key", "after", "resources", "estimated_duration", "agent_config", "callback_url", "labels",
    "notify", "overrides", "submitted_by",
)  # fmt: skip


def _submitted(s: State, e: events.TaskSubmitted) -> None:
    expect(s.task(e.task_id) is None, f"{e.task_id} exists already")
    scope = tables.task(e.task_id)
    s.put(scope, tables.SPEC, rows.TaskSpec(**{f: getattr(e, f) for f in _SPEC_FIELDS}, submitted_at=e.at))
    s.put(scope, tables.STATE, TaskState(state="PENDING", seq=e.seq, order=e.order, updated_at=e.at))
    if e.key is not None and ids.split(e.task_id)[1] != ids.keyed_local_id(e.queue, e.type, e.key):
        s.put(tables.KEYS, tables.key(e.queue, e.type, e.key), rows.Mark(text=e.task_id))
    if e.policy is None:
        _unbound(s, e)
    total = policies.effective(s, e.task_id).total_timeout
    if total is not None:
        task = TaskChange(s, e)
        task.arm("total", task.due(total))
        task.save()


def _unbound(s: State, e: Any) -> None:
    """The task's policy is not known yet; remember since when (partition time) the total clock runs."""
    row = rows.Mark(value=s.due(e.at, 0), text=e.task_id)
    s.put(tables.unbound(s.spec(e.task_id).type), e.task_id.encode(), row)


def _policy_bound(s: State, e: events.TaskPolicyBound) -> None:
    task = TaskChange(s, e)
    spec = task.spec()
    scope, suffix = tables.unbound(spec.type), e.task_id.encode()
    mark = s.get(scope, suffix)
    expect(mark is not None, f"the policy of {e.task_id} is bound already")
    if task.row.ready:
        s.put(*task.place(), None)
    s.put(tables.task(e.task_id), tables.SPEC, replace(spec, policy=e.policy, policy_version=e.policy_version))
    s.put(scope, suffix, None)
    if e.policy.total_timeout is not None and "total" not in task.row.timers:
        since = min(mark.value, task.due(0))  # counted from a log time that was ahead
        task.arm("total", since + e.policy.total_timeout, relative=False)
    if task.row.ready:
        s.put(*task.place(), rows.Ready(task_id=e.task_id))
        if e.policy.queue_timeout is not None:
            due = task.row.clock_since - task.row.queue_used + e.policy.queue_timeout
            task.arm("queue", due, relative=False)
    task.save()


def _queued(s: State, e: events.TaskQueued) -> None:
    task = TaskChange(s, e)
    if task.row.state == "PAUSED":
        task.move("PENDING")
    if e.due is not None:  # a start time, or a delay that was counted when it was set
        task.arm(tables.NOT_BEFORE if e.reason == "delayed" else "due", e.due, relative=False)
        task.save(reason=e.reason, due=e.due)
        return
    task.disarm("due", tables.NOT_BEFORE)
    put = s.put if task.row.ready else s.put_new
    put(*task.place(), rows.Ready(task_id=e.task_id))
    resumed = task.row.state == "PAUSED"
    used = task.row.queue_used if resumed else 0
    timeout = policies.effective(s, e.task_id).queue_timeout
    if timeout is not None:
        task.arm("queue", task.due(timeout - used))
    task.save(reason=e.reason, due=None, ready=True, clock_since=task.due(0), queue_used=used)


def _granted(s: State, e: events.TaskGranted) -> None:
    task = TaskChange(s, e)
    expect(task.row.ready and e.epoch == task.row.epoch + 1, f"grant {e.epoch} of {e.task_id} without a place")
    task.leave_queue()
    task.move("RUNNING")
    fresh = not task.row.charged
    task.arm("start", task.due(limits.START_DEADLINE_MS))
    s.put(
        tables.leases(e.session),
        tables.number(e.grant),
        rows.Lease(task_id=e.task_id, epoch=e.epoch, granted=task.due(0), by=e.cause.offset),
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
    task = TaskChange(s, e)
    task.disarm("start")
    policy = policies.effective(s, e.task_id)
    if policy.run_timeout is not None:
        task.arm("run", task.due(max(1, policy.run_timeout - task.row.run_used)))
    if policy.no_progress_timeout is not None:
        # A timer of the session class: it follows progress, which is no event. It may fire early and look again.
        suffix = tables.timer(task.time() + policy.no_progress_timeout, "progress", e.task_id)
        s.put(tables.SOFT_TIMERS, suffix, rows.Timer(task_id=e.task_id, kind="progress"))
    _put_live(s, e.task_id, active=task.due(0))
    first = task.row.started_at if task.row.started_at is not None else e.at
    task.save(started=True, clock_since=task.due(0), started_at=first)


def _put_live(s: State, task_id: str, **changes: Any) -> None:
    live = s.live(task_id) or rows.Live(epoch=0)
    s.put(tables.task(task_id), tables.LIVE, replace(live, **changes))


# Steps, milestones, checkpoints --------------------------------------------------------------------------------------


def _step_started(s: State, e: events.StepStarted) -> None:
    task = TaskChange(s, e)
    _drop_step(task, tables.step(e.step_id))
    step = rows.Step(function=e.function, code_version="", args_hash=e.args_hash, result=None)
    s.put(tables.task(e.task_id), tables.begun(e.step_id), step)
    task.save()


def _step_completed(s: State, e: events.StepCompleted) -> None:
    task = TaskChange(s, e)
    scope, suffix = tables.task(e.task_id), tables.step(e.step_id)
    _drop_step(task, tables.begun(e.step_id))
    kept = task.row.steps_kept + (s.get(scope, suffix) is None)
    step = rows.Step(function=e.function, code_version=e.code_version, args_hash=e.args_hash, result=e.result)
    s.put(scope, suffix, step)
    _put_live(s, e.task_id, active=task.due(0))
    task.save(steps_completed=task.row.steps_completed + 1, steps_kept=kept, crashes=0, sessions_lost=0)


def _drop_step(task: TaskChange, suffix: bytes) -> None:
    """Forget a step that has begun, or the recorded result of one that is run anew."""
    scope = tables.task(task.id)
    if task.s.get(scope, suffix) is not None:
        task.s.put(scope, suffix, None)
        if suffix.startswith(tables.STEPS):
            task.changes["steps_kept"] = task.row.steps_kept - 1


def _step_failed(s: State, e: events.StepFailed) -> None:
    task = TaskChange(s, e)
    _drop_step(task, tables.begun(e.step_id))
    task.save()


def _steps_retired(s: State, e: events.StepsRetired) -> None:
    task = TaskChange(s, e)
    scope, last = tables.task(e.task_id), tables.step(e.up_to_step)
    suffixes = s.suffixes(scope, start=tables.step(e.from_step), prefix=tables.STEPS)
    gone = list(takewhile(lambda suffix: suffix <= last, suffixes))
    expect(len(gone) == e.count, f"StepsRetired: {len(gone)} steps in the range, {e.count} said")
    for suffix in gone:
        s.put(scope, suffix, None)
    task.save(steps_kept=task.row.steps_kept - len(gone))


def _milestone(s: State, e: events.MilestoneReached) -> None:
    task = TaskChange(s, e)
    _put_live(s, e.task_id, active=task.due(0))
    task.save(milestones=[*task.row.milestones, e.name])


def _checkpoint(s: State, e: events.CheckpointRecorded) -> None:
    task = TaskChange(s, e)
    ref = CheckpointRef(version=e.version, uri=e.uri, sha256=e.sha256, size=e.size, positions=e.positions)
    _put_live(s, e.task_id, active=task.due(0))
    task.save(checkpoint=ref, checkpoint_at=task.time(), crashes=0, sessions_lost=0)


# Pause, resume, cancel, stop -----------------------------------------------------------------------------------------


def _pause_requested(s: State, e: events.PauseRequested) -> None:
    TaskChange(s, e).save(stopping="pausing")


def _cancel_requested(s: State, e: events.CancelRequested) -> None:
    TaskChange(s, e).save(stopping="cancelling", stop_detail=e.reason)


def _timeout_reached(s: State, e: events.TimeoutReached) -> None:
    task = TaskChange(s, e)
    task.disarm(e.which)
    if task.row.stopping == "cancelling" or (task.row.stopping == "timing_out" and e.which != "total"):
        task.save()
    else:
        task.save(stopping="timing_out", stop_detail=e.which)


def _drain_requested(s: State, e: events.DrainRequested) -> None:
    TaskChange(s, e).save(stopping="draining")


def _paused(s: State, e: events.TaskPaused) -> None:
    task = TaskChange(s, e)
    task.leave_queue()
    task.end_epoch()
    task.disarm("due", tables.NOT_BEFORE)
    task.move("PAUSED", reason="shutdown" if e.why == "shutdown" else "")
    task.save(due=e.due)


def _resumed(s: State, e: events.TaskResumed) -> None:
    task = TaskChange(s, e)
    task.save(**({"stopping": "none"} if task.row.state == "RUNNING" else {}))


# Ends ----------------------------------------------------------------------------------------------------------------


def _attempt_lost(s: State, e: events.AttemptLost) -> None:
    task = TaskChange(s, e)
    task.end_epoch()
    task.move("PENDING")
    crashed = e.why == "crashed"
    gone = e.why in ("session_ended", "superseded", "unseen", "not_started")
    task.save(crashes=task.row.crashes + crashed, sessions_lost=task.row.sessions_lost + gone)


def _attempt_failed(s: State, e: events.AttemptFailed) -> None:
    task = TaskChange(s, e)
    task.end_epoch()
    task.save(error=e.error, charged=False, crashes=0, run_used=0)


def _retry_scheduled(s: State, e: events.RetryScheduled) -> None:
    task = TaskChange(s, e)
    task.move("PENDING", reason="retry_backoff")
    task.arm("due", e.due)
    task.save(due=e.due)


def _end(task: TaskChange, state: str, **changes: Any) -> None:
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
    _end(TaskChange(s, e), "COMPLETED", error=None)


def _failed(s: State, e: events.TaskFailed) -> None:
    _end(TaskChange(s, e), "FAILED", error=e.error)


def _timed_out(s: State, e: events.TaskTimedOut) -> None:
    error = ErrorInfo(
        type="timeout", message=f"the {e.which.replace('_', '-')} timeout ran out", error_types=["timeout"]
    )
    _end(TaskChange(s, e), "TIMED_OUT", error=error, stop_detail=e.which)


def _cancelled(s: State, e: events.TaskCancelled) -> None:
    _end(TaskChange(s, e), "CANCELLED", stop_detail=e.reason)


def _dead_lettered(s: State, e: events.TaskDeadLettered) -> None:
    TaskChange(s, e).save(dead_letter=True)


def _redriven(s: State, e: events.TaskRedriven) -> None:
    task = TaskChange(s, e)
    spec = task.spec()
    if e.input is not None:
        s.put(tables.task(e.task_id), tables.SPEC, replace(spec, input=e.input))
    if spec.policy is None:
        _unbound(s, e)
    task.disarm_all()
    task.move("PENDING")
    total = policies.effective(s, e.task_id).total_timeout
    if total is not None:
        task.arm("total", task.due(total))
    task.save(attempt=0, charged=False, order=e.order, dead_letter=False, finished_at=None, queue_used=0, run_used=0,
              crashes=0, sessions_lost=0, stop_detail="")  # fmt: skip
    _forget_begun(s, e.task_id)


def _forget_begun(s: State, task_id: str) -> None:
    """A person has looked at the steps whose outcome was unknown: they run again."""
    scope = tables.task(task_id)
    for suffix in list(s.suffixes(scope, prefix=tables.BEGUN)):
        s.put(scope, suffix, None)


def _discarded(s: State, e: events.DeadLetterDiscarded) -> None:
    task = TaskChange(s, e)
    task.arm("retain", task.due(limits.RETAIN_MS))
    task.save(dead_letter=False)


def _answers_forgotten(s: State, e: events.AnswersForgotten) -> None:
    task = TaskChange(s, e)
    scope = tables.task(e.task_id)
    for suffix in list(islice(s.suffixes(scope, prefix=tables.ANSWERS), e.count)):
        s.put(scope, suffix, None)
    task.save()


def _retired(s: State, e: events.TaskRetired) -> None:
    task = TaskChange(s, e)
    task.disarm_all()
    scope, spec = tables.task(e.task_id), task.spec()
    if spec.key is not None and s.get(tables.KEYS, key := tables.key(spec.queue, spec.type, spec.key)) is not None:
        s.put(tables.KEYS, key, None)
    expect(task.row.steps_kept == 0, f"{e.task_id} is retired with {task.row.steps_kept} steps")
    for suffix in (
        tables.SPEC,
        tables.STATE,
        tables.RESULT,
        tables.LIVE,
    ):
        if s.get(scope, suffix) is not None:
            s.put(scope, suffix, None)
    _forget_begun(s, e.task_id)


def _rejected(s: State, e: events.CommandRejected | events.ReportRejected) -> None:
    TaskChange(s, e).save()


_RUNNING = frozenset({"RUNNING"})
_OF_THE_GRANT: frozenset[type] = frozenset({
    events.AttemptStarted, events.StepStarted, events.StepCompleted, events.StepFailed, events.MilestoneReached,
    events.CheckpointRecorded, events.AttemptLost, events.AttemptFailed, events.TaskCompleted,
})  # fmt: skip
"""Events that carry the epoch of the grant at hand."""
_IN: dict[type, frozenset[str]] = dict.fromkeys(_OF_THE_GRANT, _RUNNING) | {
    events.TaskQueued: frozenset({"PENDING", "PAUSED"}),
    events.TaskGranted: frozenset({"PENDING"}),
    events.PauseRequested: _RUNNING,
    events.CancelRequested: _RUNNING,
    events.TimeoutReached: _RUNNING,
    events.DrainRequested: _RUNNING,
    events.RetryScheduled: _RUNNING,
    events.TaskResumed: frozenset({"RUNNING", "PAUSED"}),
    events.TaskDeadLettered: DEAD,
    events.TaskRedriven: DEAD,
    events.DeadLetterDiscarded: DEAD,
    events.AnswersForgotten: ENDED,
    events.TaskRetired: ENDED,
}
"""Event -> states in which it may come; others where its own move through `LEGAL` says it."""
HANDLERS: dict[type, Callable[[State, Any], None]] = {
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
}
