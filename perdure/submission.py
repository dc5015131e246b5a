"""What a caller may say about a task that it submits, and the command that this makes."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from perdure.schemas import json_commands
from perdure.schemas.commands import SubmitTask
from perdure.schemas.common import Retry as RetryRecord
from perdure.schemas.durations import Duration
from perdure.schemas.errors import InvalidRequest
from perdure.tasks import Retry, retry_record

Moment = str | float | dt.datetime


class MoreOptions(TypedDict, total=False):
    """All of it optional; None counts as not said. Plain numbers are seconds."""

    id: str | None
    """The task's id, with or without its routing key; a second submit with the same content is the same task."""
    key: str | None
    """Idempotency key: makes the id, together with queue and type."""
    queue: str | None
    """The type's, if not said."""
    priority: int | None
    """0 to 9, higher first; 5."""
    delay: Duration | None
    """Not before so much time from now."""
    at: Moment | None
    """Not before this time: RFC 3339, an aware datetime, or seconds since 1970."""
    queue_timeout: Duration | None
    total_timeout: Duration | None
    no_progress_timeout: Duration | None
    labels: Mapping[str, str] | None
    user: str | None
    concurrency_key: str | None
    after: Sequence[str] | None
    resources: Mapping[str, Any] | None
    checkpoint_interval: Duration | None
    checkpoint_storage: str | None
    callback_url: str | None
    on_success: str | None
    notify: Sequence[str] | None


class SubmitOptions(MoreOptions, total=False):
    """All that a caller may say about a task besides its type and input."""

    timeout: Duration | None
    """Running time of one attempt."""
    retry: Retry | RetryRecord | Mapping[str, Any] | None
    on_failure: str | None
    """task:TYPE, notify:TARGET, or a bare name of either."""
    estimated_duration: Duration | None
    """The first ETA."""
    agent_config: Mapping[str, Any] | None
    """Handed to the task as `ctx.config`."""


def to_command(head: Mapping[str, Any], type: str, options: SubmitOptions, *, now: int) -> SubmitTask:
    """The checked command without its input, its id not yet completed. head: the fields of every command. now: ms, for
    `delay`.

    Raises `InvalidRequest` naming the option, or `TypeError` for an option that does not exist.
    """
    unknown = options.keys() - SubmitOptions.__optional_keys__
    if unknown:
        raise TypeError(f"submit() got an unexpected keyword argument {min(unknown)!r}")
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    task_id, delay, at, timeout, retry = (given.pop(n, None) for n in ("id", "delay", "at", "timeout", "retry"))
    if delay is not None and at is not None:
        raise InvalidRequest("delay and at exclude each other: give one of them", field="delay")
    fields = json_commands.convert(SubmitTask, given | {"type": type})
    if task_id == "":
        raise InvalidRequest("id is empty: leave it out, and the task gets one", field="task_id")
    if task_id is not None:
        fields |= json_commands.convert(SubmitTask, {"task_id": task_id})
    if delay is not None:
        fields["not_before"] = now + json_commands.to_ms(delay, "delay", positive=False)
    if at is not None:
        fields["not_before"] = json_commands.to_time(at, "at")
    if timeout is not None:
        fields["run_timeout"] = json_commands.to_ms(timeout, "timeout")
    if retry is not None:
        fields["retry"] = retry if isinstance(retry, RetryRecord) else retry_record(retry)
    command = SubmitTask(**head, **fields)
    json_commands.check(command)
    return command
