"""A rolling upgrade between two builds, under load: the next one has more fields in its records, and a level more.

The next build is this one's source with what a new version would bring, made here and run beside it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.stack import Process, Stack, prove, stack_on, until

pytestmark = pytest.mark.kafka
ROOT = Path(__file__).resolve().parent.parent.parent
FILES = 150
CHANGES = {
    "streams/decision.py": [
        ('BUILD = "0.1.0"', 'BUILD = "0.2.0"'),
        ("FEATURE_LEVEL = 1\n", "FEATURE_LEVEL = 2\n"),
    ],
    "schemas/rows.py": [
        ("    timers: A[dict[str, int],", '    flavour: A[str, "New."] = "new"\n    timers: A[dict[str, int],'),
    ],
    "schemas/commands.py": [
        ("    inbox_offset: A[int,", '    region: A[str, "New."] = "here"\n    inbox_offset: A[int,'),
    ],
}  # fmt: skip


def next_build(folder: Path) -> dict[str, str]:
    """A build that is one version further; the environment in which its processes run."""
    shutil.copytree(ROOT / "perdure", folder / "perdure", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "write_schemas.py", folder / "tools")
    avro = folder / "perdure" / "schemas" / "avro"
    (avro / "old").mkdir(exist_ok=True)
    for old in ("rows/TaskState", "sessions/WorkerStarted"):
        shutil.copy(avro / f"{old}.avsc", avro / "old" / f"{old.replace('/', '.')}.1.avsc")
    for name, changes in CHANGES.items():
        file = folder / "perdure" / name
        text = file.read_text()
        for before, after in changes:
            assert before in text, f"{name} has changed: {before!r} is not in it"
            text = text.replace(before, after, 1)
        file.write_text(text)
    environment = {"PYTHONPATH": str(folder)}
    tool = (
        (folder / "tools" / "write_schemas.py")
        .read_text()
        .replace('/ "schemas" / "avro"', '/ "perdure" / "schemas" / "avro"')
    )
    (folder / "tools" / "write_schemas.py").write_text(tool)
    subprocess.run(
        [sys.executable, str(folder / "tools" / "write_schemas.py")], env=os.environ | environment, cwd=folder,
        check=True, capture_output=True,
    )  # fmt: skip
    return environment


@pytest.fixture
def stack(kafka_bootstrap: str, topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    with stack_on(kafka_bootstrap, topic_prefix, tmp_path) as made:
        yield made


def engine(stack: Stack, host: str) -> Process:
    """An engine process of the present build on a host, working."""
    options = ["--state-dir", str(stack.folder / host)]
    started = stack.process(f"{host}-engine", "-m", "perdure.cli", "engine", *options).start()
    started.await_text("is up to date")
    return started


def upgrade(stack: Stack) -> Process:
    """`perdure upgrade`, ended."""
    command = stack.process("upgrade", "-m", "perdure.cli", "upgrade").start()
    command.ended()
    return command


def test_engines_and_workers_are_replaced_one_by_one_and_nothing_is_refused_or_lost(stack: Stack) -> None:
    newer = next_build(stack.folder / "next")
    first, second = engine(stack, "one"), engine(stack, "two")
    worker = stack.worker("--slots", "4", name="w")
    tasks = [stack.submit("files", {"witness": str(stack.witness), "count": FILES}) for _ in range(3)]
    stack.await_witness("file", tasks[-1].id, "5")

    stack.environment = newer
    assert first.stop() == 0
    first = engine(stack, "one")
    assert worker.stop() == 0
    worker = stack.worker("--slots", "4", name="w", log="worker-next")
    tasks.append(stack.submit("add", {"a": 1, "b": 2}))
    assert stack.result(tasks[-1]) == 3, "with engines of both builds and a worker of the newer"
    refused = upgrade(stack)
    assert "engines that do not know level 2 are running" in refused.text()

    stack.environment = {}
    assert first.stop() == 0
    first = engine(stack, "one")  # put back: the older build goes on from what the newer one wrote
    tasks.append(stack.submit("add", {"a": 2, "b": 2}))
    assert stack.result(tasks[-1]) == 4

    stack.environment = newer
    for old in (first, second):
        assert old.stop() == 0
    first, second = engine(stack, "one"), engine(stack, "two")
    until(
        "the engines that were stopped have left the group", lambda: "feature level 2 (was 1)" in upgrade(stack).text()
    )
    for _ in range(100):
        tasks.append(stack.submit("add", {"a": 3, "b": 3}))
        assert stack.result(tasks[-1]) == 6
        if stack.events(tasks[-1].id)[-1].feature_level == 2:
            break
    assert {e.feature_level for e in stack.events(tasks[-1].id)} <= {1, 2}
    assert stack.events(tasks[-1].id)[-1].build == "0.2.0"
    assert stack.events(tasks[-1].id)[-1].feature_level == 2

    assert second.stop() == 0
    stack.environment = {}
    older = stack.process("older", "-m", "perdure.cli", "engine", "--state-dir", str(stack.folder / "two")).start()
    assert older.ended() == 1
    assert "at feature level 2, and this build (0.1.0) knows levels up to 1" in older.text()

    stack.environment = newer
    engine(stack, "two")
    for task in tasks[:3]:
        assert stack.result(task) == sum(range(FILES))
        prove(stack, task.id, FILES, kills=1)
    assert stack.messages("quarantine") == []
    assert stack.messages("task-events", "CommandRejected") == []
