"""The rows of engine-changelog: compared with the fold of the events, and looked through for what brings tasks on.

Rows are kept as digests once they were looked at; of each task's own row what its next wake-up hangs on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from perdure.projections import audit_records as keys
from perdure.projections.audit_fold import TIMES, Fold, slim
from perdure.projections.audit_records import Decoder, LogRecord, Unreadable, digest
from perdure.projections.audit_task import Task
from perdure.schemas import topics

Report = Callable[[str, str, int, str, str], None]
"""(rule, topic, offset, text, task id)."""
Row = dict[str, Any] | None
"""None: deleted."""
_TOPIC = topics.CHANGELOG.name
_PRESENT = b""
_OF_A_TASK = frozenset({keys.IDEMPOTENCY, keys.UNBOUND})
"""Rows beside a task's own that come and go with it."""
_ENDED = frozenset({"COMPLETED", "CANCELLED", "FAILED", "TIMED_OUT"})


@dataclass(frozen=True, slots=True)
class _Standing:
    """Of a task's own row: what says how it goes on."""

    offset: int
    state: str
    ready: bool
    session: str
    grant: int
    timers: dict[str, int]
    order: int


class Rows:
    """The changelog of one partition."""

    def __init__(self, decoder: Decoder, report: Report) -> None:
        self._decoder, self._report = decoder, report
        self.position: int | None = None
        """Next offset of task-commands, as the newest transaction says."""
        self._last = 0
        """Offset of the last record: by which a row that is missing is not there."""
        self._stored: dict[bytes, tuple[int, bytes]] = {}
        """Key -> (offset, digest) of every row that was looked at."""
        self._fresh: dict[bytes, tuple[int, bytes | None]] = {}
        """Key -> (offset, value) of what has come since; None: deleted."""
        self._standing: dict[str, _Standing] = {}
        self._waking: dict[str, set[bytes]] = defaultdict(set)
        """Task -> keys of its places, leases and timers."""
        self._owner: dict[bytes, str] = {}
        """Place or lease -> its task."""

    def feed(self, record: LogRecord) -> None:
        """Take in a record of the changelog."""
        self._last = record.offset
        key, kind = record.key or b"", (record.key or b"")[:1]
        if kind == keys.POSITION:
            self._move(record)
        elif kind in keys.FOLDED | keys.WAKING | {keys.SESSION, keys.MARK} and not _is_live(key):
            self._fresh[key] = (record.offset, record.value)

    def _move(self, record: LogRecord) -> None:
        try:
            position = int(self._decoder.read(record.value or b"").fields["offset"])
        except Unreadable as error:
            self._report("readable", _TOPIC, record.offset, str(error), "")
            return
        if self.position is not None and position < self.position:
            self._report("position-grows", _TOPIC, record.offset, f"position {position} after {self.position}", "")
        self.position = position

    def check(self, fold: Fold, tasks: dict[str, Task]) -> None:
        """Compare what has changed since the last time. Call it when the events up to `position` are folded."""
        fresh: dict[bytes, tuple[int, Row]] = {}
        for key, (offset, value) in self._fresh.items():
            try:
                fresh[key] = (offset, self._row(key, value))
            except Unreadable as error:
                self._report("readable", _TOPIC, offset, str(error), "")
                fold.touched.discard(key)
        for key in sorted(fold.touched | fresh.keys()):
            if key[:1] in keys.FOLDED:
                self._compare(key, fresh.get(key), fold, tasks)
        dirty = set(self._take_in(fresh))
        for task_id in sorted(dirty):
            task = tasks.get(task_id)
            if task is None or not task.broken:
                self._check_waking(task_id, task)
        fold.touched.clear()
        self._fresh.clear()

    def _row(self, key: bytes, value: bytes | None) -> Row:
        """A row as it is compared; of cursors it is enough that they are there, and of sessions that have not ended."""
        if value is None or key[:1] == keys.MARK:
            return None if value is None else {}
        fields = self._decoder.read(value).fields
        if key[:1] == keys.SESSION:
            return None if fields["state"] == "ended" else {}
        row: Row = slim(fields)
        return row

    # G5 --------------------------------------------------------------------------------------------------------------

    def _compare(self, key: bytes, fresh: tuple[int, Row] | None, fold: Fold, tasks: dict[str, Task]) -> None:
        task: Task | None = None
        if key[:1] == keys.TASK:
            task_id, suffix = keys.task_of(key)
            task = tasks.get(task_id)
            if task.row is None if task is not None else not fold.whole:
                return
            if task is not None and suffix == keys.STATE:
                self._compare_state(task, fresh, fold)
                return
        elif fold.lost or not (fold.whole or key in fold.rows) or (key[:1] == keys.UNBOUND and not fold.clock_known):
            return
        offset, found = self._found(key, fresh)
        expected = fold.rows.get(key)
        if found != expected and not (key[:1] in _OF_A_TASK and any(t.broken for t in tasks.values())):
            what = "is there" if expected is None else "is not there" if found is None else "differs"
            text = f"row {key!r:.120} {what}, by the events before position {self.position}"
            self._report("changelog-fold", _TOPIC, offset, text, "" if task is None else task.id)
            if task is not None:
                task.give_up()

    def _found(self, key: bytes, fresh: tuple[int, Row] | None) -> tuple[int, bytes | None]:
        if fresh is None:
            return self._stored.get(key, (self._last, None))
        offset, row = fresh
        return offset, None if row is None else digest(row)

    def _compare_state(self, task: Task, fresh: tuple[int, Row] | None, fold: Fold) -> None:
        """A task's own row, field by field; due times may have been moved back with a log's clock that was."""
        assert task.row is not None
        offset, row = fresh or (self._last, None)
        if row is None:
            text = f"the task's row is not that of event {task.row['seq']}: it was not written"
        else:
            if not fold.clock_known:
                task.row |= {f: row[f] for f in TIMES if f != "timers" or row[f].keys() == task.row[f].keys()}
            elif fold.set_back:
                _move_back(task.row, row)
            wrong = [f for f in row if row[f] != task.row.get(f)]
            if not wrong:
                return
            text = "; ".join(f"{f} is {row[f]!r:.80}, by the events {task.row.get(f)!r:.80}" for f in wrong)
        self._report("changelog-fold", _TOPIC, offset, text, task.id)
        task.give_up()

    # G6 --------------------------------------------------------------------------------------------------------------

    def _take_in(self, fresh: dict[bytes, tuple[int, Row]]) -> Iterator[str]:
        """Make fresh rows stored ones; the tasks whose next wake-up is to be looked at."""
        for key, (offset, row) in fresh.items():
            kind = key[:1]
            if row is None:
                self._stored.pop(key, None)
            else:
                self._stored[key] = (offset, digest(row) if row else _PRESENT)
            if kind in keys.WAKING:
                yield from self._take_in_waking(key, row)
            elif kind == keys.TASK:
                task_id, suffix = keys.task_of(key)
                if suffix == keys.STATE:
                    self._stand(task_id, offset, row)
                    yield task_id
            elif row is None and kind in (keys.SESSION, keys.MARK):
                session = key[1:].removeprefix(b"ending/").decode(errors="replace")
                scope = keys.LEASE + keys.text(session)
                yield from (task_id for lease, task_id in self._owner.items() if lease.startswith(scope))

    def _take_in_waking(self, key: bytes, row: Row) -> Iterator[str]:
        before = keys.timer_of(key)[1] if key[:1] in keys.TIMERS else self._owner.pop(key, None)
        if before is not None:
            self._waking[before].discard(key)
            yield before
        if row is not None:
            self._waking[row["task_id"]].add(key)
            if key[:1] not in keys.TIMERS:
                self._owner[key] = row["task_id"]
            yield row["task_id"]

    def _stand(self, task_id: str, offset: int, row: Row) -> None:
        if row is None:
            self._standing.pop(task_id, None)
            return
        self._standing[task_id] = _Standing(offset, *(row[f] for f in _Standing.__slots__[1:]))

    def _check_waking(self, task_id: str, task: Task | None) -> None:
        there, standing = self._waking.get(task_id, set()), self._standing.get(task_id)
        named = set() if standing is None else self._named(task_id, task, standing, there)
        for key in sorted(there - named):
            text = f"{key!r:.120} is a row of a task that does not name it"
            self._report("stray-row", _TOPIC, self._stored[key][0], text, task_id)
        if standing is None:
            self._waking.pop(task_id, None)
            return
        fault = self._asleep(standing, sorted(named - there))
        if fault is not None:
            self._report("next-wake-up", _TOPIC, standing.offset, fault, task_id)

    def _named(self, task_id: str, task: Task | None, standing: _Standing, there: set[bytes]) -> set[bytes]:
        """Keys that the task's row says are there."""
        named = {keys.timer_key(due, kind, task_id) for kind, due in standing.timers.items()}
        if standing.session:
            named.add(keys.LEASE + keys.text(standing.session) + keys.number(standing.grant))
        if standing.ready:
            spec = task.spec if task is not None else None
            if spec is None:  # where it waits is not known: wherever it does is right
                named |= {key for key in there if key[:1] in (keys.READY, keys.HELD)}
            else:
                held = spec["policy"] is None and spec["policy_version"] is not None
                scope = (keys.HELD if held else keys.READY) + keys.text(spec["queue"]) + keys.text(spec["type"])
                named.add(scope + bytes([9 - spec["priority"]]) + keys.number(standing.order))
        return named

    def _asleep(self, standing: _Standing, missing: list[bytes]) -> str | None:
        """Why the task would never go on by itself; None if it will."""
        if missing:
            return f"the row {missing[0]!r:.120}, which the task names, is not there"
        if standing.state == "PENDING" and not standing.ready and not standing.timers.keys() & {"due", keys.NOT_BEFORE}:
            return "it is PENDING without a place in the queue or a due time"
        if standing.state == "RUNNING":
            session = standing.session.encode()
            known = keys.SESSION + session in self._stored or keys.MARK + b"ending/" + session in self._stored
            if not standing.session or not known:
                return f"it is RUNNING under session {standing.session or 'none'}, which is not there"
        return None

    @property
    def tasks(self) -> set[str]:
        """The tasks that have a row."""
        return set(self._standing)

    @property
    def open_tasks(self) -> int:
        """Tasks that have not ended."""
        return sum(s.state not in _ENDED for s in self._standing.values())


def _is_live(key: bytes) -> bool:
    return key[:1] == keys.TASK and keys.task_of(key)[1] == keys.LIVE


def _move_back(folded: dict[str, Any], row: dict[str, Any]) -> None:
    """Due times that were counted from a log time that was ahead: those of the row, where they are earlier."""
    same = folded["timers"].keys() == row["timers"].keys()
    if same and all(row["timers"][kind] <= due for kind, due in folded["timers"].items()):
        folded["timers"] = row["timers"]
    if folded["due"] is not None and row["due"] is not None and row["due"] <= folded["due"]:
        folded["due"] = row["due"]
