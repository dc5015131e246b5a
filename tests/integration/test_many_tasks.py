"""Many tasks at the same time on one worker, each with live progress of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from perdure.handle import Handle
from perdure.schemas import topics
from tests.chaos.load import queues_of
from tests.integration.stack import Stack, stack_on, until

pytestmark = pytest.mark.kafka
COUNT = 120


@pytest.fixture
def stack(kafka_bootstrap: str, topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    with stack_on(kafka_bootstrap, topic_prefix, tmp_path) as made:
        yield made


def test_120_tasks_run_at_the_same_time_and_each_shows_its_progress(stack: Stack) -> None:
    stack.engine()
    stack.worker("--slots", "1", name="w")
    gate = stack.folder / "gate"
    handles = [stack.submit("steady", {"gate": str(gate), "number": n, "of": COUNT}) for n in range(COUNT)]
    until("progress of all", lambda: _reporting(stack) == {handle.id for handle in handles})
    for number, handle in enumerate(handles):
        status = handle.status()
        assert (status.state, status.epoch) == ("RUNNING", 1)
        assert status.progress == pytest.approx((number + 1) / (COUNT + 1))
        assert status.current_step == f"number {number}"
    seen = len(stack.tail(topics.TELEMETRY.name).look())
    until("more progress", lambda: _again(stack, handles, seen))
    assert stack.messages("task-events", "TaskCompleted") == [], "all of them run at this moment"

    gate.touch()
    assert [stack.result(handle) for handle in handles] == list(range(COUNT))
    assert stack.messages("task-events", "AttemptLost") == []
    assert {e.worker_id for e in stack.messages("task-events", "TaskGranted")} == {"w.async"}


def test_a_busy_queue_gets_the_slots_that_others_leave_idle_and_gives_them_back(stack: Stack) -> None:
    stack.engine()
    queues = queues_of(stack.log.partitions)
    stack.worker("--slots", "8", *(part for queue in queues for part in ("--queue", queue)), name="w")
    gate = {"witness": str(stack.witness), "gate": str(stack.folder / "gate")}
    busy = [stack.submit("gated", gate, queue=queues[0]) for _ in range(8)]
    until("five of eight slots for one queue, whose share is two", lambda: len(_granted(stack, queues[0])) == 5)
    others = [stack.submit("gated", gate, queue=queue) for queue in queues[1:]]
    until("one for each of the others, at once", lambda: all(len(_granted(stack, q)) == 1 for q in queues[1:]))
    assert len(_granted(stack, queues[0])) == 5, "all of them run at this moment"
    (stack.folder / "gate").touch()
    for handle in (*busy, *others):
        stack.result(handle)
    assert stack.messages("task-events", "AttemptLost") == [], "none was declined"


def _granted(stack: Stack, queue: str) -> list[str]:
    return [e.task_id for e in stack.messages("task-events", "TaskGranted") if e.task_id.startswith(f"{queue}/")]


def _reporting(stack: Stack) -> set[str]:
    return {s.message.task_id for s in stack.tail(topics.TELEMETRY.name).look()}


def _again(stack: Stack, handles: list[Handle], seen: int) -> bool:
    later = stack.tail(topics.TELEMETRY.name).look()[seen:]
    return {s.message.task_id for s in later} == {handle.id for handle in handles}
