"""JSON commands: what is read, what is refused with an answer, and what cannot be answered at all."""

from __future__ import annotations

import datetime as dt
import json
import time
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure.schemas import codec, durations, json_commands, limits
from perdure.schemas.commands import (
    AwaitTask,
    CancelTask,
    Command,
    DescribeTask,
    DiscardDeadLetter,
    FindTasks,
    PauseTask,
    ResumeTask,
    RetryTask,
    SubmitBatch,
    SubmitTask,
)
from perdure.schemas.common import Retry
from perdure.schemas.errors import DecodeError, InvalidRequest, ValueTooLarge
from perdure.schemas.json_commands import InvalidCommand, JsonNotAllowed, check, parse


def text(**content: Any) -> bytes:
    return json.dumps(content).encode()


def submit(**more: Any) -> SubmitTask:
    return SubmitTask(**({"command_id": "", "type": "t"} | more))


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


WHOLE_JSON: dict[str, Any] = {
    "command_id": "c", "task_id": "etl/1", "reply_to": "r", "queue": "etl", "key": "k", "after": ["etl/2"],
    "priority": 9, "labels": {"a": "b"}, "resources": {"cpu": 1}, "agent_config": {}, "on_failure": "notify_admin",
    "on_success": "task:next", "notify": ["x"], "policy_version": 7, "user": "u", "concurrency_key": "ck",
    "issued_by": "me", "checkpoint_interval": "5m", "callback_url": "https://example.org/done",
    "checkpoint_storage": "local", "queue_timeout": "1d", "no_progress_timeout": 0.001,
}  # fmt: skip
WHOLE = WHOLE_JSON | {
    "resources": b'{"cpu":1}', "agent_config": b"{}", "checkpoint_interval": 300_000, "queue_timeout": 86_400_000,
    "no_progress_timeout": 1,
}  # fmt: skip
SUBMITS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("the least", {}, {}),
    ("null input", {"input": None}, {"input": b"null"}),
    ("canonical input", {"input": {"b": 1, "a": "é"}}, {"input": '{"a":"é","b":1}'.encode()}),
    ("number of seconds", {"run_timeout": 1.5}, {"run_timeout": 1500}),
    ("duration text", {"total_timeout": "1h 30m"}, {"total_timeout": 5_400_000}),
    ("estimate", {"estimated_duration": "6 hours"}, {"estimated_duration": 21_600_000}),
    ("a null override", {"run_timeout": None}, {}),
    ("epoch seconds", {"not_before": 1_800_000_000.25}, {"not_before": 1_800_000_000_250}),
    ("RFC 3339, Z", {"not_before": "1970-01-01T00:00:01Z"}, {"not_before": 1000}),
    ("RFC 3339, zone", {"not_before": "1970-01-01T02:00:00+01:00"}, {"not_before": 3_600_000}),
    ("retry's own defaults", {"retry": {}}, {"retry": Retry(max_attempts=3)}),
    (
        "retry",
        {
            "retry": {
                "max_attempts": 2,
                "backoff": "fixed",
                "delay": "0s",
                "max_delay": 60,
                "jitter": False,
                "retry_on": ["E"],
            }
        },
        {"retry": Retry(max_attempts=2, backoff="fixed", delay=0, max_delay=60_000, jitter=False, retry_on=["E"])},
    ),
    ("all the rest", WHOLE_JSON, WHOLE),
]
BATCH = {"tasks": [{"type": "a"}, {"type": "b", "priority": 1}]}
OTHERS: list[tuple[dict[str, Any], Command]] = [
    (BATCH, SubmitBatch(command_id="", tasks=[submit(type="a"), submit(type="b", priority=1)])),
    ({"task_id": "q/1"}, PauseTask(command_id="", task_id="q/1")),
    ({"task_id": "a local id"}, ResumeTask(command_id="", task_id="a local id")),
    ({"task_id": "q/1", "reason": "why"}, CancelTask(command_id="", task_id="q/1", reason="why")),
    ({"task_id": "q/1", "input": None}, RetryTask(command_id="", task_id="q/1")),
    ({"task_id": "q/1", "input": 0}, RetryTask(command_id="", task_id="q/1", input=b"0")),
    ({"task_id": "q/1"}, DiscardDeadLetter(command_id="", task_id="q/1")),
    ({"task_id": "q/a/b"}, DescribeTask(command_id="", task_id="q/a/b")),
    ({"task_id": "q/1", "timeout": "30s"}, AwaitTask(command_id="", task_id="q/1", timeout=30_000)),
    ({"prefix": "01928374"}, FindTasks(command_id="", prefix="01928374")),
]


@pytest.mark.parametrize(("content", "expected"), [row[1:] for row in SUBMITS], ids=[row[0] for row in SUBMITS])
def test_a_legal_submit_is_read(content: dict[str, Any], expected: dict[str, Any]) -> None:
    command = parse(text(command="SubmitTask", type="t", **content))
    assert command == submit(**expected)
    assert codec.decode(codec.encode(command)) == command


@pytest.mark.parametrize(("content", "expected"), OTHERS, ids=lambda value: type(value).__name__)
def test_every_other_legal_command_is_read(content: dict[str, Any], expected: Command) -> None:
    command = parse(text(command=type(expected).__name__, **content))
    assert command == expected
    assert codec.decode(codec.encode(command)) == command


def test_a_task_of_a_batch_is_checked_by_itself_later() -> None:
    batch = parse(text(command="SubmitBatch", tasks=[{"type": "a", "priority": 99}, {"type": "b"}]))
    assert isinstance(batch, SubmitBatch)
    check(batch.tasks[1])
    with pytest.raises(InvalidRequest):
        check(batch.tasks[0])


def test_every_command_and_every_field_of_a_submit_can_be_written_as_json() -> None:
    assert {type(row[1]).__name__ for row in OTHERS} | {"SubmitTask"} == set(json_commands.COMMANDS)
    assert {name for row in SUBMITS for name in row[1]} | {"type"} == {f.name for f in fields(SubmitTask)}


UNREADABLE: list[tuple[str, bytes]] = [
    ("nothing", b""),
    ("half an object", b'{"command": "SubmitTask", "type": "t"'),
    ("text behind the end", b'{"command": "SubmitTask", "type": "t"} x'),
    ("a list", b'[{"command": "SubmitTask"}]'),
    ("no UTF-8", b'{"command": "SubmitTask", "type": "\xff"}'),
    ("UTF-16", '{"command": "SubmitTask", "type": "t"}'.encode("utf-16-le")),
    ("no command", b'{"type": "t"}'),
    ("null command", b'{"command": null, "type": "t"}'),
    ("unknown command", b'{"command": "EatTask", "type": "t"}'),
    ("a command that is no text", b'{"command": ["SubmitTask"], "type": "t"}'),
    ("a surrogate for a command", b'{"command": "\\ud800", "type": "t"}'),
    ("duplicate key", b'{"command": "SubmitTask", "type": "t", "type": "u"}'),
    ("duplicate key inside", b'{"command": "SubmitTask", "type": "t", "input": [{"a": 1, "a": 2}]}'),
    ("NaN", b'{"command": "SubmitTask", "type": "t", "input": NaN}'),
    ("Infinity", b'{"command": "SubmitTask", "type": "t", "input": [-Infinity]}'),
    ("a number that overflows", b'{"command": "SubmitTask", "type": "t", "input": [1e999]}'),
    ("a number of too many digits", b'{"command": "SubmitTask", "type": "t", "input": ' + b"9" * 5000 + b"}"),
    ("too deep", text(command="SubmitTask", type="t", input=nested(limits.DEPTH_MAX + 1))),
    ("far too deep", b'{"command": "SubmitTask", "type": "t", "input": ' + b"[" * 200_000),
]


@pytest.mark.parametrize("data", [row[1] for row in UNREADABLE], ids=[row[0] for row in UNREADABLE])
def test_what_cannot_be_read_is_a_decode_error(data: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        parse(data)
    str(caught.value).encode()


def test_a_key_twice_among_very_many_is_found_soon() -> None:
    keys = ",".join(f'"{n}":1' for n in [*range(40_000), 39_999])
    begun = time.process_time()
    with pytest.raises(DecodeError, match="the key '39999' occurs twice"):
        parse(b'{"command":"SubmitTask","type":"t","input":{' + keys.encode() + b"}}")
    assert time.process_time() - begun < 5  # milliseconds; comparing each key with each takes half a minute


@pytest.mark.parametrize(
    "kind", ["ReportBatch", "ReportStep", "AttemptCompleted", "Tick", "ApplyConfig", "Forwarded", "WorkerBeat"]
)
def test_reports_ticks_and_configuration_are_not_taken_as_json(kind: str) -> None:
    with pytest.raises(JsonNotAllowed):
        parse(text(command=kind))


ILLEGAL: list[tuple[str, dict[str, Any], str]] = [
    ("no type", {}, "type"),
    ("empty type", {"type": ""}, "type"),
    ("type of another kind", {"type": 5}, "type"),
    ("unknown field", {"type": "t", "urgency": 1}, "urgency"),
    ("delay is the CLI's", {"type": "t", "delay": "5s"}, "delay"),
    ("priority too high", {"type": "t", "priority": 10}, "priority"),
    ("priority too low", {"type": "t", "priority": -1}, "priority"),
    ("priority as text", {"type": "t", "priority": "5"}, "priority"),
    ("priority as fraction", {"type": "t", "priority": 5.0}, "priority"),
    ("priority as flag", {"type": "t", "priority": True}, "priority"),
    ("priority null", {"type": "t", "priority": None}, "priority"),
    ("a huge number", {"type": "t", "priority": 10**400}, "priority"),
    ("policy version beyond a long", {"type": "t", "policy_version": 2**63}, "policy_version"),
    ("queue", {"type": "t", "queue": "Etl"}, "queue"),
    ("queue with slash", {"type": "t", "queue": "a/b"}, "queue"),
    ("queue too long", {"type": "t", "queue": "q" * 200}, "queue"),
    ("empty key", {"type": "t", "key": ""}, "key"),
    ("task id too long", {"type": "t", "task_id": "q/" + "x" * 513}, "task_id"),
    ("local id too long", {"type": "t", "task_id": "x" * 513}, "task_id"),
    ("routing key without local id", {"type": "t", "task_id": "q/"}, "task_id"),
    ("NUL in an id", {"type": "t", "task_id": "q/a\0"}, "task_id"),
    ("surrogate in an id", {"type": "t", "task_id": "q/\ud800"}, "task_id"),
    ("surrogate in a text", {"type": "t", "user": "\ud800"}, "user"),
    ("surrogate in the input", {"type": "t", "input": ["\ud800"]}, "input"),
    ("duration", {"type": "t", "run_timeout": "soon"}, "run_timeout"),
    ("duration of nothing", {"type": "t", "run_timeout": 0}, "run_timeout"),
    ("duration below nothing", {"type": "t", "queue_timeout": -1}, "queue_timeout"),
    ("duration of a million years", {"type": "t", "total_timeout": "1000000 years"}, "total_timeout"),
    ("duration as huge number", {"type": "t", "total_timeout": 10**400}, "total_timeout"),
    ("duration as huge text", {"type": "t", "total_timeout": "9" * 400}, "total_timeout"),
    ("duration as flag", {"type": "t", "no_progress_timeout": True}, "no_progress_timeout"),
    ("time without zone", {"type": "t", "not_before": "2026-11-21T08:00:00"}, "not_before"),
    ("no time", {"type": "t", "not_before": "tomorrow"}, "not_before"),
    ("time before 1970", {"type": "t", "not_before": -1}, "not_before"),
    ("time as flag", {"type": "t", "not_before": True}, "not_before"),
    ("time as huge number", {"type": "t", "not_before": 10**400}, "not_before"),
    ("retry is no object", {"type": "t", "retry": 3}, "retry"),
    ("unknown field of retry", {"type": "t", "retry": {"attempts": 3}}, "retry.attempts"),
    ("retry without attempts", {"type": "t", "retry": {"max_attempts": 0}}, "retry.max_attempts"),
    ("backoff", {"type": "t", "retry": {"backoff": "linear"}}, "retry.backoff"),
    ("retry's delay", {"type": "t", "retry": {"delay": -1}}, "retry.delay"),
    ("jitter as number", {"type": "t", "retry": {"jitter": 1}}, "retry.jitter"),
    ("labels of numbers", {"type": "t", "labels": {"a": 1}}, "labels"),
    ("too many labels", {"type": "t", "labels": {str(i): "" for i in range(limits.LABELS_MAX + 1)}}, "labels"),
    ("label too long", {"type": "t", "labels": {"a": "x" * (limits.TEXT_MAX + 1)}}, "labels.a"),
    ("after as text", {"type": "t", "after": "q/1"}, "after"),
    ("an empty id in after", {"type": "t", "after": [""]}, "after"),
    ("config is no object", {"type": "t", "agent_config": [1]}, "agent_config"),
    ("resources are no object", {"type": "t", "resources": "gpu"}, "resources"),
    ("outcome prefix", {"type": "t", "on_failure": "mail:me"}, "on_failure"),
    ("outcome without name", {"type": "t", "on_success": "task:"}, "on_success"),
    ("outcome empty", {"type": "t", "on_failure": ""}, "on_failure"),
    ("input too large", {"type": "t", "input": "x" * limits.VALUE_MAX}, "input"),
]


@pytest.mark.parametrize(("content", "field"), [row[1:] for row in ILLEGAL], ids=[row[0] for row in ILLEGAL])
def test_an_illegal_submit_can_be_answered(content: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidCommand) as caught:
        parse(text(command="SubmitTask", command_id="c-1", reply_to="me", **content))
    error = caught.value
    assert (error.command, error.command_id, error.reply_to, error.field) == ("SubmitTask", "c-1", "me", field)
    str(error).encode()


ILLEGAL_OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"command": "PauseTask"}, "task_id"),
    ({"command": "DescribeTask", "task_id": ""}, "task_id"),
    ({"command": "CancelTask", "task_id": "q/1", "reason": "x" * 2000}, "reason"),
    ({"command": "PauseTask", "task_id": "q/1", "reason": "no such field here"}, "reason"),
    ({"command": "AwaitTask", "task_id": "q/1", "timeout": "2m"}, "timeout"),
    ({"command": "FindTasks"}, "prefix"),
    ({"command": "FindTasks", "prefix": "short"}, "prefix"),
    ({"command": "SubmitBatch"}, "tasks"),
    ({"command": "SubmitBatch", "tasks": []}, "tasks"),
    ({"command": "SubmitBatch", "tasks": [{}] * (limits.BATCH_TASKS_MAX + 1)}, "tasks[0].type"),
    ({"command": "SubmitBatch", "tasks": [{"type": "t"}] * (limits.BATCH_TASKS_MAX + 1)}, "tasks"),
    ({"command": "SubmitBatch", "tasks": [{"type": "t"}, {"type": "t", "colour": 1}]}, "tasks[1].colour"),
    ({"command": "SubmitBatch", "tasks": [{"type": "t"}, "t"]}, "tasks"),
    ({"command": "SubmitBatch", "tasks": [{"type": "t", "command": "SubmitTask"}]}, "tasks[0].command"),
]


@pytest.mark.parametrize(("content", "field"), ILLEGAL_OTHERS)
def test_other_illegal_commands(content: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidCommand) as caught:
        parse(json.dumps(content).encode())
    assert caught.value.field == field
    assert caught.value.command == content["command"]


def test_a_refusal_carries_only_what_can_be_used() -> None:
    with pytest.raises(InvalidCommand) as caught:
        parse(text(command="SubmitTask", type="t", command_id=5, task_id="q/1", reply_to="\ud800"))
    error = caught.value
    assert (error.command_id, error.task_id, error.reply_to, error.field) == ("", "q/1", None, "command_id")


def test_a_value_that_is_too_large_says_so() -> None:
    with pytest.raises(InvalidCommand) as caught:
        parse(text(command="SubmitTask", type="t", input="x" * limits.VALUE_MAX))
    assert caught.value.code == "value_too_large"


def test_a_command_that_is_too_large_as_a_whole_is_refused() -> None:
    padding = b" " * limits.COMMAND_MAX
    with pytest.raises(InvalidCommand) as caught:
        parse(b'{"command": "SubmitTask", "type": "t"' + padding + b"}")
    assert caught.value.code == "value_too_large"


def test_a_command_of_any_form_that_could_not_be_forwarded_is_refused() -> None:
    value = b'{"x":"' + b"x" * (limits.COMMAND_MAX // 3) + b'"}'
    with pytest.raises(ValueTooLarge, match="at most 458,752 are taken"):
        check(submit(command_id="c", queue="etl", input=value, agent_config=value, resources=value))
    check(submit(command_id="c", queue="etl", input=value, agent_config=value))


def test_a_refusal_stays_short_whatever_was_sent() -> None:
    for hostile in ({"run_timeout": "x" * 400_000}, {"x" * 400_000: 1}, {"queue": "q" * 400_000}):
        with pytest.raises(InvalidCommand) as caught:
            parse(text(command="SubmitTask", type="t", **hostile))
        assert len(str(caught.value)) <= limits.TEXT_MAX
        assert len(caught.value.field or "") <= limits.TEXT_MAX


def test_the_deepest_input_that_is_taken() -> None:
    command = parse(text(command="SubmitTask", type="t", input=nested(limits.DEPTH_MAX - 1)))
    assert isinstance(command, SubmitTask)


CHECKED: list[tuple[str, dict[str, Any], str]] = [
    ("input is no JSON", {"input": b"\xff"}, "input"),
    ("input with NaN", {"input": b"NaN"}, "input"),
    ("input with duplicate keys", {"input": b'{"a":1,"a":2}'}, "input"),
    ("input too deep", {"input": b"[" * 70 + b"]" * 70}, "input"),
    ("input too large", {"input": b'"' + b"x" * limits.VALUE_MAX + b'"'}, "input"),
    ("config is no object", {"agent_config": b"1"}, "agent_config"),
    ("priority", {"priority": 10}, "priority"),
    ("timeout of nothing", {"run_timeout": 0}, "run_timeout"),
    ("timeout beyond a century", {"run_timeout": durations.MAX_MS + 1}, "run_timeout"),
    ("not before 1970", {"not_before": -1}, "not_before"),
    ("retry", {"retry": Retry(max_attempts=0)}, "retry.max_attempts"),
    ("no type", {"type": ""}, "type"),
]


@pytest.mark.parametrize(("change", "field"), [row[1:] for row in CHECKED], ids=[row[0] for row in CHECKED])
def test_check_holds_for_commands_of_any_form(change: dict[str, Any], field: str) -> None:
    command = submit(command_id="c", task_id="q/1", input=b"{}")
    check(command)
    with pytest.raises(InvalidRequest) as caught:
        check(replace(command, **change))
    assert caught.value.field == field


def test_times_from_python() -> None:
    zone = dt.timezone(dt.timedelta(hours=1))
    assert json_commands.to_time(dt.datetime(1970, 1, 1, 2, tzinfo=zone), "at") == 3_600_000
    with pytest.raises(InvalidRequest, match="zone"):
        json_commands.to_time(dt.datetime(1970, 1, 1), "at")  # noqa: DTZ001
    with pytest.raises(InvalidRequest):
        json_commands.to_time(float("nan"), "at")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.sampled_from(sorted(json_commands.COMMANDS)),
    st.dictionaries(st.sampled_from([f.name for c in json_commands.COMMANDS.values() for f in fields(c)]), _JSON),
)
def test_whatever_comes_is_read_or_refused(name: str, content: dict[str, Any]) -> None:
    """Never another error; and what is read can be written as Avro."""
    try:
        command = parse(json.dumps({"command": name} | content).encode())
    except (DecodeError, InvalidCommand):
        return
    assert codec.decode(codec.encode(command)) == command


@given(st.binary(max_size=60))
def test_whatever_bytes_come(data: bytes) -> None:
    with pytest.raises((DecodeError, InvalidCommand)):
        parse(b"{" + data)
