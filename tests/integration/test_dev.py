"""The dev stack on a real broker: ready, used, hurt, stopped, started again, killed; nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from perdure.connectors.embedded_kafka import running, stop_running

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240)]

TASKS = """
from perdure.tasks import task

@task(queue="greetings")
def greet(ctx, name):
    print("hello", name)
    return {"greeting": f"hello {name}"}
"""


class Place:
    """A directory with a dev stack, and the command line in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {n: v for n, v in os.environ.items() if not n.startswith("PERDURE_")}

    def run(self, *args: str, code: int = 0) -> Any:
        command = [sys.executable, "-m", "perdure.cli", *args, "--json"]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == code, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def start(self) -> list[psutil.Process]:
        """Start the stack; the processes it consists of."""
        facts = self.run("dev", "--tasks", "greetings", "--detach")
        assert facts.keys() == {"bootstrap", "api", "data_dir", "pid"}
        main = psutil.Process(facts["pid"])
        lock = json.loads((self.folder / ".perdure" / "kafka" / "broker.lock").read_text())
        return [main, *main.children(), psutil.Process(lock["pid"]), psutil.Process(lock["keeper"])]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    (tmp_path / "greetings.py").write_text(TASKS)
    made = Place(tmp_path)
    yield made
    made.run("dev", "stop")
    stop_running(tmp_path / ".perdure" / "kafka")


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def soon(condition: Callable[[], bool], within_s: float, what: str) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {within_s:g} s"
        time.sleep(0.05)


def named(processes: list[psutil.Process], name: str) -> psutil.Process:
    return next(p for p in processes if name in p.cmdline())


def test_the_life_of_a_dev_stack(place: Place) -> None:
    processes = place.start()
    task_id = place.run("submit", "greet", "--input", '{"name": "you"}')["task_id"]
    assert place.run("wait", task_id, "--timeout", "60s")["result"] == {"greeting": "hello you"}
    assert place.run("logs", task_id)["text"] == "hello you"

    for victim in [named(processes, "engine"), named(processes, "worker")]:
        victim.kill()
    assert place.run("status", place.run("submit", "greet", "--queue", "elsewhere")["task_id"])["state"] == "PENDING"
    again = place.run("submit", "greet", "--input", '{"name": "again"}')["task_id"]
    assert place.run("wait", again, "--timeout", "60s")["state"] == "COMPLETED"

    kafka = processes[-2]
    with (place.folder / ".perdure" / "kafka" / "logs" / "broker.log").open("a") as log:
        log.write("The state machine of the coordinator __consumer_offsets-1 is out of sync with the underlying log.\n")
    soon(lambda: gone(kafka), 60, "the end of a broker that has lost its groups")
    soon(lambda: running(place.folder / ".perdure" / "kafka") is not None, 60, "another one")
    last = place.run("submit", "greet", "--input", '{"name": "at last"}')["task_id"]
    assert place.run("wait", last, "--timeout", "60s")["state"] == "COMPLETED"

    assert place.run("dev", "stop") == {"stopped": True}
    assert all(gone(p) for p in processes)
    assert place.run("status", task_id, code=4)["error"]["code"] == "unreachable"

    processes = place.start()
    assert place.run("status", task_id)["state"] == "COMPLETED"
    processes[0].kill()
    soon(lambda: all(gone(p) for p in processes), 60, "the end of everything after the end of its owner")
    assert place.run("status", task_id, code=4)["error"]["code"] == "unreachable"


def test_a_stack_whose_worker_cannot_start_does_not_start(place: Place) -> None:
    (place.folder / "greetings.py").write_text("import no_such_module")
    told = place.run("dev", "--tasks", "greetings", "--detach", code=1)["error"]["message"]
    assert "no_such_module" in told
    assert not (place.folder / ".perdure" / "dev.json").exists()
    assert place.run("dev", "stop") == {"stopped": False}
