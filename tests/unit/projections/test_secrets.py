"""No secret reaches a record that others may read (G9), whatever the engine is sent."""

from __future__ import annotations

import pytest

from perdure.schemas import commands, topics
from perdure.schemas.common import Retry
from tests.world import KEYS, ScriptedWorker, World, completed, failed, progress, step

OPEN = (topics.EVENTS, topics.TELEMETRY, topics.REPLIES, topics.CHANGELOG, topics.CONFIG, topics.QUARANTINE)
"""All that the engine writes but `worker-inbox`, where the grants are."""


@pytest.fixture
def world() -> World:
    """A task that was run, failed, was run again and is done; and forged, late and unreadable records."""
    world = World()
    worker = ScriptedWorker(world).start()
    task_id = world.submit(retry=Retry(max_attempts=2, delay=1_000, jitter=False))
    first = worker.run(task_id)
    worker.report(first, step("a"), progress(0.5), failed())
    world.advance(2_000)
    second = worker.run(task_id)
    worker.report(second, completed({"done": True}))
    worker.report(first, step("late"))
    worker.report(second, step("forged"), token=b"t" * 32)
    worker.report(second, step("forged"), key=("w1", b"x" * 32))
    world.send(b"\xc3\x01nonsense", worker.partition)
    world.json(worker.partition, command="ReportBatch", session=worker.session)
    world.host(commands.Forwarded(source=1, target=0, number=9, record=b"x"), 0)
    world.do(commands.DescribeTask, task_id)
    assert world.kinds(task_id).count("TaskGranted") == 2
    assert {"TaskCompleted", "ReportRejected"} <= set(world.kinds(task_id))
    return world


def test_no_key_and_no_token_is_in_any_topic_that_others_may_read(world: World) -> None:
    grants = [m.token for m in world.all(topics.INBOX) if hasattr(m, "token")]
    assert len(grants) == 2
    secrets = [*KEYS.worker.values(), *KEYS.engine.values(), *grants]
    found = [
        (topic.name, type(world.decode(r)).__name__)
        for topic in OPEN
        for r in world.log.records(topic.name)
        for secret in secrets
        if secret in (r.value or b"") or secret.hex().encode() in (r.value or b"")
    ]
    assert found == []
