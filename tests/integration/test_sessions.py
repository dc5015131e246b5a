"""Sessions of real workers: names, hand-over at a shutdown, and what is left of a killed one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perdure.schemas import topics
from tests.integration.stack import Process, Stack, alive, stack_on, tree, until

pytestmark = pytest.mark.kafka
LINES_OF_TALK = 5


@pytest.fixture
def stack(kafka_bootstrap: str, topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    with stack_on(kafka_bootstrap, topic_prefix, tmp_path) as made:
        yield made


def test_two_unnamed_workers_of_one_host_do_not_disturb_each_other(stack: Stack) -> None:
    stack.engine()
    one, other = (stack.worker("--slots", "1", log=f"worker-{n}") for n in range(2))
    gate = stack.folder / "gate"
    handles = [stack.submit("gated", {"witness": str(stack.witness), "gate": str(gate)}) for _ in range(2)]
    for handle in handles:
        stack.await_witness("gate", handle.id, "1")
    names = {process.pid: _name(stack, process) for process in (one, other)}
    by_worker = {e.worker_id: e.task_id for e in stack.messages("task-events", "TaskGranted")}
    assert set(by_worker) == set(names.values())
    hit, spared = by_worker[names[one.pid]], by_worker[names[other.pid]]

    one.kill()
    one.start()
    stack.await_witness("gate", hit, "2")
    again = stack.events(hit, "TaskGranted")[1]
    assert by_worker[again.worker_id] == hit, "the slot of the host that it had before, and so its name"
    assert [e.why for e in stack.events(hit, "AttemptLost")] == ["superseded"]
    gate.touch()
    assert {handle.id: stack.result(handle) for handle in handles} == {hit: 2, spared: 1}
    assert other.runs()


def _name(stack: Stack, worker: Process) -> str:
    """The id under which the process has reported its metrics."""
    seen = stack.tail(topics.METRICS.name).look()
    return next(str(s.message.worker_id) for s in seen if s.message.pid == worker.pid)


def test_a_worker_that_is_told_to_stop_hands_its_task_over(stack: Stack) -> None:
    stack.engine()
    first = stack.worker("--slots", "1", name="first", log="first")
    handle = stack.submit("files", {"witness": str(stack.witness), "count": 40})
    stack.await_witness("file", handle.id, count=10)
    assert first.stop() == 0
    status = handle.status()
    assert (status.state, status.reason) == ("PENDING", "drained")
    assert "shutdown" in status.why
    executed = len(stack.witnessed("file", handle.id))
    assert executed < 40

    stack.worker("--slots", "1", name="second", log="second")
    assert stack.result(handle) == sum(range(40))
    granted = stack.events(handle.id, "TaskGranted")
    assert [(e.epoch, e.attempt, e.worker_id) for e in granted] == [(1, 1, "first"), (2, 1, "second")]
    assert sorted(int(e.words[2]) for e in stack.witnessed("file", handle.id)) == list(range(40)), "each file once"


def test_nothing_outlives_a_killed_supervisor(stack: Stack) -> None:
    stack.engine()
    worker = stack.worker("--slots", "2", name="w")
    handle = stack.submit("family", {"witness": str(stack.witness)})
    line = stack.await_witness("family")
    family = [line.pid, *map(int, line.words[1:])]
    everybody = tree(worker.pid)
    assert set(family) < set(everybody), "child, grandchild, and the grandchild that has a session of its own"
    worker.kill()
    until("the end of everybody", lambda: not any(map(alive, everybody)))
    assert handle.cancel()


def test_no_line_of_200_tasks_in_reused_children_is_anothers(stack: Stack) -> None:
    stack.engine()
    stack.worker("--slots", "2", name="w")
    handles = [stack.submit("talk", {"number": number}) for number in range(200)]
    until("the end of all", lambda: len(_completed(stack)) == 200)
    pids = {e.result for e in _completed(stack)}
    assert 2 <= len(pids) <= 6, "a child serves up to a hundred tasks"
    lines = until("all lines", lambda: _lines(stack))
    for number, handle in enumerate(handles):
        mine = [line for line in lines if line.task_id == handle.id]
        assert len(mine) == LINES_OF_TALK
        assert {digits for line in mine for digits in re.findall(r"\d+", line.text)} == {str(number)}
        assert [line.number for line in mine] == list(range(1, LINES_OF_TALK + 1))


def _completed(stack: Stack) -> list[Any]:
    seen = stack.tail(topics.EVENTS.name).look()
    return [s.message for s in seen if type(s.message).__name__ == "TaskCompleted"]


def _lines(stack: Stack) -> list[Any] | None:
    found = [s.message for s in stack.tail(topics.LOGS.name).look()]
    return found if len(found) >= 200 * LINES_OF_TALK else None
