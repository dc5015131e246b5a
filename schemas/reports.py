"""Reports: what a worker says about the attempts it runs, and the batch that carries them."""

from __future__ import annotations

from typing import Annotated as A

from perdure.schemas.common import ErrorInfo, Usage
from perdure.schemas.records import Json, record


@record("reports")
class AttemptDeclined:
    """The worker does not run this grant; it goes back to its place at no cost."""

    seq: A[int, "Counts this epoch's reports from 1."]
    reason: A[str, "full, stopping, unknown_type or unloadable."]


@record("reports")
class AttemptStarted:
    """User code is about to run."""

    seq: A[int, "Counts this epoch's reports from 1."]
    pid: A[int, "Process that runs it."] = 0


@record("reports")
class ReportStep:
    """A named unit of work has been begun, has ended or has failed."""

    seq: A[int, "Counts this epoch's reports from 1."]
    step_id: A[str, "Identity: scope path, name, key and occurrence."]
    name: A[str, "The step's name."]
    function: A[str, "Dotted name of the function."] = ""
    code_version: A[str, "Code version that ran."] = ""
    args_hash: A[str, "Hash of the arguments."] = ""
    result: A[Json | None, "Result, JSON, of a completed step."] = None
    error: A[ErrorInfo | None, "The exception of a failed step."] = None
    duration_ms: A[int, "Wall time."] = 0
    begun: A[bool, "True: an at-most-once step records its start; neither result nor error yet."] = False


@record("reports")
class ReportProgress:
    """Where the attempt stands; the latest counts."""

    seq: A[int, "Counts this epoch's reports from 1."]
    fraction: A[float | None, "0 to 1."] = None
    current_step: A[str | None, "What it is doing, for people to read."] = None
    units_done: A[int | None, "Units done."] = None
    units_total: A[int | None, "Units in all, when known."] = None


@record("reports")
class ReportMilestone:
    """A named point has been passed."""

    seq: A[int, "Counts this epoch's reports from 1."]
    name: A[str, "The milestone."]


@record("reports")
class ReportCheckpoint:
    """A checkpoint is in its store, whole and synced."""

    seq: A[int, "Counts this epoch's reports from 1."]
    version: A[int, "Counts up within the task, from 1."]
    uri: A[str, "Address in the checkpoint store."]
    sha256: A[str, "Hex digest of the stored bytes."]
    size: A[int, "Stored bytes."]
    positions: A[dict[str, int], "Track path -> items done."]


@record("reports")
class AttemptCompleted:
    """User code returned."""

    seq: A[int, "Counts this epoch's reports from 1."]
    result: A[Json, "Result, JSON."]
    usage: A[Usage, "What the attempt used."]


@record("reports")
class AttemptFailed:
    """User code raised."""

    seq: A[int, "Counts this epoch's reports from 1."]
    error_types: A[list[str], "Dotted class names along the MRO, most derived first."]
    message: A[str, "The exception's text."]
    traceback: A[str, "Formatted traceback."]
    usage: A[Usage, "What the attempt used."]
    final: A[bool, "True: never retried, whatever the policy says."] = False


@record("reports")
class AttemptCrashed:
    """The process that ran user code ended without a word, under a living supervisor."""

    seq: A[int, "Counts this epoch's reports from 1."]
    usage: A[Usage, "What the attempt used."]
    exit_code: A[int | None, "Exit code, if it exited."] = None
    signal: A[int | None, "Signal number, if one ended it."] = None
    innocent: A[bool, "True: the process died because of another task in it; nothing is counted."] = False


@record("reports")
class AttemptStopped:
    """The attempt has stopped as it was asked to."""

    seq: A[int, "Counts this epoch's reports from 1."]
    why: A[str, "paused, cancelled, timed_out, drained or revoked."]
    usage: A[Usage, "What the attempt used."]


@record("reports")
class SendSteps:
    """Asks for the next page of recorded steps."""

    seq: A[int, "Counts this epoch's reports from 1."]
    after: A[str, "Last step id of the page before."]


Report = (
    AttemptDeclined
    | AttemptStarted
    | ReportStep
    | ReportProgress
    | ReportMilestone
    | ReportCheckpoint
    | AttemptCompleted
    | AttemptFailed
    | AttemptCrashed
    | AttemptStopped
    | SendSteps
)


@record("reports")
class ReportEntry:
    """The reports of one attempt."""

    task_id: A[str, "The task."]
    epoch: A[int, "The grant."]
    token: A[bytes, "The grant's token: HMAC of task, epoch and session by the engine key."]
    reports: A[
        list[
            AttemptDeclined
            | AttemptStarted
            | ReportStep
            | ReportProgress
            | ReportMilestone
            | ReportCheckpoint
            | AttemptCompleted
            | AttemptFailed
            | AttemptCrashed
            | AttemptStopped
            | SendSteps
        ],
        "In order of seq.",
    ]


@record("reports")
class ReportBatch:
    """Reports of one session to one partition."""

    session: A[str, "The session."]
    entries: A[list[ReportEntry], "One for each attempt."]
    key_id: A[str, "Worker key."] = ""
    hmac: A[bytes, "HMAC-SHA256 by the worker key over the record's bytes before this field."] = b""
