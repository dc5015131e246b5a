"""Policies as JSON, in `config/type/<name>` and in what a submitter overrides, checked on the way in.

Durations are milliseconds here: people's spellings ("90s") end where they are typed, in `perdure.tasks` and the client.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import msgspec

from perdure.schemas import limits
from perdure.schemas.common import Policy, Retry
from perdure.schemas.durations import MAX_MS
from perdure.schemas.errors import InvalidRequest

OVERRIDES = (
    "run_timeout",
    "queue_timeout",
    "total_timeout",
    "no_progress_timeout",
    "retry",
    "on_failure",
    "on_success",
    "checkpoint_interval",
    "checkpoint_storage",
)
"""What a submitter may set for one task; null means: as the type has it."""

_DURATIONS = ("run_timeout", "queue_timeout", "total_timeout", "no_progress_timeout", "checkpoint_interval")
_CHOICES = {
    "on_shutdown": ("drain", "pause"),
    "step_mismatch": ("warn", "fail", "rerun"),
    "executor": ("process", "async"),
}


def policy_to_json(policy: Policy) -> dict[str, Any]:
    """The policy as a JSON object; the inverse of `policy_from_json`."""
    return asdict(policy)


def policy_from_json(content: Mapping[str, Any]) -> Policy:
    """The policy in a JSON object. Fields it does not name have their defaults; those unknown here are passed over,
    so that a worker may be newer than the engine. Raises `InvalidRequest` naming the field.
    """
    return check(_convert({"retry": {}} | dict(content), Policy, "policy"))


def apply_overrides(policy: Policy, overrides: Mapping[str, Any]) -> Policy:
    """`policy` with what the submitter set for one task. `overrides` holds any of `OVERRIDES`, durations in ms; a
    `retry` object replaces only the fields it names. Raises `InvalidRequest` naming the field.
    """
    unknown = overrides.keys() - set(OVERRIDES)
    if unknown:
        first = min(unknown)
        raise InvalidRequest(f"{first} cannot be set for one task; these can: {', '.join(OVERRIDES)}", field=first)
    chosen = {name: value for name, value in overrides.items() if value is not None}
    if not chosen:
        return policy
    merged = asdict(policy) | chosen
    if "retry" in chosen:
        merged["retry"] = asdict(policy.retry) | _retry_fields(chosen["retry"])
    return check(_convert(merged, Policy, "policy"))


def check(policy: Policy) -> Policy:
    """`policy`, if it can be carried out. Raises `InvalidRequest` naming the field."""
    for name in _DURATIONS:
        _check_duration(name, getattr(policy, name))
    _check_duration("cancel_grace", policy.cancel_grace, least=0)
    for name, choices in _CHOICES.items():
        _check_choice(name, getattr(policy, name), choices)
    for name in ("on_failure", "on_success"):
        _check_target(name, getattr(policy, name))
    check_retry(policy.retry)
    return policy


def check_retry(retry: Retry) -> Retry:
    """`retry`, if it can be carried out. Raises `InvalidRequest` naming the field."""
    if not 1 <= retry.max_attempts <= limits.ATTEMPTS_MAX:
        raise InvalidRequest(
            f"retry.max_attempts is {retry.max_attempts}; it is 1 to {limits.ATTEMPTS_MAX:,}",
            field="retry.max_attempts",
        )
    _check_choice("retry.backoff", retry.backoff, ("exponential", "fixed"))
    _check_duration("retry.delay", retry.delay, least=0)
    _check_duration("retry.max_delay", retry.max_delay, least=0)
    return retry


def _convert(content: dict[str, Any], kind: type[Policy], what: str) -> Policy:
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        field = path.strip(".`") or what
        raise InvalidRequest(f"{field}: {text}", field=field) from error


def _retry_fields(value: Any) -> dict[str, Any]:
    if isinstance(value, Retry):
        return asdict(value)
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"retry is an object like {{'max_attempts': 3}}, not {value!r}", field="retry")
    known = {f.name for f in fields(Retry)}
    for name in value:
        if name not in known:
            raise InvalidRequest(f"retry.{name} is unknown; known: {', '.join(sorted(known))}", field=f"retry.{name}")
    return dict(value)


def _check_duration(name: str, ms: int | None, least: int = 1) -> None:
    if ms is not None and not least <= ms <= MAX_MS:
        raise InvalidRequest(f"{name} is {ms} ms; {least} ms to 100 years can be used", field=name)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidRequest(f"{name} is {value!r}; it is one of: {', '.join(choices)}", field=name)


def _check_target(name: str, value: str | None) -> None:
    """A type or notify target, bare or with the prefix that decides which."""
    if value is None:
        return
    prefix, colon, rest = value.partition(":")
    if not value.strip() or (colon and (prefix not in ("task", "notify") or not rest.strip())):
        raise InvalidRequest(
            f"{name} is {value!r}; name a task type or notify target, or write task:<type> or notify:<target>",
            field=name,
        )


# msgspec learns a dataclass when it first converts to it, and two threads that do so at the same time can crash the
# process: it reads what the other one has not filled in yet. So it learns here, where modules are loaded one at a time.
policy_from_json({})
