"""The attempts of a task, read from its events: what ran where, how it ended, and what it cost.

An attempt is a run charged to `max_attempts`. It may go through several epochs: a lost worker, a drain or a pause ends
the epoch and not the attempt. A redrive begins again with attempt 1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import get_args

from perdure.projections.inputs import Fact
from perdure.projections.progress import timeout_error
from perdure.schemas import events
from perdure.schemas.common import ErrorInfo, Usage

_Ending = (
    events.AttemptLost
    | events.AttemptFailed
    | events.TaskCompleted
    | events.TaskPaused
    | events.TaskCancelled
    | events.TaskTimedOut
    | events.TaskFailed
)
KINDS = tuple(e.__name__ for e in (events.TaskGranted, events.TaskRedriven, events.AttemptStarted, *get_args(_Ending)))
"""The kinds of events that `attempts` reads: a task's steps need not be fetched for it."""


VALUES = tuple(e.__name__ for e in (events.TaskSubmitted, events.TaskRedriven, events.TaskCompleted))
"""The kinds of events that hold a task's input and result."""


_ATTEMPTS, _EPOCHS = 500, 100
"""What is shown at the most: a task may fail a million times, and be granted as often without that."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One grant of the task to a worker. Times are log times in ms."""

    number: int
    worker_id: str
    granted_at: int
    started_at: int | None = None
    ended_at: int | None = None
    outcome: str = "RUNNING"
    """RUNNING, COMPLETED, FAILED, TIMED_OUT, CANCELLED, PAUSED or LOST."""
    why: str = ""
    """Why it was lost, paused, cancelled or timed out."""
    usage: Usage | None = None


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A run charged to `max_attempts`, with its epochs."""

    number: int
    redrive: int = 0
    """How often the task had been sent back from the dead letters before."""
    epochs: tuple[Epoch, ...] = ()
    outcome: str = "RUNNING"
    """As of its last epoch, or of the task that ended with it; LOST and PAUSED attempts may go on."""
    error: ErrorInfo | None = None

    @property
    def started_at(self) -> int | None:
        """When user code first ran; None: it never did."""
        return next((e.started_at for e in self.epochs if e.started_at is not None), None)

    @property
    def ended_at(self) -> int | None:
        """When its last epoch ended; None: it runs."""
        return self.epochs[-1].ended_at


def attempts(facts: Iterable[Fact]) -> list[Attempt]:
    """The attempts of one task, in order, from its events in the order of their `seq`: the newest 500, and of each its
    newest 100 epochs.
    """
    found: deque[Attempt] = deque(maxlen=_ATTEMPTS)
    redrive = 0
    for event in facts:
        if isinstance(event, events.TaskRedriven):
            redrive += 1
        elif isinstance(event, events.TaskGranted):
            epoch = Epoch(number=event.epoch, worker_id=event.worker_id, granted_at=event.at)
            if not found or (found[-1].number, found[-1].redrive) != (event.attempt, redrive):
                found.append(Attempt(number=event.attempt, redrive=redrive))
            found[-1] = replace(found[-1], epochs=(*found[-1].epochs[1 - _EPOCHS :], epoch), outcome="RUNNING")
        elif found and found[-1].redrive == redrive:
            found[-1] = _after(found[-1], event)
    return list(found)


def recorded(facts: Iterable[Fact], name: str) -> bytes | None:
    """The `input` or `result` that holds after a task's events, as its record carries it; None: there is none."""
    found: bytes | None = None
    for event in facts:
        given: bytes | None = getattr(event, name, None)
        if given is not None:
            found = given
        elif isinstance(event, events.TaskSubmitted):  # the id of a task that was forgotten, used again
            found = None
    return found


def _after(attempt: Attempt, event: Fact) -> Attempt:
    """The attempt after one more event."""
    match event:
        case events.AttemptStarted():
            return _last(attempt, started_at=event.at)
        case events.AttemptLost():
            return _end(attempt, event, "LOST", f"{event.why}: {event.detail}" if event.detail else event.why)
        case events.AttemptFailed():
            return replace(_end(attempt, event, event.outcome), error=event.error)
        case events.TaskCompleted():
            return _end(attempt, event, "COMPLETED")
        case events.TaskPaused():
            return _end(attempt, event, "PAUSED", event.why)
        case events.TaskCancelled():
            return _end(attempt, event, "CANCELLED", event.reason)
        case events.TaskTimedOut():
            ended = _end(attempt, event, "TIMED_OUT", event.which)
            return ended if ended is attempt else replace(ended, error=timeout_error(event.which))
        case events.TaskFailed():
            return replace(_end(attempt, event, "FAILED", event.why), error=event.error)
        case _:
            return attempt


def _end(attempt: Attempt, event: _Ending, outcome: str, why: str = "") -> Attempt:
    """The running epoch ends; where none runs, only the attempt does, unless it has failed already."""
    if attempt.outcome == "RUNNING":
        usage = getattr(event, "usage", None)
        return replace(_last(attempt, ended_at=event.at, outcome=outcome, why=why, usage=usage), outcome=outcome)
    if attempt.outcome in ("LOST", "PAUSED") and outcome != "PAUSED":
        return replace(attempt, outcome=outcome)
    return attempt


def _last(attempt: Attempt, **changes: object) -> Attempt:
    *before, epoch = attempt.epochs
    return replace(attempt, epochs=(*before, replace(epoch, **changes)))  # type: ignore[arg-type]
