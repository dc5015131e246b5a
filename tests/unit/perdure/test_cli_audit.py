"""`perdure audit` without a broker: its rules, and what it says of what it has found."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from perdure import audit_reader, cli, cli_audit
from perdure.projections.audit import Audit
from perdure.projections.audit_rules import RULES
from tests.unit.projections.test_audit import History, a_step_is_recorded_twice, life


class Reader:
    """Has read a history in memory."""

    spoiled = False

    def __init__(self, *_: Any) -> None:
        self.audit = Audit()

    def round(self) -> None:
        history = History.of(life())
        if self.spoiled:
            a_step_is_recorded_twice(history)
        self.audit = history.audit()

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def reader(monkeypatch: pytest.MonkeyPatch) -> type[Reader]:
    monkeypatch.setattr(audit_reader, "AuditReader", Reader)
    monkeypatch.setattr(Reader, "spoiled", False)
    return Reader


def run(*flags: str) -> Any:
    return CliRunner().invoke(cli.main, ["audit", "--bootstrap", "localhost:1", *flags])


def test_a_clean_log(reader: type[Reader]) -> None:
    done = run()
    assert done.exit_code == 0
    assert done.stdout.startswith("clean in ")
    assert not reader.spoiled


def test_violations_are_named_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader, "spoiled", True)
    done = run("--json")
    answer = json.loads(done.stdout)
    assert done.exit_code == 1
    assert (answer["clean"], answer["violations_total"], answer["rules"]["step-once"]) == (False, 1, 1)
    (violation,) = answer["violations"]
    assert violation.keys() == {"guarantee", "rule", "topic", "partition", "offset", "text", "task_id"}
    assert (violation["guarantee"], violation["rule"], violation["topic"]) == ("G3", "step-once", "task-events")
    text = run()
    assert text.exit_code == 1
    assert text.stdout.startswith(f"step-once: task-events/{violation['partition']} offset {violation['offset']}: ")


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_following_tells_each_violation_once_until_it_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    monkeypatch.setattr(Reader, "spoiled", True)
    monkeypatch.setattr(cli_audit, "_PAUSE_S", 0)
    rounds = iter(range(3))
    once = Reader.round

    def read_on(self: Reader) -> None:
        n = next(rounds)
        if n == 0:
            once(self)
        elif n == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Reader, "round", read_on)
    done = run("--follow", *flags)
    assert done.exit_code == 1
    (line,) = done.stdout.splitlines()
    assert "step-once" in line
    assert (json.loads(line)["rule"] == "step-once") if flags else line.startswith("step-once")
    assert "1 violations" in done.stderr


def test_the_rules_are_told() -> None:
    assert {rule["rule"] for rule in json.loads(run("--rules", "--json").stdout)} == {rule.name for rule in RULES}
    text = run("--rules").stdout
    assert all(rule.says in text for rule in RULES)
