"""A partition's state as decisions see it: typed rows over a store, with everything since the last commit on top.

`put` is for `evolve` alone. Every change can be undone: to the last mark (one bad record), or to the last commit (an
aborted transaction). The ready fronts and the session table are derived from rows and never say anything rows do not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from heapq import merge
from itertools import groupby, islice, takewhile
from typing import Any, NamedTuple, TypeVar

from perdure.schemas import codec, ids, limits
from perdure.schemas.rows import Clock, Config, Counter, Live, Position, Row, Session, Step, TaskSpec, TaskState
from perdure.streams import tables
from perdure.streams.ready_front import ReadyFront
from perdure.streams.store import Store

Key = tuple[bytes, bytes]
R = TypeVar("R")
KEPT_TASKS = 20_000
KEPT_ROW_BYTES = 4_096
"""Bigger rows (inputs) are read again when they are needed."""
_FAILURE = limits.DECISION_KEYS // 100
"""What a part of a decision that raised counts in rows: so many of them are as much as one decision does."""
_KEPT = frozenset({tables.STATE, tables.SPEC, tables.LIVE})
"""Rows of a task that each of its inputs asks for: kept from one transaction to the next."""


class Applied(NamedTuple):
    """The applied version of a configuration name."""

    version: int
    content: dict[str, Any]
    text: bytes
    """The content as it was applied, JSON."""


class State:
    """The rows of one partition."""

    def __init__(self, store: Store, partition: int, partitions: int) -> None:
        self.partition = partition
        self.partitions = partitions
        self._store = store
        self._dirty: dict[bytes, dict[bytes, Any]] = {}
        self._kept: dict[bytes, dict[bytes, Any]] = {}
        self._read: dict[Key, Any] = {}
        self._unknown: set[bytes] = set()
        self._passing: set[Key] = set()
        self._undo: list[tuple[bytes, bytes, Any, bool]] = []
        self._encoded: dict[bytes, bytes | None] = {}
        self._put_off: dict[Key, int] = {}
        self._in_vain = 0
        self._load()

    def _load(self) -> None:
        """(Re)build what is derived from rows; all of it is small, or read when it is asked for."""
        self._fronts: dict[bytes, ReadyFront] = {}
        self._routing_keys: frozenset[str] | None = None
        self._types: dict[str, Applied | None] = {}
        self.sessions: dict[str, Session] = {s.decode(): row for s, row in self.scan(tables.SESSIONS)}
        self.clock: Clock = self.get(tables.CLOCK, b"") or Clock()
        self.position: Position | None = self.get(tables.POSITION, b"")
        self.next_timer: int | None = 0
        self.next_start: int | None = 0
        self.look_for_timers()
        self.grantable = True

    # Reading ---------------------------------------------------------------------------------------------------------

    def get(self, scope: bytes, suffix: bytes) -> Any:
        """The row, or None."""
        rows = self._dirty.get(scope)
        if rows is not None and suffix in rows:
            return rows[suffix]
        kept = self._kept.get(scope)
        if kept is not None and suffix in kept:
            return kept[suffix]
        if scope in self._unknown:
            return None
        key = (scope, suffix)
        if key not in self._read:
            self._read[key] = self._look_up(scope, suffix)
        return self._read[key]

    def _look_up(self, scope: bytes, suffix: bytes) -> Any:
        data = self._store.get(scope + suffix)
        row = None if data is None else codec.decode(data)
        if data is not None and suffix in _KEPT:
            self._keep(scope, suffix, row, data)
        elif data is None and suffix == tables.STATE and scope[:1] == b"t":
            self._unknown.add(scope)  # and the store has nothing else of the task: a new one needs no further reads
        return row

    def _keep(self, scope: bytes, suffix: bytes, row: Any, data: bytes) -> None:
        """Keep a row that the store has for later transactions."""
        if len(data) > KEPT_ROW_BYTES:
            return
        if scope not in self._kept and len(self._kept) >= KEPT_TASKS:
            for old in list(islice(self._kept, KEPT_TASKS // 2)):
                del self._kept[old]
        self._kept.setdefault(scope, {})[suffix] = row

    def scan(self, scope: bytes, start: bytes = b"", prefix: bytes = b"") -> Iterator[tuple[bytes, Any]]:
        """(suffix, row) of a scope in order, from `start` on, as it is now; `prefix` narrows the suffixes."""
        for suffix, row in self._range(scope, start, prefix):
            yield suffix, codec.decode(row) if isinstance(row, bytes) else row

    def workable(self, scope: bytes, start: bytes = b"", prefix: bytes = b"") -> Iterator[tuple[bytes, Any]]:
        """As `scan`, without the rows that are left out for a while."""
        for suffix, row in self._range(scope, start, prefix):
            if (scope, suffix) not in self._put_off:
                yield suffix, codec.decode(row) if isinstance(row, bytes) else row

    def suffixes(self, scope: bytes, start: bytes = b"", prefix: bytes = b"") -> Iterator[bytes]:
        """As `scan`, without the rows."""
        return (suffix for suffix, _ in self._range(scope, start, prefix))

    def _range(self, scope: bytes, start: bytes, prefix: bytes) -> Iterator[tuple[bytes, Any]]:
        """(suffix, row) of a scope; rows that the store has are still encoded."""
        fresh = self._dirty.get(scope, {})
        begin = max(start, prefix)
        mine = sorted(s for s in fresh if s >= begin and s.startswith(prefix))
        at = 0
        cut = len(scope)
        for key, data in self._store.scan(scope + prefix, begin[len(prefix) :] if begin.startswith(prefix) else b""):
            suffix = key[cut:]
            while at < len(mine) and mine[at] < suffix:
                if (row := fresh[mine[at]]) is not None:
                    yield mine[at], row
                at += 1
            if at < len(mine) and mine[at] == suffix:
                continue
            if suffix not in fresh:
                yield suffix, data
        for suffix in mine[at:]:
            if (row := fresh[suffix]) is not None:
                yield suffix, row

    def task(self, task_id: str) -> TaskState | None:
        """Where the task stands; None if it is unknown."""
        row: TaskState | None = self.get(tables.task(task_id), tables.STATE)
        return row

    def known(self, task_id: str) -> TaskState:
        """Where a task stands that must exist."""
        row = self.task(task_id)
        assert row is not None, f"no task {task_id}"
        return row

    def spec(self, task_id: str) -> TaskSpec:
        """What a task is that must exist."""
        row = self.get(tables.task(task_id), tables.SPEC)
        assert isinstance(row, TaskSpec), f"no task {task_id}"
        return row

    def live(self, task_id: str) -> Live | None:
        """The attempt's latest reports."""
        row: Live | None = self.get(tables.task(task_id), tables.LIVE)
        return row

    def steps(self, task_id: str, after: str = "") -> Iterator[tuple[str, Step]]:
        """Recorded steps in the order of their ids, behind `after`."""
        start = tables.step(after) + b"\x00" if after else tables.STEPS
        for suffix, row in self.scan(tables.task(task_id), start=start, prefix=tables.STEPS):
            yield tables.step_id(suffix), row

    def find_tasks(self, prefix: bytes, most: int, routing_key: str | None = None) -> list[str]:
        """Ids of the first `most` tasks, in the order of scopes, whose scope begins with `prefix`; looks at 1,000."""
        fresh = sorted(scope for scope in self._dirty if scope.startswith(prefix))
        scopes = (scope for scope, _ in groupby(merge(fresh, self._stored_tasks(prefix))))
        ids_of = (tables.task_of(scope)[1] for scope in islice(scopes, limits.DECISION_KEYS))
        wanted = (t for t in ids_of if routing_key is None or ids.split(t)[0] == routing_key)
        return list(islice((t for t in wanted if self.task(t) is not None), most))

    def _stored_tasks(self, prefix: bytes) -> Iterator[bytes]:
        """Scopes in the store; the rows of each are jumped over."""
        start = b""
        while (first := next(self._store.scan(prefix, start), None)) is not None:
            scope, _ = tables.task_of(first[0])
            yield scope
            start = scope[len(prefix) :] + b"\xff"

    def counter(self, name: str) -> int:
        """A number that only grows; 0 at first."""
        row: Counter | None = self.get(tables.COUNTERS, name.encode())
        return 0 if row is None else row.value

    def config(self, name: str) -> Applied | None:
        """What is applied of a configuration name; None if there is nothing or it was deleted."""
        if name not in self._types:
            row: Config | None = self.get(tables.CONFIG, name.encode())
            present = row is not None and row.content is not None
            self._types[name] = Applied(row.version, json.loads(row.content), row.content) if row and present else None  # type: ignore[arg-type]
        return self._types[name]

    def routing_keys(self) -> frozenset[str]:
        """Every routing key that the applied configuration knows."""
        if self._routing_keys is None:
            found = {limits.DEFAULT_QUEUE}
            for suffix, row in self.scan(tables.CONFIG):
                kind, _, name = suffix.decode().partition("/")
                content = {} if row.content is None else json.loads(row.content)
                if kind == "queue" and row.content is not None:
                    found |= {name, *content.get("routing_keys", ())}
                elif kind == "type" and content.get("queue"):
                    found.add(content["queue"])
            self._routing_keys = frozenset(found)
        return self._routing_keys

    def first_ready(self, scope: bytes) -> tuple[bytes, str] | None:
        """(place, task id) of the first task in a ready scope."""
        front = self._fronts.get(scope) or self._read_front(scope, b"")
        while (first := front.first()) is None and front.end is not None:
            front = self._read_front(scope, front.end + b"\x00")
        return first

    def _read_front(self, scope: bytes, start: bytes) -> ReadyFront:
        front = ReadyFront((place, row.task_id) for place, row in self.workable(scope, start=start))
        self._fronts[scope] = front
        return front

    def partition_time(self, at: int) -> int:
        """Partition time of a log time, unclamped: what events' due times are made from."""
        return at + self.clock.offset

    def due(self, at: int, delay: int) -> int:
        """Partition time `delay` after the log time `at`; in a window of doubt, counted from the later reading."""
        return at + self.clock.offset + max(0, self.clock.unconfirmed) + delay

    def start_time(self, t: TaskState) -> int | None:
        """Log time at which a task that waits for one becomes ready. Before its first attempt it waits for the time
        that was given; later for a delay, which is counted in partition time.
        """
        return t.due if t.due is None or not t.attempt else t.due - self.clock.offset

    def look_for_timers(self) -> None:
        """Find the earliest timers again, after some have fired: in partition time, and in wall time."""
        self.next_timer = self._first_timer(self.next_timer, tables.TIMERS, tables.SOFT_TIMERS)
        self.next_start = self._first_timer(self.next_start, tables.START_TIMERS)

    def _first_timer(self, since: int | None, *scopes: bytes) -> int | None:
        """Due time of the earliest timer. None is before the one found last: what has fired, or was taken back, before
        that is not looked through again.
        """
        if since is None:
            return None
        firsts = [
            next((s for s in self.suffixes(scope, start=tables.number(since)) if not self.is_put_off(scope, s)), None)
            for scope in scopes
        ]
        return min((tables.timer_due(f) for f in firsts if f is not None), default=None)

    def next_due(self) -> int | None:
        """Log time of the earliest timer; None: there is none."""
        dues = [] if self.next_timer is None else [self.next_timer - self.clock.offset]
        return min(dues if self.next_start is None else [*dues, self.next_start], default=None)

    # What was failed at ----------------------------------------------------------------------------------------------

    def is_put_off(self, scope: bytes, suffix: bytes) -> bool:
        """Whether a row is left out for a while."""
        return (scope, suffix) in self._put_off

    def put_off(self, key: Key, now: int) -> None:
        """Leave out a row whose part of a decision raised, for ten minutes.

        Only in memory, and until a transaction is aborted: a defect goes with the build, and another process tries at
        once.
        """
        self._put_off[key] = now + limits.PUT_OFF_MS  # in the order of their ends
        front = self._fronts.get(key[0])
        if front is not None:
            front.remove(key[1])

    def try_again(self, now: int) -> None:
        """What was put off until now is due like everything else."""
        over = [key for key, _ in takewhile(lambda item: item[1] <= now, self._put_off.items())]
        for key in over:
            del self._put_off[key]
            self._fronts.pop(key[0], None)
        if over:
            self.next_timer = self.next_start = 0
            self.look_for_timers()
            self.grantable = True

    def next_trial(self) -> int | None:
        """Log time from which on something that was put off is tried again."""
        return next(iter(self._put_off.values())) - self.clock.offset if self._put_off else None

    # Changing: for evolve alone --------------------------------------------------------------------------------------

    def put(self, scope: bytes, suffix: bytes, row: Row | None) -> None:
        """Set or (None) delete a row."""
        rows = self._dirty.setdefault(scope, {})
        known = suffix in rows
        self._undo.append((scope, suffix, rows.get(suffix), known))
        if row is None and (scope, suffix) in self._passing:
            rows.pop(suffix, None)
        else:
            rows[suffix] = row
        self._derive(scope, suffix, row)

    def put_new(self, scope: bytes, suffix: bytes, row: Row) -> None:
        """Set a row that was not there before: if it goes in the same transaction, it has never been written."""
        if suffix not in self._dirty.get(scope, ()):
            self._passing.add((scope, suffix))
        self.put(scope, suffix, row)

    def _derive(self, scope: bytes, suffix: bytes, row: Any) -> None:
        kind = scope[:1]
        if kind == b"t":
            return
        if kind == b"q":
            front = self._fronts.get(scope)
            if row is not None:
                self.grantable = True
                if front is not None:
                    front.add(suffix, row.task_id)
            elif front is not None:
                front.remove(suffix)
        elif kind in (tables.TIMERS, tables.SOFT_TIMERS):
            if row is not None and (self.next_timer is None or tables.timer_due(suffix) < self.next_timer):
                self.next_timer = tables.timer_due(suffix)
        elif kind == tables.START_TIMERS:
            if row is not None and (self.next_start is None or tables.timer_due(suffix) < self.next_start):
                self.next_start = tables.timer_due(suffix)
        elif kind == tables.SESSIONS:
            self.grantable = True
            if row is None:
                self.sessions.pop(suffix.decode(), None)
            else:
                self.sessions[suffix.decode()] = row
        elif kind == tables.CONFIG:
            self.grantable = True
            self._routing_keys = None
            self._types.clear()
        elif kind == tables.CLOCK:
            self.clock = row or Clock()
        elif kind == tables.POSITION:
            self.position = row

    # Marks, undo, commit ---------------------------------------------------------------------------------------------

    def mark(self) -> None:
        """Everything before this point stands, whatever happens to the next record."""
        self._undo.clear()
        self._in_vain = 0

    @property
    def changes(self) -> int:
        """Changes of rows since the mark: a point that `undo` can go back to."""
        return len(self._undo)

    @property
    def touched(self) -> int:
        """Rows changed since the mark, and what was tried in vain as so many."""
        return len(self._undo) + self._in_vain

    def check_rows(self, since: int) -> None:
        """Raise `ValueError` or `TypeError` if a row that has changed since that point cannot be written."""
        for scope, suffix, _, _ in self._undo[since:]:
            row = self._dirty[scope].get(suffix)
            if row is not None:
                codec.encode(row)

    def undo(self, back_to: int = 0) -> None:
        """Take every change since a point, or since the mark, back. Timers may be looked for too early afterwards."""
        self._in_vain += _FAILURE
        while len(self._undo) > back_to:
            scope, suffix, row, known = self._undo.pop()
            if known:
                self._dirty[scope][suffix] = row
            else:
                self._dirty[scope].pop(suffix, None)
            self._derive(scope, suffix, self.get(scope, suffix))

    def writes(self) -> dict[bytes, bytes | None]:
        """Every change since the last commit, encoded."""
        self._encoded = {
            scope + suffix: None if row is None else codec.encode(row)
            for scope, rows in self._dirty.items()
            for suffix, row in rows.items()
        }
        return dict(self._encoded)

    def committed(self) -> None:
        """The store has the changes now."""
        for scope, rows in self._dirty.items():
            if scope[:1] == b"t":
                self._keep_task(scope, rows)
        self._forget()

    def _keep_task(self, scope: bytes, rows: dict[bytes, Any]) -> None:
        kept = self._kept.get(scope, {})
        for suffix in _KEPT & rows.keys():
            kept.pop(suffix, None)
            data = self._encoded.get(scope + suffix)
            if data is not None:
                self._keep(scope, suffix, rows[suffix], data)

    def _forget(self) -> None:
        """Everything that holds for one transaction."""
        self._dirty.clear()
        self.mark()
        self._read.clear()
        self._unknown.clear()
        self._passing.clear()

    def rolled_back(self) -> None:
        """The transaction was aborted: back to what the store has. What was put off in it is in no quarantine."""
        self._forget()
        self._put_off.clear()
        self._kept.clear()
        self._load()
