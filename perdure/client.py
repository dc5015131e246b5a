"""The client: submits tasks and asks about them over Kafka alone, with no HTTP API and no import of the tasks' code."""

from __future__ import annotations

import getpass
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from perdure.catalog import Catalog
from perdure.connectors.large_values import LargeValues
from perdure.handle import Handle
from perdure.replies import Replies, raise_refusal
from perdure.schemas import codec, ids, json_commands, limits, topics
from perdure.schemas.commands import AwaitTask, Command, Control, DescribeTask, FindTasks, SubmitTask
from perdure.schemas.errors import AmbiguousId, InfrastructureError, InvalidRequest, NotFound, UnknownType, Unreachable
from perdure.schemas.inbox import CommandReply
from perdure.streams.admission import Admission
from perdure.streams.log import Log, Producer
from perdure.streams.schema_lookup import SchemaLookup
from perdure.submission import SubmitOptions, to_command

if TYPE_CHECKING:
    from perdure.settings import Settings

_ACK_S = 15.0
_VERDICT_S = limits.VERDICT_MS / 1000
_SHOWN_IDS = 5
_KAFKA = {"fetch.wait.max.ms": "50", "linger.ms": "1"}
"""A new consumer's first fetch covers only the partitions that it knows by then; the others wait until it returns. What
is sent waits a moment for what other threads send: with 16 of them that is 16 % more tasks a second, for 1 ms each."""


class Client:
    """A namespace's client; thread-safe. Connects at its first use.

    log: the namespace's topics; none: those that `settings` name, or, without settings, those of `Settings.load()`.
    clock: the present time in ms, from which a `delay` counts; the machine's when none is given.
    large_values: their store, for a log that is given; none: every value has to fit into its record.
    """

    def __init__(
        self,
        log: Log | None = None,
        *,
        settings: Settings | None = None,
        clock: Callable[[], int] | None = None,
        large_values: LargeValues | None = None,
    ) -> None:
        self.id = ids.new_id("c-")
        self._given = None if log is None else (log, large_values or LargeValues())
        self._settings = settings
        self._clock = clock or (lambda: int(time.time() * 1000))
        self._issued_by = _whoami()
        self._lock = threading.Lock()
        self._connected: _Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the log; blocks for at most a few seconds."""
        with self._lock:
            if self._connected is not None:
                self._connected.close()
                self._connected = None

    @property
    def log(self) -> Log:
        """The namespace's topics. Raises `Unreachable`."""
        return self._connection().log

    @property
    def catalog(self) -> Catalog:
        """The namespace's types and queues. Raises `Unreachable`."""
        return self._connection().catalog

    @property
    def large_values(self) -> LargeValues:
        """Where the namespace keeps values too large for a record. Raises `Unreachable`."""
        return self._connection().large_values

    def submit(self, type: str, input: Any = None, **options: Unpack[SubmitOptions]) -> Handle:
        """Ask for a task to be run; returns once Kafka has it for good (`acks=all`). See `SubmitOptions`.

        An input too large for a record goes to the store of large values first, if there is one (PERDURE_BLOBS).
        Raises `InvalidRequest` naming the field, `UnknownType` for a type that no worker has published when neither
        queue nor id says where to put the task, `Busy` while 100,000 commands wait for an engine (to a client that has
        made 10,000 submits; see `Admission`), and `Unreachable`. A refusal by the engine shows in the handle.
        """
        command = to_command(self.head(), type, options, now=self._clock())
        text = self.large_values.text(input, "input")
        command = self._placed(command)
        command = codec.replace(command, input=self.large_values.carried(command.task_id, text))
        json_commands.check(command)
        self._connection().admission.admit_submit()
        expected = self._connection().replies.expect(command.command_id)
        self._send(command)
        return Handle(self, command.task_id, verdict=expected)

    def get(self, task_id: str) -> Handle:
        """The handle of a task, by its id; without the routing key, or by unique prefix, the engine is asked for it.

        Raises `NotFound`, `AmbiguousId` or `Unreachable`.
        """
        return Handle(self, task_id if self.catalog.is_whole(task_id) else self.resolve(task_id))

    def resolve(self, text: str) -> str:
        """The whole id of the task that a person means. Raises `NotFound`, `AmbiguousId` or `Unreachable`."""
        reply = self.ask(DescribeTask(**self.head(), task_id=text))
        if reply.accepted:
            return reply.task_id or text
        if len(text.encode()) < limits.FIND_PREFIX_MIN:
            raise NotFound(
                f"no task has the id {text!r}; the beginning of one has to have {limits.FIND_PREFIX_MIN} characters"
            )
        found = self.find(text)
        if not found:
            raise NotFound(f"no task has the id {text!r}, and none of an id that begins so is known to the engine")
        if len(found) > 1:
            shown = ", ".join(found[:_SHOWN_IDS]) + (" ..." if len(found) > _SHOWN_IDS else "")
            raise AmbiguousId(f"{text!r} is the beginning of {len(found)} ids: {shown}", field="task_id")
        return found[0]

    def find(self, prefix: str) -> list[str]:
        """The ids, whole or local, that begin with a prefix of at least 8 characters; every partition is asked.

        Raises `InvalidRequest`, or `Unreachable` when not all of them have answered within 5 s.
        """
        answers = self.ask_all(FindTasks(**self.head(), prefix=prefix))
        if len(answers) < self.log.partitions:
            raise Unreachable(f"not every partition answered within {_VERDICT_S:g} s: give the whole id, or try again")
        return sorted({task_id for reply in answers for task_id in json.loads(reply.body or b"{}").get("ids", ())})

    def ask_all(self, query: FindTasks) -> list[CommandReply]:
        """Every partition's answer; those that come within 5 s. Raises `InvalidRequest`, or `Unreachable` (Kafka)."""
        json_commands.check(query)
        connection = self._connection()
        expected = connection.replies.expect(query.command_id)
        self._append(query, range(connection.log.partitions), limits.DEFAULT_QUEUE)
        deadline = time.monotonic() + _VERDICT_S
        answers: list[CommandReply] = []
        while len(answers) < connection.log.partitions:
            reply = expected.next(deadline - time.monotonic())
            if reply is None:
                break
            answers.append(reply)
        return answers

    def head(self) -> dict[str, Any]:
        """The fields that every command of this client has."""
        return {"command_id": ids.new_id(), "issued_by": self._issued_by, "reply_to": self.id}

    def ask(self, query: DescribeTask | AwaitTask, timeout_s: float | None = None) -> CommandReply:
        """The engine's answer to a query about a task. Raises `InvalidRequest`, or `Unreachable` without one."""
        timeout_s = _VERDICT_S if timeout_s is None else timeout_s
        json_commands.check(query)
        expected = self._connection().replies.expect(query.command_id)
        self._send(query)
        reply = expected.next(timeout_s)
        if reply is None:
            raise Unreachable(f"the engine did not answer within {timeout_s:g} s; is one running on this namespace?")
        return reply

    def decide(self, command: Control) -> bool:
        """Send a command and wait for its verdict: True when it holds, False when it is in the log but undecided.

        Blocks up to 5 s after the append. Raises `CommandRefused`, `NotFound` or `Unreachable` (the append failed).
        """
        json_commands.check(command)
        expected = self._connection().replies.expect(command.command_id)
        self._send(command)
        reply = expected.next(_VERDICT_S)
        if reply is None:
            return False
        raise_refusal(reply, command.task_id)
        return True

    # Where things go --------------------------------------------------------------------------------------------------

    def _placed(self, command: SubmitTask) -> SubmitTask:
        """The submit with its whole task id, found as the engine finds it, and the policy version that was seen."""
        catalog = self.catalog
        known = catalog.type(command.type)
        command = codec.replace(command, policy_version=None if known is None else known.version)
        head, local = ids.split(command.task_id)
        if head and (head in catalog.routing_keys() or head == command.queue):
            ids.check_local_id(local)
            if command.queue is not None and head not in (command.queue, *catalog.routing_keys_of(command.queue)):
                raise InvalidRequest(
                    f"id {command.task_id!r} is in queue {head!r}, not {command.queue!r}", field="task_id"
                )
            return codec.replace(command, queue=head)
        queue = command.queue or catalog.queue_of(command.type)
        if queue is None:
            raise UnknownType(
                f"type {command.type!r} is not known: start a worker that has it, or name the queue to wait in",
                field="type",
            )
        local = ids.check_local_id(command.task_id) if command.task_id else _new_local_id(command, queue)
        routing_key = catalog.routing_key(queue, local)
        return codec.replace(command, queue=routing_key, task_id=ids.join(routing_key, local))

    # The log ----------------------------------------------------------------------------------------------------------

    def _send(self, command: SubmitTask | Control | DescribeTask | AwaitTask) -> None:
        """Append to the partition of the id's routing key; an id without one is looked up by the engine, from any."""
        head, _ = ids.split(command.task_id)
        routing_key = head if ids.is_routing_key(head) else limits.DEFAULT_QUEUE
        self._append(command, [ids.partition_of(routing_key, self.log.partitions)], routing_key)

    def _append(self, command: Command, partitions: Iterable[int], routing_key: str) -> None:
        """Append to `task-commands`; returns when every append is acknowledged. Raises `Unreachable`."""
        record = codec.bounded(codec.encode(command), limits.COMMAND_MAX, "command")
        producer = self._connection().producer
        acks: SimpleQueue[InfrastructureError | None] = SimpleQueue()
        sent = 0
        for partition in partitions:
            producer.append(
                topics.COMMANDS.name, partition, routing_key.encode(), record, lambda _, error: acks.put(error)
            )
            sent += 1
        for _ in range(sent):
            try:
                error = acks.get(timeout=_ACK_S)
            except Empty:
                raise Unreachable(
                    f"Kafka has not acknowledged the command within {_ACK_S:g} s; it may still arrive, so repeat a "
                    "submit only with the same id or key"
                ) from None
            if error is not None:
                raise error

    def _connection(self) -> _Connection:
        with self._lock:
            if self._connected is None:
                self._connected = _Connection(*(self._given or self._open()), self.id)
            return self._connected

    def _open(self) -> tuple[Log, LargeValues]:
        """The log in Kafka; imported only here, so that a command line that fails early starts fast."""
        from perdure.settings import Settings

        settings = self._settings or Settings.load()
        bootstrap = settings.require_bootstrap()
        from perdure.streams.kafka_log import KafkaLog

        log = KafkaLog(bootstrap, settings.namespace, options=_KAFKA | settings.kafka)
        return log, settings.large_values(log.topic_id)


class _Connection:
    """What a client holds of a log."""

    def __init__(self, log: Log, large_values: LargeValues, client_id: str) -> None:
        self.log, self.large_values = log, large_values
        self._lookup = SchemaLookup(log)
        self._unlearn = codec.learn_from(self._lookup)
        self.catalog = Catalog(log)
        self.replies = Replies(log, client_id)
        self.producer: Producer = log.producer()
        self.admission = Admission(log, time.monotonic)

    def close(self) -> None:
        self.replies.close()
        self.catalog.close()
        self.producer.close()
        self._unlearn()
        self._lookup.close()


_default_lock = threading.Lock()
_default: Client | None = None


def default_client() -> Client:
    """The process's own client, from its settings; made at the first call."""
    global _default
    with _default_lock:
        if _default is None:
            _default = Client()
        return _default


def _new_local_id(command: SubmitTask, queue: str) -> str:
    if command.key is not None:
        return ids.keyed_local_id(queue, command.type, command.key)
    return ids.new_local_id()


def _whoami() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = str(os.getuid())
    return f"{name}@{socket.gethostname()}"
