"""Logs with records on them, and view stores filled from them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from perdure.projections.dead_letters import DeadLetterProcessor
from perdure.projections.progress import ProgressProcessor
from perdure.projections.view_writer import ViewWriter
from perdure.projections.views import Views
from perdure.schemas import events
from perdure.schemas.codec import encode
from perdure.schemas.public import ConfigRecord, LogLine, TaskProgress, WorkerMetrics
from perdure.streams.memory_log import MemoryLog
from tests.unit.projections.story import FakeTransaction, Story, append, on_topic

TABLES = ("tasks", "labels", "events", "logs", "dead_letters", "workers", "config")


@contextmanager
def writing(log: MemoryLog, path: Path, **said: Any) -> Iterator[ViewWriter]:
    """A writer that has read all there is."""
    with closing(ViewWriter(log, path, **{"clock": log.clock} | said)) as writer:
        drain(writer)
        yield writer


def drain(writer: ViewWriter) -> None:
    while writer.step(0):
        pass


def filled(log: MemoryLog, path: Path, **said: Any) -> Views:
    """The views, with all there is in them."""
    with writing(log, path, **said):
        return Views(path)


def content(path: Path) -> dict[str, list[Any]]:
    with closing(sqlite3.connect(path)) as db:
        return {t: sorted(db.execute(f"SELECT * FROM {t}").fetchall(), key=repr) for t in TABLES}


def tell(log: MemoryLog, story: Story) -> None:
    """All that the engine and the two projections would write for a story."""
    tx = FakeTransaction()
    for event in story.events:
        append(log, "task-events", story.task_id, event)
        ProgressProcessor().handle(on_topic(encode(event)), tx)
        append(log, "task-progress", story.task_id, tx.rows[story.task_id.encode()])
    letters = FakeTransaction()
    for event in story.events:
        DeadLetterProcessor().handle(on_topic(encode(event)), letters)
    for topic, _, value in letters.emitted:
        append(log, topic, story.task_id, value)


def task(log: MemoryLog, task_id: str, at: int = 1_000, **said: Any) -> None:
    """A task's row, without its events."""
    usual: dict[str, Any] = {
        "type": "crunch",
        "queue": task_id.split("/")[0],
        "state": "PENDING",
        "submitted_at": at,
        "seq": 1,
    }
    append(log, "task-progress", task_id, TaskProgress(task_id=task_id, **usual | said))


def line(task_id: str, number: int, text: str = "hello") -> LogLine:
    return LogLine(
        task_id=task_id, epoch=1, attempt=1, worker_id="w1", number=number, at=number, stream="stdout", text=text
    )


def metrics(worker_id: str = "w1", at: int = 0, **said: Any) -> WorkerMetrics:
    usual: dict[str, Any] = {
        "session": "s", "host": "h", "pid": 1, "queues": ["etl"], "slots": 1, "running": [], "cpu_percent": 0.0,
        "rss": 0, "load": 0.0, "memory_available": 0, "disk_free": 0,
    }  # fmt: skip
    return WorkerMetrics(worker_id=worker_id, at=at, **usual | said)


def everything(log: MemoryLog) -> None:
    """Something on every topic."""
    done = Story("etl/done").running(labels={"env": "prod"})
    done.then(events.TaskCompleted)
    tell(log, done)
    tell(log, Story("etl/broken").running(labels={"env": "dev"}).failing())
    mended = Story("mail/mended").running().failing()
    mended.then(events.TaskRedriven)
    tell(log, mended)
    for i in range(3):
        append(log, "task-logs", "etl/done", line("etl/done", i))
    append(log, "worker-metrics", "w1", metrics(at=1))
    append(log, "worker-metrics", "w1", metrics(at=2))
    append(log, "config", "type/crunch", ConfigRecord(name="type/crunch", content=b'{"queue":"etl"}'))
    append(log, "config", "queue/etl", ConfigRecord(name="queue/etl", content=b"{}"))
    append(log, "config", "queue/etl", None)


def some(log: MemoryLog) -> None:
    task(log, "etl/1", at=10, state="RUNNING", labels={"env": "prod", "team": "a"})
    task(log, "etl/2", at=20, state="FAILED", labels={"env": "prod"})
    task(log, "mail/3", at=20, state="RUNNING", type="send", labels={"env": "dev"})
    task(log, "etl/4", at=30, state="PENDING")
