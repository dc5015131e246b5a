"""Submitting: a new task, the same one again, or a refusal."""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, fields
from typing import Any

from perdure.schemas import events, ids, references
from perdure.schemas.codec import replace
from perdure.schemas.commands import SubmitTask
from perdure.schemas.common import Retry
from perdure.schemas.errors import InvalidRequest, ValueTooLarge
from perdure.streams import policies, tables
from perdure.streams.decision import Moment, Outputs, of_task
from perdure.streams.state import State
from perdure.streams.task_lifecycle import place_order

_NOT_CONTENT = {"command_id", "task_id", "issued_by", "reply_to", "policy_version"}
_COPIED = (
    "type", "input", "priority", "not_before", "key", "user", "concurrency_key", "after", "resources",
    "estimated_duration", "agent_config", "callback_url", "labels", "notify",
)  # fmt: skip
_SIDE_VALUES = 32 * 1024
_DEFAULTS: dict[type, dict[str, Any]] = {
    cls: {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(cls)}
    for cls in (SubmitTask, Retry)
}


def submit(s: State, m: Moment, command: SubmitTask) -> Outputs:
    """Record the task and queue it. Raises `InvalidRequest` for another task under the same id or key."""
    task_id, queue = command.task_id, command.queue
    assert queue is not None, "routing fills the queue in"
    content, value = digests(command)
    if s.task(task_id) is not None:
        _check_same(s, command, content, value)
        return
    _check_key(s, command)
    if command.after:
        raise InvalidRequest("dependencies are not part of this feature level", field="after")
    overrides = policies.overrides_of(command)
    _check_side_values(command, overrides)
    known = s.config("type/" + command.type)
    bound = known is not None and known[0] >= (command.policy_version or 0)
    policy = policies.of_type(s, command.type, overrides) if bound else None
    yield events.TaskSubmitted(
        **of_task(s, m, task_id), **{name: getattr(command, name) for name in _COPIED}, queue=queue,
        order=place_order(m), content_hash=content, input_hash=value, policy=policy,
        policy_version=known[0] if known is not None and bound else command.policy_version,
        submitted_by=command.issued_by, overrides=overrides,
    )  # fmt: skip
    start = command.not_before
    if start is not None and (start > m.at or s.clock.unconfirmed):  # a tick knows whether the log's clock is right
        yield events.TaskQueued(**of_task(s, m, task_id), reason="delayed", due=start)
    else:
        yield events.TaskQueued(**of_task(s, m, task_id), reason="queued")


def digests(command: SubmitTask) -> tuple[str, str]:
    """(digest of all the submitter said, digest of type and input)."""
    command = replace(command, input=references.identity(command.input))
    return _digest(_said(command)), _digest((command.type, command.input))


def _said(value: Any) -> Any:
    """What a record says: without fields that have their default, so that a field added later changes no digest."""
    if isinstance(value, dict):
        return sorted(value.items())
    if type(value) not in _DEFAULTS:
        return value
    defaults = _DEFAULTS[type(value)]
    said = {k: v for k, v in value.__dict__.items() if k not in _NOT_CONTENT and v != defaults.get(k)}
    return sorted((name, _said(v)) for name, v in said.items())


def _check_side_values(command: SubmitTask, overrides: bytes | None) -> None:
    """Every grant of the task carries them beside the input."""
    sizes = {
        "labels": sum(len(text.encode()) for label in command.labels.items() for text in label),
        "resources": len(command.resources or b""),
        "agent_config": len(command.agent_config or b""),
        "retry": len(overrides or b""),
    }
    if sum(sizes.values()) > _SIDE_VALUES:
        names = "labels, resources, agent_config and what is set of the policy"
        raise ValueTooLarge(f"{names} together may be {_SIDE_VALUES:,} bytes", field=max(sizes, key=sizes.__getitem__))


def _canonical(value: bytes) -> str:
    """Programs write the same JSON in different ways; large values are all written by us, in one."""
    return repr(value) if references.is_reference(value) else json.dumps(json.loads(value), sort_keys=True)


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:32]


def _check_key(s: State, command: SubmitTask) -> None:
    """A key stands for one task, also where a task with that key was given an id of its own."""
    if command.key is None:
        return
    assert command.queue is not None, "routing fills the queue in"
    keyed = ids.join(command.queue, ids.keyed_local_id(command.queue, command.type, command.key))
    row = s.get(tables.KEYS, tables.key(command.queue, command.type, command.key))
    holder = row.text if row is not None else keyed if s.task(keyed) is not None else None
    if holder is not None:
        raise InvalidRequest(f"key {command.key!r} belongs to task {holder} already", field="key")


def _check_same(s: State, command: SubmitTask, content: str, value: str) -> None:
    spec = s.spec(command.task_id)
    if command.key is not None and spec.key == command.key:
        if spec.input_hash != value and _canonical(spec.input) != _canonical(command.input):
            raise InvalidRequest(f"key {command.key!r} was used before with another input", field="key")
    elif spec.content_hash != content:
        raise InvalidRequest(f"another task has the id {command.task_id!r}", field="task_id")
