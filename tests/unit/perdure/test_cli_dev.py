"""`perdure dev` before and after there is a stack; the stack itself is tested in tests/integration/test_dev.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from perdure import cli

HOLDER = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.truncate(0); file.write(str(os.getpid())); file.flush()
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PERDURE_BOOTSTRAP", raising=False)


@contextmanager
def holding(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a data directory as a dev stack does."""
    folder.mkdir()
    command = [sys.executable, "-c", HOLDER, str(folder / "dev.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        try:
            yield process
        finally:
            process.kill()


def run(*args: str) -> Any:
    return CliRunner().invoke(cli.main, args)


def test_stop_without_a_stack_is_done(tmp_path: Path) -> None:
    result = run("dev", "stop", "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (0, {"stopped": False})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [["stop", "--data-dir", "there"], ["--data-dir", "there", "stop"]])
def test_stop_ends_the_process_that_holds_the_data_directory(tmp_path: Path, args: list[str]) -> None:
    with holding(tmp_path / "there") as process:
        assert run("dev", *args).stdout == "stopped\n"
        assert process.wait(5) == -15
    assert run("dev", *args).stdout.startswith("no dev stack runs on")


@pytest.mark.parametrize("detach", [[], ["--detach"]])
def test_a_second_stack_on_one_data_directory_is_refused(tmp_path: Path, detach: list[str]) -> None:
    with holding(tmp_path / "there") as process:
        result = run("dev", "--data-dir", "there", "--json", *detach)
        assert result.exit_code == 1
        told = json.loads(result.stdout)["error"]
        assert f"(pid {process.pid})" in told["message"]
        assert "perdure dev stop" in told["message"]
        assert "error: " not in told["message"]
        assert process.poll() is None


def test_what_a_stack_in_the_background_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho Kafka is ready\necho error: no worker\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    log = tmp_path / "there" / "logs" / "dev.log"
    log.parent.mkdir(parents=True)
    log.write_text("of another stack\n")
    result = run("dev", "--data-dir", "there", "--detach")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Kafka is ready\nerror: the dev stack did not start: no worker (see {log})\n"
    assert log.read_text().startswith("of another stack\n")
