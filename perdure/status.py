"""What the engine says about a task, as Python values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from perdure.schemas import values
from perdure.schemas.errors import DecodeError, TaskCancelled, TaskFailed, TaskOutcome, TaskTimedOut

ENDED = frozenset({"COMPLETED", "FAILED", "TIMED_OUT", "CANCELLED"})


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where a task stands. Times are log times in ms since 1970; what is not known (yet) is None."""

    task_id: str
    type: str
    state: str
    """PENDING, RUNNING, PAUSED, COMPLETED, FAILED, TIMED_OUT or CANCELLED."""
    queue: str = ""
    reason: str = ""
    """Why it is PENDING or PAUSED."""
    why: str = ""
    """One sentence for people: why it is where it is."""
    stopping: str = "none"
    """none, pausing, cancelling, timing_out or draining: what a RUNNING task is on its way to."""
    priority: int = 5
    labels: Mapping[str, str] = field(default_factory=dict)
    progress: float | None = None
    """0 to 1."""
    current_step: str | None = None
    milestones: tuple[str, ...] = ()
    steps_completed: int = 0
    total_steps: int | None = None
    units_done: int | None = None
    units_total: int | None = None
    attempt: int = 0
    max_attempts: int | None = None
    epoch: int = 0
    elapsed_seconds: float | None = None
    eta_seconds: float | None = None
    estimated_duration_seconds: float | None = None
    submitted_at: int | None = None
    started_at: int | None = None
    finished_at: int | None = None
    updated_at: int | None = None
    due: int | None = None
    worker_id: str | None = None
    checkpoint_version: int | None = None
    result: Any = None
    """None also for a result too large for a record: `result_ref` describes it, `Handle.result` fetches it."""
    result_ref: Mapping[str, Any] | None = None
    """Of a large result its size in bytes, sha256, preview (how its JSON text begins), and the day it was written."""
    error: Mapping[str, Any] | None = None
    """The last recorded error: type, message, error_types, traceback."""
    cancel_reason: str | None = None
    timeout: str | None = None
    """Which timeout ended it: queue, run, total or no_progress."""
    dead_letter: bool = False
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """All that the engine said, as plain JSON; also what this build has no name for."""

    @property
    def ended(self) -> bool:
        """Whether the task is COMPLETED, FAILED, TIMED_OUT or CANCELLED."""
        return self.state in ENDED

    def outcome(self) -> TaskOutcome | None:
        """The error that `result` raises for a task that ended without one; None for every other task."""
        where = f"task {self.task_id}"
        error = dict(self.error) if self.error else None
        if self.state == "FAILED":
            told = f"{error['type']}: {error['message']}" if error else "no error was recorded"
            return TaskFailed(self.task_id, f"{where} failed: {told}", error=error)
        if self.state == "TIMED_OUT":
            return TaskTimedOut(self.task_id, f"{where} ran out of its {self.timeout or 'total'} time", error=error)
        if self.state == "CANCELLED":
            told = f": {self.cancel_reason}" if self.cancel_reason else ""
            return TaskCancelled(self.task_id, f"{where} was cancelled{told}", error=error)
        return None


def parse_status(body: bytes) -> Status:
    """The status in an engine's answer. Raises `DecodeError`."""
    try:
        raw = json.loads(body)
        known = {name: raw[name] for name in _NAMES if name in raw}
        known["result"] = values.loads(json.dumps(raw.get("result")).encode())
        return Status(**known | {"milestones": tuple(raw.get("milestones", ())), "raw": raw})
    except (ValueError, TypeError, AttributeError) as error:
        raise DecodeError(f"the engine's answer is no status: {error}") from error


_NAMES = frozenset(f.name for f in fields(Status)) - {"raw"}
