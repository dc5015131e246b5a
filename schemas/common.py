"""Records that are parts of others: policies, causes, errors, usage."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated as A

from perdure.schemas.records import Json, record


@record("common")
class Cause:
    """The input record that an event comes from."""

    partition: A[int, "Partition of task-commands."]
    offset: A[int, "Offset in that partition."]
    index: A[int | None, "Position inside a batch record, counted from 0."] = None
    command_id: A[str | None, "The command's id, when a command caused the event."] = None


@record("common")
class Retry:
    """When a failed attempt is followed by another one."""

    max_attempts: A[int, "Runs that may fail before the task does; 1 means no retry."] = 1
    backoff: A[str, "exponential or fixed."] = "exponential"
    delay: A[int, "Pause before the first retry, ms."] = 1_000
    max_delay: A[int, "Upper bound of the pause, ms."] = 300_000
    jitter: A[bool, "Whether the pause is drawn from [pause / 2, pause], derived from task and attempt."] = True
    retry_on: A[list[str] | None, "Class names, bare or dotted, in the error's MRO that are retried; null: all."] = None
    never_on: A[list[str] | None, "Class names that are never retried; they win over retry_on."] = None


@record("common")
class Policy:
    """How tasks of a type are run; copied into each task when it is submitted."""

    retry: A[Retry, "When a failed attempt is tried again."]
    run_timeout: A[int | None, "Running time of one attempt, ms; pauses do not count."] = None
    queue_timeout: A[int | None, "Time in the queue while it could have run, ms."] = None
    total_timeout: A[int | None, "Time from submit to the end, ms; runs on while paused."] = None
    no_progress_timeout: A[int | None, "Running time without step, progress, item, milestone or checkpoint, ms."] = None
    checkpoint_interval: A[int | None, "Time between checkpoints, ms; null: chosen from elapsed time."] = None
    checkpoint_storage: A[str | None, "Name of the checkpoint store; null: the worker's default."] = None
    on_failure: A[str | None, "task:<type> or notify:<target>, for a failure for good. Nothing acts on it yet."] = None
    on_success: A[str | None, "task:<type> or notify:<target>, for a completion. Nothing acts on it yet."] = None
    on_shutdown: A[str, "drain: back to the queue; pause: PAUSED until resumed."] = "drain"
    step_mismatch: A[str, "warn, fail or rerun, if a recorded step is asked for with other code or arguments."] = "warn"
    strict_lease: A[bool, "Whether the task is stopped before its lease could end unheard."] = False
    cancel_grace: A[int, "Time between a cooperative stop and SIGTERM, and again until SIGKILL, ms."] = 10_000
    executor: A[str, "process or async."] = "process"
    code_version: A[str, "What the worker had loaded when it published the type."] = ""


@record("common")
class ErrorInfo:
    """An exception as it was raised in user code, or a cause of failure that the engine found."""

    type: A[str, "Class name with module, or a cause of the engine's: crash_loop, lost_sessions, timeout."]
    message: A[str, "The exception's text."]
    error_types: A[list[str], "Dotted class names along the MRO, most derived first."] = field(default_factory=list)
    traceback: A[str, "Formatted traceback, cut to its limit from the front."] = ""


@record("common")
class Usage:
    """What an attempt used of the machine."""

    exit_code: A[int | None, "Exit code of the process, where one ended."] = None
    duration_ms: A[int, "Wall time of the attempt."] = 0
    cpu_seconds: A[float, "User and system time."] = 0.0
    peak_rss: A[int, "Largest resident set, bytes."] = 0
    read_bytes: A[int, "Bytes read from storage."] = 0
    written_bytes: A[int, "Bytes written to storage."] = 0
    artifacts: A[list[str], "Addresses of files that the attempt left behind."] = field(default_factory=list)


@record("common")
class StepRecord:
    """A completed step as a resumed attempt needs it."""

    step_id: A[str, "Identity: scope path, name, key and occurrence."]
    function: A[str, "Dotted name of the function that ran."]
    code_version: A[str, "Code version that ran."]
    args_hash: A[str, "Hash of the arguments."]
    result: A[Json, "Recorded result, JSON."]


@record("common")
class CheckpointRef:
    """Where a recorded checkpoint is and how to verify it."""

    version: A[int, "Counts up within the task, from 1."]
    uri: A[str, "Address in the checkpoint store."]
    sha256: A[str, "Hex digest of the stored bytes."]
    size: A[int, "Stored bytes."]
    positions: A[dict[str, int], "Track path -> items done."]
