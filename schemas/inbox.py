"""What the engine tells workers (`worker-inbox`) and answers clients (`command-replies`)."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated as A

from perdure.schemas.common import CheckpointRef, Policy, StepRecord
from perdure.schemas.records import Json, record


@record("inbox")
class StepPage:
    """Recorded steps of a task in the order of their ids; the last page has `more` false."""

    worker_id: A[str, "The worker."]
    session: A[str, "Its session."]
    task_id: A[str, "The task."]
    epoch: A[int, "The grant."]
    after: A[str, "Step id that the page begins behind; empty: the first page."]
    steps: A[list[StepRecord], "The steps."]
    more: A[bool, "Whether another page follows."]


@record("inbox")
class RunAttempt:
    """A grant: run this task."""

    worker_id: A[str, "The worker."]
    session: A[str, "Its session."]
    grant: A[int, "Counts the session's grants in this partition from 1."]
    task_id: A[str, "The task."]
    type: A[str, "Registered task type."]
    input: A[Json | None, "Input value, JSON; null: see input_ref."]
    input_ref: A[str | None, "Address of an input that is too big for the record."] = None
    policy: A[Policy, "How it is run."]
    attempt: A[int, "Runs charged to max_attempts, this one included."]
    epoch: A[int, "The grant's epoch."]
    token: A[bytes, "Proof of the grant, sent back with each report."] = b""
    checkpoint: A[CheckpointRef | None, "The newest recorded checkpoint."] = None
    steps_total: A[int, "Recorded steps that the pages will hold."] = 0
    priority: A[int, "0 to 9."] = 5
    submitted_at: A[int, "When the task was submitted, ms."] = 0
    deadline: A[int | None, "Log time at which the total timeout ends the task, ms."] = None
    run_timeout_left: A[int | None, "What is left of the run timeout, ms."] = None
    agent_config: A[Json | None, "Configuration for ctx.config."] = None
    milestones: A[list[str], "Milestones reached before."] = field(default_factory=list)
    begun_steps: A[list[str], "At-most-once steps that began and never ended."] = field(default_factory=list)
    resources: A[Json | None, "Resources asked for."] = None
    labels: A[dict[str, str], "The task's labels."] = field(default_factory=dict)


@record("inbox")
class PauseAttempt:
    """Stop at the next boundary, save, and hand back; or, undone, go on."""

    worker_id: A[str, "The worker."]
    session: A[str, "Its session."]
    task_id: A[str, "The task."]
    epoch: A[int, "The grant."]
    undo: A[bool, "True: a pause asked for before does not hold any more."] = False


@record("inbox")
class CancelAttempt:
    """Stop for good: cooperatively, then by force."""

    worker_id: A[str, "The worker."]
    session: A[str, "Its session."]
    task_id: A[str, "The task."]
    epoch: A[int, "The grant."]
    reason: A[str, "cancelled or timed_out, and why."]
    grace_ms: A[int, "Time until SIGTERM, and again until SIGKILL."]


@record("inbox")
class RevokeAttempt:
    """The grant is over: stop at once, nothing you say about it counts."""

    worker_id: A[str, "The worker."]
    session: A[str, "Its session."]
    task_id: A[str, "The task."]
    epoch: A[int, "The grant."]
    why: A[str, "Why."]


@record("inbox")
class EndSession:
    """The session is over: another one of the same worker id has begun, or its lease has ended."""

    worker_id: A[str, "The worker."]
    session: A[str, "Its session."]
    why: A[str, "superseded or expired."]


@record("inbox")
class CheckpointAccepted:
    """A checkpoint is recorded, so a resume needs no older one. Said to sessions that ask for it (`HEARS_CHECKPOINTS`).

    That a report is in the log does not mean so: the grant may have been lost before it.
    """

    worker_id: A[str, "The worker."]
    session: A[str, "Its session."]
    task_id: A[str, "The task."]
    epoch: A[int, "The grant."]
    version: A[int, "The checkpoint's version."]


InboxRecord = RunAttempt | StepPage | PauseAttempt | CancelAttempt | RevokeAttempt | EndSession | CheckpointAccepted


@record("replies")
class CommandReply:
    """The answer to a command or query."""

    client_id: A[str, "The client that asked."]
    command_id: A[str, "What it asked."]
    task_id: A[str, "The task, if there is one."] = ""
    accepted: A[bool, "Whether the command holds; for queries, whether the task is known."]
    reason: A[str, "Why not, if refused."] = ""
    field: A[str | None, "The field that is wrong, if one is."] = None
    body: A[Json | None, "Answer of a query, JSON: the task's status, or a list of ids."] = None
    at: A[int, "Log time of the command, ms."]
