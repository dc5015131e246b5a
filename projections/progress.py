"""The latest public state of each task: a fold of its events and of its accepted progress.

Events come in the order of their `seq`; one that is included already changes nothing, so the fold may be repeated. Two
topics have no common order, so the row may not depend on one: what a task has reached is the newest that its telemetry
says, whatever its events have come to meanwhile, and telemetry that comes before the task's submit waits for it.

Times are log times. A `due` in an event is partition time, which runs apart from log time once a clock has jumped; so
what is shown is counted from the event that set the delay.

**Estimated end.** The pace is what has been reached (the fraction, or units done of all units) over the time spent
running: all epochs together, from the start of user code, without queues and pauses. Work that was lost and done again
so slows the estimate, as it slowed the task, and an epoch that resumes at 60 % does not look infinitely fast. What is
left at that pace counts from the last change, or from when the task becomes ready. Before there is a pace, the
submitter's `estimated_duration`, less the time already spent, takes its place; a paused or ended task has no estimate,
nor has one that would take a century.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any, assert_never

from perdure.projections.inputs import Fact, Transaction, fact, read_as, readable, task_of, written
from perdure.schemas import durations, events, topics
from perdure.schemas.codec import decode_as, replace
from perdure.schemas.common import ErrorInfo
from perdure.schemas.errors import DecodeError
from perdure.schemas.public import TaskProgress
from perdure.streams.log import Record
from perdure.streams.store import META

_EARLY = META + b"early/"
"""Before a task's key: its newest telemetry while its submit has not been read. Stays out of the public topic."""
_SWEPT = META + b"swept"
"""The last row that was looked at: a pass through all takes weeks, and has to outlast restarts."""
KEPT_MS = 30 * topics.DAY_MS
"""For which a task is shown after the engine has forgotten it, log time; then its row is deleted."""
_SWEPT_AT_ONCE = 2
VALUE_SHOWN_MAX = 64 * 1024
"""A result or input above this is left out of the views (bytes); the event log has it."""
MILESTONES_SHOWN_MAX = 64 * 1024
"""Text of all milestones shown; the oldest go first."""

_ENDED = ("COMPLETED", "FAILED", "TIMED_OUT", "CANCELLED")
STATES = ("PENDING", "RUNNING", "PAUSED", *_ENDED)

_Course = (
    events.TaskQueued
    | events.TaskGranted
    | events.AttemptStarted
    | events.StepCompleted
    | events.MilestoneReached
    | events.CheckpointRecorded
    | events.PauseRequested
    | events.CancelRequested
    | events.TimeoutReached
    | events.DrainRequested
    | events.TaskResumed
)
_Stop = (
    events.TaskPaused
    | events.AttemptLost
    | events.AttemptFailed
    | events.RetryScheduled
    | events.TaskCompleted
    | events.TaskFailed
    | events.TaskTimedOut
    | events.TaskCancelled
    | events.TaskDeadLettered
    | events.TaskRedriven
    | events.DeadLetterDiscarded
    | events.TaskRetired
)
_Unseen = (
    events.TaskPolicyBound
    | events.StepStarted
    | events.StepFailed
    | events.StepsRetired
    | events.AnswersForgotten
    | events.CommandRejected
    | events.ReportRejected
)
"""Events that the history shows and the present state does not."""


class ProgressProcessor:
    """Keeps `task-progress`; the topic is the changelog of its own store."""

    name = "progress"
    inputs = (topics.EVENTS.name, topics.TELEMETRY.name)
    changelog = topics.PROGRESS.name

    def handle(self, record: Record, tx: Transaction) -> None:
        """Fold one record into its task's row. Bad records are quarantined."""
        found = readable(record, tx)
        task_id = None if found is None else task_of(found)
        if found is None or task_id is None:
            return
        key = task_id.encode()
        row = tx.get(key)
        before = None if row is None else read_as(TaskProgress, row)
        if isinstance(found, events.ProgressReported) and (before is None or before.retired):
            tx.put(_EARLY + key, record.value)
            return
        after = fold(before, found)
        if isinstance(found, events.TaskSubmitted) and after is not before:
            early = tx.get(_EARLY + key)
            if early is not None:
                after = fold(after, fact(early))
                tx.put(_EARLY + key, None)
        if after is not None and after is not before:
            tx.put(key, written(after))
        if isinstance(found, events.TaskRetired):
            for _ in range(_SWEPT_AT_ONCE):
                self._sweep(tx, found.at - KEPT_MS)

    def _sweep(self, tx: Transaction, before: int) -> None:
        """Look at one more row, and delete it if its task was forgotten before a time.

        Once for each task that is forgotten, two rows: so all are looked at before half as many again have come, and
        nothing has to be kept of what is due when.
        """
        key = tx.after(tx.get(_SWEPT) or b"")
        tx.put(_SWEPT, key)
        row = None if key is None else tx.get(key)
        if key is None or row is None:
            return
        with suppress(DecodeError):  # a row that nobody can read is not the fault of the task at hand
            progress = decode_as(TaskProgress, row)
            if progress.retired and progress.updated_at < before:
                tx.put(key, None)
                tx.put(_EARLY + key, None)


def fold(progress: TaskProgress | None, record: Fact) -> TaskProgress | None:
    """The task's progress after one more event or report; the same object if it changes nothing.

    None while the task is unknown: its submit has not been seen, or the event is not of a task.
    """
    if isinstance(record, events.TaskSubmitted):
        return _submitted(progress, record)
    if progress is None:
        return None
    if isinstance(record, events.ProgressReported):
        return _reported(progress, record)
    if isinstance(record, events.PartitionEvent) or record.task_id is None or record.seq <= progress.seq:
        return progress
    return _updated(progress, record.at, seq=record.seq, **_changes(progress, record))


def shown(value: bytes | None) -> bytes | None:
    """A JSON value, unless it is too big for a view."""
    return None if value is None or len(value) > VALUE_SHOWN_MAX else value


def _submitted(known: TaskProgress | None, e: events.TaskSubmitted) -> TaskProgress:
    # An id is free again once the engine has forgotten its task; until then a second submit is a repeat.
    if known is not None and not (known.retired and e.at > known.submitted_at):
        return known
    fresh = TaskProgress(
        task_id=e.task_id, type=e.type, queue=e.queue, state="PENDING", seq=e.seq, priority=e.priority, labels=e.labels,
        user=e.user, estimated_duration=e.estimated_duration, submitted_at=e.at, updated_at=e.at, due=e.not_before,
    )  # fmt: skip
    return replace(fresh, eta_at=_eta(fresh))


def _updated(p: TaskProgress, at: int, **changes: Any) -> TaskProgress:
    after = replace(p, updated_at=max(p.updated_at, at), **changes)
    return replace(after, eta_at=_eta(after))


def _reported(p: TaskProgress, r: events.ProgressReported) -> TaskProgress:
    said = {
        "progress": 1.0 if p.state == "COMPLETED" else _fraction(r),
        "current_step": r.current_step,
        "units_done": r.units_done,
        "units_total": r.units_total,
    }
    changes = {name: value for name, value in said.items() if value is not None and value != getattr(p, name)}
    return _updated(p, r.at, **changes) if changes or r.at > p.updated_at else p


def _fraction(r: events.ProgressReported) -> float | None:
    """The fraction as said, else from the units; 0 to 1."""
    fraction = r.fraction
    if fraction is None and r.units_total and r.units_done is not None:
        fraction = r.units_done / r.units_total
    if fraction is None or math.isnan(fraction):
        return None
    return min(1.0, max(0.0, fraction))


def _eta(p: TaskProgress) -> int | None:
    """When the task will probably end, log time, ms; the module's text says how."""
    at = p.updated_at
    if p.state == "PAUSED" or p.state in _ENDED:
        return None
    spent = p.running_ms + (max(0, at - p.running_since) if p.running_since is not None else 0)
    if p.progress and spent:
        left = spent * (1 - p.progress) / p.progress
    elif p.estimated_duration is not None:
        left = max(0, p.estimated_duration - spent)
    else:
        return None
    return None if left > durations.MAX_MS else max(at, p.due or 0) + round(left)


# What each event changes --------------------------------------------------------------------------------------------


def _changes(p: TaskProgress, e: _Course | _Stop | _Unseen) -> dict[str, Any]:
    """Fields that an event sets."""
    match e:
        case events.TaskQueued():
            due = None if e.due is None else p.due
            return {"state": "PENDING", "reason": e.reason, "due": due, "stopping": "none"}
        case events.TaskGranted():
            return {"state": "RUNNING", "reason": "", "due": None, "stopping": "none", "epoch": e.epoch,
                    "attempt": e.attempt, "worker_id": e.worker_id}  # fmt: skip
        case events.AttemptStarted():
            return {"running_since": e.at, "started_at": e.at if p.started_at is None else p.started_at}
        case events.StepCompleted():
            return {"steps_completed": p.steps_completed + 1}
        case events.MilestoneReached():
            return {"milestones": _with_milestone(p.milestones, e.name)}
        case events.CheckpointRecorded():
            return {"checkpoint_version": e.version, "checkpoint_at": e.at}
        case events.PauseRequested():
            return {"stopping": "pausing"}
        case events.CancelRequested():
            return {"stopping": "cancelling"}
        case events.TimeoutReached():
            return {"stopping": p.stopping if p.stopping == "cancelling" else "timing_out"}
        case events.DrainRequested():
            return {"stopping": "draining"}
        case events.TaskResumed():  # a paused task's TaskQueued follows
            return {"stopping": "none"}
        case _:
            return _stop_changes(p, e)


def _stop_changes(p: TaskProgress, e: _Stop | _Unseen) -> dict[str, Any]:
    """Fields that the end of an attempt, a delay or the task sets."""
    match e:
        case events.TaskPaused():
            reason = "shutdown" if e.why == "shutdown" else ""
            return {"state": "PAUSED", "reason": reason, "due": None if e.due is None else p.due, **_stopped(p, e.at)}
        case events.AttemptLost():
            return {"state": "PENDING", "reason": "", **_stopped(p, e.at)}
        case events.AttemptFailed():
            return {"error": e.error, **_stopped(p, e.at)}
        case events.RetryScheduled():
            return {"state": "PENDING", "reason": "retry_backoff", "due": e.at + e.delay, "stopping": "none"}
        case events.TaskCompleted():
            return {"progress": 1.0, "result": shown(e.result), "error": None, **_ended(p, e.at, "COMPLETED")}
        case events.TaskFailed():
            return {"error": e.error, **_ended(p, e.at, "FAILED")}
        case events.TaskTimedOut():
            return {"error": timeout_error(e.which), **_ended(p, e.at, "TIMED_OUT")}
        case events.TaskCancelled():
            return _ended(p, e.at, "CANCELLED")
        case events.TaskDeadLettered():
            return {"dead_letter": True, "error": e.error or p.error}
        case events.TaskRedriven():
            return {"state": "PENDING", "reason": "", "attempt": 0, "finished_at": None, "dead_letter": False}
        case events.DeadLetterDiscarded():
            return {"dead_letter": False}
        case events.TaskRetired():
            return {"retired": True}
        case (
            events.TaskPolicyBound()
            | events.StepStarted()
            | events.StepFailed()
            | events.StepsRetired()
            | events.AnswersForgotten()
            | events.CommandRejected()
            | events.ReportRejected()
        ):
            return {}
        case _:
            assert_never(e)


def _stopped(p: TaskProgress, at: int) -> dict[str, Any]:
    """The epoch is over: its running time is added up."""
    spent = 0 if p.running_since is None else max(0, at - p.running_since)
    return {"running_ms": p.running_ms + spent, "running_since": None, "stopping": "none"}


def _ended(p: TaskProgress, at: int, state: str) -> dict[str, Any]:
    return {"state": state, "reason": "", "due": None, "finished_at": at, **_stopped(p, at)}


def timeout_error(which: str) -> ErrorInfo:
    """The error of a task that ran out of time, in the engine's words."""
    return ErrorInfo(type="timeout", message=f"the {which.replace('_', '-')} timeout ran out", error_types=["timeout"])


def _with_milestone(known: list[str], name: str) -> list[str]:
    milestones = [*known, name]
    while sum(len(m.encode()) for m in milestones) > MILESTONES_SHOWN_MAX and len(milestones) > 1:
        milestones.pop(0)
    return milestones
