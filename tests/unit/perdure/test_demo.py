"""The demo's parts: what it reviews, what it shows, and its proof from a log. The whole: tests/integration/test_demo.py."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from perdure import cli, cli_dev, demo
from perdure.demo_proof import prove
from perdure.demo_tasks import examine, find_files
from perdure.schemas import errors, events
from perdure.schemas.common import Cause
from perdure.streams.memory_log import MemoryLog
from tests.unit.perdure.scripted_engine import append_event

NOW = 1_800_000_000_000
HEAD: dict[str, Any] = {
    "task_id": "demo/1", "cause": Cause(partition=0, offset=0), "build": "b", "feature_level": 1, "epoch": 1,
    "attempt": 1, "function": "f", "code_version": "c", "args_hash": "h", "duration_ms": 1,
}  # fmt: skip


def test_a_path_without_python_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_dev, "launch", None)
    result = CliRunner().invoke(cli.main, ["demo", "--path", str(tmp_path), "--json"])
    assert result.exit_code == 2
    assert "no Python file" in result.stdout


def test_more_files_than_a_step_can_list_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_files", lambda _: [f"{n:0>100}.py" for n in range(2_000)])
    with pytest.raises(errors.ValueTooLarge, match="2,000 files") as caught:
        demo.python_files(tmp_path)
    assert caught.value.field == "path"


def test_what_cannot_be_reviewed_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def broken(:")
    (tmp_path / "deep.py").write_text("(" * 5_000 + ")" * 5_000)
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "nowhere.py").symlink_to("gone")
    assert find_files(str(tmp_path)) == ["bad.py", "deep.py"]
    for name in ("bad.py", "deep.py", "gone.py"):
        assert examine(tmp_path / name, name)["finding"]


def test_what_programs_read_is_neither_wrapped_nor_taken_for_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{'deep/' * 25}we[ird].py"
    out = io.StringIO()
    monkeypatch.setenv("COLUMNS", "80")
    console = demo.open_console(stderr=False)
    console.file = out
    totals = {"files": 1, "lines": 2, "functions": 1}
    result = {
        "files": 1, "packages": {"deep": totals}, "functions": [[f"{name}:1 f", 2]], "complex": [[name, 0]],
        "findings": [[name, "SyntaxError: " + "x" * 300]],
    }  # fmt: skip
    demo.show_result(console, result)
    shown = out.getvalue()
    assert shown.count(name) == 3
    assert f"finding: {name}: SyntaxError: {'x' * 300}\n" in shown


def recorded(log: MemoryLog, index: int, at: int, result: bytes = b"{}") -> None:
    step = f"files@{index:012d}/review"
    append_event(log, events.StepCompleted(**HEAD, seq=index + 2, at=at, step_id=step, name="review", result=result))


@pytest.fixture
def log() -> MemoryLog:
    """The log of a run over a.py and b.py, both recorded once."""
    made = MemoryLog(lambda: NOW)
    listed = events.StepCompleted(
        **HEAD, seq=1, at=NOW, step_id="find-files", name="find-files", result=b'["a.py","b.py"]'
    )
    append_event(made, listed)
    recorded(made, 0, NOW + 10)
    recorded(made, 1, NOW + 20)
    return made


def witnessed(folder: Path, *executions: tuple[int, str]) -> Path:
    path = folder / "witness.txt"
    path.write_text("".join(f"{at}\t1\t{name}\n" for at, name in executions))
    return path


def test_a_proof_that_holds(log: MemoryLog, tmp_path: Path) -> None:
    witness = witnessed(tmp_path, (NOW, "a.py"), (NOW + 11, "b.py"), (NOW + 15, "b.py"))
    proof = prove(log, "demo/1", witness, kills=1)
    assert proof.holds
    assert proof.line() == "proved: files 2, recorded steps 2, executions 3, kills survived 1, duplicates 0"


FAULTS: list[tuple[str, list[tuple[int, str]], int]] = [
    ("more than 2 files and 0 kills", [(NOW, "a.py"), (NOW, "b.py"), (NOW, "b.py")], 0),
    ("no execution", [(NOW, "a.py")], 3),
    ("began after the step was recorded", [(NOW, "a.py"), (NOW, "b.py"), (NOW + 11, "a.py")], 3),
]


@pytest.mark.parametrize(("told", "executions", "kills"), FAULTS, ids=[row[0] for row in FAULTS])
def test_a_witness_that_disproves(
    log: MemoryLog, tmp_path: Path, told: str, executions: list[tuple[int, str]], kills: int
) -> None:
    proof = prove(log, "demo/1", witnessed(tmp_path, *executions), kills)
    assert not proof.holds
    assert told in proof.faults[0]
    assert proof.line().startswith("NOT PROVED")


def test_a_step_recorded_twice_and_one_not_at_all(tmp_path: Path) -> None:
    log = MemoryLog(lambda: NOW)
    listed = events.StepCompleted(
        **HEAD, seq=1, at=NOW, step_id="find-files", name="find-files", result=b'["a.py","b.py"]'
    )
    append_event(log, listed)
    recorded(log, 0, NOW + 10)
    recorded(log, 0, NOW + 20)
    proof = prove(log, "demo/1", witnessed(tmp_path, (NOW, "a.py")), kills=3)
    assert proof.duplicates == 1
    assert [fault.split(",")[0] for fault in proof.faults] == [
        "1 files have no recorded step", "1 files have more than one recorded step",
    ]  # fmt: skip
