"""Which partition a command belongs to, and its way there.

The Kafka key of a command is never read: the routing key is that of the task id, else of the queue, else of the type's
queue, else `default`. A command on another partition goes through the outbox, in order per partition of origin.
"""

from __future__ import annotations

import hashlib
from itertools import islice

from perdure.schemas import codec, events, ids, limits
from perdure.schemas.codec import replace
from perdure.schemas.commands import AwaitTask, Control, DescribeTask, Forwarded, ForwardedAck, LookUp, SubmitTask
from perdure.schemas.errors import InvalidRequest
from perdure.schemas.rows import Mark
from perdure.streams import tables
from perdure.streams.decision import Acknowledge, Moment, Note, Outputs, of_partition
from perdure.streams.state import State

CLEARING = b"clearing/"
ForOneTask = Control | DescribeTask | AwaitTask


def complete_submit(s: State, m: Moment, command: SubmitTask, *, placed: bool) -> SubmitTask:
    """The submit with its whole task id and queue filled in. Raises `InvalidRequest` naming the field that is wrong.

    `placed`: the id was completed by another partition already.
    """
    if placed:
        return command
    head, _ = ids.split(command.task_id)
    known = s.routing_keys()
    if command.task_id and head and (head in known or head == command.queue):
        ids.check_local_id(ids.split(command.task_id)[1])
        return replace(command, queue=head)
    queue = command.queue or _queue_of_type(s, command.type)
    if queue is None and head and ids.is_routing_key(head):
        ids.check_local_id(ids.split(command.task_id)[1])
        return replace(command, queue=head)
    if queue is None and command.task_id:
        queue = limits.DEFAULT_QUEUE
    if queue is None:
        raise InvalidRequest(
            f"type {command.type!r} is unknown and neither queue nor task_id says where to put it", field="type"
        )
    ids.check_queue(queue)
    if command.task_id:
        local = ids.check_local_id(command.task_id)
    elif command.key is not None:
        local = ids.keyed_local_id(queue, command.type, command.key)
    elif command.command_id != ids.derived_command_id(m.cause.partition, m.cause.offset, m.cause.index):
        # Sent again, it is the same task. No key can hold a NUL.
        local = ids.keyed_local_id(queue, command.type, "\x00" + command.command_id)
    else:
        local = ids.derived_local_id(m.at, m.cause.partition, m.cause.offset, m.cause.index)
    routing_key = _spread(s, queue, local)
    return replace(command, task_id=ids.join(routing_key, local), queue=routing_key)


def _queue_of_type(s: State, task_type: str) -> str | None:
    known = s.config("type/" + task_type)
    return None if known is None else str(known[1].get("queue") or limits.DEFAULT_QUEUE)


def _spread(s: State, queue: str, local_id: str) -> str:
    """One of the queue's routing keys, always the same for a local id."""
    known = s.config("queue/" + queue)
    keys = list(known[1].get("routing_keys") or ()) if known else []
    if not keys:
        return queue
    return str(keys[int.from_bytes(hashlib.sha256(local_id.encode()).digest()[:4], "big") % len(keys)])


def partition_of(s: State, task_id: str) -> int:
    """The partition that owns a whole task id."""
    return ids.partition_of(ids.split(task_id)[0], s.partitions)


def find(s: State, command: ForOneTask) -> str | int | list[int]:
    """Where a command for one task is to be executed: its whole id here, another partition, or partitions to ask."""
    head, _ = ids.split(command.task_id)
    if head and head in s.routing_keys():
        where = partition_of(s, command.task_id)
        return command.task_id if where == s.partition else where
    if s.task(command.task_id) is not None:
        return command.task_id
    here = find_local(s, command.task_id)
    if here is not None:
        return here
    # The id's own partition comes first: its submit goes there too, and only on one way do commands keep their order.
    own = [partition_of(s, command.task_id)] if head and ids.is_routing_key(head) else []
    others = {ids.partition_of(key, s.partitions) for key in s.routing_keys()} - set(own)
    return [p for p in (*own, *sorted(others)) if p != s.partition]


def find_local(s: State, local_id: str) -> str | None:
    """The task of this partition with exactly this local id."""
    found = s.find_tasks(tables.tasks_from(local_id) + b"\x00", 1)
    return found[0] if found else None


def find_by_prefix(s: State, prefix: str) -> list[str]:
    """The tasks of this partition whose id, whole or local, begins with a prefix."""
    head, tail = ids.split(prefix)
    found = s.find_tasks(tables.tasks_from(prefix), limits.FIND_IDS_MAX)
    if head:
        found += s.find_tasks(tables.tasks_from(tail), limits.FIND_IDS_MAX, routing_key=head)
    return sorted(set(found))[: limits.FIND_IDS_MAX]


def forward(s: State, m: Moment, target: int, record: bytes) -> Outputs:
    """Put a record into the outbox for another partition."""
    number = s.counter(f"sent/{target}") + 1
    yield events.ForwardQueued(**of_partition(s, m), target=target, number=number, record=record)


def look_up(s: State, m: Moment, command: ForOneTask, left: list[int]) -> Outputs:
    """Ask the next partition whether it has the task."""
    yield from forward(s, m, left[0], codec.encode(LookUp(record=codec.encode(command), left=left[1:])))


def acknowledged(s: State, m: Moment, record: ForwardedAck) -> Outputs:
    """The target has taken records: they leave the outbox."""
    if record.up_to <= s.counter(f"sent/{record.target}"):
        yield from clear_outbox(s, m, record.target, record.up_to)


def clear_outbox(s: State, m: Moment, target: int, up_to: int) -> Outputs:
    """Take acknowledged rows out of the outbox, a chunk at a time."""
    found = islice(s.suffixes(tables.outbox(target)), limits.STEPS_CHUNK + 1)
    numbers = [n for suffix in found if (n := int.from_bytes(suffix, "big")) <= up_to]
    cursor = CLEARING + str(target).encode()
    if numbers:
        last = numbers[: limits.STEPS_CHUNK][-1]
        yield events.ForwardAcknowledged(**of_partition(s, m), target=target, up_to=last)
    if len(numbers) > limits.STEPS_CHUNK:
        yield Note(tables.MARKS, cursor, Mark(value=up_to))
    elif s.get(tables.MARKS, cursor) is not None:
        yield Note(tables.MARKS, cursor, None)


def taken(s: State, m: Moment, record: Forwarded) -> Outputs:
    """Count a forwarded record as taken, and say so to its source."""
    yield events.ForwardTaken(**of_partition(s, m), source=record.source, number=record.number)
    yield Acknowledge(record.source, record.number)


def is_next(s: State, record: Forwarded) -> bool:
    """Whether this is the next number of its source."""
    return record.number == s.counter(f"taken/{record.source}") + 1
