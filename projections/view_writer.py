"""Fills the view store from the log: one thread, one SQLite transaction per batch, rows and positions together.

Rows are replaced by key, so a record read twice changes nothing, and a file that is deleted, or whose topics have been
made anew, is filled again. The store is not synced to disk at each commit: a power cut costs a tail of whole batches,
which is read again.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from perdure.projections.inputs import GATHER_MS, fact, read_as, task_of
from perdure.projections.progress import KEPT_MS
from perdure.projections.views import APPLICATION_ID, SCHEMA, VERSION
from perdure.schemas import events, limits, topics
from perdure.schemas.codec import decode_as, encode
from perdure.schemas.errors import ConfigurationError, DecodeError, InfrastructureError, Unreachable
from perdure.schemas.public import ConfigRecord, DeadLetter, LogLine, Quarantined, TaskProgress, WorkerMetrics
from perdure.streams.log import BEGIN, Log, Record, TopicPartition

Clock = Callable[[], int]
"""Returns the present time in ms."""

BATCH = 1_000
"""Records of one transaction."""
WAIT_S = 0.5
SETTLE_S = 10.0
MEASURE_EVERY_S = 5.0
LIVE_BATCHES = 8
"""Batches over which the clocks are compared."""

_TABLES = {
    topics.PROGRESS.name: ("tasks", "labels"),
    topics.DEAD_LETTERS.name: ("dead_letters",),
    topics.EVENTS.name: ("events",),
    topics.LOGS.name: ("logs",),
    topics.METRICS.name: ("workers",),
    topics.CONFIG.name: ("config",),
}
_ALWAYS_ANEW = (topics.DEAD_LETTERS.name, topics.CONFIG.name)
"""Their rows are deleted by tombstones, which the broker keeps for a day only: who was away longer would never see
them. Both are short, so they are read from the beginning at each start."""


@dataclass(frozen=True)
class Retention:
    """How much log time the store keeps, ms. The topics themselves keep more."""

    tasks_ms: int = KEPT_MS
    """After the engine has forgotten them."""
    events_ms: int = 30 * topics.DAY_MS
    logs_ms: int = 7 * topics.DAY_MS
    workers_ms: int = topics.DAY_MS


@dataclass(frozen=True)
class Reading:
    """How far the store is, as last measured."""

    caught_up: bool = False
    """Whether it has once read all that was there."""
    lag: Mapping[str, int] = field(default_factory=dict)
    """Topic -> records still to be read."""
    skew_ms: int | None = None
    """The log's clock minus this machine's; None: no live event has been read yet."""
    problem: str | None = None
    """Why it could not be measured last time."""


class ViewWriter:
    """The only writer of a view store. `reading` may be read by any thread; the rest belongs to one at a time.

    Raises `ConfigurationError` for a file that is none of ours or has a writer already, `Unreachable` without a broker,
    `InfrastructureError` when the file cannot be written, or was damaged (then it is deleted).
    """

    def __init__(self, log: Log, path: Path, *, clock: Clock, retention: Retention | None = None) -> None:
        self.reading = Reading()
        self._log, self._path, self._clock = log, path, clock
        self._retention = retention or Retention()
        self._failed: InfrastructureError | None = None
        self._live: deque[int] = deque(maxlen=LIVE_BATCHES)
        self._heard: int | None = None
        with ExitStack() as held:
            held.callback(os.close, _locked(path))
            self._db = held.enter_context(closing(_opened(path)))
            self._reader = held.enter_context(closing(log.reader(gather_ms=GATHER_MS)))
            self._producer = held.enter_context(closing(log.producer()))
            with _writing(path):
                self._next = self._positions()
            self._ends = {where: self._reader.bounds(*where)[1] for where in self._next}
            self._reader.assign(self._next)
            self._held = held.pop_all()

    def run(self, stop: threading.Event) -> None:
        """Fill the store until `stop` is set. Raises `InfrastructureError` when log or disk fail for good."""
        measured = time.monotonic()
        while not stop.is_set():
            self.step(WAIT_S)
            if time.monotonic() - measured >= MEASURE_EVERY_S:
                self.measure()
                measured = time.monotonic()

    def step(self, timeout_s: float) -> int:
        """Read one batch, waiting up to `timeout_s` for its first record; returns the number of records."""
        records, now = self._reader.read(BATCH, timeout_s), self._clock()
        if records:
            with _writing(self._path):
                self._store(records)
            if self._heard is not None and self.reading.caught_up and len(records) < BATCH:
                self._live.append(self._heard - now)
        if not self.reading.caught_up and all(self._lag(where) == 0 for where in self._ends):
            self.reading = replace(self.reading, caught_up=True, lag=dict.fromkeys(_TABLES, 0))
        return len(records)

    def measure(self) -> None:
        """Find out how far behind the store is and how the clocks differ; `run` does so every few seconds."""
        try:
            self._ends = {where: self._reader.bounds(*where)[1] for where in self._ends}
        except Unreachable as error:
            self.reading = replace(self.reading, problem=str(error))
            return
        lag = dict.fromkeys(_TABLES, 0)
        for where in self._ends:
            lag[where[0]] += self._lag(where)
        # Latency only ever makes the log's clock look late, so the largest difference is the nearest to the truth.
        self.reading = replace(self.reading, lag=lag, skew_ms=max(self._live, default=None), problem=None)

    def close(self) -> None:
        """Let go of log, file and lock."""
        self._held.close()

    # Positions ------------------------------------------------------------------------------------------------------

    def _positions(self) -> dict[TopicPartition, int]:
        """Where to read on; rows that do not fit the topics any more are deleted."""
        found: dict[TopicPartition, int] = {}
        with self._db:
            known = {(t, p): (i, n) for t, p, i, n in self._db.execute("SELECT * FROM positions")}
            for topic, tables in _TABLES.items():
                topic_id = self._log.topic_id(topic)
                wheres = [(topic, p) for p in range(self._log.partitions if topics.BY_NAME[topic].partitioned else 1)]
                bounds = {where: self._reader.bounds(*where) for where in wheres}
                fits = all(known.get(w, ("", -1))[0] == topic_id and known[w][1] <= bounds[w][1] for w in wheres)
                if fits and topic not in _ALWAYS_ANEW:
                    found |= {w: max(known[w][1], bounds[w][0]) for w in wheres}
                    continue
                for table in tables:
                    self._db.execute(f"DELETE FROM {table}")  # noqa: S608
                rows = [(topic, p, topic_id, bounds[topic, p][0]) for _, p in wheres]
                self._db.executemany("INSERT OR REPLACE INTO positions VALUES (?, ?, ?, ?)", rows)
                found |= dict.fromkeys(wheres, BEGIN)
        return found

    def _lag(self, where: TopicPartition) -> int:
        """Records of a partition still to be read; transaction markers may count as some while there are any."""
        end = self._ends[where]
        return 0 if self._reader.caught_up(*where, end) else max(1, end - max(0, self._next[where]))

    # Records --------------------------------------------------------------------------------------------------------

    def _store(self, records: list[Record]) -> None:
        bad, self._heard = 0, None
        with self._db:
            for record in records:
                try:
                    self._row(record)
                except DecodeError as error:
                    self._quarantine(record, error)
                    bad += 1
            behind = {(r.topic, r.partition): r.offset + 1 for r in records}
            self._db.executemany(
                "UPDATE positions SET next = ? WHERE topic = ? AND partition = ?", [(n, *w) for w, n in behind.items()]
            )
            self._prune({r.topic for r in records})
            if bad:
                self._settle()
        self._next |= behind

    def _row(self, r: Record) -> None:
        """One record into its table. Raises `DecodeError`."""
        match r.topic:
            case topics.PROGRESS.name if r.value is None:
                self._forget("task_id = ?", _key(r))
            case topics.PROGRESS.name:
                self._task(r)
            case topics.EVENTS.name:
                self._event(r)
            case topics.LOGS.name:
                line = decode_as(LogLine, r.value or b"")
                self._put("logs", r.partition, r.offset, line.task_id, r.at, r.value)
            case topics.METRICS.name:
                worker = decode_as(WorkerMetrics, r.value or b"")
                self._put("workers", worker.worker_id, r.at, r.value)
            case topics.DEAD_LETTERS.name if r.value is None:
                self._db.execute("DELETE FROM dead_letters WHERE task_id = ?", (_key(r),))
            case topics.DEAD_LETTERS.name:
                d = decode_as(DeadLetter, r.value or b"")
                self._put("dead_letters", d.task_id, d.type, d.queue, d.fingerprint, d.failed_at, r.value)
            case topics.CONFIG.name if r.value is None:
                self._db.execute("DELETE FROM config WHERE name = ?", (_key(r),))
            case topics.CONFIG.name:
                decode_as(ConfigRecord, r.value or b"")
                self._put("config", _key(r), r.offset, r.value)

    def _task(self, r: Record) -> None:
        p = read_as(TaskProgress, r.value or b"")
        labels = json.dumps(p.labels, sort_keys=True)
        known = self._db.execute("SELECT labels FROM tasks WHERE task_id = ?", (p.task_id,)).fetchone()
        if known is None or known[0] != labels:
            self._db.execute("DELETE FROM labels WHERE task_id = ?", (p.task_id,))
            rows = [(name, value, p.task_id) for name, value in p.labels.items()]
            self._db.executemany("INSERT INTO labels VALUES (?, ?, ?)", rows)
        retired_at = p.updated_at if p.retired else None
        self._put("tasks", p.task_id, p.type, p.queue, p.state, p.submitted_at, retired_at, labels, r.value)

    def _forget(self, which: str, *values: object) -> None:
        gone = f"SELECT task_id FROM tasks WHERE {which}"  # noqa: S608
        self._db.execute(f"DELETE FROM labels WHERE task_id IN ({gone})", values)  # noqa: S608
        self._db.execute(f"DELETE FROM tasks WHERE {which}", values)  # noqa: S608

    def _event(self, r: Record) -> None:
        event = fact(r.value)
        task_id = task_of(event)
        if task_id is None:
            return
        # An event's own time is the log's; a record's is that of whoever wrote it, on every topic but task-commands.
        self._heard = max(event.at, self._heard or 0)
        if isinstance(event, events.ProgressReported):
            raise DecodeError("accepted progress belongs on task-telemetry")
        if event.seq == 1:  # an id that was free again: the events of its former task are another story
            self._db.execute("DELETE FROM events WHERE task_id = ? AND offset < ?", (task_id, r.offset))
        if isinstance(event, events.TaskRetired):  # its last record may be gone by now, and the tombstone as well
            self._db.execute(
                "UPDATE tasks SET retired_at = ? WHERE task_id = ? AND submitted_at < ?", (event.at, task_id, event.at)
            )
        self._put("events", task_id, event.seq, event.at, type(event).__name__, r.partition, r.offset, r.value)

    def _put(self, table: str, *values: object) -> None:
        self._db.execute(f"INSERT OR REPLACE INTO {table} VALUES ({', '.join('?' * len(values))})", values)  # noqa: S608

    def _prune(self, read: set[str]) -> None:
        """Drop what is older than kept, by log time: the same records leave the same rows, whenever they are read.

        A time that is ahead of this machine counts as now: else one record of a clock that leapt would take all others
        away, and all that follow, until that time has come.
        """
        kept = {
            topics.EVENTS.name: ("events", self._retention.events_ms),
            topics.LOGS.name: ("logs", self._retention.logs_ms),
            topics.METRICS.name: ("workers", self._retention.workers_ms),
        }
        for topic in read & kept.keys():
            table, ms = kept[topic]
            newest = f"min((SELECT max(at) FROM {table}), ?)"  # noqa: S608
            self._db.execute(f"DELETE FROM {table} WHERE at < {newest} - ?", (self._clock(), ms))  # noqa: S608
        # Of tasks tombstones tell as well, but who was away for long never sees those.
        if read & {topics.PROGRESS.name, topics.EVENTS.name}:
            newest = "min((SELECT max(at) FROM events), ?)"
            self._forget(f"retired_at < {newest} - ?", self._clock(), self._retention.tasks_ms)

    def _quarantine(self, r: Record, error: DecodeError) -> None:
        value = r.value or b""
        bad = Quarantined(
            topic=r.topic, partition=r.partition, offset=r.offset, at=r.at, reader="views", cause=error.code,
            detail=str(error), key=r.key, record=value[: limits.QUARANTINE_KEPT], size=len(value),
        )  # fmt: skip
        self._producer.append(topics.QUARANTINE.name, r.partition, None, encode(bad), self._acked)

    def _acked(self, _offset: int, error: InfrastructureError | None) -> None:
        self._failed = error or self._failed

    def _settle(self) -> None:
        """Wait until bad records are in quarantine: only then does the position move past them."""
        if not self._producer.flush(SETTLE_S):
            raise Unreachable(f"no broker took the quarantined records within {SETTLE_S:.0f} s")
        if self._failed is not None:
            raise self._failed


def _key(r: Record) -> str:
    return (r.key or b"").decode(errors="replace")


def _locked(path: Path) -> int:
    """A lock that is held as long as this process has the file open."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ConfigurationError(
            f"the view store {path} is in use by another server; give each its own file"
        ) from error
    return lock


def _opened(path: Path) -> sqlite3.Connection:
    """The store with the tables of this version; one of an older version begins anew."""
    try:
        db = _connected(path)
        whose, version = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        blank = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    except sqlite3.DatabaseError as error:
        raise ConfigurationError(
            f"{path} is no view store, or damaged ({error}): delete it, it is filled again from the log, or choose"
            " another file"
        ) from error
    if whose != APPLICATION_ID and not blank:
        raise ConfigurationError(f"{path} is another program's database: choose another file for the view store")
    if whose == APPLICATION_ID and version == VERSION:
        return db
    if not blank:
        db.close()
        _delete(path)
        db = _connected(path)
    db.executescript(
        f"BEGIN; {SCHEMA} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION}; COMMIT"
    )
    return db


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Names what SQLite raises, with what to do. A damaged store is deleted: all of it is in the log."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        primary = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest of an error code tells it apart further
        if primary not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise InfrastructureError(
                f"the view store {path} cannot be written ({error}): make room on the disk, or delete the file; it is"
                " filled again from the log"
            ) from error
        _delete(path)
        raise InfrastructureError(
            f"the view store {path} was damaged ({error}) and has been deleted: start the server again, and it is"
            " filled again from the log"
        ) from error


def _delete(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def _connected(path: Path) -> sqlite3.Connection:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # inputs and results are nobody else's
    db = sqlite3.connect(path, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    return db
