"""What a task's state says to people: the body of an answer to `DescribeTask`, and why it waits."""

from __future__ import annotations

import json
from typing import Any

from perdure.schemas import limits, references
from perdure.schemas.commands import CHECKPOINT_STORE
from perdure.schemas.inbox import CommandReply
from perdure.schemas.rows import TaskSpec, TaskState
from perdure.streams import policies, tables
from perdure.streams.decision import Moment
from perdure.streams.state import State

_WORDS = {
    "queued": "waits in queue {queue!r}",
    "delayed": "waits for its start time",
    "retry_backoff": "waits before its next attempt",
    "drained": "was handed back by a worker that shut down (paused by shutdown) and waits in queue {queue!r}",
}


_DOING = {
    "none": "runs",
    "pausing": "stops at its next boundary to pause",
    "draining": "hands back to the queue",
    "cancelling": "is being cancelled",
    "timing_out": "is being stopped: time ran out",
}


def status_reply(s: State, m: Moment, task_id: str, *, client_id: str, command_id: str) -> CommandReply:
    """The answer to a query about a task that exists."""
    body = json.dumps(status(s, m, task_id), separators=(",", ":"), ensure_ascii=False).encode()
    return CommandReply(client_id=client_id, command_id=command_id, task_id=task_id, accepted=True, body=body, at=m.at)


def status(s: State, m: Moment, task_id: str) -> dict[str, Any]:
    """Everything `status --json` shows. Times are log times in ms, fractions 0 to 1."""
    t, spec, live = s.known(task_id), s.spec(task_id), s.live(task_id)
    result = s.get(tables.task(task_id), tables.RESULT)
    large = references.shown(result.result) if result else None
    end = t.finished_at if t.finished_at is not None else m.at
    reason = pending_reason(s, t, spec)
    done = t.state == "COMPLETED"
    fraction = 1.0 if done else (live.fraction if live else None)
    if fraction is None and live and live.units_total and live.units_done is not None:
        fraction = min(1.0, live.units_done / live.units_total)
    eta = _eta_seconds(s, m, t, spec, fraction)
    return {
        "task_id": task_id, "type": spec.type, "queue": spec.queue, "state": t.state, "reason": reason,
        "stopping": t.stopping, "priority": spec.priority, "labels": spec.labels,
        "progress": fraction, "current_step": (live.current_step or None) if live else None,
        "steps_completed": t.steps_completed, "total_steps": None,
        "units_done": live.units_done if live else None, "units_total": live.units_total if live else None,
        "attempt": t.attempt, "epoch": t.epoch, "milestones": t.milestones,
        "elapsed_seconds": None if t.started_at is None else max(0, end - t.started_at) / 1000,
        "eta_seconds": eta, "submitted_at": spec.submitted_at, "started_at": t.started_at, "finished_at": t.finished_at,
        "updated_at": t.updated_at, "due": s.start_time(t),
        "worker_id": t.worker_id or None, "session": t.session or None,
        "result": json.loads(result.result) if result and not large else None, "result_ref": large,
        "error": dict(t.error.__dict__) if t.error else None,
        "usage": dict(t.usage.__dict__) if t.usage else None,
        "checkpoint_version": t.checkpoint.version if t.checkpoint else None,
        "checkpoint_overdue_seconds": _seconds(_unsaved(s, m, t, task_id)),
        "cancel_reason": t.stop_detail if t.state == "CANCELLED" or t.stopping == "cancelling" else None,
        "timeout": t.stop_detail if t.state == "TIMED_OUT" or t.stopping == "timing_out" else None,
        "dead_letter": t.dead_letter, "estimated_duration_seconds": _seconds(spec.estimated_duration),
        "max_attempts": None if spec.policy is None else spec.policy.retry.max_attempts,
        "seq": t.seq, "why": why(s, m, task_id, reason),
    }  # fmt: skip


def pending_reason(s: State, t: TaskState, spec: TaskSpec) -> str:
    """The stored reason, or for a task in the queue what keeps it there now."""
    if t.state != "PENDING" or not t.ready or t.reason == "drained":
        return t.reason
    return "no_worker" if not _able(s, spec) else t.reason


def why(s: State, m: Moment, task_id: str, reason: str) -> str:
    """One sentence: why the task is where it is."""
    t, spec = s.known(task_id), s.spec(task_id)
    if t.state == "PENDING":
        if reason == "no_worker":
            return f"waits in queue {spec.queue!r}: no live worker serves type {spec.type!r} there"
        if t.ready and spec.policy is None and spec.policy_version is not None:
            return f"waits until version {spec.policy_version} of type {spec.type!r} has arrived here"
        text = _WORDS.get(reason, f"waits ({reason})").format(queue=spec.queue)
        if (start := s.start_time(t)) is not None:
            text += f", {max(0, start - m.at) / 1000:.1f} s to go"
        elif all(w.running >= w.slots for w in _able(s, spec)):
            text += ": every slot is taken"
        return text + _apart(s, t, spec)
    if t.state == "RUNNING":
        doing = _DOING[t.stopping]
        session = s.sessions.get(t.session)
        silent = "" if session is None or session.state != "suspect" else "; the worker has not been heard of lately"
        unsaved = _unsaved(s, m, t, task_id)
        overdue = "" if unsaved is None else f"; no checkpoint for {unsaved / 1000:.0f} s: the next is overdue"
        notes = silent + overdue + _apart(s, t, spec)
        return f"{doing} on worker {t.worker_id}, attempt {t.attempt}, epoch {t.epoch}{notes}"
    if t.state == "PAUSED":
        return "paused by shutdown; resume it" if reason == "shutdown" else "paused; resume it"
    if t.error is not None and t.state in ("FAILED", "TIMED_OUT"):
        return f"{t.state}: {t.error.type}: {t.error.message[:200]}"
    return t.state + (f": {t.stop_detail}" if t.state == "CANCELLED" and t.stop_detail else "")


def _apart(s: State, t: TaskState, spec: TaskSpec) -> str:
    """A warning, if the task has a checkpoint that not all of its workers can see."""
    stores = {w.labels[CHECKPOINT_STORE] for w in _able(s, spec) if CHECKPOINT_STORE in w.labels}
    if t.checkpoint is None or len(stores) < 2:
        return ""
    return "; its workers do not share a checkpoint store: on another one it begins anew (perdure doctor)"


def _able(s: State, spec: TaskSpec) -> list[Any]:
    """Live sessions that serve the task's queue and type."""
    return [w for w in s.sessions.values() if w.state == "live" and spec.queue in w.queues and spec.type in w.types]


def _eta_seconds(s: State, m: Moment, t: TaskState, spec: TaskSpec, fraction: float | None) -> float | None:
    """Remaining time at the pace so far; the submitter's estimate before there is a pace."""
    if t.state not in ("PENDING", "RUNNING"):
        return None
    start = s.start_time(t)
    wait = 0 if start is None else max(0, start - m.at)
    elapsed = t.ran + (m.now - t.clock_since if t.started else 0)
    if fraction is not None and fraction > 0 and elapsed > 0:
        return round((wait + elapsed * (1 - fraction) / fraction) / 1000, 3)
    return None if spec.estimated_duration is None else (wait + max(0, spec.estimated_duration - elapsed)) / 1000


def _unsaved(s: State, m: Moment, t: TaskState, task_id: str) -> int | None:
    """ms since the last checkpoint of a running task, if the next one is overdue by two intervals."""
    if t.state != "RUNNING" or not t.started:
        return None
    since = m.now - max(t.clock_since, t.checkpoint_at or 0)
    interval = policies.effective(s, task_id).checkpoint_interval or limits.CHECKPOINT_INTERVAL_MAX
    return since if since > 3 * interval else None


def _seconds(ms: int | None) -> float | None:
    return None if ms is None else ms / 1000
