"""Records that anyone may read: configuration, progress, dead letters, logs, worker metrics, quarantine."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated as A

from perdure.schemas.common import ErrorInfo
from perdure.schemas.records import Json, record


@record("public")
class ConfigRecord:
    """One version of a configuration name; the key is kind/name, the version is this record's offset."""

    name: A[str, "kind/name: queue, type, limit, schedule, rule, schema or topology."]
    content: A[Json, "The value, JSON object."]
    issued_by: A[str, "Who set it."] = ""
    at: A[int, "The writer's clock, ms."] = 0


@record("public")
class TaskProgress:
    """The latest public state of a task."""

    task_id: A[str, "The task."]
    type: A[str, "Registered task type."]
    queue: A[str, "Queue, as a routing key."]
    state: A[str, "PENDING, RUNNING, PAUSED, COMPLETED, FAILED, TIMED_OUT or CANCELLED."]
    reason: A[str, "Why it is PENDING or PAUSED."] = ""
    stopping: A[str, "none, pausing, cancelling, timing_out or draining."] = "none"
    seq: A[int, "Last event that is included."] = 0
    priority: A[int, "0 to 9, higher first."] = 5
    labels: A[dict[str, str], "Free labels."] = field(default_factory=dict)
    user: A[str | None, "On whose behalf."] = None
    attempt: A[int, "Runs charged to max_attempts."] = 0
    epoch: A[int, "Grants."] = 0
    worker_id: A[str, "The worker that runs or last ran it."] = ""
    progress: A[float | None, "0 to 1."] = None
    current_step: A[str | None, "What it is doing."] = None
    units_done: A[int | None, "Units done."] = None
    units_total: A[int | None, "Units in all, when known."] = None
    steps_completed: A[int, "Steps recorded in all."] = 0
    milestones: A[list[str], "Milestones reached, in order."] = field(default_factory=list)
    checkpoint_version: A[int | None, "The newest recorded checkpoint."] = None
    checkpoint_at: A[int | None, "When it was recorded, ms."] = None
    estimated_duration: A[int | None, "The submitter's estimate, ms."] = None
    submitted_at: A[int, "Log time of the submit, ms."] = 0
    started_at: A[int | None, "Log time of the first start, ms."] = None
    finished_at: A[int | None, "Log time of the end, ms."] = None
    updated_at: A[int, "Log time of the last change, ms."] = 0
    running_ms: A[int, "Time spent RUNNING in epochs that have ended, ms."] = 0
    running_since: A[int | None, "Log time since when the present epoch runs, ms."] = None
    eta_at: A[int | None, "Estimated end, log time, ms."] = None
    due: A[int | None, "When it becomes ready, while it waits for a delay, ms."] = None
    error: A[ErrorInfo | None, "The last error."] = None
    result: A[Json | None, "Result of a completed task, JSON; null also when it is too big for this view."] = None
    dead_letter: A[bool, "Whether it is on the dead-letter list."] = False
    retired: A[bool, "Whether the engine has forgotten it; 30 days later its record is deleted."] = False


@record("public")
class DeadLetter:
    """A task that ended FAILED or TIMED_OUT and waits for a person."""

    task_id: A[str, "The task."]
    type: A[str, "Registered task type."]
    queue: A[str, "Queue, as a routing key."]
    state: A[str, "FAILED or TIMED_OUT."]
    error: A[ErrorInfo | None, "The last error."] = None
    fingerprint: A[str, "Digest of error type and place: equal for failures of one cause."] = ""
    attempts: A[int, "Attempts made."] = 0
    failed_at: A[int, "Log time of the end, ms."] = 0
    submitted_at: A[int, "Log time of the submit, ms."] = 0
    labels: A[dict[str, str], "Free labels."] = field(default_factory=dict)
    input: A[Json | None, "Input value, JSON; null also when it is too big for this view."] = None
    redrives: A[int, "How often it was sent back before."] = 0
    steps_completed: A[int, "Recorded steps that a redrive keeps."] = 0


@record("public")
class LogLine:
    """A line that a task printed or logged."""

    task_id: A[str, "The task."]
    epoch: A[int, "The grant."]
    attempt: A[int, "The attempt."]
    worker_id: A[str, "The worker."]
    number: A[int, "Counts the epoch's lines from 1."]
    at: A[int, "The worker's clock, ms."]
    stream: A[str, "stdout, stderr, log or perdure."]
    level: A[str, "Log level, for the stream log."] = ""
    text: A[str, "The line, without its end, cut to its limit."]
    dropped: A[int, "Lines left out just before this one by the rate cap."] = 0


@record("public")
class WorkerMetrics:
    """What a worker process and its machine are doing."""

    worker_id: A[str, "The worker."]
    session: A[str, "Its session."]
    at: A[int, "The worker's clock, ms."]
    host: A[str, "Host name."]
    pid: A[int, "Process id."]
    queues: A[list[str], "Queues it serves."]
    slots: A[int, "Tasks it may run at the same time."]
    running: A[list[str], "Task ids that run now."]
    cpu_percent: A[float, "CPU of the worker and its children, 100 is one core."]
    rss: A[int, "Resident memory of the worker and its children, bytes."]
    load: A[float, "The machine's load over 1 minute."]
    memory_available: A[int, "The machine's available memory, bytes."]
    disk_free: A[int, "Free bytes where the worker keeps its files."]
    state: A[str, "running, draining or stopped."] = "running"
    checkpoint_store: A[str, "Id found in its checkpoint directory, equal where workers share one."] = ""


@record("public")
class Quarantined:
    """A record that no reader could execute."""

    topic: A[str, "Topic it came from, without the prefix."]
    partition: A[int, "Partition."]
    offset: A[int, "Offset."]
    at: A[int, "Log time, ms."]
    reader: A[str, "Who gave up on it: engine, progress, dead_letters, views."]
    cause: A[str, "One word: undecodable, unknown_schema, not_authentic, json_not_allowed, too_large, defect, killer."]
    detail: A[str, "The error, with traceback for a defect."]
    key: A[bytes | None, "Its Kafka key."] = None
    record: A[bytes | None, "Its first 64 kB; null: unread."] = None
    size: A[int, "Its whole size, bytes."] = 0
