"""The audit of a namespace that is at work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from perdure.audit_reader import AuditReader
from perdure.schemas import topics
from perdure.schemas.events import TaskCancelled, TaskCompleted
from tests.integration.stack import Stack, stack_on, until

pytestmark = pytest.mark.kafka


@pytest.fixture
def stack(kafka_bootstrap: str, topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    with stack_on(kafka_bootstrap, topic_prefix, tmp_path) as made:
        yield made


def is_end(event: object) -> bool:
    return isinstance(event, TaskCompleted | TaskCancelled)


def test_a_namespace_is_followed_while_its_engine_is_killed(stack: Stack) -> None:
    engine = stack.engine()
    stack.worker("--slots", "2", name="w")
    reader = AuditReader(stack.bootstrap, stack.prefix, {}, progress=lambda _: None)
    handles = []
    for n in range(6):
        handles += [stack.submit("add", {"a": n, "b": m}) for m in range(10)]
        for m in range(20):
            command = {"command": "CancelTask", "task_id": handles[-1].id, "reply_to": "me", "command_id": f"{n}-{m}"}
            stack.produce(command, partition=m % stack.log.partitions)
        reader.round()
        if n % 2:
            engine.kill()
            engine.start()
    stack.flush()
    events = stack.tail(topics.EVENTS.name)
    until(
        "all ends", lambda: {h.id for h in handles} <= {s.message.task_id for s in events.look() if is_end(s.message)}
    )
    for _ in range(2):
        reader.round()
    reader.close()
    assert not reader.audit.violations, "\n".join(v.line() for v in reader.audit.violations[:20])
    read = reader.audit.summary()["read"]
    assert (read["tasks"], read["partial"], read["partitions"]) == (len(handles), 0, stack.log.partitions)
