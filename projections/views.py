"""What the read side can be asked: a SQLite file that `view_writer` fills from the log.

The file is a cache. Every row comes from a topic, so a deleted file is filled again with the same content. Each query
opens the file anew, reads one consistent state of it and closes it: any thread may ask at any time.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from perdure.projections.inputs import Fact, fact
from perdure.schemas.codec import decode_as
from perdure.schemas.public import ConfigRecord, DeadLetter, LogLine, TaskProgress, WorkerMetrics

PAGE_MAX = 1_000
"""Rows of a page."""
PAGE_BYTES = 4 * 1024 * 1024
"""A page ends early above this; it always has one row."""
ALIVE_MS = 30_000
"""A worker heard of within this is alive; they speak every few seconds."""

APPLICATION_ID = 0x50455244
VERSION = 2
"""Of the tables below: a file of another version is filled anew."""
SCHEMA = """
CREATE TABLE positions (
    topic TEXT, partition INTEGER, topic_id TEXT, next INTEGER, PRIMARY KEY (topic, partition)) WITHOUT ROWID;
CREATE TABLE tasks (
    task_id TEXT PRIMARY KEY, type TEXT, queue TEXT, state TEXT, submitted_at INTEGER, retired_at INTEGER, labels TEXT,
    record BLOB);
CREATE INDEX tasks_by_time ON tasks (submitted_at, task_id);
CREATE INDEX tasks_by_state ON tasks (state, submitted_at, task_id);
CREATE INDEX tasks_by_type ON tasks (type, submitted_at, task_id);
CREATE INDEX tasks_by_queue ON tasks (queue, state, submitted_at, task_id);
CREATE INDEX tasks_by_end ON tasks (retired_at) WHERE retired_at IS NOT NULL;
CREATE TABLE labels (
    name TEXT, value TEXT, task_id TEXT, PRIMARY KEY (name, value, task_id)) WITHOUT ROWID;
CREATE INDEX labels_by_task ON labels (task_id);
CREATE TABLE events (
    task_id TEXT, seq INTEGER, at INTEGER, kind TEXT, partition INTEGER, offset INTEGER, record BLOB,
    PRIMARY KEY (task_id, seq));
CREATE INDEX events_by_time ON events (at);
CREATE TABLE logs (
    partition INTEGER, offset INTEGER, task_id TEXT, at INTEGER, record BLOB, PRIMARY KEY (partition, offset));
CREATE INDEX logs_by_task ON logs (task_id, offset);
CREATE INDEX logs_by_time ON logs (at);
CREATE TABLE dead_letters (
    task_id TEXT PRIMARY KEY, type TEXT, queue TEXT, fingerprint TEXT, failed_at INTEGER, record BLOB);
CREATE INDEX dead_letters_by_time ON dead_letters (failed_at, task_id);
CREATE TABLE workers (worker_id TEXT PRIMARY KEY, at INTEGER, record BLOB);
CREATE TABLE config (name TEXT PRIMARY KEY, version INTEGER, record BLOB);
"""

Place = tuple[int, str]
"""Where a page ended: its last row's time and task id. The next page begins behind it, whatever came meanwhile."""
Row = TypeVar("Row")


@dataclass(frozen=True)
class Page(Generic[Row]):
    """Some rows, and where to go on; None: there are no more."""

    rows: list[Row]
    next: Place | None


@dataclass(frozen=True)
class Stretch(Generic[Row]):
    """Some rows of a task's own sequence, oldest first."""

    rows: list[Row]
    last: int
    """The last row's number: the next stretch begins behind it."""
    more: bool
    """Whether there are rows behind it already."""


@dataclass(frozen=True)
class Numbered(Generic[Row]):
    """A record and its place: the version of a configuration, the number of a log line."""

    number: int
    record: Row


class Views:
    """Queries on the view store. All raise `sqlite3.Error` if the file is gone or broken."""

    def __init__(self, path: Path) -> None:
        self._uri = f"{path.absolute().as_uri()}?mode=ro"

    def status(self, task_id: str) -> TaskProgress | None:
        """The task's latest public state; None if it is not known (yet)."""
        row = self._one("SELECT record FROM tasks WHERE task_id = ?", task_id)
        return None if row is None else decode_as(TaskProgress, row[0])

    def tasks(
        self,
        *,
        states: Sequence[str] = (),
        type: str | None = None,
        queue: str | None = None,
        labels: Sequence[tuple[str, str]] = (),
        limit: int = 100,
        after: Place | None = None,
    ) -> Page[TaskProgress]:
        """Tasks, newest submit first, that have one of the states and all of the rest."""
        where = _Where()
        where.equal("type", type)
        where.equal("queue", queue)
        where.among("state", states)
        for label in labels:
            where.add("task_id IN (SELECT task_id FROM labels WHERE name = ? AND value = ?)", *label)
        where.behind("submitted_at", after)
        sql = (
            f"SELECT record, submitted_at, task_id FROM tasks {where} ORDER BY submitted_at DESC, task_id DESC LIMIT ?"  # noqa: S608
        )
        rows, more = self._rows(sql, *where.values, limit=limit)
        return Page([decode_as(TaskProgress, r[0]) for r in rows], (rows[-1][1], rows[-1][2]) if more else None)

    def events(self, task_id: str, *, after: int = 0, limit: int = 100, kinds: Sequence[str] = ()) -> Stretch[Fact]:
        """The task's events (of some kinds) behind the number `after`, as far back as they are kept."""
        where = _Where()
        where.equal("task_id", task_id)
        where.add("seq > ?", after)
        where.among("kind", kinds)
        sql = f"SELECT record, seq FROM events {where} ORDER BY seq LIMIT ?"  # noqa: S608
        rows, more = self._rows(sql, *where.values, limit=limit)
        return Stretch([fact(r[0]) for r in rows], rows[-1][1] if rows else after, more)

    def every_event(self, task_id: str, kinds: Sequence[str]) -> Iterator[Fact]:
        """All of the task's events of some kinds, a page at a time."""
        after, more = 0, True
        while more:
            part = self.events(task_id, after=after, limit=PAGE_MAX, kinds=kinds)
            yield from part.rows
            after, more = part.last, part.more

    def logs(
        self, task_id: str, *, last: int | None = None, after: int = -1, limit: int = 100
    ) -> Stretch[Numbered[LogLine]]:
        """The task's last `last` lines, or those behind the line number `after`."""
        columns = "SELECT record, offset FROM logs WHERE task_id = ?"
        if last is None:
            rows, more = self._rows(f"{columns} AND offset > ? ORDER BY offset LIMIT ?", task_id, after, limit=limit)
        else:
            rows, more = self._rows(f"{columns} ORDER BY offset DESC LIMIT ?", task_id, limit=last)[0][::-1], False
        lines = [Numbered(r[1], decode_as(LogLine, r[0])) for r in rows]
        return Stretch(lines, lines[-1].number if lines else after, more)

    def dead_letters(
        self,
        *,
        type: str | None = None,
        queue: str | None = None,
        fingerprint: str | None = None,
        limit: int = 100,
        after: Place | None = None,
    ) -> Page[DeadLetter]:
        """Dead letters, newest first."""
        where = _Where()
        for column, value in (("type", type), ("queue", queue), ("fingerprint", fingerprint)):
            where.equal(column, value)
        where.behind("failed_at", after)
        sql = (
            f"SELECT record, failed_at, task_id FROM dead_letters {where} ORDER BY failed_at DESC, task_id DESC LIMIT ?"  # noqa: S608
        )
        rows, more = self._rows(sql, *where.values, limit=limit)
        return Page([decode_as(DeadLetter, r[0]) for r in rows], (rows[-1][1], rows[-1][2]) if more else None)

    def dead_letter(self, task_id: str) -> DeadLetter | None:
        """One dead letter; None if the task is none."""
        row = self._one("SELECT record FROM dead_letters WHERE task_id = ?", task_id)
        return None if row is None else decode_as(DeadLetter, row[0])

    def workers(self) -> list[WorkerMetrics]:
        """What each worker said last, by id. `alive` says whether that is recent."""
        with self._open() as db:
            rows = db.execute("SELECT record FROM workers ORDER BY worker_id").fetchall()
        return [decode_as(WorkerMetrics, r[0]) for r in rows]

    def queues(self) -> dict[str, dict[str, int]]:
        """Queue -> state -> number of tasks."""
        found: dict[str, dict[str, int]] = {}
        with self._open() as db:
            for queue, state, n in db.execute("SELECT queue, state, count(*) FROM tasks GROUP BY queue, state"):
                found.setdefault(queue, {})[state] = n
        return found

    def config(self, kind: str) -> list[Numbered[ConfigRecord]]:
        """The configuration names of a kind (type, queue, ...), each with its newest version."""
        with self._open() as db:
            sql = "SELECT record, version FROM config WHERE name >= ? AND name < ? ORDER BY name"
            rows = db.execute(sql, (f"{kind}/", f"{kind}0")).fetchall()  # "0" follows "/"
        return [Numbered(r[1], decode_as(ConfigRecord, r[0])) for r in rows]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._uri, uri=True, timeout=5)) as db:
            yield db

    def _one(self, sql: str, *values: Any) -> Any:
        with self._open() as db:
            return db.execute(sql, values).fetchone()

    def _rows(self, sql: str, *values: Any, limit: int) -> tuple[list[Any], bool]:
        """Rows up to the limits of a page, and whether there are more."""
        limit = min(limit, PAGE_MAX)
        with self._open() as db:
            return _page(db.execute(sql, (*values, limit + 1)), limit)


def alive(worker: WorkerMetrics, now: int) -> bool:
    """Whether the worker, by its own clock against `now` (ms), was heard of lately and has not stopped."""
    return worker.state != "stopped" and now - worker.at < ALIVE_MS


def _page(found: Iterable[Any], limit: int) -> tuple[list[Any], bool]:
    rows: list[Any] = []
    size = 0
    for row in found:
        size += len(row[0])
        if rows and (len(rows) == limit or size > PAGE_BYTES):
            return rows, True
        rows.append(row)
    return rows, False


class _Where:
    """Conditions of a query, all of which hold, and their values."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._parts: list[str] = []

    def add(self, condition: str, *values: Any) -> None:
        self._parts.append(condition)
        self.values += values

    def equal(self, column: str, value: Any) -> None:
        if value is not None:
            self.add(f"{column} = ?", value)

    def among(self, column: str, values: Sequence[Any]) -> None:
        if values:
            self.add(f"{column} IN ({', '.join('?' * len(values))})", *values)

    def behind(self, column: str, place: Place | None) -> None:
        if place is not None:
            self.add(f"({column}, task_id) < (?, ?)", *place)

    def __str__(self) -> str:
        return f"WHERE {' AND '.join(self._parts)}" if self._parts else ""
