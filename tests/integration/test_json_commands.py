"""JSON commands by a plain producer, as kcat sends them: no client, no server, any key and any partition (G1, G2)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from perdure.schemas import limits, topics
from perdure.schemas.errors import CommandRefused
from perdure.streams import tables
from tests.integration.stack import QUEUE, Stack, stack_on, until

pytestmark = pytest.mark.kafka
TASKS = 200
LIFE = ["TaskSubmitted", "TaskQueued", "TaskPaused", "TaskResumed", "TaskQueued", "TaskCancelled"]
STAGES = ("TaskSubmitted", "TaskPaused", "TaskResumed", "TaskCancelled")


@pytest.fixture
def stack(kafka_bootstrap: str, topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    # As many as a namespace has by default: a command for a queue that nobody knows then makes the longest journeys.
    with stack_on(kafka_bootstrap, topic_prefix, tmp_path, partitions=limits.DEFAULT_PARTITIONS) as made:
        yield made


def life_of(task_id: str, **submit: Any) -> list[dict[str, Any]]:
    return [
        {"command": "SubmitTask", "task_id": task_id, "type": "unheard", "input": {"of": task_id}, **submit},
        *({"command": c, "task_id": task_id} for c in ("PauseTask", "ResumeTask", "CancelTask")),
    ]


@pytest.mark.parametrize("with_key", [False, True], ids=["no key", "a wrong key"])
def test_each_command_is_applied_once_and_in_order_while_engines_are_killed(stack: Stack, with_key: bool) -> None:
    engine = stack.engine()
    tasks = [f"queue{n % 7}/job {n}" for n in range(TASKS)]
    for step in range(len(STAGES)):
        for n, task in enumerate(tasks):
            command = life_of(task)[step]
            if with_key:  # the key picks the partition, and is not the routing key
                stack.produce(command, key=f"customer {n}".encode())
            else:
                stack.produce(command, partition=n % stack.log.partitions)
    stack.flush()
    for stage in STAGES:
        until(f"a first {stage}", partial(_done, stack, stage))
        engine.kill()
        engine.start()
    until("the end of all", lambda: _done(stack, "TaskCancelled") == set(tasks))
    kinds: dict[str, list[str]] = {task: [] for task in tasks}
    for event in stack.messages("task-events"):
        if getattr(event, "task_id", None) is not None:
            kinds[event.task_id].append(type(event).__name__)
    assert {task: found for task, found in kinds.items() if found != LIFE} == {}
    assert stack.messages("task-events", "CommandRejected") == []
    assert stack.messages("quarantine") == []
    stack.await_engine(engine)
    stack.check_store(engine)


def _done(stack: Stack, kind: str) -> set[str]:
    seen = stack.tail(topics.EVENTS.name).look()
    return {s.message.task_id for s in seen if type(s.message).__name__ == kind}


def test_a_repeated_command_has_one_event_and_the_same_answer(stack: Stack) -> None:
    stack.engine()
    task = f"{QUEUE}/twice"
    ask = {"task_id": task, "reply_to": "somebody"}
    commands = [
        {"command": "SubmitTask", "command_id": "s", "type": "unheard", **ask},
        {"command": "PauseTask", "command_id": "p", **ask},
        {"command": "PauseTask", "command_id": "refused", **ask},
        {"command": "ResumeTask", "command_id": "r", **ask},
    ]
    for command in commands:
        for partition in (stack.home(), stack.home(), *range(stack.log.partitions)):
            stack.produce(command, partition=partition)
        stack.flush()
        until("all answers", partial(_answered, stack, command["command_id"], 2 + stack.log.partitions))
    assert [type(e).__name__ for e in stack.events(task)] == [
        "TaskSubmitted", "TaskQueued", "TaskPaused", "CommandRejected", "TaskResumed", "TaskQueued"
    ]  # fmt: skip
    for command_id in ("s", "p", "refused", "r"):
        answers = {(a.accepted, a.reason, a.field, a.task_id) for a in _answers(stack, command_id)}
        assert len(answers) == 1
        assert {a[0] for a in answers} == {command_id != "refused"}


def _answered(stack: Stack, command_id: str, count: int) -> bool:
    return len(_answers(stack, command_id)) >= count


def _answers(stack: Stack, command_id: str | None = None) -> list[Any]:
    found = [s.message for s in stack.tail(topics.REPLIES.name).look() if s.message.client_id == "somebody"]
    return [a for a in found if command_id in (None, a.command_id)]


def test_one_key_is_one_task_by_whatever_way_it_comes(stack: Stack) -> None:
    stack.engine()
    first = stack.submit("unheard", {"n": 1}, key="2026-11")
    again = stack.submit("unheard", {"n": 1}, key="2026-11")
    assert first.id == again.id
    assert again.status().state == "PENDING"
    said = {"command": "SubmitTask", "type": "unheard", "queue": QUEUE, "key": "2026-11", "reply_to": "somebody"}
    stack.produce({**said, "command_id": "same", "input": {"n": 1}}, key=b"any")
    stack.produce({**said, "command_id": "other", "input": {"n": 2}}, key=b"any")
    until("both answers", lambda: _answers(stack, "same") and _answers(stack, "other"))
    (same,), (other,) = _answers(stack, "same"), _answers(stack, "other")
    assert (same.accepted, same.task_id) == (True, first.id)
    assert (other.accepted, other.field) == (False, "key")
    with pytest.raises(CommandRefused) as refused:
        stack.submit("unheard", {"n": 3}, key="2026-11").status()
    assert refused.value.field == "key"
    assert len(stack.messages("task-events", "TaskSubmitted")) == 1
    assert {e.field for e in stack.messages("task-events", "CommandRejected")} == {"key"}


def test_status_shows_each_own_command_at_once(stack: Stack) -> None:
    stack.engine()
    for n in range(20):
        handle = stack.submit("unheard", {"n": n})
        assert handle.status().state == "PENDING"
        stack.produce({"command": "PauseTask", "task_id": handle.id}, partition=stack.home())
        stack.flush()
        assert handle.status().state == "PAUSED"
        assert handle.resume()
        assert handle.status().state == "PENDING"
        assert handle.cancel("enough")
        status = handle.status()
        assert (status.state, status.cancel_reason) == ("CANCELLED", "enough")


def test_thousands_of_questions_leave_no_trace(stack: Stack) -> None:
    stack.engine()
    handles = [stack.submit("unheard", {"n": n}) for n in range(3)]
    assert [h.status().state for h in handles] == ["PENDING"] * 3
    away = (stack.home() + 1) % stack.log.partitions

    def ask(n: int) -> None:
        about = {"task_id": handles[n % 3].id, "reply_to": "somebody", "command_id": f"q{n}"}
        stack.produce({"command": "DescribeTask", **about}, partition=away)

    ask(0)  # two partitions count from now on what goes between them
    until("the first answer", lambda: _answers(stack))
    until("an empty outbox", lambda: not any(key[:1] in (b"o", b"m") for keys in _keys(stack).values() for key in keys))
    before, events = _keys(stack), len(stack.messages("task-events"))
    for n in range(1, 3_000):
        ask(n)
    stack.flush()
    until("all answers", lambda: len(_answers(stack)) == 3_000)
    assert {a.task_id for a in _answers(stack)} == {h.id for h in handles}
    until("what was forwarded is forgotten", lambda: _keys(stack) == before)
    kinds = {type(e).__name__ for e in stack.messages("task-events")[events:]}
    assert kinds <= {"ForwardQueued", "ForwardTaken", "ForwardAcknowledged"}, "no event tells of a question"


def _keys(stack: Stack) -> dict[int, set[bytes]]:
    """Keys of the engine's rows, but for the positions: a partition has one from its first tick on, early or late."""
    return {partition: {key for key in rows if key != tables.POSITION} for partition, rows in stack.changelog().items()}
