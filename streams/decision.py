"""The shape of every decision.

A decision is a generator over (state, moment, input) that yields what happens: events, notes and effects. It never
changes state itself; the shell evolves each event, and takes each note, before the decision goes on, so its later
parts see what its earlier parts brought about. Everything that varies from outside is in the moment or the input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from perdure.schemas.common import Cause
from perdure.schemas.events import Event, ProgressReported
from perdure.schemas.inbox import CommandReply, InboxRecord
from perdure.schemas.rows import Row
from perdure.streams.state import Key, State

BUILD = "0.1.0"
FEATURE_LEVEL = 1
"""The highest level of features that this build knows. What it uses is the namespace's level, which somebody raises
once every engine knows the next one."""
LEVEL = "feature/level"
"""Name of the namespace's level in `config`; without one it is 1."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Where and when an input stands in the log."""

    at: int
    """Log time, ms."""
    now: int
    """Partition time, ms: what durations are measured in."""
    cause: Cause

    def following(self) -> Moment:
        """The moment of what follows from the input without being asked for by its command."""
        if self.cause.command_id is None:
            return self
        return Moment(self.at, self.now, Cause(partition=self.cause.partition, offset=self.cause.offset))

    def of(self, command_id: str | None, index: int | None = None) -> Moment:
        """The moment of one command of the input."""
        place = Cause(partition=self.cause.partition, offset=self.cause.offset, index=index, command_id=command_id)
        return Moment(self.at, self.now, place)


@dataclass(frozen=True, slots=True)
class Note:
    """A row of the session class, set (or deleted) by value."""

    scope: bytes
    suffix: bytes
    row: Row | None


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer a client."""

    reply: CommandReply


@dataclass(frozen=True, slots=True)
class ToWorker:
    """Tell a worker. A `RunAttempt` gets its token from the shell."""

    record: InboxRecord


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Publish accepted progress."""

    record: ProgressReported


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """Tell `source` after the commit which of its records are taken."""

    source: int
    up_to: int


@dataclass(frozen=True, slots=True)
class Quarantine:
    """The input cannot be executed."""

    cause: str
    detail: str


Effect = Reply | ToWorker | Telemetry | Acknowledge | Quarantine


@dataclass(frozen=True, slots=True)
class Part:
    """What a decision does for one of many: it happens whole, or not at all if it raises, and the others go on."""

    of: str
    """What it is done for, in words: a task, a session, a cursor."""
    work: Outputs
    """Not begun yet."""
    row: Key | None = None
    """The row that makes it due; it is left out for a while after a failure. None: nothing would try it again."""
    otherwise: Outputs | None = None
    """What is done in place of work that has raised. Not begun yet."""


Output = Event | Note | Effect | Part
Outputs = Iterator[Output]


def of_task(s: State, m: Moment, task_id: str) -> dict[str, Any]:
    """The fields every next event of a task has."""
    row = s.task(task_id)
    return _head(s, m) | {"task_id": task_id, "seq": 1 if row is None else row.seq + 1}


def of_partition(s: State, m: Moment) -> dict[str, Any]:
    """The fields every next event of the partition has."""
    return _head(s, m) | {"seq": s.counter("events") + 1}


def _head(s: State, m: Moment) -> dict[str, Any]:
    return {"at": m.at, "cause": m.cause, "build": BUILD, "feature_level": feature_level(s)}


def feature_level(s: State) -> int:
    """The level at which this partition decides."""
    known = s.config(LEVEL)
    return 1 if known is None else int(known[1]["level"])
