"""What a tick does: cursors go on, timers fire, silent sessions are looked at.

Only ticks fire timers. A durable timer goes with its task or with what replaces it; a timer of the session class only
makes the tick look again.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from perdure.schemas import events, limits
from perdure.schemas.codec import replace
from perdure.schemas.commands import Tick
from perdure.schemas.inbox import RevokeAttempt
from perdure.schemas.rows import Mark, Timer
from perdure.streams import attempts, clock, leases, policies, routing, tables, task_lifecycle
from perdure.streams.decision import Moment, Note, Outputs, Part, ToWorker, of_task
from perdure.streams.state import State
from perdure.streams.task_lifecycle import ENDED

SKEW = b"skew"
BINDING = b"binding/"
AT_ONCE = 0
"""A tick is wanted now: there is unfinished work."""
_KEYS = limits.DECISION_KEYS * 9 // 10
BINDS_AT_ONCE = limits.CHUNK * 2 // 3


def tick(s: State, m: Moment, record: Tick) -> Outputs:
    """Time has passed, if log and host agree on it."""
    s.try_again(m.now)
    skew = record.host_clock - m.at
    if not clock.agrees(record, m.at):
        yield Note(tables.MARKS, SKEW, Mark(value=min(abs(skew), limits.TIME_MAX)))
        return
    if s.get(tables.MARKS, SKEW) is not None:
        yield Note(tables.MARKS, SKEW, None)
    if m.at - record.due > limits.BEAT_MS or leases.overdue(s, m):
        yield from leases.restart(s, m)
    yield from leases.tell(s, m, record.executed)
    yield from clock.settle(s, m, next(s.scan(tables.WINDOW), None) is not None)
    yield from _go_on(s, m)
    if s.touched < _KEYS:  # before the timers: a million that wait to be forgotten would keep it for minutes
        yield from leases.examine(s, m)
    yield from _fire(s, m, tables.START_TIMERS, m.at)
    yield from _fire(s, m, tables.TIMERS, m.now)
    yield from _fire(s, m, tables.SOFT_TIMERS, m.now)


def _go_on(s: State, m: Moment) -> Outputs:
    """One chunk of each cursor, as far as half the decision's budget goes; after the timers' half, none waits for long.

    Another one is first with each input, so that none waits for the end of those before it.
    """
    marks = list(s.workable(tables.MARKS))
    first = m.cause.offset % max(1, len(marks))
    for suffix, mark in [*marks[first:], *marks[:first]]:
        if s.touched >= _KEYS // 2:
            return
        yield Part(suffix.decode(), _next_chunk(s, m, suffix, mark), (tables.MARKS, suffix))


def _next_chunk(s: State, m: Moment, cursor: bytes, mark: Mark) -> Outputs:
    kind, _, rest = cursor.partition(b"/")
    if kind + b"/" == leases.ENDING:
        yield from leases.end_leases(s, m, rest.decode(), mark.text)
    elif kind + b"/" == leases.DRAINING:
        yield from leases.drain(s, m, rest.decode(), tables.number(mark.value))
    elif kind + b"/" == attempts.RETIRING:
        yield from attempts.retire_steps(s, m, rest.decode(), since={})
    elif kind + b"/" == BINDING:
        yield from bind_tasks(s, m, rest.decode(), after=mark.text)
    elif kind + b"/" == task_lifecycle.TELLING:
        yield from task_lifecycle.tell_waiters(s, m, rest.decode())
    elif kind + b"/" == routing.CLEARING:
        yield from routing.clear_outbox(s, m, int(rest), mark.value)


def bind_tasks(s: State, m: Moment, task_type: str, after: str = "") -> Outputs:
    """Bind the policies of tasks that were submitted before their type was known here, a chunk at a time."""
    start = after.encode() + b"\x00" if after else b""
    found = islice(s.scan(tables.unbound(task_type), start=start), BINDS_AT_ONCE + 1)
    waiting = [suffix.decode() for suffix, _ in found]
    for task_id in waiting[:BINDS_AT_ONCE]:  # one that is passed over is tried again with its grant
        yield Part(task_id, policies.bind(s, m.following(), task_id))
    cursor = BINDING + task_type.encode()
    if len(waiting) > BINDS_AT_ONCE:
        yield Note(tables.MARKS, cursor, Mark(text=waiting[BINDS_AT_ONCE - 1]))
    elif s.get(tables.MARKS, cursor) is not None:
        yield Note(tables.MARKS, cursor, None)


def _fire(s: State, m: Moment, scope: bytes, now: int) -> Outputs:
    for suffix, timer in _due(s, scope, now):
        if s.touched >= _KEYS:
            return
        if s.get(scope, suffix) is None:
            continue  # what fired before has ended the task or taken the timer back
        fired = _soft(s, m, suffix, timer) if scope == tables.SOFT_TIMERS else _durable(s, m, timer)
        yield Part(f"{timer.kind} of {timer.task_id}", fired, (scope, suffix))


def _due(s: State, scope: bytes, now: int) -> list[tuple[bytes, Timer]]:
    found: list[tuple[bytes, Timer]] = []
    first = s.next_start if scope == tables.START_TIMERS else s.next_timer
    if first is None or first > now:
        return found
    for suffix, timer in s.workable(scope, start=tables.number(first)):
        if tables.timer_due(suffix) > now or len(found) >= limits.TICK_TIMERS:
            break
        found.append((suffix, timer))
    return found


def _durable(s: State, m: Moment, timer: Timer) -> Outputs:
    """A timer of the durable class: what it stands for happens."""
    yield from _KINDS[timer.kind](s, m.following(), timer.task_id)


def _ready(s: State, m: Moment, task_id: str) -> Outputs:
    yield events.TaskQueued(**of_task(s, m, task_id), reason="queued")


def _not_started(s: State, m: Moment, task_id: str) -> Outputs:
    t = s.known(task_id)
    why = "not started within its deadline"
    yield ToWorker(RevokeAttempt(worker_id=t.worker_id, session=t.session, task_id=task_id, epoch=t.epoch, why=why))
    yield from task_lifecycle.lost(s, m, task_id, "not_started")


def _timeout(kind: str) -> Callable[[State, Moment, str], Outputs]:
    return lambda s, m, task_id: task_lifecycle.time_is_up(s, m, task_id, kind)


def _retire(s: State, m: Moment, task_id: str) -> Outputs:
    """Forget an ended task: first its steps and answers, a chunk with each tick, then itself."""
    scope = tables.task(task_id)
    kept = list(islice(s.suffixes(scope, prefix=tables.STEPS), limits.STEPS_CHUNK))
    if kept:
        first, last = tables.step_id(kept[0]), tables.step_id(kept[-1])
        yield events.StepsRetired(**of_task(s, m, task_id), from_step=first, up_to_step=last, count=len(kept))
        return
    answers = sum(1 for _ in islice(s.suffixes(scope, prefix=tables.ANSWERS), limits.STEPS_CHUNK))
    if answers:
        yield events.AnswersForgotten(**of_task(s, m, task_id), count=answers)
    if answers == limits.STEPS_CHUNK:
        return
    yield events.TaskRetired(**of_task(s, m, task_id))


def _soft(s: State, m: Moment, suffix: bytes, timer: Timer) -> Outputs:
    """A timer of the session class: look whether there is still something to do."""
    yield Note(tables.SOFT_TIMERS, suffix, None)
    t = s.task(timer.task_id)
    if timer.kind == "waiter":
        waiting = s.scan(tables.waiters(timer.task_id))
        expired = list(islice(((k, w) for k, w in waiting if w.expires <= m.now), task_lifecycle.WAITERS_AT_ONCE + 1))
        for key, waiter in expired[: task_lifecycle.WAITERS_AT_ONCE]:
            yield from task_lifecycle.answer_waiter(s, m, timer.task_id, key, waiter)
        if len(expired) > task_lifecycle.WAITERS_AT_ONCE:
            yield Note(tables.SOFT_TIMERS, suffix, timer)
        return
    limit = None if t is None or t.state in ENDED else policies.effective(s, timer.task_id).no_progress_timeout
    live = s.live(timer.task_id)
    if t is None or limit is None or live is None or not t.started or t.stopping in ("timing_out", "cancelling"):
        return
    if live.active > m.now:  # counted from a log time that was ahead
        live = replace(live, active=m.now)
        yield Note(tables.task(timer.task_id), tables.LIVE, live)
    due = live.active + limit
    if due <= m.now:
        yield from task_lifecycle.time_is_up(s, m.following(), timer.task_id, "progress")
    else:
        yield Note(tables.SOFT_TIMERS, tables.timer(due, "progress", timer.task_id), timer)


_KINDS: dict[str, Callable[[State, Moment, str], Outputs]] = {
    "due": _ready,
    tables.NOT_BEFORE: _ready,
    "start": _not_started,
    "queue": _timeout("queue"),
    "run": _timeout("run"),
    "total": _timeout("total"),
    "retain": _retire,
}


def skewed(s: State) -> bool:
    """Whether the last tick found that log and host disagree about the time."""
    return s.get(tables.MARKS, SKEW) is not None


def next_tick(s: State) -> int | None:
    """Log time at which the next tick has something to do; None: never, as things stand."""
    cursors = (k for k, _ in s.workable(tables.MARKS) if k != SKEW)
    if s.clock.unconfirmed or s.clock.shift or any(leases.can_go_on(s, k) for k in cursors):
        return AT_ONCE
    if next(s.scan(tables.WINDOW), None) is not None:
        return AT_ONCE
    looks = [look - s.clock.offset for look in leases.next_looks(s)]
    return min((at for at in (*looks, s.next_due(), s.next_trial()) if at is not None), default=None)
