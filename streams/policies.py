"""Which policy holds for a task: the type's, with what the submitter set laid over it."""

from __future__ import annotations

import json
from functools import lru_cache

from perdure.schemas import events, limits
from perdure.schemas.commands import SubmitTask
from perdure.schemas.common import Policy, Retry
from perdure.schemas.errors import InvalidRequest
from perdure.schemas.ids import check_queue
from perdure.schemas.policies import apply_overrides, policy_from_json
from perdure.streams.decision import FEATURE_LEVEL, LEVEL, Moment, Outputs, of_task
from perdure.streams.state import State

_PLAIN = (
    "run_timeout", "queue_timeout", "total_timeout", "no_progress_timeout", "checkpoint_interval", "checkpoint_storage",
    "on_success", "on_failure",
)  # fmt: skip


def effective(s: State, task_id: str) -> Policy:
    """The task's policy; while it is not bound, the default with the submitter's own settings."""
    spec = s.spec(task_id)
    return spec.policy if spec.policy is not None else _over(Policy(retry=Retry()), spec.overrides)


def of_type(s: State, task_type: str, overrides: bytes | None) -> Policy:
    """The policy of a type whose configuration is applied, with the submitter's settings laid over it."""
    known = s.config("type/" + task_type)
    assert known is not None, f"type {task_type} is not configured"
    return _parsed(known.text, overrides)


@lru_cache(maxsize=1_024)
def _parsed(content: bytes, overrides: bytes | None) -> Policy:
    return _over(policy_from_json(json.loads(content).get("policy", {})), overrides)


def bind(s: State, m: Moment, task_id: str) -> Outputs:
    """Bind the policy of a task whose type was unknown until now, if it is known here."""
    spec = s.spec(task_id)
    known = s.config("type/" + spec.type)
    if spec.policy is None and known is not None and known[0] >= (spec.policy_version or 0):
        policy = of_type(s, spec.type, spec.overrides)
        yield events.TaskPolicyBound(**of_task(s, m, task_id), policy=policy, policy_version=known[0])


def fault(name: str, content: bytes | None) -> str | None:
    """What makes a configuration value unusable; None if nothing does."""
    try:
        value = {} if content is None else json.loads(content)
        if not isinstance(value, dict):
            return "no JSON object"
        kind, _, rest = name.partition("/")
        policy, routing_keys = value.get("policy", {}), value.get("routing_keys", [])
        if kind == "type":
            if not isinstance(policy, dict):
                return "policy is no JSON object"
            policy_from_json(policy)
            check_queue(value.get("queue") or limits.DEFAULT_QUEUE)
        elif kind == "queue" and content is not None:
            if not isinstance(routing_keys, list):
                return "routing_keys is no list"
            for key in (rest, *routing_keys):
                check_queue(key, "routing_keys")
        elif name == LEVEL and not 1 <= int(value.get("level", 0)) <= FEATURE_LEVEL:
            return f"this build knows the feature levels 1 to {FEATURE_LEVEL}"
    except (ValueError, TypeError, InvalidRequest) as error:
        return str(error)
    return None


def overrides_of(command: SubmitTask) -> bytes | None:
    """What a submit sets of its own, as JSON; None if nothing."""
    found: dict[str, object] = {name: getattr(command, name) for name in _PLAIN if getattr(command, name) is not None}
    if command.retry is not None:
        found["retry"] = dict(command.retry.__dict__)
    return json.dumps(found, sort_keys=True, separators=(",", ":")).encode() if found else None


def _over(policy: Policy, overrides: bytes | None) -> Policy:
    return apply_overrides(policy, json.loads(overrides)) if overrides else policy
