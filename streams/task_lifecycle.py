"""The life of a task: which state may follow which, and what each command and each end of an attempt leads to.

Pause, cancel, timeout and drain of a running task only mark it as stopping: reports of its epoch still count until the
attempt has ended; then the mark decides where the task goes. A completion that is earlier in the log wins.
"""

from __future__ import annotations

import hashlib
from itertools import islice

from perdure.schemas import events, inbox, limits
from perdure.schemas.commands import CancelTask, DiscardDeadLetter, PauseTask, ResumeTask, RetryTask
from perdure.schemas.common import ErrorInfo, Retry, Usage
from perdure.schemas.rows import Mark, TaskState, Waiter
from perdure.streams import policies, tables
from perdure.streams.decision import Moment, Note, Outputs, Reply, ToWorker, of_task
from perdure.streams.describe import status_reply
from perdure.streams.state import State

LEGAL: dict[str, frozenset[str]] = {
    "PENDING": frozenset({"RUNNING", "PAUSED", "CANCELLED", "FAILED", "TIMED_OUT"}),
    "RUNNING": frozenset({"COMPLETED", "FAILED", "TIMED_OUT", "CANCELLED", "PAUSED", "PENDING"}),
    "PAUSED": frozenset({"PENDING", "CANCELLED", "TIMED_OUT"}),
    "FAILED": frozenset({"PENDING"}),
    "TIMED_OUT": frozenset({"PENDING"}),
    "COMPLETED": frozenset(),
    "CANCELLED": frozenset(),
}
"""State -> states it may become. The documents' diagram is drawn from this table."""

ENDED = frozenset({"COMPLETED", "FAILED", "TIMED_OUT", "CANCELLED"})
DEAD = frozenset({"FAILED", "TIMED_OUT"})

TELLING = b"telling/"
WAITERS_AT_ONCE = 32

_RANK = {"none": 0, "draining": 1, "pausing": 2, "timing_out": 3, "cancelling": 4}


class Refused(Exception):
    """The command is not legal in the task's present state. Never leaves the core."""


# Commands ------------------------------------------------------------------------------------------------------------


def pause(s: State, m: Moment, command: PauseTask) -> Outputs:
    """PENDING: at once. RUNNING: at the next boundary."""
    task_id, t = command.task_id, s.known(command.task_id)
    if t.state == "PENDING":
        yield events.TaskPaused(**of_task(s, m, task_id), due=t.due)
    elif t.state == "RUNNING":
        _check_stopping(t, "pausing", "paused")
        yield events.PauseRequested(**of_task(s, m, task_id))
        yield ToWorker(inbox.PauseAttempt(worker_id=t.worker_id, session=t.session, task_id=task_id, epoch=t.epoch))
    else:
        raise Refused(f"the task is {t.state}: only PENDING and RUNNING tasks can be paused")


def resume(s: State, m: Moment, command: ResumeTask) -> Outputs:
    """PAUSED: back to its place. RUNNING and pausing: undone."""
    task_id, t = command.task_id, s.known(command.task_id)
    if t.state == "PAUSED":
        yield events.TaskResumed(**of_task(s, m, task_id))
        yield from queue_again(s, m, task_id, "queued")
    elif t.state == "RUNNING" and t.stopping == "pausing":
        yield events.TaskResumed(**of_task(s, m, task_id))
        yield ToWorker(
            inbox.PauseAttempt(worker_id=t.worker_id, session=t.session, task_id=task_id, epoch=t.epoch, undo=True)
        )
    else:
        doing = f" and {t.stopping}" if t.stopping != "none" else ""
        raise Refused(f"the task is {t.state}{doing}: only PAUSED and pausing tasks can be resumed")


def cancel(s: State, m: Moment, command: CancelTask) -> Outputs:
    """PENDING, PAUSED: at once. RUNNING: cooperatively, then by force."""
    task_id, t = command.task_id, s.known(command.task_id)
    if t.state in ("PENDING", "PAUSED"):
        yield events.TaskCancelled(**of_task(s, m, task_id), reason=command.reason)
        yield from tell_waiters(s, m, task_id)
    elif t.state == "RUNNING":
        _check_stopping(t, "cancelling", "cancelled")
        yield events.CancelRequested(**of_task(s, m, task_id), reason=command.reason)
        yield stop_attempt(s, task_id, f"cancelled: {command.reason}")
    else:
        raise Refused(f"the task is {t.state}: it has ended already")


def retry(s: State, m: Moment, command: RetryTask) -> Outputs:
    """FAILED, TIMED_OUT: attempts from 0; steps and checkpoint kept."""
    task_id, t = command.task_id, s.known(command.task_id)
    if t.state not in DEAD:
        raise Refused(f"the task is {t.state}: only FAILED and TIMED_OUT tasks can be retried")
    if t.timers.get("retain", m.now + 1) <= m.now:
        raise Refused("the task was discarded and is being forgotten: parts of it may be gone already")
    order = place_order(m)
    yield events.TaskRedriven(**of_task(s, m, task_id), input=command.input, order=order)
    yield from policies.bind(s, m, task_id)
    yield events.TaskQueued(**of_task(s, m, task_id), reason="queued")


def discard(s: State, m: Moment, command: DiscardDeadLetter) -> Outputs:
    """Off the dead-letter list; the task stays what it is until it is retired."""
    task_id, t = command.task_id, s.known(command.task_id)
    if not t.dead_letter:
        raise Refused(f"the task is {t.state} and no dead letter")
    yield events.DeadLetterDiscarded(**of_task(s, m, task_id), reason=command.reason)


def _check_stopping(t: TaskState, wanted: str, word: str) -> None:
    """Refuse a stop that is no stronger than the one under way."""
    if _RANK[t.stopping] >= _RANK[wanted]:
        raise Refused(f"the task is RUNNING and {t.stopping} already: it cannot be {word} on top of that")


# Ends of attempts ----------------------------------------------------------------------------------------------------


def completed(s: State, m: Moment, task_id: str, result: bytes, usage: Usage) -> Outputs:
    """User code returned: the task has its result, whatever else was asked of it meanwhile."""
    t = s.known(task_id)
    yield events.TaskCompleted(**of_task(s, m, task_id), epoch=t.epoch, attempt=t.attempt, result=result, usage=usage)
    yield from tell_waiters(s, m, task_id)


def failed(s: State, m: Moment, task_id: str, error: ErrorInfo, usage: Usage | None, *, final: bool) -> Outputs:
    """User code raised: a retry, a dead letter, or where the task was being stopped to."""
    t = s.known(task_id)
    if t.stopping == "timing_out":
        yield from timed_out(s, m, task_id, usage)
        return
    yield events.AttemptFailed(**of_task(s, m, task_id), epoch=t.epoch, attempt=t.attempt, error=error, usage=usage)
    if t.stopping == "cancelling":
        yield from _cancelled(s, m, task_id)
        return
    retry = policies.effective(s, task_id).retry
    unknown = any(name.endswith("OutcomeUnknown") for name in error.error_types[:1])
    if final or not retryable(retry, error):
        yield from die(s, m, task_id, error, "outcome_unknown" if unknown else "not_retryable")
    elif t.attempt >= retry.max_attempts:
        yield from die(s, m, task_id, error, "attempts")
    else:
        yield from _schedule_retry(s, m, task_id, retry, t)


def _schedule_retry(s: State, m: Moment, task_id: str, retry: Retry, before: TaskState) -> Outputs:
    delay = backoff(retry, before.attempt, task_id)
    due = s.due(m.at, delay)
    yield events.RetryScheduled(**of_task(s, m, task_id), attempt=before.attempt, due=due, delay=delay)
    if before.stopping == "pausing":
        yield events.TaskPaused(**of_task(s, m, task_id), due=due)


def timed_out(s: State, m: Moment, task_id: str, usage: Usage | None) -> Outputs:
    """A running attempt that was stopped because time ran out has ended."""
    t = s.known(task_id)
    which = t.stop_detail
    error = ErrorInfo(type="timeout", message=f"the {which.replace('_', '-')} timeout ran out", error_types=["timeout"])
    yield events.AttemptFailed(
        **of_task(s, m, task_id), epoch=t.epoch, attempt=t.attempt, error=error, outcome="TIMED_OUT", usage=usage
    )
    retry = policies.effective(s, task_id).retry
    if which != "total" and t.attempt < retry.max_attempts:
        yield from _schedule_retry(s, m, task_id, retry, t)
    else:
        yield events.TaskTimedOut(**of_task(s, m, task_id), which=which)
        yield from _bury(s, m, task_id)


def lost(s: State, m: Moment, task_id: str, why: str, detail: str = "", usage: Usage | None = None) -> Outputs:
    """A grant ended without a result and without being charged: lost, declined, drained, crashed or undone."""
    t = s.known(task_id)
    if t.stopping == "timing_out":
        yield from timed_out(s, m, task_id, usage)
        return
    if t.stopping == "pausing" and why == "paused":
        yield events.TaskPaused(**of_task(s, m, task_id), usage=usage)
        return
    shutdown = why == "drained" and policies.effective(s, task_id).on_shutdown == "pause"
    if shutdown and t.stopping in ("none", "draining"):
        yield events.TaskPaused(**of_task(s, m, task_id), why="shutdown", usage=usage)
        return
    if t.stopping == "cancelling":
        yield events.TaskCancelled(**of_task(s, m, task_id), reason=t.stop_detail, usage=usage)
        yield from tell_waiters(s, m, task_id)
        return
    yield events.AttemptLost(
        **of_task(s, m, task_id), epoch=t.epoch, why=why, worker_id=t.worker_id, detail=detail, usage=usage
    )
    after = s.known(task_id)
    if after.crashes >= limits.CRASHES_MAX:
        yield from die(s, m, task_id, _found("crash_loop", f"the process died {after.crashes} times in a row without "
                                            f"a new step or checkpoint; last: {detail}"), "crash_loop")  # fmt: skip
    elif after.sessions_lost >= limits.SESSIONS_LOST_MAX:
        yield from die(
            s, m, task_id, _found("lost_sessions", f"{after.sessions_lost} workers were lost under it"), "lost_sessions"
        )
    elif t.stopping == "pausing":
        yield events.TaskPaused(**of_task(s, m, task_id))
    else:
        yield from queue_again(s, m, task_id, "drained" if why == "drained" else "queued")


def die(s: State, m: Moment, task_id: str, error: ErrorInfo, why: str) -> Outputs:
    """FAILED for good."""
    yield events.TaskFailed(**of_task(s, m, task_id), error=error, why=why)
    yield from _bury(s, m, task_id)


def _cancelled(s: State, m: Moment, task_id: str) -> Outputs:
    yield events.TaskCancelled(**of_task(s, m, task_id), reason=s.known(task_id).stop_detail)
    yield from tell_waiters(s, m, task_id)


def _bury(s: State, m: Moment, task_id: str) -> Outputs:
    t = s.known(task_id)
    yield events.TaskDeadLettered(**of_task(s, m, task_id), state=t.state, error=t.error)
    yield from tell_waiters(s, m, task_id)


def queue_again(s: State, m: Moment, task_id: str, reason: str) -> Outputs:
    """To its place in the queue, or on with the delay it was waiting for."""
    t = s.known(task_id)
    if t.due is not None and not t.attempt:  # wall time: only a tick knows whether it is past
        yield events.TaskQueued(**of_task(s, m, task_id), reason="delayed", due=t.due)
    elif t.due is not None and t.due > m.now:
        yield events.TaskQueued(**of_task(s, m, task_id), reason="retry_backoff", due=t.due)
    else:
        yield events.TaskQueued(**of_task(s, m, task_id), reason=reason)


# Timers of a task ----------------------------------------------------------------------------------------------------


def time_is_up(s: State, m: Moment, task_id: str, kind: str) -> Outputs:
    """One of the four timeouts has run out."""
    t = s.known(task_id)
    which = "no_progress" if kind == "progress" else kind
    if t.state in ("PENDING", "PAUSED"):
        yield events.TaskTimedOut(**of_task(s, m, task_id), which=which)
        yield from _bury(s, m, task_id)
    elif _RANK[t.stopping] < _RANK["timing_out"]:
        yield events.TimeoutReached(**of_task(s, m, task_id), which=which)
        yield stop_attempt(s, task_id, f"timed_out: {which}")
    else:
        yield events.TimeoutReached(**of_task(s, m, task_id), which=which)


def stop_attempt(s: State, task_id: str, reason: str) -> ToWorker:
    """What tells the worker to end an attempt for good."""
    t = s.known(task_id)
    grace = policies.effective(s, task_id).cancel_grace
    return ToWorker(
        inbox.CancelAttempt(
            worker_id=t.worker_id, session=t.session, task_id=task_id, epoch=t.epoch, reason=reason, grace_ms=grace
        )
    )


# Small pure parts ----------------------------------------------------------------------------------------------------


def tell_waiters(s: State, m: Moment, task_id: str) -> Outputs:
    """Answer those who wait for the task's end, a few with each decision."""
    waiting = list(islice(s.scan(tables.waiters(task_id)), WAITERS_AT_ONCE + 1))
    for suffix, waiter in waiting[:WAITERS_AT_ONCE]:
        yield from answer_waiter(s, m, task_id, suffix, waiter)
    cursor = TELLING + task_id.encode()
    if len(waiting) > WAITERS_AT_ONCE:
        yield Note(tables.MARKS, cursor, Mark())
    elif s.get(tables.MARKS, cursor) is not None:
        yield Note(tables.MARKS, cursor, None)


def answer_waiter(s: State, m: Moment, task_id: str, suffix: bytes, waiter: Waiter) -> Outputs:
    """Tell one client how the task stands, and forget that it waits."""
    if s.task(task_id) is not None:
        yield Reply(status_reply(s, m, task_id, client_id=waiter.client_id, command_id=suffix.decode()))
    yield Note(tables.waiters(task_id), suffix, None)


def retryable(retry: Retry, error: ErrorInfo) -> bool:
    """Whether the policy retries this error: class names, bare or dotted, along the MRO."""
    names = {n for full in error.error_types for n in (full, full.rpartition(".")[2])}
    if retry.never_on and names & set(retry.never_on):
        return False
    return retry.retry_on is None or bool(names & set(retry.retry_on))


def backoff(retry: Retry, attempt: int, task_id: str) -> int:
    """The pause in ms after a failed attempt; jitter is drawn from (task, attempt), so a replay draws the same."""
    pause = retry.delay if retry.backoff == "fixed" else retry.delay * 2 ** min(attempt - 1, 40)
    pause = min(pause, retry.max_delay)
    if not retry.jitter:
        return pause
    draw = int.from_bytes(hashlib.sha256(f"{task_id}\x00{attempt}".encode()).digest()[:4], "big")
    return pause // 2 + draw * (pause - pause // 2) // 0xFFFFFFFF


def place_order(m: Moment) -> int:
    """A task's place in its priority: the order of the inputs that brought it."""
    return m.cause.offset * 1024 + (m.cause.index or 0)


def _found(kind: str, message: str) -> ErrorInfo:
    return ErrorInfo(type=kind, message=message, error_types=[kind])
