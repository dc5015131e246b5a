"""Tasks' lives for tests: events with their sequence, a transaction in memory, records on a log."""

from __future__ import annotations

from typing import Any, TypeVar

from perdure.schemas import events, ids, topics
from perdure.schemas.codec import encode
from perdure.schemas.common import Cause, ErrorInfo
from perdure.schemas.events import ProgressReported
from perdure.streams.log import Record
from perdure.streams.memory_log import MemoryLog
from perdure.streams.store import META

E = TypeVar("E", bound=events.TaskEvent)

ERROR = ErrorInfo(type="app.Broken", message="no", error_types=["app.Broken"], traceback="")
_USUAL: dict[type, dict[str, Any]] = {
    events.TaskSubmitted: {
        "type": "crunch", "queue": "etl", "input": b"{}", "order": 0, "content_hash": "", "input_hash": "",
    },
    events.TaskQueued: {"reason": "queued"},
    events.TaskGranted: {"epoch": 1, "attempt": 1, "worker_id": "w1", "session": "s1", "grant": 1},
    events.AttemptStarted: {"epoch": 1, "attempt": 1},
    events.StepCompleted: {
        "epoch": 1, "attempt": 1, "step_id": "s", "name": "s", "function": "f", "code_version": "", "args_hash": "",
        "result": b"1", "duration_ms": 1,
    },
    events.MilestoneReached: {"epoch": 1},
    events.CheckpointRecorded: {"epoch": 1, "version": 1, "uri": "u", "sha256": "", "size": 1, "positions": {}},
    events.AttemptLost: {"epoch": 1, "why": "session_ended"},
    events.AttemptFailed: {"epoch": 1, "attempt": 1, "error": ERROR},
    events.RetryScheduled: {"attempt": 1, "due": 0, "delay": 0},
    events.TaskCompleted: {"epoch": 1, "attempt": 1, "result": b"42"},
    events.TaskFailed: {"error": ERROR},
    events.TaskDeadLettered: {"state": "FAILED", "error": ERROR},
}  # fmt: skip


class Story:
    """One task's events in order; each happens 1 s after the one before unless it is told when."""

    def __init__(self, task_id: str = "etl/1", *, at: int = 1_000_000) -> None:
        self.task_id, self.seq, self.at = task_id, 0, at
        self.events: list[Any] = []

    def then(self, kind: type[E], *, at: int | None = None, **said: Any) -> E:
        """The task's next event."""
        self.seq += 1
        self.at = self.at + 1_000 if at is None else at
        event = kind(
            task_id=self.task_id, seq=self.seq, at=self.at, cause=Cause(partition=0, offset=self.seq), build="b",
            feature_level=1, **_USUAL.get(kind, {}) | said,
        )  # fmt: skip
        self.events.append(event)
        return event

    def running(self, *, epoch: int = 1, attempt: int = 1, **submit: Any) -> Story:
        """Submit (the first time), queue, grant, start."""
        if not self.events:
            self.then(events.TaskSubmitted, **submit)
        self.then(events.TaskQueued)
        self.then(events.TaskGranted, epoch=epoch, attempt=attempt)
        self.then(events.AttemptStarted, epoch=epoch, attempt=attempt)
        return self

    def failing(self) -> Story:
        """Fail for good."""
        self.then(events.AttemptFailed)
        self.then(events.TaskFailed)
        self.then(events.TaskDeadLettered)
        return self

    def progress(self, *, at: int | None = None, epoch: int = 1, **said: Any) -> ProgressReported:
        """Telemetry: no event, so it has no `seq`."""
        self.at = self.at + 1_000 if at is None else at
        return ProgressReported(
            task_id=self.task_id, at=self.at, cause=Cause(partition=0, offset=0), epoch=epoch, attempt=1,
            worker_id="w1", **said,
        )  # fmt: skip


class FakeTransaction:
    """What a processor did."""

    def __init__(self) -> None:
        self.rows: dict[bytes, bytes] = {}
        self.puts: list[bytes] = []
        self.emitted: list[tuple[str, bytes | None, bytes | None]] = []
        self.quarantined: list[tuple[str, str]] = []

    def get(self, key: bytes) -> bytes | None:
        return self.rows.get(key)

    def after(self, key: bytes) -> bytes | None:
        return next((k for k in sorted(self.rows) if k > key and not k.startswith(META)), None)

    def put(self, key: bytes, value: bytes | None) -> None:
        self.puts.append(key)
        if value is None:
            self.rows.pop(key, None)
        else:
            self.rows[key] = value

    def emit(self, topic: str, key: bytes | None, value: bytes | None) -> None:
        self.emitted.append((topic, key, value))

    def quarantine(self, record: Record, cause: str, detail: str) -> None:
        self.quarantined.append((cause, detail))


def on_topic(value: bytes | None, topic: str = topics.EVENTS.name) -> Record:
    """A record as a processor gets it."""
    return Record(topic, 0, 0, 0, b"key", value)


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self, now: int = 2_000_000) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


def append(log: MemoryLog, topic: str, key: str, value: object | None) -> None:
    """A record on a log, in the partition of its task id; bytes go as they are."""
    wide = topics.BY_NAME[topic].partitioned
    partition = ids.partition_of(ids.split(key)[0] or key, log.partitions) if wide else 0
    data = value if value is None or isinstance(value, bytes) else encode(value)
    log.producer().append(topic, partition, key.encode(), data)
