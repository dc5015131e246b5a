"""Events: the facts on `task-events`, and accepted progress on `task-telemetry`.

Task events carry the task's own contiguous `seq`; partition events carry the partition's, and no task id. The fold of
both is the engine's durable state. `at` is the log time of the input that caused the event.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated as A

from perdure.schemas.common import Cause, ErrorInfo, Policy, Usage
from perdure.schemas.records import Json, record, shared


@shared
class TaskEvent:
    """What every event of a task says."""

    task_id: A[str, "The task."]
    seq: A[int, "Counts the task's events from 1, without gaps."]
    at: A[int, "Log time of the cause, ms."]
    cause: A[Cause, "The input record it comes from."]
    build: A[str, "Build of the engine that decided it."]
    feature_level: A[int, "Feature level it was decided at."]


@shared
class PartitionEvent:
    """What every event of a partition says."""

    seq: A[int, "Counts the partition's own events from 1, without gaps."]
    at: A[int, "Log time of the cause, ms."]
    cause: A[Cause, "The input record it comes from."]
    build: A[str, "Build of the engine that decided it."]
    feature_level: A[int, "Feature level it was decided at."]


@record("events")
class TaskSubmitted(TaskEvent):
    """A task exists."""

    type: A[str, "Registered task type."]
    queue: A[str, "Queue, as a routing key."]
    input: A[Json, "Input value, JSON."]
    order: A[int, "Place in its priority: lower first."]
    content_hash: A[str, "Digest of all the submitter said; tells a repeat from another task of the same id."]
    input_hash: A[str, "Digest of type and input; tells a repeat from another task of the same key."]
    policy: A[Policy | None, "How it is run, overrides included; null: bound when the type becomes known."] = None
    policy_version: A[int | None, "Version of the type's configuration; without policy, the lowest accepted."] = None
    priority: A[int, "0 to 9, higher first."] = 5
    not_before: A[int | None, "Earliest start, ms since 1970."] = None
    submitted_by: A[str, "Who asked."] = ""
    key: A[str | None, "Idempotency key."] = None
    user: A[str | None, "On whose behalf."] = None
    concurrency_key: A[str | None, "Tasks of one key share a concurrency limit."] = None
    after: A[list[str] | None, "Task ids that have to complete first."] = None
    resources: A[Json | None, "Resources asked for, JSON object."] = None
    estimated_duration: A[int | None, "The submitter's estimate, ms."] = None
    agent_config: A[Json | None, "Configuration for ctx.config, JSON object."] = None
    callback_url: A[str | None, "Called when the task ends."] = None
    labels: A[dict[str, str], "Free labels."] = field(default_factory=dict)
    notify: A[list[str] | None, "Notify targets for this task."] = None
    overrides: A[Json | None, "Policy fields the submitter set, JSON object, for binding later."] = None


@record("events")
class TaskPolicyBound(TaskEvent):
    """The type became known after the submit: the task's policy holds from here."""

    policy: A[Policy, "How it is run, overrides included."]
    policy_version: A[int, "Version of the type's configuration."]


@record("events")
class TaskQueued(TaskEvent):
    """The task waits: in the queue, or for its due time."""

    reason: A[str, "queued, delayed, retry_backoff, drained or another PENDING reason."]
    due: A[int | None, "Partition time at which it becomes ready, ms; null: now."] = None


@record("events")
class TaskGranted(TaskEvent):
    """A worker's session got the right to run the task."""

    epoch: A[int, "Counts the task's grants from 1; fences everything older."]
    attempt: A[int, "Runs charged to max_attempts, this one included."]
    worker_id: A[str, "The worker."]
    session: A[str, "Its session."]
    grant: A[int, "Counts the session's grants in this partition from 1."]


@record("events")
class AttemptStarted(TaskEvent):
    """User code began to run."""

    epoch: A[int, "The grant."]
    attempt: A[int, "The attempt."]


@record("events")
class StepStarted(TaskEvent):
    """An at-most-once step is about to run."""

    epoch: A[int, "The grant."]
    step_id: A[str, "Identity: scope path, name, key and occurrence."]
    name: A[str, "The step's name."]
    function: A[str, "Dotted name of the function."] = ""
    args_hash: A[str, "Hash of the arguments."] = ""


@record("events")
class StepCompleted(TaskEvent):
    """A step's result is recorded; it never runs again unless rolled back."""

    epoch: A[int, "The grant."]
    attempt: A[int, "The attempt."]
    step_id: A[str, "Identity: scope path, name, key and occurrence."]
    name: A[str, "The step's name."]
    function: A[str, "Dotted name of the function."]
    code_version: A[str, "Code version that ran."]
    args_hash: A[str, "Hash of the arguments."]
    result: A[Json, "Result, JSON."]
    duration_ms: A[int, "Wall time."]


@record("events")
class StepFailed(TaskEvent):
    """A step raised; it runs again in the next attempt."""

    epoch: A[int, "The grant."]
    attempt: A[int, "The attempt."]
    step_id: A[str, "Identity: scope path, name, key and occurrence."]
    name: A[str, "The step's name."]
    error: A[ErrorInfo, "The exception."]
    duration_ms: A[int, "Wall time."]


@record("events")
class StepsRetired(TaskEvent):
    """Recorded steps that a checkpoint has made unnecessary left the state; they stay in this log."""

    from_step: A[str, "First step id of the range."]
    up_to_step: A[str, "Last step id of the range."]
    count: A[int, "Steps in the range."]


@record("events")
class MilestoneReached(TaskEvent):
    """A named point was passed."""

    epoch: A[int, "The grant."]
    name: A[str, "The milestone."]


@record("events")
class CheckpointRecorded(TaskEvent):
    """A checkpoint is the one to resume from."""

    epoch: A[int, "The grant."]
    version: A[int, "Counts up within the task, from 1."]
    uri: A[str, "Address in the checkpoint store."]
    sha256: A[str, "Hex digest of the stored bytes."]
    size: A[int, "Stored bytes."]
    positions: A[dict[str, int], "Track path -> items done."]


@record("events")
class PauseRequested(TaskEvent):
    """A running task was asked to pause at its next boundary."""


@record("events")
class TaskPaused(TaskEvent):
    """The task holds no slot and waits for a person."""

    why: A[str, "requested or shutdown."] = "requested"
    due: A[int | None, "Partition time of the delay it will go on waiting for after its resume."] = None
    usage: A[Usage | None, "What the stopped attempt used."] = None


@record("events")
class TaskResumed(TaskEvent):
    """The task goes on: back to its place, or the pause of a running task undone."""


@record("events")
class CancelRequested(TaskEvent):
    """A running task was asked to stop for good."""

    reason: A[str, "Why."] = ""


@record("events")
class TaskCancelled(TaskEvent):
    """The task ended without a result, as asked."""

    reason: A[str, "Why."] = ""
    usage: A[Usage | None, "What the stopped attempt used."] = None


@record("events")
class TimeoutReached(TaskEvent):
    """A running task ran out of time and is being stopped."""

    which: A[str, "run, total or no_progress."]


@record("events")
class DrainRequested(TaskEvent):
    """The worker is shutting down; the attempt hands back at its next boundary."""


@record("events")
class AttemptLost(TaskEvent):
    """A grant ended without a result, at no cost to the retries."""

    epoch: A[int, "The grant."]
    why: A[str, "session_ended, superseded, unseen, not_started, declined, drained, crashed, resumed or revoked."]
    worker_id: A[str, "The worker that had it."] = ""
    detail: A[str, "Exit code, signal or reason, for people to read."] = ""
    usage: A[Usage | None, "What the attempt used."] = None


@record("events")
class AttemptFailed(TaskEvent):
    """A run charged to max_attempts ended with an error or ran out of time."""

    epoch: A[int, "The grant."]
    attempt: A[int, "The attempt."]
    error: A[ErrorInfo, "The exception, or the timeout as an error."]
    outcome: A[str, "FAILED or TIMED_OUT: this attempt's own."] = "FAILED"
    usage: A[Usage | None, "What the attempt used."] = None


@record("events")
class RetryScheduled(TaskEvent):
    """Another attempt follows."""

    attempt: A[int, "The attempt that failed."]
    due: A[int, "Partition time at which the task becomes ready, ms."]
    delay: A[int, "The pause, ms."]


@record("events")
class TaskCompleted(TaskEvent):
    """The task has a result."""

    epoch: A[int, "The grant."]
    attempt: A[int, "The attempt."]
    result: A[Json, "Result, JSON."]
    usage: A[Usage | None, "What the attempt used."] = None


@record("events")
class TaskFailed(TaskEvent):
    """The task ended without a result: no retries left, not retryable, or it cannot be run."""

    error: A[ErrorInfo, "The last error."]
    why: A[str, "attempts, not_retryable, crash_loop, lost_sessions or outcome_unknown."] = "attempts"


@record("events")
class TaskTimedOut(TaskEvent):
    """The task ended because a timeout ran out for good."""

    which: A[str, "queue, run, total or no_progress."]


@record("events")
class TaskDeadLettered(TaskEvent):
    """The task is on the dead-letter list, to be looked at by a person."""

    state: A[str, "FAILED or TIMED_OUT."]
    error: A[ErrorInfo | None, "The last error."] = None


@record("events")
class TaskRedriven(TaskEvent):
    """A person sent a dead letter back to its queue."""

    input: A[Json | None, "New input; null: the old one."] = None
    order: A[int, "New place in its priority."] = 0


@record("events")
class DeadLetterDiscarded(TaskEvent):
    """A person took the dead letter off the list."""

    reason: A[str, "Why."] = ""


@record("events")
class TaskRetired(TaskEvent):
    """The engine forgets the task; this log and the projections still know it."""


@record("events")
class AnswersForgotten(TaskEvent):
    """Stored answers to commands of a task left the state, before the task itself does."""

    count: A[int, "How many."]
    up_to_command: A[str, "Last command id of the range."] = ""


@record("events")
class CommandRejected:
    """A command was decided and changes nothing. With a task id it is an event of the task, else of the partition."""

    task_id: A[str | None, "The task, if it is known."] = None
    seq: A[int, "Counts the task's events, or the partition's."]
    at: A[int, "Log time of the cause, ms."]
    cause: A[Cause, "The input record it comes from."]
    build: A[str, "Build of the engine that decided it."]
    feature_level: A[int, "Feature level it was decided at."]
    command_id: A[str, "The command."]
    command: A[str, "Its kind."]
    reason: A[str, "Why it is refused."]
    field: A[str | None, "The field that is wrong, if one is."] = None


@record("events")
class ReportRejected:
    """A report or session record was refused. With a task id it is an event of the task, else of the partition."""

    task_id: A[str | None, "The task, if it is known."] = None
    seq: A[int, "Counts the task's events, or the partition's."]
    at: A[int, "Log time of the cause, ms."]
    cause: A[Cause, "The input record it comes from."]
    build: A[str, "Build of the engine that decided it."]
    feature_level: A[int, "Feature level it was decided at."]
    why: A[str, "not_authentic, token, stale_epoch, stale_session, gap, unknown_task or illegal."]
    report: A[str, "Its kind."]
    session: A[str, "The session that sent it."] = ""
    epoch: A[int | None, "The epoch it spoke for."] = None
    detail: A[str, "More, for people to read."] = ""


@record("events")
class ConfigApplied(PartitionEvent):
    """A version of a configuration name holds in this partition from here."""

    name: A[str, "kind/name."]
    version: A[int, "Offset in config."]
    content: A[Json | None, "The value, JSON object; null: deleted."] = None


@record("events")
class ForwardQueued(PartitionEvent):
    """A record for another partition is in the outbox."""

    target: A[int, "Receiving partition."]
    number: A[int, "Counts up per target, from 1."]
    record: A[bytes, "The record, encoded."]


@record("events")
class ForwardTaken(PartitionEvent):
    """A forwarded record was executed here."""

    source: A[int, "Sending partition."]
    number: A[int, "Its number."]


@record("events")
class ForwardAcknowledged(PartitionEvent):
    """The target has taken the outbox rows up to a number; they are gone."""

    target: A[int, "Receiving partition."]
    up_to: A[int, "Highest number taken."]


@record("events")
class ClockAdjusted(PartitionEvent):
    """Partition time and log time differ by another amount: the log's clock jumped, or a jump was confirmed."""

    offset: A[int, "Partition time minus log time, ms."]
    unconfirmed: A[int, "Part of a forward jump that no agreeing tick has confirmed, ms."]
    shift: A[int, "What timers set since the jump are moved by, ms; 0: they stand."] = 0


@record("telemetry")
class ProgressReported:
    """Where a running task stands."""

    task_id: A[str, "The task."]
    at: A[int, "Log time of the report, ms."]
    cause: A[Cause, "The input record it comes from."]
    epoch: A[int, "The grant."]
    attempt: A[int, "The attempt."]
    worker_id: A[str, "The worker."]
    fraction: A[float | None, "0 to 1."] = None
    current_step: A[str | None, "What it is doing."] = None
    units_done: A[int | None, "Units done."] = None
    units_total: A[int | None, "Units in all, when known."] = None


Event = (
    TaskSubmitted
    | TaskPolicyBound
    | TaskQueued
    | TaskGranted
    | AttemptStarted
    | StepStarted
    | StepCompleted
    | StepFailed
    | StepsRetired
    | MilestoneReached
    | CheckpointRecorded
    | PauseRequested
    | TaskPaused
    | TaskResumed
    | CancelRequested
    | TaskCancelled
    | TimeoutReached
    | DrainRequested
    | AttemptLost
    | AttemptFailed
    | RetryScheduled
    | TaskCompleted
    | TaskFailed
    | TaskTimedOut
    | TaskDeadLettered
    | TaskRedriven
    | DeadLetterDiscarded
    | TaskRetired
    | AnswersForgotten
    | CommandRejected
    | ReportRejected
    | ConfigApplied
    | ForwardQueued
    | ForwardTaken
    | ForwardAcknowledged
    | ClockAdjusted
)
