"""The commands that run a process: what they hand on, and the key files they make."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner

from perdure import cli, engine_main, forkserver, server_main, worker
from perdure.schemas.signing import Keys
from perdure.settings import Settings
from perdure.streams import kafka_log


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {n: v for n, v in os.environ.items() if not n.startswith("PERDURE_")})
    return tmp_path


def run(*args: str) -> Any:
    return CliRunner().invoke(cli.main, args)


def test_engine_gets_settings_and_processes(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[Settings, int, str | None]] = []

    def main(settings: Settings, *, processes: int, ready: Any) -> int:
        got.append((settings, processes, os.environ.get("PERDURE_BOOTSTRAP")))
        return 7

    monkeypatch.setattr(engine_main, "main", main)
    result = run("engine", "--bootstrap", "a:1", "--processes", "3", "--state-dir", "state", "--keys-file", "k.json")
    assert result.exit_code == 7
    [(settings, processes, inherited)] = got
    assert (settings.bootstrap, settings.state_dir, settings.keys_file) == ("a:1", Path("state"), Path("k.json"))
    assert processes == 3
    assert inherited == "a:1"


class Forks:
    """Stands in for the fork server: what it was told, and what was done to it."""

    made: ClassVar[list[Forks]] = []

    def __init__(self, modules: Any, **more: Any) -> None:
        self.given = {"modules": list(modules)} | more
        self.done: list[str] = []
        self.made.append(self)

    def start(self) -> None:
        self.done.append("started")

    def stop(self, timeout_s: float) -> None:
        assert timeout_s == 0
        self.done.append("stopped")


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> list[Forks]:
    monkeypatch.setattr(Forks, "made", [])
    monkeypatch.setattr(forkserver, "ForkServer", Forks)
    return Forks.made


def test_a_worker_that_cannot_begin_leaves_no_fork_server(forks: list[Forks]) -> None:
    assert run("worker", "-m", "x", "--bootstrap", "kafka.example.org:9092").exit_code == 1
    assert [fork.done for fork in forks] == [["started", "stopped"]]


def test_worker_gets_all_it_needs(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, forks: list[Forks]) -> None:
    got: list[dict[str, Any]] = []

    class Worker:
        def __init__(self, log: Any, keys: Any, forks: Forks, **more: Any) -> None:
            assert forks.done == ["started"]
            got.append({"log": log, "keys": keys} | forks.given | more)

        def run(self) -> int:
            return 75

    monkeypatch.setattr(worker, "Worker", Worker)

    class KafkaLog(tuple[Any, ...]):
        def topic_id(self, topic: str) -> str:
            return f"id of {topic}"

    monkeypatch.setattr(kafka_log, "KafkaLog", lambda *args, **_: KafkaLog(args))
    args = ["-m", "a.tasks", "-m", "b", "--queue", "etl", "--slots", "8", "--name", "w", "--start", "spawn"]
    args += ["--drain-timeout", "1m", "--state-dir", "state"]
    result = run("worker", "--bootstrap", "127.0.0.1:1", *args)
    assert result.exit_code == 75
    [given] = got
    assert given["keys"] == Keys.load(elsewhere / ".perdure" / "keys.json")
    assert given["log"][:2] == ("127.0.0.1:1", "perdure.")
    assert {n: given[n] for n in ("modules", "queues", "slots", "name", "start_method", "drain_timeout_s")} == {
        "modules": ["a.tasks", "b"],
        "queues": ["etl"],
        "slots": 8,
        "name": "w",
        "start_method": "spawn",
        "drain_timeout_s": 60,
    }
    assert (given["state_dir"], given["checkpoint_dir"]) == (Path("state"), Path("state/checkpoints"))


@pytest.mark.parametrize("args", [["worker", "-m", "x"], ["engine"]])
def test_a_broker_that_others_reach_needs_keys(args: list[str]) -> None:
    result = run(*args, "--bootstrap", "kafka.example.org:9092", "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)["error"]
    assert told["code"] == "configuration"
    assert "perdure keys new" in told["message"]


def test_server_prints_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(settings: Settings, *, host: str, port: int, ready: Any) -> int:
        ready(f"http://{host}:{port}")
        return 0

    monkeypatch.setattr(server_main, "main", main)
    result = run("server", "--bootstrap", "a:1", "--port", "1234", "--json")
    assert json.loads(result.stdout) == {"api": "http://127.0.0.1:1234"}


def test_a_process_ends_with_the_one_that_owns_it(elsewhere: Path) -> None:
    """The owner is killed; its child, which asked the kernel for it, goes with it."""
    child = "import os, time; from perdure.cli_run import _end_with_owner as tie; tie(); "
    child += "print(os.getpid(), flush=True); time.sleep(60)"
    owner = textwrap.dedent(
        f"""
        import os, subprocess, sys
        environment = os.environ | {{"PERDURE_OWNER": str(os.getpid())}}
        subprocess.Popen([sys.executable, "-c", {child!r}], env=environment)
        sys.stdin.read()
        """
    )
    with subprocess.Popen([sys.executable, "-c", owner], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        child_fd = os.pidfd_open(pid)
        process.kill()
    import select

    assert select.select([child_fd], [], [], 10)[0], "the child goes on without its owner"
    os.close(child_fd)


def test_new_keys_and_newer_ones(elsewhere: Path) -> None:
    result = run("keys", "new", "keys.json", "--json")
    facts = json.loads(result.stdout)
    assert facts == {"file": str(elsewhere / "keys.json"), "worker_keys": ["w1"], "engine_keys": ["e1"]}
    first = Keys.load(elsewhere / "keys.json")
    assert (elsewhere / "keys.json").stat().st_mode & 0o777 == 0o600
    again = run("keys", "new", "keys.json", "--json")
    assert again.exit_code == 2
    assert json.loads(again.stdout)["error"]["field"] == "file"
    assert Keys.load(elsewhere / "keys.json") == first
    assert run("keys", "rotate", "keys.json").exit_code == 0
    second = Keys.load(elsewhere / "keys.json")
    assert (list(second.worker), second.worker["w1"]) == (["w1", "w2"], first.worker["w1"])
    for secret in (*second.worker.values(), *second.engine.values()):
        assert secret.hex() not in result.output


def test_keys_go_to_the_data_directory_unless_told_otherwise(elsewhere: Path) -> None:
    assert run("keys", "new").exit_code == 0
    assert (elsewhere / ".perdure" / "keys.json").exists()
    assert run("keys", "rotate", "nowhere.json").exit_code == 1
