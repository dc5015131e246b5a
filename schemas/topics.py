"""Every topic once: its key, who writes and reads it, and the settings that start-up verifies."""

from __future__ import annotations

from dataclasses import dataclass, field

from perdure.schemas import limits

DAY_MS = 24 * 3600 * 1000


@dataclass(frozen=True)
class Topic:
    """A topic of the namespace; its name on the broker is prefix + name."""

    name: str
    key: str
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    doc: str
    partitioned: bool = True
    """False: one partition, whatever the namespace's partition count."""
    settings: dict[str, str] = field(default_factory=dict)
    record_max: int = limits.TOPIC_RECORD_MAX - limits.FRAMING
    """Bytes of a record, key included. The broker's own limit is for whole batches."""

    def on(self, prefix: str) -> str:
        """The topic's name on the broker."""
        return prefix + self.name


def _deleted_after(days: float, **more: str) -> dict[str, str]:
    return _with_size({"cleanup.policy": "delete", "retention.ms": str(int(days * DAY_MS))} | _dots(more))


def _compacted(**more: str) -> dict[str, str]:
    return _with_size({"cleanup.policy": "compact", "delete.retention.ms": str(DAY_MS)} | _dots(more))


def _with_size(settings: dict[str, str]) -> dict[str, str]:
    return {"max.message.bytes": str(limits.TOPIC_RECORD_MAX)} | settings


def _dots(settings: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "."): value for name, value in settings.items()}


COMMANDS = Topic(
    "task-commands", "routing key", ("clients", "any Kafka producer", "workers", "engine hosts"), ("engine",),
    "The one door: commands, reports, beats, configuration and time, in one order per partition.",
    settings=_deleted_after(7, message_timestamp_type="LogAppendTime"),
    record_max=limits.RECORD_MAX,
)  # fmt: skip
INTAKE = Topic(
    "task-intake", "any", ("transactional producers",), ("forwarder",),
    "Reserved for commands of transactional producers. Nothing reads it yet: what is written here is not executed.",
    settings=_deleted_after(7),
)  # fmt: skip
EVENTS = Topic(
    "task-events", "task id", ("engine",), ("projections", "rules", "anyone"),
    "The log of record: every state transition and every recorded step.",
    settings={"cleanup.policy": "delete", "retention.ms": "-1", "max.message.bytes": str(limits.TOPIC_RECORD_MAX)},
)  # fmt: skip
TELEMETRY = Topic(
    "task-telemetry", "task id", ("engine",), ("projections", "anyone"),
    "Accepted progress of running tasks.",
    settings=_deleted_after(3),
)  # fmt: skip
REPLIES = Topic(
    "command-replies", "client id", ("engine",), ("the client that asked",),
    "Answers to commands and queries, in the partition of the task.",
    settings=_deleted_after(1 / 24),
)  # fmt: skip
INBOX = Topic(
    "worker-inbox", "worker id", ("engine",), ("workers of that partition's queues",),
    "Grants, step pages, pauses and cancels.",
    settings=_deleted_after(1),
)  # fmt: skip
CHANGELOG = Topic(
    "engine-changelog", "state key", ("engine",), ("recovery",),
    "The engine's state, row by row.",
    settings=_compacted(delete_retention_ms=str(2 * DAY_MS), min_compaction_lag_ms=str(60_000)),
)  # fmt: skip
PROGRESS = Topic(
    "task-progress", "task id", ("progress projection",), ("anyone",),
    "The latest public state of each task.",
    settings=_compacted(),
)  # fmt: skip
DEAD_LETTERS = Topic(
    "task-dead-letters", "task id", ("dead-letter projection",), ("anyone",),
    "Tasks that ended FAILED or TIMED_OUT and wait for a person.",
    settings=_compacted(),
)  # fmt: skip
LOGS = Topic(
    "task-logs", "task id", ("workers",), ("projections",),
    "Lines that tasks printed or logged.",
    settings=_deleted_after(14),
)  # fmt: skip
METRICS = Topic(
    "worker-metrics", "worker id", ("workers",), ("projections",),
    "What worker processes and their machines are doing.",
    settings=_deleted_after(3),
)  # fmt: skip
CONFIG = Topic(
    "config", "kind/name", ("CLI", "API", "workers", "engine hosts"), ("engine hosts", "clients", "projections"),
    "Queues, types, limits, schedules, rules, schema fingerprints and the topology; the version is the offset.",
    partitioned=False,
    settings=_compacted(),
)  # fmt: skip
ALERTS = Topic(
    "alerts", "rule and subject", ("alert rules",), ("Kafka Connect sinks", "anyone"),
    "Alerts, plain JSON.",
    settings=_deleted_after(7),
)  # fmt: skip
QUARANTINE = Topic(
    "quarantine", "none", ("every reader",), ("operators",),
    "Undecodable or impossible records: cause, origin, and at most 64 kB of the bytes.",
    settings=_deleted_after(30),
)  # fmt: skip

ALL: tuple[Topic, ...] = (
    COMMANDS,
    INTAKE,
    EVENTS,
    TELEMETRY,
    REPLIES,
    INBOX,
    CHANGELOG,
    PROGRESS,
    DEAD_LETTERS,
    LOGS,
    METRICS,
    CONFIG,
    ALERTS,
    QUARANTINE,
)
ENGINE_GROUP = "engine"
"""The consumer group of the engines: its offsets on `task-commands` tell how far they are."""
BY_NAME: dict[str, Topic] = {topic.name: topic for topic in ALL}
