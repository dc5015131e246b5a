"""The fold of one partition's task-events: its durable rows, as the engine's changelog would hold them.

Recovery without store and changelog, time travel and the proof of G5 all stand on it. Only durable rows are written:
sessions, leases' beats and latest progress are in no event. Where the log has lost its beginning, the events of a task
that began before it are passed over and the task is named: half a task would be worse than none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from perdure.schemas import events
from perdure.schemas.errors import EventsIncomplete
from perdure.schemas.rows import Counter
from perdure.streams import tables
from perdure.streams.evolve import evolve
from perdure.streams.state import State
from perdure.streams.store import Store
from perdure.streams.task_change import IllegalTransition

BATCH = 1_000
"""Events between two writes to the store."""
_ENDS = (events.TaskCompleted, events.TaskCancelled, events.TaskFailed, events.TaskTimedOut, events.TaskDeadLettered,
         events.DeadLetterDiscarded, events.AnswersForgotten)  # fmt: skip
_SAYS_NOTHING = (events.CommandRejected, events.ReportRejected)
"""Events that come in any state."""
NAMED = 5
"""Tasks that an error names; the rest is counted."""


@dataclass(slots=True)
class Headless:
    """A task whose first events the log has lost."""

    first: int
    """Number of its first event that is left."""
    open: bool = True
    """Whether it may still have to run: nothing that is left says that it has ended."""


class EventFold:
    """Events of one partition, in order, into the durable rows of a store. Pure but for the store it is handed.

    `store` is empty, or holds what `flush` of an earlier fold of the same partition left there.
    """

    def __init__(self, store: Store, partition: int, partitions: int) -> None:
        self.state = State(store, partition, partitions)
        self.headless: dict[str, Headless] = {}
        """Tasks that are passed over, by id."""
        self._store = store
        self._waiting = 0

    def apply(self, event: Any) -> None:
        """Fold the next event. Raises `EventsIncomplete` if it cannot follow what came before it."""
        task_id = getattr(event, "task_id", None)
        if task_id is None:
            self._count_from(event)
        elif self._is_headless(task_id, event):
            return
        try:
            evolve(self.state, event)
        except IllegalTransition as error:
            raise EventsIncomplete(
                f"{self._topic} does not hold together at the event that input {event.cause.offset} brought about: "
                f"{error}. An event is missing or not the engine's own; recover from the changelog or a snapshot"
            ) from error
        self._waiting += 1
        if self._waiting >= BATCH:
            self.flush()

    def _count_from(self, event: Any) -> None:
        """The partition's own events count on from the first that is left."""
        if self.state.counter("events") == 0 and event.seq > 1:
            self.state.put(tables.COUNTERS, b"events", Counter(value=event.seq - 1))

    def _is_headless(self, task_id: str, event: Any) -> bool:
        lost = self.headless.get(task_id)
        if lost is None:
            if event.seq == 1 or self.state.task(task_id) is not None:
                return False
            lost = self.headless[task_id] = Headless(first=event.seq)
        if isinstance(event, events.TaskRetired):
            del self.headless[task_id]
        elif not isinstance(event, _SAYS_NOTHING):
            lost.open = not isinstance(event, _ENDS)
        return True

    def flush(self) -> None:
        """Bring the store up to the last event folded."""
        writes = self.state.writes()
        self._store.apply({key: row for key, row in writes.items() if tables.is_durable(key)})
        self.state.committed()
        self._waiting = 0

    def require_whole(self, first_offset: int) -> None:
        """Raise `EventsIncomplete`, with names, if rows are missing because the log does not reach back far enough.

        `first_offset`: the first offset that task-events still has in this partition. Unless that is 0 nobody can say
        that nothing is missing: a task that has been silent since before it has no event left to be missed by.
        """
        lost = sorted(task_id for task_id, t in self.headless.items() if t.open)
        if lost:
            named = ", ".join(f"{t} (from event {self.headless[t].first})" for t in lost[:NAMED])
            more = f" and {len(lost) - NAMED:,} more" if len(lost) > NAMED else ""
            raise EventsIncomplete(f"{self._topic} does not reach back to the beginning of {named}{more}. {_ADVICE}")
        if first_offset > 0:
            raise EventsIncomplete(
                f"{self._topic} begins at offset {first_offset}: a task silent since before, the clock and "
                f"the numbers of forwarded records may be missing. {_ADVICE}"
            )

    @property
    def _topic(self) -> str:
        return f"task-events/{self.state.partition}"


_ADVICE = "Recover from the local store, a snapshot or the changelog; keep task-events for ever to recover from it"


def fold_events(found: Iterable[Any], store: Store, partition: int, partitions: int) -> EventFold:
    """Fold decoded events of a partition, in order, into `store`; the fold, flushed. Raises `EventsIncomplete`."""
    fold = EventFold(store, partition, partitions)
    for event in found:
        fold.apply(event)
    fold.flush()
    return fold
