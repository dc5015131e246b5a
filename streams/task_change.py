"""One task's rows while an event changes them."""

from __future__ import annotations

from typing import Any

from perdure.schemas import rows
from perdure.schemas.codec import replace
from perdure.schemas.rows import TaskState
from perdure.streams import tables
from perdure.streams.state import State
from perdure.streams.task_lifecycle import LEGAL


class IllegalTransition(Exception):
    """An event does not fit the state: a defect of a decision. Never leaves the core."""


def expect(holds: bool, otherwise: str) -> None:
    """Raise `IllegalTransition` unless something holds that every decision has to see to."""
    if not holds:
        raise IllegalTransition(otherwise)


class TaskChange:
    """A task's state while an event changes it: rows that hang on it are written at once, itself by `save`."""

    def __init__(self, s: State, event: Any) -> None:
        self.s, self.event, self.id = s, event, event.task_id
        row = s.task(self.id)
        if row is None:
            raise IllegalTransition(f"no task {self.id}")
        self.row: TaskState = row
        self.changes: dict[str, Any] = {"seq": event.seq, "updated_at": event.at}

    def save(self, **changes: Any) -> None:
        """Write the state with everything that has changed."""
        self.changes |= changes
        self.s.put(tables.task(self.id), tables.STATE, replace(self.row, **self.changes))

    def move(self, state: str, **changes: Any) -> None:
        """To another state, if the table allows it."""
        if state not in LEGAL[self.row.state]:
            raise IllegalTransition(f"{type(self.event).__name__}: {self.row.state} to {state} of {self.id}")
        self.changes |= {"state": state, "reason": "", "stopping": "none"} | changes

    def arm(self, kind: str, due: int, *, relative: bool = True) -> None:
        """Set a timer, in place of an older one of the kind. `relative`: counted from this event on, so in a window of
        doubt it has to be set right should the window's jump turn out to have been none.
        """
        self.disarm(kind)
        suffix = tables.timer(due, kind, self.id)
        self.s.put(tables.timers(kind), suffix, rows.Timer(task_id=self.id, kind=kind))
        if relative and self.s.clock.unconfirmed > 0:
            self.s.put(tables.WINDOW, suffix, rows.Mark(value=self.s.clock.unconfirmed))
        self.changes["timers"] = self._timers() | {kind: due}

    def disarm(self, *kinds: str) -> None:
        """Take timers back."""
        timers = self._timers()
        for kind in kinds:
            if kind in timers:
                self.s.put(tables.timers(kind), tables.timer(timers[kind], kind, self.id), None)
                self.changes["timers"] = timers = {k: due for k, due in timers.items() if k != kind}

    def disarm_all(self) -> None:
        """Take every timer back."""
        self.disarm(*self._timers())

    def _timers(self) -> dict[str, int]:
        timers: dict[str, int] = self.changes.get("timers", self.row.timers)
        return timers

    def time(self) -> int:
        """Partition time of the event."""
        return self.s.partition_time(self.event.at)

    def due(self, delay: int) -> int:
        """Partition time `delay` after the event."""
        return self.s.due(self.event.at, delay)

    def spec(self) -> rows.TaskSpec:
        return self.s.spec(self.id)

    def place(self) -> tuple[bytes, bytes]:
        """Key of the task's place in the ready queue, or among those held until their type's version is applied."""
        spec = self.spec()
        held = spec.policy is None and spec.policy_version is not None
        scope = tables.held if held else tables.ready
        return scope(spec.queue, spec.type), tables.place(spec.priority, self.row.order)

    def leave_queue(self) -> None:
        """Off the ready queue; the queue clock stands."""
        if self.row.ready:
            self.s.put(*self.place(), None)
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
            declined = getattr(self.event, "why", "") == "declined"
            changed = replace(session, running=max(0, session.running - 1), full=session.full and declined)
            self.s.put(tables.SESSIONS, t.session.encode(), changed)
        ran = max(0, self.time() - t.clock_since) if t.started else 0
        self.disarm("run", "start")
        self.changes |= {"session": "", "started": False, "run_used": t.run_used + ran, "ran": t.ran + ran}
        usage = getattr(self.event, "usage", None)
        if usage is not None:
            self.changes["usage"] = usage
