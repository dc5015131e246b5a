"""Real kills in the middle of real work: what is recorded stays recorded, and what is late is refused (G2, G3, G4)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.stack import FAULTY, Stack, alive, prove, stack_on, stopped, until

pytestmark = pytest.mark.kafka


@pytest.fixture
def stack(kafka_bootstrap: str, topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    with stack_on(kafka_bootstrap, topic_prefix, tmp_path) as made:
        yield made


def test_kills_of_child_worker_and_engine_in_the_middle_of_a_step(stack: Stack) -> None:
    engine = stack.engine()
    worker = stack.worker("--slots", "1", name="w")
    handle = stack.submit("files", {"witness": str(stack.witness), "count": 60})
    task = handle.id

    child = stack.await_witness("file", task, count=10).pid
    os.kill(child, signal.SIGKILL)
    stack.await_witness("file", task, count=20)
    worker.kill()
    worker.start()
    stack.await_witness("file", task, count=35)
    engine.kill()
    engine.start()

    assert stack.result(handle) == sum(range(60))
    prove(stack, task, 60, kills=3)
    lost = stack.events(task, "AttemptLost")
    assert [e.why for e in lost] == ["crashed", "superseded"], "the engine's death costs nobody anything"
    assert len(stack.events(task, "TaskCompleted")) == 1
    assert [e.attempt for e in stack.events(task, "TaskGranted")] == [1, 1, 1], "no kill spends an attempt"


def test_a_worker_that_is_back_under_its_name_has_no_lease_to_wait_for(stack: Stack) -> None:
    stack.engine()
    worker = stack.worker("--slots", "1", name="w")
    gate = stack.folder / "gate"
    handle = stack.submit("gated", {"witness": str(stack.witness), "gate": str(gate)})
    child = stack.await_witness("gate", handle.id, "1").pid
    worker.kill()
    worker.start()
    stack.await_witness("gate", handle.id, "2")
    gate.touch()
    assert stack.result(handle) == 2
    assert not alive(child)
    (lost,) = stack.events(handle.id, "AttemptLost")
    assert lost.why == "superseded"
    causes = [
        (s.record.partition, s.record.offset)
        for s in stack.tail("task-commands").whole()
        if type(s.message).__name__ == "WorkerStarted"
    ]
    assert (lost.cause.partition, lost.cause.offset) in causes, "the new session ends the old lease, and no timer"


def test_a_worker_that_wakes_up_late_is_refused(stack: Stack) -> None:
    stack.engine()
    zombie = stack.worker("--slots", "1", name="zombie", log="zombie")
    gate = stack.folder / "gate"
    handle = stack.submit("gated", {"witness": str(stack.witness), "gate": str(gate)})
    stack.await_witness("gate", handle.id, "1")
    with stopped(zombie.pid):  # the supervisor alone: its child goes on, and its result waits in the socket
        heir = stack.worker("--slots", "1", name="heir", log="heir")
        stack.await_witness("gate", handle.id, "2")
        gate.touch()
        assert stack.result(handle) == 2
    granted = {e.epoch: e.session for e in stack.events(handle.id, "TaskGranted")}

    def refused() -> list[str]:
        found = stack.messages("task-events", "ReportRejected")
        return [e.report for e in found if e.session == granted[1]]

    until("the refusal", lambda: "ReportBatch" in refused())
    assert len(stack.events(handle.id, "TaskCompleted")) == 1
    assert [e.epoch for e in stack.events(handle.id, "StepCompleted")] == [2]
    assert [e.why for e in stack.events(handle.id, "AttemptLost")] == ["session_ended"]
    assert heir.runs()


def test_an_engine_killed_between_commit_and_store_goes_on_where_it_was(stack: Stack) -> None:
    engine = stack.engine(program=(FAULTY,))
    handle = stack.submit("add", {"a": 1, "b": 2}, id="dies-before-store")
    assert handle.pause()
    (stack.folder / "armed").touch()
    stack.produce({"command": "ResumeTask", "task_id": handle.id}, partition=stack.home())
    assert engine.ended() == -signal.SIGKILL
    engine.start()
    stack.await_engine(engine)
    stack.produce({"command": "CancelTask", "task_id": handle.id}, partition=stack.home())
    stack.await_event(handle.id, "TaskCancelled")
    assert [(e.seq, type(e).__name__) for e in stack.events(handle.id)] == [
        (1, "TaskSubmitted"), (2, "TaskQueued"), (3, "TaskPaused"), (4, "TaskResumed"), (5, "TaskQueued"),
        (6, "TaskCancelled"),
    ]  # fmt: skip
    stack.check_store(engine)
