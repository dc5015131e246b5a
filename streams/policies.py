"""Which policy holds for a task: the type's, with what the submitter set laid over it."""

from __future__ import annotations

import json

from perdure.schemas.commands import SubmitTask
from perdure.schemas.common import Policy, Retry
from perdure.schemas.policies import apply_overrides, policy_from_json
from perdure.streams.state import State

_PLAIN = (
    "run_timeout", "queue_timeout", "total_timeout", "no_progress_timeout", "checkpoint_interval", "checkpoint_storage",
    "on_success", "on_failure",
)  # fmt: skip


def effective(s: State, task_id: str) -> Policy:
    """The task's policy; while it is not bound, the default with the submitter's own settings."""
    spec = s.spec(task_id)
    return spec.policy if spec.policy is not None else _over(Policy(retry=Retry()), spec.overrides)


def of_type(content: dict[str, object], overrides: bytes | None) -> Policy:
    """The policy in a type's configuration, with the submitter's settings laid over it."""
    stated = content.get("policy", {})
    if not isinstance(stated, dict):
        raise TypeError(f"a type's policy is an object, not {type(stated).__name__}")
    return _over(policy_from_json(stated), overrides)


def overrides_of(command: SubmitTask) -> bytes | None:
    """What a submit sets of its own, as JSON; None if nothing."""
    found: dict[str, object] = {name: getattr(command, name) for name in _PLAIN if getattr(command, name) is not None}
    if command.retry is not None:
        found["retry"] = dict(command.retry.__dict__)
    return json.dumps(found, sort_keys=True, separators=(",", ":")).encode() if found else None


def _over(policy: Policy, overrides: bytes | None) -> Policy:
    return apply_overrides(policy, json.loads(overrides)) if overrides else policy
