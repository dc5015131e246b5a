"""Commands as plain JSON, from any Kafka producer; and the rules that every command has to keep, whatever its form.

    {"command": "SubmitTask", "type": "process_large_dataset", "input": {"path": "large.csv"}, "run_timeout": "6h"}

A value that cannot be decoded at all is a `DecodeError`: there is nobody to answer, the record is quarantined. A
command that can be read but is illegal is an `InvalidCommand`, which carries what is known of its sender, so that it
can be answered.
"""

from __future__ import annotations

import datetime as dt
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Annotated, Any, get_args, get_origin

from perdure.schemas import codec, commands, durations, ids, limits, references, values
from perdure.schemas.commands import Command, SubmitBatch, SubmitTask
from perdure.schemas.common import Retry
from perdure.schemas.errors import DecodeError, InvalidRequest, ValueTooLarge
from perdure.schemas.records import JsonText, field_types

COMMANDS: dict[str, type[Command]] = {c.__name__: c for c in get_args(Command)}
DURATIONS = frozenset(
    {
        "run_timeout",
        "queue_timeout",
        "total_timeout",
        "no_progress_timeout",
        "estimated_duration",
        "checkpoint_interval",
        "timeout",
    }
)
_OBJECTS = frozenset({"resources", "agent_config"})
_RETRY_DURATIONS = frozenset({"delay", "max_delay"})
_BACKOFFS = ("exponential", "fixed")
_LATEST_MS = 253_402_300_799_999  # the last moment of the year 9999
_LONG_MAX = 2**63 - 1
_TASK_ID_MAX = limits.ROUTING_KEY_MAX + 1 + limits.LOCAL_ID_MAX


class JsonNotAllowed(DecodeError):
    """Reports, ticks and configuration are not taken as JSON."""

    code = "json_not_allowed"


class InvalidCommand(InvalidRequest):
    """A JSON command that can be read but is illegal, with what its answer needs."""

    def __init__(
        self, cause: InvalidRequest, *, command: str, command_id: str, task_id: str, reply_to: str | None
    ) -> None:
        super().__init__(_readable(str(cause)), field=cause.field and _readable(cause.field))
        self.code = cause.code
        self.command = command
        self.command_id = command_id
        self.task_id = task_id
        self.reply_to = reply_to


def parse(data: bytes) -> Command:
    """The command that JSON text holds, with `check` passed. Missing ids are empty: the log position gives them later.

    Raises `DecodeError` (no JSON object, duplicate keys, NaN, too deep, no or unknown `command`) or `InvalidCommand`.
    """
    content = strict_loads(data)
    if not isinstance(content, dict):
        raise DecodeError(f"a JSON command is an object, not {_kind(content)}")
    name = content.pop("command", None)
    if not isinstance(name, str) or name not in COMMANDS:
        if isinstance(name, str) and name in _FOREIGN:
            raise JsonNotAllowed(f"{name} is not taken as JSON: only {', '.join(COMMANDS)} are")
        raise DecodeError(f"command is {name!r:.100}, but only {', '.join(COMMANDS)} are commands")
    try:
        command: Command = _build(COMMANDS[name], content, "")
        check(command)
        _check_size(len(data))
    except InvalidRequest as error:
        raise InvalidCommand(
            error,
            command=name,
            command_id=_known(content, "command_id", limits.TEXT_MAX) or "",
            task_id=_known(content, "task_id", _TASK_ID_MAX) or "",
            reply_to=_known(content, "reply_to", limits.TEXT_MAX),
        ) from error
    return command


def check(command: Command) -> None:
    """Refuse a command whose values are illegal, wherever it comes from. Raises `InvalidRequest` naming the field.

    The tasks of a `SubmitBatch` are decided, and so checked, one by one; here only their number counts.
    """
    for name, rule in _RULES_OF[type(command)]:
        value = getattr(command, name)
        if value is not None:
            rule(value, name)
    # All others are small, or never forwarded as a whole.
    if isinstance(command, SubmitTask) and sum(map(len, _bulk(command))) > limits.COMMAND_MAX // 8:
        _check_size(len(codec.encode(command)))
    if not isinstance(command, SubmitTask | SubmitBatch | commands.FindTasks) and not command.task_id:
        raise InvalidRequest("task_id is missing: name the task that the command is for", field="task_id")


def _bulk(command: SubmitTask) -> list[bytes]:
    """What of a submit is not short by its own rule; all the rest together is below half of what a command may be."""
    labels = [text.encode() for label in command.labels.items() for text in label]
    return [command.input, command.resources or b"", command.agent_config or b"", *labels]


def _check_size(size: int) -> None:
    """What is larger could not be forwarded to the task's partition: the envelope would not fit into a record."""
    if size > limits.COMMAND_MAX:
        message = f"the command is {size:,} bytes; at most {limits.COMMAND_MAX:,} are taken"
        raise ValueTooLarge(message, field="command")


def strict_loads(data: bytes) -> Any:
    """JSON text as Python values, or `DecodeError`: no duplicate keys, no NaN or infinite number, a limit on depth."""
    try:
        content = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"no JSON: {error}") from error
    _check_shape(content)
    return content


def convert(cls: type, content: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Fields of a command, or of `Retry`, from values as people write them. Raises `InvalidRequest` naming one."""
    converters = _CONVERTERS[cls]
    for name in content:
        if name not in converters:
            raise InvalidRequest(f"{path}{name} is no field of {cls.__name__}", field=path + name)
    return {name: converters[name](value, path + name) for name, value in content.items()}


def to_retry(value: Retry | Mapping[str, Any], field: str = "retry") -> Retry:
    """A retry policy from a mapping as people write it; what it leaves out is 3 attempts, exponential, 1 s to 5 min.

    Raises `InvalidRequest` naming the field.
    """
    if isinstance(value, Retry):
        return value
    if not isinstance(value, Mapping):
        raise _wrong(field, "an object such as {\"max_attempts\": 3}", value)  # fmt: skip
    return Retry(**({"max_attempts": 3} | convert(Retry, value, f"{field}.")))


def to_ms(value: durations.Duration, field: str, *, positive: bool = True) -> int:
    """`durations.to_ms` for values from outside, of whatever size or type."""
    if isinstance(value, str) and len(value) > limits.TEXT_MAX:
        raise InvalidRequest(f"{field}: {len(value):,} characters are no duration", field=field)
    try:
        return durations.to_ms(value, field=field, positive=positive)
    except OverflowError as error:
        raise InvalidRequest(f"{field}: {str(value)[:40]}... is longer than 100 years", field=field) from error


def to_time(value: str | float | dt.datetime, field: str) -> int:
    """Milliseconds since 1970 of an RFC 3339 text, an aware datetime, or a number of seconds since 1970."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= _LATEST_MS / 1000:
        return round(value * 1000)
    try:
        moment = dt.datetime.fromisoformat(value) if isinstance(value, str) else value
        if isinstance(moment, dt.datetime) and moment.tzinfo is not None:
            return _non_negative(round(moment.timestamp() * 1000), field)
    except (ValueError, OverflowError):
        pass  # told below, as for every other value that is no time
    raise InvalidRequest(
        f"{field}: {str(value)[:60]!r} is no time; write 2026-11-21T08:00:00Z (with its zone) or seconds since 1970",
        field=field,
    )


# From JSON to records -------------------------------------------------------------------------------------------------


def _build(cls: type, content: dict[str, Any], path: str) -> Any:
    given = convert(cls, content, path)
    if "type" not in given and cls is SubmitTask:
        raise InvalidRequest(f"{path}type is missing: name the task type to run", field=f"{path}type")
    for required in ("prefix", "tasks"):
        if required not in given and required in _CONVERTERS[cls]:
            raise InvalidRequest(f"{path}{required} is missing", field=f"{path}{required}")
    return cls(**({n: "" for n in ("command_id", "task_id") if n not in given} | given))


def _readable(text: str) -> str:
    """`text` as an answer can carry it: not too long, and with lone surrogates made visible."""
    return text[: limits.TEXT_MAX].encode("utf-8", "backslashreplace").decode()


def _converter(name: str, hint: Any) -> Callable[[Any, str], Any]:
    """How a field's JSON becomes its value; None is let through where the field may be null."""
    arms = [a for a in get_args(hint) if a is not type(None)] if type(None) in get_args(hint) else [hint]
    convert = _plain_converter(name, arms[0])
    if len(arms) == len(get_args(hint)) or arms[0] is hint:
        return convert
    return lambda value, field: None if value is None else convert(value, field)


def _plain_converter(name: str, hint: Any) -> Callable[[Any, str], Any]:
    if name in DURATIONS:
        return to_ms
    if name in _RETRY_DURATIONS:
        return partial(to_ms, positive=False)
    if name == "not_before":
        return to_time
    if get_origin(hint) is Annotated and any(isinstance(m, JsonText) for m in get_args(hint)):
        return _object_json if name in _OBJECTS else lambda value, field: values.dumps(value, field=field)
    if hint is Retry:
        return to_retry
    if hint == list[SubmitTask]:
        return _submits
    return _CHECKED[hint]


def _submits(value: Any, field: str) -> list[SubmitTask]:
    if not isinstance(value, list) or not all(isinstance(task, dict) for task in value):
        raise _wrong(field, "a list of objects", value)
    return [_build(SubmitTask, task, f"{field}[{i}].") for i, task in enumerate(value)]


def _object_json(value: Any, field: str) -> bytes:
    if not isinstance(value, dict):
        raise _wrong(field, "an object", value)
    return values.dumps(value, field=field)


def _string(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise _wrong(field, "text", value)
    return value


def _whole(value: Any, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(field, "a whole number", value)
    return value


def _flag(value: Any, field: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(field, "true or false", value)
    return value


def _strings(value: Any, field: str) -> list[str]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise _wrong(field, "a list of texts", value)
    return list(value)


def _string_map(value: Any, field: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for item in value.items() for v in item):
        raise _wrong(field, "an object of texts", value)
    return value


_CHECKED: dict[Any, Callable[[Any, str], Any]] = {
    str: _string,
    int: _whole,
    bool: _flag,
    list[str]: _strings,
    dict[str, str]: _string_map,
}


def _bare(hint: Any) -> Any:
    """The field's type without its text."""
    base, *marks = get_args(hint)
    return Annotated[base, *marks] if any(isinstance(m, JsonText) for m in marks) else base


_CONVERTERS: dict[type, dict[str, Callable[[Any, str], Any]]] = {
    cls: {name: _converter(name, _bare(hint)) for name, hint in field_types(cls).items()}
    for cls in (*COMMANDS.values(), Retry)
}
_FOREIGN = frozenset(
    {"Tick", "ApplyConfig", "Forwarded", "ForwardedAck", "WorkerStarted", "WorkerBeat", "WorkerStopping", "ReportBatch"}
    | {"AttemptDeclined", "AttemptStarted", "ReportStep", "ReportProgress", "ReportMilestone", "ReportCheckpoint"}
    | {"AttemptCompleted", "AttemptFailed", "AttemptCrashed", "AttemptStopped", "SendSteps"}
)


def _wrong(field: str, wanted: str, value: Any) -> InvalidRequest:
    return InvalidRequest(f"{field} has to be {wanted}, not {_kind(value)}", field=field)


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _known(content: Mapping[str, Any], name: str, most: int) -> str | None:
    """A text field of a command that was refused, if it is usable."""
    value = content.get(name)
    try:
        return value if isinstance(value, str) and value and len(_text(value, name, most)) <= most else None
    except InvalidRequest:
        return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name!r:.60} occurs twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _check_shape(content: Any) -> None:
    """Refuse nesting beyond the limit and numbers that overflow to infinity (1e999)."""
    level, depth = [content], 0
    while level:
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner.extend(value.values())
            elif isinstance(value, list):
                inner.extend(value)
            elif isinstance(value, float) and not math.isfinite(value):
                raise DecodeError("no JSON: a number is too large")
        level, depth = inner, depth + 1
        if depth > limits.DEPTH_MAX + 1:
            raise DecodeError(f"nested deeper than {limits.DEPTH_MAX} levels")


# Rules ----------------------------------------------------------------------------------------------------------------


def _text(value: str, field: str, most: int = limits.TEXT_MAX, least: int = 0) -> str:
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise InvalidRequest(f"{field} holds a lone surrogate, which is no text", field=field) from None
    if not least <= size <= most or "\x00" in value:
        raise InvalidRequest(
            f"{field} has to be {least} to {most:,} bytes of text without NUL, got {size:,}", field=field
        )
    return value


_name = partial(_text, least=1)


def _check_task_id(value: str, field: str) -> None:
    """A whole id, or a local id to which the engine adds the routing key; empty: the engine derives it."""
    head, local = ids.split(value)
    if value:
        ids.check_local_id(local if ids.is_routing_key(head) else value, field)


def _check_queue(value: str, field: str) -> None:
    ids.check_queue(_name(value, field), field)


def _number(value: int, field: str, least: int, most: int) -> int:
    if not least <= value <= most:
        raise InvalidRequest(f"{field} is {value!s:.40}; it has to be {least:,} to {most:,}", field=field)
    return value


_duration = partial(_number, least=1, most=durations.MAX_MS)
_non_negative = partial(_number, least=0, most=_LATEST_MS)


def _names(value: list[str], field: str, most: int = limits.LABELS_MAX) -> None:
    if len(value) > most:
        raise InvalidRequest(f"{field} has {len(value):,} entries; at most {most:,} are taken", field=field)
    for item in value:
        _name(item, field)


def _check_after(value: list[str], field: str) -> None:
    _names(value, field, limits.BATCH_TASKS_MAX)
    for task_id in value:
        _check_task_id(task_id, field)


def _check_labels(value: dict[str, str], field: str) -> None:
    _names(list(value), field)
    for name, text in value.items():
        _text(text, f"{field}.{name}")


def _check_value(value: bytes, field: str) -> Any:
    if len(value) > limits.VALUE_MAX:
        raise ValueTooLarge(
            f"{field} is {len(value):,} bytes of JSON; at most {limits.VALUE_MAX:,} are taken", field=field
        )
    try:
        return strict_loads(value)
    except DecodeError as error:
        raise InvalidRequest(f"{field}: {error}", field=field) from error


def _check_input(value: bytes, field: str) -> None:
    """JSON text, or what stands for a text too large for a record. Only a record in Avro can hold the latter."""
    if references.is_reference(value):
        try:
            references.parse(value)
        except DecodeError as error:
            raise InvalidRequest(f"{field}: {error}", field=field) from error
    else:
        _check_value(value, field)


def _check_object(value: bytes, field: str) -> None:
    content = _check_value(value, field)
    if not isinstance(content, dict):
        raise _wrong(field, "an object", content)


def _check_outcome(value: str, field: str) -> None:
    """`task:NAME`, `notify:NAME`, or a bare name for which the configuration decides."""
    prefix, colon, name = _name(value, field).partition(":")
    if not value.strip() or (colon and (prefix not in ("task", "notify") or not name.strip())):
        raise InvalidRequest(f"{field} is {value!r:.80}: write task:TYPE, notify:TARGET or a bare name", field=field)


def _check_retry(value: Retry, field: str) -> None:
    _number(value.max_attempts, f"{field}.max_attempts", 1, limits.ATTEMPTS_MAX)
    if value.backoff not in _BACKOFFS:
        raise InvalidRequest(
            f"{field}.backoff is {value.backoff!r:.40}; it has to be one of {_BACKOFFS}", field=f"{field}.backoff"
        )
    for name in ("delay", "max_delay"):
        _number(getattr(value, name), f"{field}.{name}", 0, durations.MAX_MS)
    for name in ("retry_on", "never_on"):
        _names(getattr(value, name) or [], f"{field}.{name}")


def _check_tasks(value: list[SubmitTask], field: str) -> None:
    _number(len(value), field, 1, limits.BATCH_TASKS_MAX)


_RULES: dict[str, Callable[..., Any]] = {
    "command_id": _text, "task_id": _check_task_id, "issued_by": _text, "reply_to": _name, "reason": _text,
    "type": _name, "input": _check_input, "queue": _check_queue, "key": _name, "user": _name,
    "policy_version": partial(_number, least=0, most=_LONG_MAX), "concurrency_key": _name, "after": _check_after,
    "resources": _check_object, "agent_config": _check_object, "estimated_duration": _duration,
    "checkpoint_interval": _duration, "checkpoint_storage": _name, "callback_url": _name,
    "on_success": _check_outcome, "on_failure": _check_outcome,
    "priority": partial(_number, least=0, most=limits.PRIORITY_MAX), "not_before": _non_negative,
    "run_timeout": _duration, "queue_timeout": _duration, "total_timeout": _duration, "no_progress_timeout": _duration,
    "retry": _check_retry, "labels": _check_labels, "notify": _names, "tasks": _check_tasks,
    "timeout": partial(_number, least=1, most=limits.WAITER_MAX_MS),
    "prefix": partial(_text, least=limits.FIND_PREFIX_MIN, most=_TASK_ID_MAX),
}  # fmt: skip
_RULES_OF: dict[type, list[tuple[str, Callable[..., Any]]]] = {
    cls: [(f.name, _RULES[f.name]) for f in fields(cls)] for cls in COMMANDS.values()
}
