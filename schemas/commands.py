"""Commands (intents of clients), host records and session records: everything on `task-commands` but report batches."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated as A

from perdure.schemas.common import Retry
from perdure.schemas.records import Json, record


@record("commands")
class SubmitTask:
    """Asks for a task to be run."""

    command_id: A[str, "Unique id of this command; a repeat is answered as the first."]
    task_id: A[str, "Routing key, slash, local id; empty: the engine derives one."] = ""
    issued_by: A[str, "Who asks, for people to read."] = ""
    reply_to: A[str | None, "Client id that gets the answer on command-replies."] = None
    type: A[str, "Registered task type."]
    input: A[Json, "Input value, JSON."] = b"null"
    policy_version: A[int | None, "Version of the type's configuration that the client saw."] = None
    queue: A[str | None, "Queue; null: the type's queue."] = None
    key: A[str | None, "Idempotency key, unique per namespace, queue and type."] = None
    user: A[str | None, "On whose behalf, for fairness and limits."] = None
    concurrency_key: A[str | None, "Tasks of one key share a concurrency limit."] = None
    after: A[list[str] | None, "Task ids that have to complete first."] = None
    resources: A[Json | None, "Resources asked for, JSON object."] = None
    estimated_duration: A[int | None, "The submitter's estimate, ms; the first ETA."] = None
    agent_config: A[Json | None, "Configuration handed to the task as ctx.config, JSON object."] = None
    checkpoint_interval: A[int | None, "Overrides the type's interval, ms."] = None
    checkpoint_storage: A[str | None, "Overrides the type's checkpoint store."] = None
    callback_url: A[str | None, "Called when the task ends."] = None
    on_success: A[str | None, "Overrides the type's on_success."] = None
    on_failure: A[str | None, "Overrides the type's on_failure."] = None
    priority: A[int, "0 to 9, higher first."] = 5
    not_before: A[int | None, "Earliest start, ms since 1970."] = None
    run_timeout: A[int | None, "Overrides the type's run timeout, ms."] = None
    queue_timeout: A[int | None, "Overrides the type's queue timeout, ms."] = None
    total_timeout: A[int | None, "Overrides the type's total timeout, ms."] = None
    no_progress_timeout: A[int | None, "Overrides the type's no-progress timeout, ms."] = None
    retry: A[Retry | None, "Overrides the type's retry policy."] = None
    labels: A[dict[str, str], "Free labels."] = field(default_factory=dict)
    notify: A[list[str] | None, "Notify targets for this task."] = None


@record("commands")
class SubmitBatch:
    """Several submits in one record; each is decided by itself."""

    command_id: A[str, "Unique id of this command."]
    task_id: A[str, "Unused; the tasks carry their own."] = ""
    issued_by: A[str, "Who asks."] = ""
    reply_to: A[str | None, "Client id that gets the answers."] = None
    tasks: A[list[SubmitTask], "The submits, in order."]


@record("commands")
class PauseTask:
    """Asks that a task stops at its next boundary and waits."""

    command_id: A[str, "Unique id of this command."]
    task_id: A[str, "The task."]
    issued_by: A[str, "Who asks."] = ""
    reply_to: A[str | None, "Client id that gets the answer."] = None


@record("commands")
class ResumeTask:
    """Asks that a paused task goes on."""

    command_id: A[str, "Unique id of this command."]
    task_id: A[str, "The task."]
    issued_by: A[str, "Who asks."] = ""
    reply_to: A[str | None, "Client id that gets the answer."] = None


@record("commands")
class CancelTask:
    """Asks that a task ends without a result."""

    command_id: A[str, "Unique id of this command."]
    task_id: A[str, "The task."]
    issued_by: A[str, "Who asks."] = ""
    reply_to: A[str | None, "Client id that gets the answer."] = None
    reason: A[str, "Why, for people to read."] = ""


@record("commands")
class RetryTask:
    """Redrives a FAILED or TIMED_OUT task: attempts from 0, steps and checkpoint kept."""

    command_id: A[str, "Unique id of this command."]
    task_id: A[str, "The task."]
    issued_by: A[str, "Who asks."] = ""
    reply_to: A[str | None, "Client id that gets the answer."] = None
    input: A[Json | None, "New input; null: the old one."] = None


@record("commands")
class DiscardDeadLetter:
    """Takes a dead letter off the list for good."""

    command_id: A[str, "Unique id of this command."]
    task_id: A[str, "The task."]
    issued_by: A[str, "Who asks."] = ""
    reply_to: A[str | None, "Client id that gets the answer."] = None
    reason: A[str, "Why, for people to read."] = ""


@record("commands")
class DescribeTask:
    """Asks for a task's present state; leaves no trace."""

    command_id: A[str, "Unique id of this query."]
    task_id: A[str, "The task."]
    issued_by: A[str, "Who asks."] = ""
    reply_to: A[str | None, "Client id that gets the answer."] = None


@record("commands")
class AwaitTask:
    """Asks to be told when the task has ended; the client renews it."""

    command_id: A[str, "Unique id of this query."]
    task_id: A[str, "The task."]
    issued_by: A[str, "Who asks."] = ""
    reply_to: A[str | None, "Client id that gets the answer."] = None
    timeout: A[int, "How long the engine remembers the question, ms, at most 60,000."] = 60_000


@record("commands")
class FindTasks:
    """Asks for the ids that begin with a prefix; sent to every partition, never forwarded."""

    command_id: A[str, "Unique id of this query."]
    task_id: A[str, "Unused."] = ""
    issued_by: A[str, "Who asks."] = ""
    reply_to: A[str | None, "Client id that gets the answer."] = None
    prefix: A[str, "Beginning of an id, with or without its routing key; at least 8 characters."]


@record("hosts")
class Tick:
    """Tells a partition that time has passed; only ticks fire timers."""

    due: A[int, "Log time at which the tick was due, ms: that of the earliest timer, or of the input that made it so."]
    host_clock: A[int, "The host's own clock when it appended the tick, ms."]
    executed: A[int, "Offset before which all inputs were executed and committed then; 0: not said."] = 0


@record("hosts")
class ApplyConfig:
    """Brings one version of a configuration name into a partition's order."""

    name: A[str, "kind/name, as the key in config."]
    version: A[int, "Offset of the record in config."]
    content: A[Json | None, "The value, JSON object; null: deleted."] = None
    key_id: A[str, "Engine key."] = ""
    hmac: A[bytes, "HMAC-SHA256 by the engine key over the record's bytes before this field."] = b""


@record("hosts")
class Forwarded:
    """A record that one partition sends another; numbered per (source, target)."""

    source: A[int, "Sending partition."]
    target: A[int, "Receiving partition."]
    number: A[int, "Counts up from 1; only the next one is taken."]
    record: A[bytes, "The forwarded record, encoded."]
    key_id: A[str, "Engine key."] = ""
    hmac: A[bytes, "HMAC-SHA256 by the engine key over the record's bytes before this field."] = b""


@record("hosts")
class ForwardedAck:
    """Says which forwarded records have been taken; cumulative."""

    source: A[int, "Partition that sent the forwarded records; this acknowledgement lies in it."]
    target: A[int, "Partition that took them."]
    up_to: A[int, "Highest number taken."]
    key_id: A[str, "Engine key."] = ""
    hmac: A[bytes, "HMAC-SHA256 by the engine key over the record's bytes before this field."] = b""


@record("hosts")
class LookUp:
    """A command for a task whose partition is unknown, on its way through the partitions; only inside Forwarded."""

    record: A[bytes, "The command, encoded."]
    left: A[list[int], "Partitions still to be asked."]


@record("sessions")
class WorkerStarted:
    """Announces one life of a worker process to a partition; ends older sessions of the same worker id."""

    session: A[str, "Unique id of this session, ordered by start."]
    worker_id: A[str, "Name that outlives the process."]
    types: A[dict[str, int], "Task type -> version of its configuration that the worker published."]
    queues: A[list[str], "Queues (routing keys) that it serves in this partition."]
    slots: A[int, "Tasks it lends this partition at the same time."]
    labels: A[dict[str, str], "Free labels of the worker."] = field(default_factory=dict)
    inbox_offset: A[int, "End of the partition's worker-inbox before this record was sent."] = 0
    host: A[str, "Host name, for people to read."] = ""
    pid: A[int, "Process id on that host."] = 0
    key_id: A[str, "Worker key."] = ""
    hmac: A[bytes, "HMAC-SHA256 by the worker key over the record's bytes before this field."] = b""


@record("sessions")
class WorkerBeat:
    """Says that a session is alive."""

    session: A[str, "The session."]
    grants_seen: A[int, "Highest grant number of this session and partition that it has read."]
    free: A[int, "Slots lent to this partition that are idle."]
    slots: A[int, "Slots it lends this partition from now on; 0: as many as before."] = 0
    key_id: A[str, "Worker key."] = ""
    hmac: A[bytes, "HMAC-SHA256 by the worker key over the record's bytes before this field."] = b""


@record("sessions")
class WorkerStopping:
    """Says that a session takes no more work and hands back what it runs."""

    session: A[str, "The session."]
    reason: A[str, "Why, for people to read."] = "shutdown"
    key_id: A[str, "Worker key."] = ""
    hmac: A[bytes, "HMAC-SHA256 by the worker key over the record's bytes before this field."] = b""


CHECKPOINT_STORE = "checkpoint_store"
"""Label of a worker: the id found in its checkpoint directory, equal where workers share one."""
HEARS_CHECKPOINTS = "hears_checkpoints"
"""Label of a worker that wants to be told which checkpoints are recorded (`CheckpointAccepted`); with any value."""

Control = PauseTask | ResumeTask | CancelTask | RetryTask | DiscardDeadLetter
Query = DescribeTask | AwaitTask | FindTasks
Command = SubmitTask | SubmitBatch | Control | Query
HostRecord = Tick | ApplyConfig | Forwarded | ForwardedAck
SessionRecord = WorkerStarted | WorkerBeat | WorkerStopping
