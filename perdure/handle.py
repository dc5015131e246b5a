"""A submitted task, to be asked about and controlled."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from perdure.replies import Expected, raise_refusal
from perdure.schemas import codec, ids, json_commands, limits, topics, values
from perdure.schemas.commands import (
    AwaitTask,
    CancelTask,
    DescribeTask,
    DiscardDeadLetter,
    PauseTask,
    ResumeTask,
    RetryTask,
)
from perdure.schemas.durations import Duration
from perdure.schemas.errors import CommandRefused, DecodeError, InfrastructureError, NotFound, Unreachable, WaitTimeout
from perdure.schemas.inbox import CommandReply
from perdure.schemas.public import LogLine
from perdure.schemas.references import Reference
from perdure.status import Status, parse_status
from perdure.streams.log import Record

if TYPE_CHECKING:
    from perdure.client import Client

_RENEW_S = 20.0
_GRACE_S = limits.VERDICT_MS / 1000
_POLL_S = 0.5
_SILENCE_S = 120.0
"""So long may an engine that has answered say nothing more: the longest of its recoveries."""
_BATCH = 500
_ENDS = frozenset({"TaskCompleted", "TaskFailed", "TaskTimedOut", "TaskCancelled"})
_KEEP_INPUT = object()


@dataclass(frozen=True, slots=True)
class Event:
    """A fact about a task, as the engine recorded it."""

    kind: str
    """Its record class: TaskSubmitted, StepCompleted, TaskCompleted ..."""
    at: int
    """Log time, ms."""
    seq: int
    """Counts the task's events from 1."""
    record: Any
    """All of it; the class is in `perdure.schemas.events`."""


class Handle:
    """One task. Every method asks the engine: it sees your own last command, with no server running.

    Control verbs return True when the engine has accepted the command, and False when it is safely in the log but was
    not decided within 5 s. They raise `CommandRefused`, `NotFound` or `Unreachable`.
    """

    def __init__(self, client: Client, task_id: str, *, verdict: Expected | None = None) -> None:
        self.id = task_id
        self._client = client
        self._verdict = verdict
        self._refusal: CommandRefused | None = None

    def __repr__(self) -> str:
        return f"Handle({self.id!r})"

    def status(self) -> Status:
        """Where the task stands now. Blocks up to 5 s.

        Raises `NotFound`, `Unreachable`, or `CommandRefused` if this handle's submit was refused.
        """
        return self._status_in(self._client.ask(DescribeTask(**self._client.head(), task_id=self.id)))

    def wait(self, timeout: Duration | None = None) -> Status:
        """Wait for the end and return the final status. Raises `WaitTimeout`, and what `status` raises.

        Once the engine has answered, its silence is waited out, for engines and brokers are restarted: until the end of
        `timeout`, or without one for two minutes. Then it is `Unreachable`.
        """
        deadline = (
            None
            if timeout is None
            else time.monotonic() + json_commands.to_ms(timeout, "timeout", positive=False) / 1000
        )
        status = self.status()
        patience = time.monotonic() + _SILENCE_S
        while not status.ended:
            left = _RENEW_S if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeout(f"task {self.id} is {status.state} still; it goes on, wait for it again")
            try:
                status = self._await(min(left, _RENEW_S), left) or self.status()
                patience = time.monotonic() + _SILENCE_S
            except Unreachable:
                if time.monotonic() >= (patience if deadline is None else deadline):
                    raise
                time.sleep(_POLL_S)
        return status

    def result(self, timeout: Duration | None = None) -> Any:
        """Wait for the end and return the task's result.

        Raises `TaskFailed`, `TaskTimedOut` or `TaskCancelled` with the recorded error, what `wait` raises, and for a
        result that is too large for a record `ValueLost`, or `ConfigurationError` where PERDURE_BLOBS is not set.
        """
        status = self.wait(timeout)
        outcome = status.outcome()
        if outcome is not None:
            raise outcome
        if status.result_ref is None:
            return status.result
        carried = Reference(**status.result_ref).encode()
        return values.loads(self._client.large_values.fetched(status.task_id, carried))

    def pause(self) -> bool:
        """Stop at the next boundary, keep everything, wait for `resume`."""
        return self._client.decide(PauseTask(**self._client.head(), task_id=self.id))

    def resume(self) -> bool:
        """Go on after a pause."""
        return self._client.decide(ResumeTask(**self._client.head(), task_id=self.id))

    def cancel(self, reason: str = "") -> bool:
        """End without a result. A running task is stopped cooperatively first."""
        return self._client.decide(CancelTask(**self._client.head(), task_id=self.id, reason=reason))

    def retry(self, input: Any = _KEEP_INPUT) -> bool:
        """Send a FAILED or TIMED_OUT task back to its queue: attempts from 0, steps and checkpoint kept."""
        new = None
        if input is not _KEEP_INPUT:
            large = self._client.large_values
            text = large.text(input, "input")
            owner = self.id if len(text) <= limits.VALUE_MAX else self.status().task_id  # whole, whatever we were given
            new = large.carried(owner, text)
        return self._client.decide(RetryTask(**self._client.head(), task_id=self.id, input=new))

    def discard(self, reason: str = "") -> bool:
        """Take the task off the dead-letter list for good."""
        return self._client.decide(DiscardDeadLetter(**self._client.head(), task_id=self.id, reason=reason))

    def events(self, *, follow: bool = True) -> Iterator[Event]:
        """The task's history from its submit, and, with `follow`, what happens until its end. Blocks in between.

        Raises `NotFound` for a task that has no history, `Unreachable`.
        """
        known = seen = ended = False
        for record in self._tail(topics.EVENTS.name):
            if record is not None:
                event = codec.decode(record.value or b"")
                kind = type(event).__name__
                seen, ended = True, kind in _ENDS or (ended and kind != "TaskRedriven")
                yield Event(kind, event.at, event.seq, event)
            elif ended or not follow:
                break
            elif not known:
                self.status()  # raises for a task that does not exist
                known = True
        if not seen:
            raise NotFound(f"task {self.id} has no history in {topics.EVENTS.name}")

    def logs(self, last_n: int = 100) -> list[LogLine]:
        """The newest lines that the task printed or logged, oldest first. Raises as `log_lines` does."""
        return list(self.log_lines(last_n, follow=False))

    def _line(self, record: Record) -> LogLine:
        """A record of `task-logs`. Anybody may write there: what is no line is told as one, and hides no other."""
        try:
            return codec.decode_as(LogLine, record.value or b"")
        except DecodeError as error:
            told = f"{record.topic}/{record.partition} at offset {record.offset} is no line: {error}"
            return LogLine(
                task_id=self.id, epoch=0, attempt=0, worker_id="", number=0, at=record.at, stream="perdure", text=told
            )

    def log_lines(self, last_n: int = 100, *, follow: bool = True) -> Iterator[LogLine]:
        """The newest lines, oldest first, and, with `follow`, those that come until the task's end. Blocks.

        Raises `Unreachable`, and `NotFound` when there is neither a line nor such a task.
        """
        newest: deque[LogLine] = deque(maxlen=max(0, last_n))
        seen = caught_up = ended = False
        ask_at = 0.0
        for record in self._tail(topics.LOGS.name):
            if record is not None:
                seen = True
                line = self._line(record)
                if caught_up:
                    yield line
                else:
                    newest.append(line)
                continue
            if not caught_up:
                if not seen:
                    self.status()  # raises for a task that does not exist
                yield from newest
                caught_up = True
            if ended or not follow:
                return
            if time.monotonic() >= ask_at:  # others' lines may bring us here many times a second
                ended = self.status().ended  # its last lines are in the log before its end is: one more look is enough
                ask_at = time.monotonic() + _POLL_S

    # Inside ----------------------------------------------------------------------------------------------------------

    def _await(self, wait_s: float, left_s: float) -> Status | None:
        """The status at the task's end or after `wait_s`; None when the engine said nothing."""
        query = AwaitTask(**self._client.head(), task_id=self.id, timeout=max(1, int(wait_s * 1000)))
        try:
            return self._status_in(self._client.ask(query, min(wait_s + _GRACE_S, left_s)))
        except Unreachable:
            return None  # perhaps it is just being restarted: the next question decides

    def _status_in(self, reply: CommandReply) -> Status:
        self._check_verdict()
        raise_refusal(reply, self.id)
        return parse_status(reply.body or b"")

    def _check_verdict(self) -> None:
        """Raise the refusal of this handle's submit. Its answer comes before any later one of the same partition."""
        if self._verdict is not None:
            try:
                reply = self._verdict.next(0)
            except InfrastructureError:
                self._verdict = None  # whoever waited for an answer has been told
                return
            if reply is not None:
                self._verdict = None
                self._refusal = None if reply.accepted else CommandRefused(reply.reason, field=reply.field)
        if self._refusal is not None:
            raise self._refusal

    def _tail(self, topic: str) -> Iterator[Record | None]:
        """The task's records from the beginning of its partition on; None whenever the end is reached."""
        log, key = self._client.log, self.id.encode()
        partition = ids.partition_of(ids.split(self.id)[0], log.partitions)
        reader = log.reader()
        try:
            reader.assign({(topic, partition): reader.bounds(topic, partition)[0]})
            while True:
                _, end = reader.bounds(topic, partition)
                while not reader.caught_up(topic, partition, end):
                    yield from (r for r in reader.read(_BATCH, _POLL_S) if r.key == key)
                yield None
                yield from (r for r in reader.read(_BATCH, _POLL_S) if r.key == key)
        finally:
            reader.close()
