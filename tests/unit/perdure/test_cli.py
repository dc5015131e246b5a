"""The command line as a whole: help, what a command imports, how errors end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from perdure import cli
from perdure.cli_common import exit_code, report
from perdure.schemas import errors


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings, no dev stack."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PERDURE_BOOTSTRAP", raising=False)
    monkeypatch.delenv("PERDURE_API", raising=False)


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = dict(commands(cli.main))


def run(*args: str, **more: Any) -> Any:
    return CliRunner().invoke(cli.main, args, **more)


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_command_has_help_with_an_example_and_takes_json(path: tuple[str, ...]) -> None:
    result = run(*path, "--help")
    assert result.exit_code == 0
    assert f"perdure {' '.join(path)}" in result.output.replace("Usage: ", "").partition("\n")[2]
    if not isinstance(ALL[path], click.Group):
        assert "--json" in result.output


def test_the_commands_that_are_promised() -> None:
    promised = (
        "dev engine worker server kafka keys submit status list watch wait history why pause resume cancel retry logs"
    )
    promised += " dlq workers queues audit"
    assert set(promised.split()) <= {path[0] for path in ALL}
    assert {("dlq", n) for n in ("list", "show", "retry", "discard")} | {("dev", "stop")} <= ALL.keys()


HEAVY = {"confluent_kafka", "starlette", "uvicorn", "rocksdict", "pydantic", "fastavro", "rich", "psutil", "sqlite3"}


@pytest.mark.parametrize("args", [["--help"], ["submit", "--help"], ["dlq", "list", "--help"], ["dev", "--help"],
                                  ["demo", "--help"], ["worker", "--help"], ["kafka", "start", "--help"]])  # fmt: skip
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code = f"""
import sys
from perdure.cli import main
try:
    main({args!r})
except SystemExit:
    pass
print(sorted({HEAVY!r} & {{name.partition(".")[0] for name in sys.modules}}), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage: " in done.stdout
    assert done.stderr.splitlines()[-1] == "[]"


def test_the_module_can_be_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "perdure.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert "perdure" in done.stdout


USAGE: list[tuple[list[str], str | None]] = [
    (["status"], "task_id"),
    (["submit"], "type"),
    (["submit", "t", "--priority", "high"], "priority"),
    (["submit", "t", "--priority", "12"], "priority"),
    (["submit", "t", "--input", "{bad"], "input"),
    (["submit", "t", "--input", "NaN"], "input"),
    (["submit", "t", "--input", "@no-such-file"], "input"),
    (["submit", "t", "--retry", "3"], "retry"),
    (["submit", "t", "--retry", '{"attempts": 3}'], "retry.attempts"),
    (["submit", "t", "--timeout", "soon"], "timeout"),
    (["submit", "t", "--delay", "1s", "--at", "2030-01-01T00:00:00Z"], "delay"),
    (["submit", "t", "--at", "tomorrow"], "at"),
    (["submit", "t", "--queue", "No Queue"], "queue"),
    (["submit", "t", "--label", "alone"], "label"),
    (["submit", "t", "--urgency", "1"], "urgency"),
    (["logs", "x", "-n", "-5"], "last_n"),
    (["list", "--limit", "0"], "limit"),
    (["submit", "t", "--at", "nan"], "at"),
    (["worker"], "modules"),
    (["worker", "-m", "t", "--queue", "No Queue"], "queue"),
    (["nonsense"], None),
]


@pytest.mark.parametrize(("args", "field"), USAGE, ids=[" ".join(row[0]) for row in USAGE])
def test_bad_input_is_usage_and_names_the_field(args: list[str], field: str | None) -> None:
    result = run(*args, "--json")
    assert result.exit_code == 2
    told = json.loads(result.stdout)["error"]
    assert told["field"] == field
    assert told["message"]
    plain = run(*args)
    assert (plain.exit_code, plain.stdout) == (2, "")
    assert plain.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["status", "x"],
        ["submit", "t"],
        ["pause", "x"],
        ["wait", "x"],
        ["list"],
        ["workers"],
        ["queues"],
        ["dlq", "list"],
    ],
    ids=" ".join,
)
def test_with_nothing_running_everything_is_unreachable(args: list[str]) -> None:
    result = run(*args, "--json")
    assert result.exit_code == 4
    told = json.loads(result.stdout)["error"]
    assert told["code"] == "unreachable"
    assert "perdure dev" in told["message"]
    plain = run(*args)
    assert (plain.exit_code, plain.stdout) == (4, "")
    assert "perdure dev" in plain.stderr


CODES: list[tuple[errors.PerdureError, int]] = [
    (errors.CommandRefused("no"), 1),
    (errors.UnknownType("no"), 1),
    (errors.ValueTooLarge("no"), 1),
    (errors.WaitTimeout("no"), 1),
    (errors.TaskFailed("etl/1", "no"), 1),
    (errors.ConfigurationError("no"), 1),
    (errors.InvalidRequest("no"), 2),
    (errors.NotSerializable("no"), 2),
    (errors.AmbiguousId("no"), 2),
    (errors.NotFound("no"), 3),
    (errors.Unreachable("no"), 4),
]


@pytest.mark.parametrize(("error", "code"), CODES, ids=[type(row[0]).__name__ for row in CODES])
def test_exit_codes(error: errors.PerdureError, code: int) -> None:
    assert exit_code(error) == code


def test_an_interrupt_ends_with_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("perdure.cli_common.Session.settings", interrupted)
    assert run("list").exit_code == 130


def test_a_place_that_cannot_be_used_is_told_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("keys", "new", "file/keys.json", "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)["error"]
    assert (told["code"], "file" in told["message"]) == ("configuration", True)


def test_every_error_that_a_user_may_catch_is_named_in_one_place() -> None:
    from perdure import errors as named
    from perdure import failures, tasks

    assert {named.StepOutcomeUnknown, named.InputMismatch} == {failures.StepOutcomeUnknown, tasks.InputMismatch}
    assert named.TaskFailed is errors.TaskFailed


def test_a_defect_is_not_dressed_up() -> None:
    with pytest.raises(ZeroDivisionError):
        report(ZeroDivisionError(), json=True)


@pytest.mark.parametrize("flags", [["--bootstrap", "prod:9092"], ["--namespace", "a."], ["--json"]], ids=" ".join)
def test_options_in_front_of_a_subcommand_that_would_not_count_are_refused(flags: list[str]) -> None:
    """Else the topics would be made somewhere else than was asked for."""
    result = run("topics", *flags, "create")
    assert result.exit_code == 2
    assert "behind 'create'" in result.output
