"""Tasks submitted before anybody knows their type, and while the first worker is starting, run under its policy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from perdure.handle import Handle
from perdure.schemas import topics
from tests.integration.stack import TASKS, Stack, stack_on

pytestmark = pytest.mark.kafka
BETWEEN_S = 0.05


@pytest.fixture
def stack(kafka_bootstrap: str, topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    with stack_on(kafka_bootstrap, topic_prefix, tmp_path) as made:
        yield made


def test_the_decorators_retry_policy_holds_whenever_the_task_is_submitted(stack: Stack) -> None:
    stack.engine()
    early = stack.submit("flaky")
    assert early.status().state == "PENDING"
    worker = stack.process("worker", "-m", "perdure.cli", "worker", "-m", TASKS, "--slots", "4").start()
    handles: list[Handle] = [early]
    while not _registered(stack):
        assert worker.runs(), worker.text()
        handles.append(stack.submit("flaky"))
        time.sleep(BETWEEN_S)  # the submits are spread over the worker's start, so that some fall into its middle
    handles += [stack.submit("flaky") for _ in range(10)]
    handles.append(stack.client.submit("flaky"))  # by now the client knows the queue by itself

    assert {stack.result(handle) for handle in handles} == {3}
    events = stack.messages("task-events", "TaskSubmitted", "TaskPolicyBound", "AttemptFailed")
    for handle in handles:
        mine = [e for e in events if e.task_id == handle.id]
        assert sum(type(e).__name__ == "AttemptFailed" for e in mine) == 2
        bound = [policy for e in mine if (policy := getattr(e, "policy", None)) is not None]
        assert [policy.retry.max_attempts for policy in bound] == [3], "bound once, at the submit or later"
    (first,) = stack.events(early.id, "TaskPolicyBound")
    assert first.policy_version > 0


def _registered(stack: Stack) -> bool:
    return any(type(s.message).__name__ == "WorkerStarted" for s in stack.tail(topics.COMMANDS.name).look())
