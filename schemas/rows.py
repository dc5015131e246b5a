"""Rows of the engine's state, as `engine-changelog` and the local store hold them.

Durable rows change only by events on `task-events`; session rows (Session, Live, Waiter, Mark) are set by value and
live in the changelog alone.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated as A

from perdure.schemas.common import CheckpointRef, ErrorInfo, Policy, Usage
from perdure.schemas.records import Json, record


@record("rows")
class TaskSpec:
    """What a task is: written once, rewritten only when its policy is bound or a redrive brings new input."""

    task_id: A[str, "The task."]
    type: A[str, "Registered task type."]
    queue: A[str, "Queue, as a routing key."]
    input: A[Json, "Input value, JSON."]
    content_hash: A[str, "Digest of all the submitter said."]
    input_hash: A[str, "Digest of type and input."]
    policy: A[Policy | None, "How it is run; null: not bound yet."] = None
    policy_version: A[int | None, "Version of the type's configuration, or the lowest acceptable."] = None
    priority: A[int, "0 to 9, higher first."] = 5
    submitted_at: A[int, "Log time of the submit, ms."] = 0
    submitted_by: A[str, "Who asked."] = ""
    key: A[str | None, "Idempotency key."] = None
    user: A[str | None, "On whose behalf."] = None
    concurrency_key: A[str | None, "Tasks of one key share a concurrency limit."] = None
    after: A[list[str] | None, "Task ids that have to complete first."] = None
    resources: A[Json | None, "Resources asked for."] = None
    estimated_duration: A[int | None, "The submitter's estimate, ms."] = None
    agent_config: A[Json | None, "Configuration for ctx.config."] = None
    callback_url: A[str | None, "Called when the task ends."] = None
    labels: A[dict[str, str], "Free labels."] = field(default_factory=dict)
    notify: A[list[str] | None, "Notify targets for this task."] = None
    overrides: A[Json | None, "Policy fields the submitter set."] = None


@record("rows")
class TaskState:
    """Where a task stands. Small: rewritten by most of its events. Times here are partition time unless named `_at`."""

    state: A[str, "PENDING, RUNNING, PAUSED, COMPLETED, FAILED, TIMED_OUT or CANCELLED."]
    reason: A[str, "Why it is PENDING or PAUSED; empty otherwise."] = ""
    stopping: A[str, "none, pausing, cancelling, timing_out or draining."] = "none"
    seq: A[int, "The task's last event."] = 0
    epoch: A[int, "The last grant."] = 0
    attempt: A[int, "Runs charged to max_attempts."] = 0
    charged: A[bool, "Whether the next grant goes on with the attempt already charged."] = False
    order: A[int, "Place in its priority."] = 0
    ready: A[bool, "Whether it has a place in the ready queue."] = False
    due: A[int | None, "When it becomes ready, while it waits for a delay."] = None
    session: A[str, "The session that holds the grant; empty: none."] = ""
    worker_id: A[str, "The worker that holds or last held the grant."] = ""
    grant: A[int, "The session's number of the grant."] = 0
    started: A[bool, "Whether the granted attempt has started."] = False
    clock_since: A[int, "Since when the queue clock (ready) or the run clock (started) is running."] = 0
    queue_used: A[int, "Time already spent in the queue by this wait, ms."] = 0
    run_used: A[int, "Running time already spent by this attempt, ms."] = 0
    ran: A[int, "Running time of all grants that have ended, ms."] = 0
    timers: A[dict[str, int], "Timer kind -> due."] = field(default_factory=dict)
    steps_kept: A[int, "Step rows in the state."] = 0
    steps_completed: A[int, "Steps recorded in all."] = 0
    milestones: A[list[str], "Milestones reached, in order."] = field(default_factory=list)
    checkpoint: A[CheckpointRef | None, "The newest recorded checkpoint."] = None
    checkpoint_at: A[int | None, "When it was recorded."] = None
    crashes: A[int, "Process deaths in a row without a new step or checkpoint."] = 0
    sessions_lost: A[int, "Sessions lost under this task."] = 0
    error: A[ErrorInfo | None, "The last error."] = None
    usage: A[Usage | None, "What the last attempt that ended used."] = None
    stop_detail: A[str, "Reason of a cancel, or the timeout, that is stopping or has stopped it."] = ""
    dead_letter: A[bool, "Whether it is on the dead-letter list."] = False
    started_at: A[int | None, "Log time of the first start, ms."] = None
    finished_at: A[int | None, "Log time of the end, ms."] = None
    updated_at: A[int, "Log time of the last event, ms."] = 0


@record("rows")
class TaskResult:
    """The result of a completed task."""

    result: A[Json, "Result, JSON."]


@record("rows")
class Step:
    """A recorded step, or an at-most-once step that has begun (result null)."""

    function: A[str, "Dotted name of the function."]
    code_version: A[str, "Code version that ran."]
    args_hash: A[str, "Hash of the arguments."]
    result: A[Json | None, "Result, JSON; null: begun, outcome unknown."]


@record("rows")
class Ready:
    """A place in the ready queue; the key holds queue, type, priority and order."""

    task_id: A[str, "The task."]


@record("rows")
class Lease:
    """A session's right to run a task; the key holds session and grant number."""

    task_id: A[str, "The task."]
    epoch: A[int, "The grant's epoch."]
    granted: A[int, "Partition time of the grant, ms."]
    by: A[int, "Offset of the input that it was given by."] = 0


@record("rows")
class Timer:
    """A due time; the key holds due, kind and task. It counts only while the task names the same due."""

    task_id: A[str, "The task."]
    kind: A[str, "due, queue, run, total, start, retain, progress or retire."]


@record("rows")
class Answer:
    """The stored answer to a command; the key holds task and command id."""

    accepted: A[bool, "Whether the command held."]
    reason: A[str, "Why not."] = ""
    field: A[str | None, "The field that is wrong."] = None
    at: A[int, "Log time, ms."] = 0


@record("rows")
class Config:
    """The applied version of a configuration name."""

    version: A[int, "Offset in config."]
    content: A[Json | None, "The value; null: deleted."]


@record("rows")
class Outbox:
    """A record on its way to another partition; the key holds target and number."""

    record: A[bytes, "The record, encoded."]


@record("rows")
class Counter:
    """A number: the partition's event sequence, its order counter, numbers sent and taken per partition."""

    value: A[int, "The number."]


@record("rows")
class Clock:
    """How partition time follows log time; durable, changed by ClockAdjusted."""

    offset: A[int, "Partition time minus log time, ms."] = 0
    unconfirmed: A[int, "Forward jump not yet confirmed, ms."] = 0
    shift: A[int, "What timers of the closed window are still to be moved back by, ms."] = 0


@record("rows")
class Mark:
    """A session-class row: a cursor, the log time last seen, or a key to look at again."""

    value: A[int, "A number; its meaning is the key's."] = 0
    text: A[str, "A text; its meaning is the key's."] = ""


@record("rows")
class Session:
    """A worker process as this partition knows it."""

    session: A[str, "Unique id."]
    worker_id: A[str, "Name that outlives the process."]
    types: A[dict[str, int], "Task type -> version of its configuration."]
    queues: A[list[str], "Queues it serves here."]
    slots: A[int, "Tasks it lends this partition."]
    labels: A[dict[str, str], "Free labels."] = field(default_factory=dict)
    host: A[str, "Host name."] = ""
    pid: A[int, "Process id."] = 0
    state: A[str, "live, suspect, stopping or ended."] = "live"
    since: A[int, "Partition time of its start, ms."] = 0
    beat: A[int, "Partition time of its last beat, ms."] = 0
    suspected: A[int, "Partition time of the first tick that found no beat, ms; 0: none."] = 0
    restarted: A[bool, "Whether a late tick already restarted the lease since the last beat."] = False
    grants: A[int, "Grants given."] = 0
    grants_seen: A[int, "Grants the worker has read."] = 0
    running: A[int, "Grants that hold a slot."] = 0
    full: A[bool, "Whether it declined a grant since its last beat."] = False
    readable: A[int, "Grants by inputs before this offset could be read for a lease or longer."] = 0
    telling: A[int, "Grants by inputs before this offset could be read since the next field."] = 0
    telling_since: A[int, "Partition time, ms."] = 0


@record("rows")
class Live:
    """The running attempt's latest reports."""

    epoch: A[int, "The grant."]
    report_seq: A[int, "Last accepted report."] = 0
    active: A[int, "Partition time of the last sign of progress, ms."] = 0
    fraction: A[float | None, "0 to 1."] = None
    current_step: A[str | None, "What it is doing."] = None
    units_done: A[int | None, "Units done."] = None
    units_total: A[int | None, "Units in all."] = None
    progress_at: A[int | None, "Log time of the last progress report, ms."] = None


@record("rows")
class Waiter:
    """A client that waits for a task's end; the key holds task and command id."""

    client_id: A[str, "Who waits."]
    expires: A[int, "Partition time until which the engine remembers it, ms."]


@record("rows")
class Position:
    """How far the input is executed; written with every transaction. After a restore it is the truth."""

    offset: A[int, "Next offset of task-commands to execute."]
    at: A[int, "Highest log time executed, ms."] = 0


Row = (
    TaskSpec
    | TaskState
    | TaskResult
    | Step
    | Ready
    | Lease
    | Timer
    | Answer
    | Config
    | Outbox
    | Counter
    | Clock
    | Mark
    | Session
    | Live
    | Waiter
    | Position
)
