"""Every error Perdure raises, under one root.

Each message says what happened, where, and what to do. Three questions sort them: may the caller try again later
(`RetryLater`), was the request itself wrong (`InvalidRequest`), or is the surrounding infrastructure broken
(`InfrastructureError`)?
"""

from __future__ import annotations


class PerdureError(Exception):
    """The root of all errors that Perdure raises on purpose."""

    code = "error"


class InvalidRequest(PerdureError):
    """The request cannot be carried out as it stands; repeating it unchanged will fail again."""

    code = "invalid_request"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ValueTooLarge(InvalidRequest):
    """A value is larger than its limit."""

    code = "value_too_large"


class NotSerializable(InvalidRequest):
    """A value cannot be carried as JSON."""

    code = "not_serializable"


class UnknownType(InvalidRequest):
    """The task type is not known to the namespace and no queue was named."""

    code = "unknown_type"


class CommandRefused(InvalidRequest):
    """The engine refused the command: it is not legal in the task's present state."""

    code = "rejected"


class NotFound(PerdureError):
    """No task, checkpoint or other object has this id."""

    code = "not_found"


class AmbiguousId(InvalidRequest):
    """More than one task id begins with the given prefix."""

    code = "ambiguous"


class NotSubmitted(PerdureError):
    """The task object has not been submitted yet, so there is nothing to control."""

    code = "not_submitted"


class RetryLater(PerdureError):
    """Nothing is wrong with the request, but it cannot be served now."""

    code = "retry_later"


class Busy(RetryLater):
    """Too much work waits already: nothing new is let in for the moment."""

    code = "busy"

    def __init__(self, message: str, *, retry_after: int) -> None:
        """`retry_after`: seconds."""
        super().__init__(message)
        self.retry_after = retry_after


class WaitTimeout(RetryLater, TimeoutError):
    """The wait ended before the task did; the task goes on."""

    code = "timeout"


class InfrastructureError(PerdureError):
    """Kafka, the disk or another process that Perdure stands on does not do its part."""

    code = "infrastructure"


class Unreachable(InfrastructureError):
    """A server did not answer: the broker, the engine or the HTTP API."""

    code = "unreachable"


class ConfigurationError(InfrastructureError):
    """Settings, topics or keys do not fit together; a person has to change one of them."""

    code = "configuration"


class PartitionRefused(InfrastructureError):
    """To go on with this partition would lose something or record it twice. The other partitions are not concerned."""


class LogTruncated(PartitionRefused):
    """The committed position lies below the log's first offset: commands were deleted before they were executed."""

    code = "log_truncated"


class EventsIncomplete(PartitionRefused):
    """The events on task-events do not tell a whole story: their beginning or something in between is missing."""

    code = "events_incomplete"


class RestoreStuck(PartitionRefused):
    """A partition's state cannot be read to its end: something holds its changelog up."""

    code = "restore_stuck"


class ValueLost(InfrastructureError):
    """A value too large for a record is missing from its store, or damaged there; trying again finds the same."""

    code = "value_lost"


class Fenced(InfrastructureError):
    """Another process has taken over; this one must stop writing."""

    code = "fenced"


class DecodeError(PerdureError):
    """The bytes are no valid record of a known schema."""

    code = "undecodable"


class TaskOutcome(PerdureError):
    """A task ended without a result."""

    def __init__(self, task_id: str, message: str, *, error: dict[str, object] | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id
        self.error = error


class TaskFailed(TaskOutcome):
    """The task ended FAILED; `error` holds the recorded error."""

    code = "task_failed"


class TaskTimedOut(TaskOutcome):
    """The task ended TIMED_OUT; `error` names the timeout."""

    code = "task_timed_out"


class TaskCancelled(TaskOutcome):
    """The task was cancelled; the message holds the reason given."""

    code = "task_cancelled"


class StepError(PerdureError):
    """A step was used in a way that durable steps do not allow."""

    code = "step_error"


class DuplicateStep(StepError):
    """Two concurrent sections used the same step identity; give one of them a `key`."""

    code = "duplicate_step"


class StepMismatch(StepError):
    """A recorded step is asked for again with another function, code version or arguments."""

    code = "step_mismatch"
