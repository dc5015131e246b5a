"""The commands about one task, against an engine by script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from perdure import api_client, cli
from perdure import client as client_module
from perdure.client import Client
from perdure.connectors.blobs import MemoryBlobs
from perdure.connectors.large_values import LargeValues
from perdure.schemas import codec, events, ids, limits, references
from perdure.schemas.commands import (
    AwaitTask,
    CancelTask,
    DescribeTask,
    DiscardDeadLetter,
    FindTasks,
    PauseTask,
    RetryTask,
    SubmitTask,
)
from perdure.schemas.common import Cause, ErrorInfo
from perdure.schemas.errors import NotFound
from perdure.schemas.public import LogLine
from perdure.schemas.references import Reference
from perdure.streams.memory_log import MemoryLog
from tests.unit.perdure.scripted_engine import NOT_FOUND, Answer, append_event, configure, running, status

NOW = 1_800_000_000_000
BLOBS = MemoryBlobs()
LARGE_VALUES = LargeValues(lambda: (BLOBS, "home"))
REFERENCE = Reference(day=1, sha256="ab" * 32, size=10_485_760, preview='{"rows":[\x1b[31m')


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryLog:
    """The log that every client of the command line gets."""
    made = MemoryLog(lambda: NOW)
    configure(made, "type/t", {"queue": "etl"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Client, "_open", lambda _: (made, LARGE_VALUES))
    return made


def run(*args: str, **more: Any) -> Any:
    return CliRunner().invoke(cli.main, args, **more)


def answering(**body: Any) -> Any:
    return lambda command, _: (True, {"task_id": "etl/1", "body": status("etl/1", **body)})


def submitted(log: MemoryLog) -> SubmitTask:
    return codec.decode_as(SubmitTask, log.records("task-commands")[-1].value or b"")


# Submit --------------------------------------------------------------------------------------------------------------


def test_submit_prints_the_id_when_kafka_has_the_task(log: MemoryLog) -> None:
    result = run(
        "submit", "t", "--input", '{"a": 1}', "--id", "x", "--priority", "7", "--label", "team=a=b", "--timeout", "6h"
    )
    assert (result.exit_code, result.stdout) == (0, "etl/x\n")
    sent = submitted(log)
    assert (sent.input, sent.priority, sent.labels, sent.run_timeout) == (b'{"a":1}', 7, {"team": "a=b"}, 21_600_000)


def test_a_start_in_seconds_since_1970(log: MemoryLog) -> None:
    assert run("submit", "t", "--at", "1900000000.5").exit_code == 0
    assert submitted(log).not_before == 1_900_000_000_500


def test_submit_as_json(log: MemoryLog) -> None:
    result = run("submit", "t", "--json", "--key", "k", "--on-failure", "notify_admin")
    assert json.loads(result.stdout) == {"task_id": "etl/" + ids.keyed_local_id("etl", "t", "k"), "type": "t"}
    assert (submitted(log).input, submitted(log).on_failure) == (b"null", "notify_admin")


def test_input_from_a_file_and_from_stdin(log: MemoryLog, tmp_path: Path) -> None:
    (tmp_path / "input.json").write_text('{"from": "file"}')
    assert run("submit", "t", "--input", "@input.json").exit_code == 0
    assert submitted(log).input == b'{"from":"file"}'
    assert run("submit", "t", "--input", "-", input='{"from": "stdin"}').exit_code == 0
    assert submitted(log).input == b'{"from":"stdin"}'


def test_a_type_that_nobody_published_is_refused(log: MemoryLog) -> None:
    result = run("submit", "unheard", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["code"] == "unknown_type"


# Looking -------------------------------------------------------------------------------------------------------------


def test_status_as_json_is_what_the_engine_said(log: MemoryLog) -> None:
    with running(log, answering(progress=0.5, new_field=1)):
        result = run("status", "etl/1", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == status("etl/1", progress=0.5, new_field=1)


def test_status_for_people(log: MemoryLog) -> None:
    body = {
        "progress": 0.4567, "units_done": 4567, "units_total": 10_000, "eta_seconds": 61.0, "elapsed_seconds": 3.0,
        "current_step": "reading \x1b[31mred", "attempt": 1, "max_attempts": 3, "epoch": 2, "why": "runs on worker w",
        "stopping": "pausing", "worker_id": "w", "steps_completed": 12,
    }  # fmt: skip
    with running(log, answering(**body)):
        result = run("status", "1")
    assert result.exit_code == 0
    for told in (
        "etl/1",
        "RUNNING (pausing)",
        "45.7 %, 4,567 of 10,000, 1m 1s to go",
        "1 of 3, epoch 2",
        "runs on worker w",
    ):
        assert told in result.stdout
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize("command", ["status", "wait"])
def test_of_a_large_result_only_the_beginning_is_shown(log: MemoryLog, command: str) -> None:
    body = {"state": "COMPLETED", "result": None, "result_ref": vars(REFERENCE)}
    with running(log, answering(**body)):
        text, data = run(command, "etl/1").stdout, json.loads(run(command, "etl/1", "--json").stdout)
    assert '10,485,760 bytes: {"rows":[' in text
    assert "\x1b" not in text
    assert (data["result"], data["result_ref"]) == (None, vars(REFERENCE))


def test_a_large_input_goes_through_the_store(log: MemoryLog) -> None:
    large = json.dumps("v" * limits.VALUE_MAX)
    assert run("submit", "t", "--input", "-", "--id", "x", input=large).exit_code == 0
    assert references.is_reference(submitted(log).input)
    assert LARGE_VALUES.fetched("etl/x", submitted(log).input) == large.encode()


def test_an_estimate_is_told_in_whole_seconds(log: MemoryLog) -> None:
    for seconds, told in ((0.2, "1s to go"), (59.96, "1m to go"), (7.4, "7s to go")):
        with running(log, answering(progress=0.5, eta_seconds=seconds)):
            assert told in run("status", "etl/1").stdout


def test_status_of_a_failed_task_is_no_failure_of_the_command(log: MemoryLog) -> None:
    with running(log, answering(state="FAILED", error={"type": "builtins.ValueError", "message": "bad row"})):
        result = run("status", "etl/1")
    assert result.exit_code == 0
    assert "builtins.ValueError: bad row" in result.stdout


@pytest.mark.parametrize("command", ["status", "why", "pause", "watch", "history", "logs", "wait"])
def test_an_unknown_id_is_not_found(log: MemoryLog, command: str) -> None:
    def script(asked: Any, _: int) -> Answer:
        return (True, {"body": {"ids": []}}) if isinstance(asked, FindTasks) else NOT_FOUND

    with running(log, script):
        result = run(command, "0192f3aa", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["error"]["code"] == "not_found"


def test_an_ambiguous_prefix_is_usage(log: MemoryLog) -> None:
    def script(asked: Any, partition: int) -> Answer:
        if isinstance(asked, FindTasks):
            return True, {"body": {"ids": [f"etl/0192f3aa{n}" for n in range(2)] if partition == 0 else []}}
        return NOT_FOUND

    with running(log, script):
        result = run("status", "0192f3aa", "--json")
    assert result.exit_code == 2
    told = json.loads(result.stdout)["error"]
    assert (told["code"], told["field"]) == ("ambiguous", "task_id")
    assert "etl/0192f3aa0, etl/0192f3aa1" in told["message"]


def test_the_beginning_of_an_id_has_to_be_long_enough(log: MemoryLog) -> None:
    with running(log, lambda *_: NOT_FOUND) as engine:
        result = run("status", "0192f3a")
    assert result.exit_code == 3
    assert "8 characters" in result.stderr
    assert [type(command) for _, command in engine.seen] == [DescribeTask]


def test_a_prefix_with_its_routing_key_will_do(log: MemoryLog) -> None:
    def script(asked: Any, partition: int) -> Answer:
        if isinstance(asked, FindTasks):
            return True, {"body": {"ids": ["etl/0192f3aa-1"] if partition == 0 else []}}
        known = asked.task_id == "etl/0192f3aa-1"
        return (True, {"body": status(asked.task_id)}) if known else NOT_FOUND

    with running(log, script):
        result = run("status", "etl/0192f3", "--json")
    assert json.loads(result.stdout)["task_id"] == "etl/0192f3aa-1"


def test_why(log: MemoryLog) -> None:
    body = {"state": "PENDING", "reason": "no_worker", "why": "waits in queue 'etl': no live worker"}
    with running(log, answering(**body)):
        assert run("why", "etl/1").stdout == "PENDING: waits in queue 'etl': no live worker\n"
        assert json.loads(run("why", "etl/1", "--json").stdout) == {"task_id": "etl/1", **body}


def test_why_of_a_task_that_has_ended_says_it_once_and_cannot_steer_the_terminal(log: MemoryLog) -> None:
    body = {"state": "FAILED", "why": "FAILED: E: \x1b[31mred", "error": {"type": "E", "message": "\x1b[31mred"}}
    with running(log, answering(**body)):
        assert run("why", "etl/1", color=True).stdout == "FAILED: E: \\x1b[31mred\n"
        for command in ("wait", "watch"):
            assert run(command, "etl/1", color=True).stdout.endswith("task etl/1 failed: E: \\x1b[31mred\n")


HEAD: dict[str, Any] = {
    "cause": Cause(partition=0, offset=0),
    "build": "b",
    "feature_level": 1,
    "at": NOW,
    "task_id": "etl/1",
}


def test_history(log: MemoryLog) -> None:
    append_event(log, events.TaskQueued(**HEAD, seq=1, reason="queued"))
    append_event(log, events.TaskCompleted(**HEAD, seq=2, epoch=1, attempt=1, result=b'{"n":1}'))
    with running(log, answering()):
        lines = [json.loads(line) for line in run("history", "etl/1", "--json").stdout.splitlines()]
        text = run("history", "etl/1").stdout.splitlines()
    assert [(e["kind"], e["seq"]) for e in lines] == [("TaskQueued", 1), ("TaskCompleted", 2)]
    assert lines[1]["result"] == {"n": 1}
    assert lines[0]["cause"]["partition"] == 0
    assert "TaskQueued" in text[0]
    assert 'result={"n": 1}' in text[1]


def test_a_large_value_in_the_history(log: MemoryLog) -> None:
    append_event(log, events.TaskCompleted(**HEAD, seq=1, epoch=1, attempt=1, result=REFERENCE.encode()))
    with running(log, answering()):
        event = json.loads(run("history", "etl/1", "--json").stdout)
        text = run("history", "etl/1").stdout
    assert (event["result"], event["result_ref"]) == (None, vars(REFERENCE))
    assert "result_ref=10,485,760 bytes:" in text


def test_the_history_of_a_task_that_the_engine_has_forgotten(log: MemoryLog) -> None:
    append_event(log, events.TaskFailed(**HEAD, seq=1, error=ErrorInfo(type="E", message="m")))
    append_event(log, events.TaskRetired(**HEAD, seq=2))

    def script(asked: Any, _: int) -> Answer:
        return (True, {"body": {"ids": []}}) if isinstance(asked, FindTasks) else NOT_FOUND

    with running(log, script):
        result = run("history", "etl/1", "--json", "--follow")
    assert result.exit_code == 0
    assert [json.loads(line)["kind"] for line in result.stdout.splitlines()] == ["TaskFailed", "TaskRetired"]


def test_history_and_logs_need_no_engine(log: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_VERDICT_S", 0.05)
    append_event(log, events.TaskQueued(**HEAD, seq=1, reason="queued"))
    line = LogLine(task_id="etl/1", epoch=1, attempt=1, worker_id="w", number=1, at=NOW, stream="stdout", text="hi")
    log.producer().append("task-logs", ids.partition_of("etl", log.partitions), b"etl/1", codec.encode(line))
    assert "TaskQueued" in run("history", "etl/1").stdout
    assert run("logs", "etl/1").stdout == "hi\n"
    assert run("status", "etl/1").exit_code == 4


def test_logs_of_a_whole_id_that_nobody_knows(log: MemoryLog) -> None:
    def script(asked: Any, _: int) -> Answer:
        return (True, {"body": {"ids": []}}) if isinstance(asked, FindTasks) else NOT_FOUND

    with running(log, script):
        result = run("logs", "etl/0192f3aa")
    assert (result.exit_code, result.stdout) == (3, "")


def test_logs(log: MemoryLog) -> None:
    partition = ids.partition_of("etl", log.partitions)
    for n, dropped in enumerate((0, 0, 7)):
        line = LogLine(
            task_id="etl/1", epoch=1, attempt=1, worker_id="w", number=n, at=NOW, stream="stdout", text=f"line {n}",
            dropped=dropped,
        )  # fmt: skip
        log.producer().append("task-logs", partition, b"etl/1", codec.encode(line))
    with running(log, answering()):
        assert run("logs", "etl/1", "-n", "2").stdout.splitlines() == ["line 1", "... 7 lines left out ...", "line 2"]
        told = [json.loads(line) for line in run("logs", "etl/1", "-n", "1", "--json").stdout.splitlines()]
    assert told[-1]["text"] == "line 2"


# Waiting -------------------------------------------------------------------------------------------------------------


ENDS: list[tuple[dict[str, Any], int, str]] = [
    ({"state": "COMPLETED", "result": {"n": 1}}, 0, 'COMPLETED: {"n":1}'),
    ({"state": "FAILED", "error": {"type": "E", "message": "bad row"}}, 1, "E: bad row"),
    ({"state": "TIMED_OUT", "timeout": "run"}, 1, "ran out of its run time"),
    ({"state": "CANCELLED", "cancel_reason": "not needed"}, 1, "cancelled: not needed"),
]


@pytest.mark.parametrize(("body", "code", "told"), ENDS)
def test_wait_ends_as_the_task_did(log: MemoryLog, body: dict[str, Any], code: int, told: str) -> None:
    with running(log, answering(**body)):
        plain, as_json = run("wait", "etl/1"), run("wait", "etl/1", "--json")
    assert (plain.exit_code, as_json.exit_code) == (code, code)
    assert told in plain.stdout
    assert json.loads(as_json.stdout) == status("etl/1", **body)


def test_a_wait_that_times_out(log: MemoryLog) -> None:
    with running(log, lambda asked, _: None if isinstance(asked, AwaitTask) else (True, {"body": status("etl/1")})):
        result = run("wait", "etl/1", "--timeout", "10ms", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["code"] == "timeout"


def test_watch_prints_a_line_for_each_change_where_there_is_no_terminal(
    log: MemoryLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perdure.cli_watch._EVERY_S", 0)
    seen: list[dict[str, Any]] = [
        {"progress": 0.0},
        {"progress": 0.5, "current_step": "reading"},
        {"progress": 0.5, "current_step": "reading"},
    ]
    bodies = [status("etl/1", **b) for b in [seen[0], *seen]] + [status("etl/1", state="COMPLETED", progress=1.0)]
    flags: list[str]
    for flags in ([], ["--json"]):
        answers = iter(bodies)
        with running(log, lambda *_: (True, {"task_id": "etl/1", "body": next(answers)})):  # noqa: B023
            result = run("watch", "etl/1", *flags)
        lines = result.stdout.splitlines()
        assert result.exit_code == 0
        if flags:
            assert [json.loads(line)["progress"] for line in lines] == [0.0, 0.5, 1.0]
        else:
            assert lines == ["RUNNING  0.0 %", "RUNNING  50.0 %  reading", "COMPLETED  100.0 %", "COMPLETED"]


def test_watch_of_a_task_that_fails(log: MemoryLog) -> None:
    with running(log, answering(state="FAILED", error={"type": "E", "message": "m"})):
        result = run("watch", "etl/1")
    assert result.exit_code == 1
    assert "E: m" in result.stdout


def test_a_dead_letter_by_the_beginning_of_its_id(log: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        """A server that knows one dead letter, by its whole id."""

        def __init__(self, settings: Any) -> None:
            pass

        def get(self, path: str, query: Any, name: str) -> dict[str, Any]:
            if name != "etl/0192f3aa-1":
                raise NotFound(f"task {name!r} is no dead letter")
            return {"task_id": name}

    def script(asked: Any, partition: int) -> Answer:
        if isinstance(asked, FindTasks):
            return True, {"body": {"ids": ["etl/0192f3aa-1"] if partition == 0 else []}}
        return (True, {"task_id": "etl/living"}) if asked.task_id == "living" else NOT_FOUND

    monkeypatch.setattr(api_client, "ApiClient", Api)
    monkeypatch.setenv("PERDURE_BOOTSTRAP", "none:1")
    with running(log, script):
        assert run("dlq", "show", "0192f3aa").stdout == "task_id  etl/0192f3aa-1\n"
        alive = run("dlq", "show", "living")
    assert (alive.exit_code, alive.stderr) == (3, "error: task 'etl/living' is no dead letter\n")


# Control -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["pause", "resume", "cancel", "retry"])
def test_a_verb_tells_its_verdict(log: MemoryLog, verb: str) -> None:
    with running(log, answering()) as engine:
        result = run(verb, "1", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"task_id": "etl/1", "command": verb, "accepted": True, "decided": True}
    assert type(engine.seen[-1][1]).__name__ == f"{verb.capitalize()}Task"
    assert engine.seen[-1][1].task_id == "etl/1"


def test_a_verb_that_nobody_decides_is_safe_in_the_log(log: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_VERDICT_S", 0.05)
    with running(log, lambda *_: None) as engine:
        result = run("pause", "etl/1", "--json")
        plain = run("pause", "etl/1")
    assert [type(command) for _, command in engine.seen] == [PauseTask, PauseTask]  # nothing is asked first
    assert result.exit_code == 0
    assert json.loads(result.stdout)["decided"] is False
    assert "not yet decided" in plain.stdout


def test_a_verb_takes_the_beginning_of_an_id_with_its_routing_key(log: MemoryLog) -> None:
    def script(asked: Any, partition: int) -> Answer:
        if isinstance(asked, FindTasks):
            return True, {"body": {"ids": ["etl/0192f3aa-1"] if partition == 0 else []}}
        return (True, {}) if asked.task_id == "etl/0192f3aa-1" else NOT_FOUND

    with running(log, script):
        result = run("pause", "etl/0192f3", "--json")
    assert json.loads(result.stdout)["task_id"] == "etl/0192f3aa-1"


def test_a_verb_that_is_refused(log: MemoryLog) -> None:
    def script(asked: Any, _: int) -> Answer:
        return (
            answering()(asked, 0)
            if isinstance(asked, DescribeTask)
            else (False, {"reason": "it is COMPLETED", "field": None})
        )

    with running(log, script):
        result, plain = run("pause", "etl/1", "--json"), run("pause", "etl/1")
    assert (result.exit_code, plain.exit_code) == (1, 1)
    assert json.loads(result.stdout)["error"] == {"code": "rejected", "message": "it is COMPLETED", "field": None}
    assert plain.stderr == "error: it is COMPLETED\n"


def test_what_the_verbs_carry(log: MemoryLog) -> None:
    with running(log, answering()) as engine:
        run("cancel", "etl/1", "--reason", "wrong file")
        run("retry", "etl/1", "--input", "5")
        run("dlq", "retry", "etl/1", "--input", "null")
        run("dlq", "discard", "etl/1", "--reason", "old")
    sent = [c for _, c in engine.seen if not isinstance(c, DescribeTask)]
    assert [type(c) for c in sent] == [CancelTask, RetryTask, RetryTask, DiscardDeadLetter]
    assert [getattr(c, "reason", getattr(c, "input", None)) for c in sent] == ["wrong file", b"5", b"null", "old"]
