"""A position below the log's start is a loud refusal, never a silent reset (G1)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import TopicPartition

from perdure.schemas import topics
from tests.integration.stack import Stack, stack_on

pytestmark = pytest.mark.kafka


@pytest.fixture
def stack(kafka_bootstrap: str, topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    with stack_on(kafka_bootstrap, topic_prefix, tmp_path) as made:
        yield made


def _delete_before(stack: Stack, offset: int) -> None:
    where = TopicPartition(topics.COMMANDS.on(stack.prefix), stack.home(), offset)
    for done in stack.log.admin().delete_records([where]).values():
        done.result(30)


def test_commands_deleted_before_they_were_executed_are_a_refusal(stack: Stack) -> None:
    engine = stack.engine()
    first = stack.submit("unheard", {"n": 1})
    assert first.status().state == "PENDING"
    assert engine.stop() == 0
    lost = [stack.submit("unheard", {"n": n}) for n in range(2, 5)]
    _, end = stack.log.offsets(topics.COMMANDS.name, stack.home())
    _delete_before(stack, end)
    events = len(stack.messages("task-events"))

    engine.start()
    assert engine.ended() not in (0, None)
    said = engine.text()
    assert f"{topics.COMMANDS.name}/{stack.home()} begins at {end}" in said
    assert "3 records were deleted before they were read" in said
    assert "retention" in said
    assert len(stack.messages("task-events")) == events, "nothing was executed behind the gap"
    assert [stack.events(handle.id) for handle in lost] == [[], [], []]


def test_commands_deleted_after_they_were_executed_are_no_loss(stack: Stack) -> None:
    engine = stack.engine()
    first = stack.submit("unheard", {"n": 1})
    assert first.status().state == "PENDING"
    assert engine.stop() == 0
    _, end = stack.log.offsets(topics.COMMANDS.name, stack.home())
    _delete_before(stack, end)
    engine.start()
    stack.await_engine(engine)
    assert first.cancel()
    assert first.status().state == "CANCELLED"
