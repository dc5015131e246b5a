"""How each event changes state: the only writer of durable rows, live and on recovery alike.

This module holds the dispatch and the events of the partition; `evolve_task` holds those of tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice, takewhile
from typing import Any

from perdure.schemas import events, rows
from perdure.schemas.codec import replace
from perdure.streams import evolve_task, tables
from perdure.streams.state import State
from perdure.streams.task_change import expect


def evolve(s: State, event: Any) -> None:
    """Apply one event. Raises `IllegalTransition` for one that no decision may make."""
    if getattr(event, "task_id", None) is not None:
        evolve_task.apply(s, event)
        _remember_answer(s, event)
        return
    last = s.counter("events")
    expect(event.seq == last + 1, f"partition event {event.seq} after {last}")
    s.put(tables.COUNTERS, b"events", rows.Counter(value=event.seq))
    _HANDLERS[type(event)](s, event)


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
        accepted=not refused, reason=event.reason if refused else "", field=event.field if refused else None,
        at=event.at,
    ))  # fmt: skip


def _rejected(s: State, e: events.CommandRejected | events.ReportRejected) -> None:
    """A rejection that concerns no known task: no state is kept for ids that name nothing."""


# Events of the partition ---------------------------------------------------------------------------------------------


def _config_applied(s: State, e: events.ConfigApplied) -> None:
    s.put(tables.CONFIG, e.name.encode(), rows.Config(version=e.version, content=e.content))


def _forward_queued(s: State, e: events.ForwardQueued) -> None:
    s.put(tables.COUNTERS, f"sent/{e.target}".encode(), rows.Counter(value=e.number))
    s.put(tables.outbox(e.target), tables.number(e.number), rows.Outbox(record=e.record))


def _forward_taken(s: State, e: events.ForwardTaken) -> None:
    s.put(tables.COUNTERS, f"taken/{e.source}".encode(), rows.Counter(value=e.number))


def _forward_acknowledged(s: State, e: events.ForwardAcknowledged) -> None:
    scope, last = tables.outbox(e.target), tables.number(e.up_to)
    for suffix in list(takewhile(lambda suffix: suffix <= last, s.suffixes(scope))):
        s.put(scope, suffix, None)


SHIFT_CHUNK = 200
_CONFIRMED = b""
"""Key of the part of the last window's jump that was confirmed; before the window's timers."""


def _clock_adjusted(s: State, e: events.ClockAdjusted) -> None:
    """The clock row, and the next few timers of a closed window of doubt.

    They were counted from a log time that was ahead by what was unconfirmed then; what of that was not confirmed in the
    end is taken back.
    """
    before = s.clock
    s.put(tables.CLOCK, b"", rows.Clock(offset=e.offset, unconfirmed=e.unconfirmed, shift=e.shift))
    if e.unconfirmed > 0:
        return
    if before.unconfirmed > 0 and next(s.scan(tables.WINDOW), None) is not None:
        confirmed = before.unconfirmed if e.shift == before.shift else 0
        s.put(tables.WINDOW, _CONFIRMED, rows.Mark(value=confirmed))
    level = s.get(tables.WINDOW, _CONFIRMED)
    chunk = list(islice(s.scan(tables.WINDOW, start=b"\x00"), SHIFT_CHUNK))
    for suffix, mark in chunk:
        s.put(tables.WINDOW, suffix, None)
        if mark.value > level.value:
            _take_back(s, suffix, mark.value - level.value)
    if level is not None and len(chunk) < SHIFT_CHUNK:
        s.put(tables.WINDOW, _CONFIRMED, None)


def _take_back(s: State, suffix: bytes, ms: int) -> None:
    kind, task_id = tables.timer_of(suffix)
    due = tables.timer_due(suffix)
    t = s.task(task_id)
    if t is None:
        return
    changes: dict[str, Any] = {}
    if t.timers.get(kind) == due:
        s.put(tables.TIMERS, suffix, None)
        s.put(tables.TIMERS, tables.timer(due - ms, kind, task_id), rows.Timer(task_id=task_id, kind=kind))
        changes["timers"] = t.timers | {kind: due - ms}
    if kind == "due" and t.due == due:  # also of a task that was paused meanwhile
        changes["due"] = due - ms
    if changes:
        s.put(tables.task(task_id), tables.STATE, replace(t, **changes))


_HANDLERS: dict[type, Callable[[State, Any], None]] = {
    events.ConfigApplied: _config_applied,
    events.ForwardQueued: _forward_queued,
    events.ForwardTaken: _forward_taken,
    events.ForwardAcknowledged: _forward_acknowledged,
    events.ClockAdjusted: _clock_adjusted,
    events.CommandRejected: _rejected,
    events.ReportRejected: _rejected,
}
HANDLED = frozenset(_HANDLERS) | frozenset(evolve_task.HANDLERS)
