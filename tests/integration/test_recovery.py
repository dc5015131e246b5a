"""A host is lost, or the changelog: another way of recovery brings everything back, and tasks go on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic  # type: ignore[attr-defined]

from perdure.schemas import topics
from perdure.streams import topology
from tests.integration.stack import Stack, prove, stack_on, until

pytestmark = pytest.mark.kafka
FILES = 60


@pytest.fixture
def stack(kafka_bootstrap: str, topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    with stack_on(kafka_bootstrap, topic_prefix, tmp_path) as made:
        yield made


def test_another_host_starts_from_a_snapshot(stack: Stack) -> None:
    stack.environment = {"PERDURE_BLOBS": str(stack.folder / "blobs"), "PERDURE_SNAPSHOT_ROWS": "100"}
    engine = stack.engine()
    stack.worker(name="w")
    task = stack.submit("files", {"witness": str(stack.witness), "count": FILES})
    stack.await_witness("file", task.id, "10")
    engine.await_text(f"partition {stack.home()}: snapshot ")
    engine.kill()
    shutil.rmtree(stack.folder / "state" / "partition")

    elsewhere = stack.process("other-host", "-m", "perdure.cli", "engine", "--state-dir", str(stack.folder / "other"))
    stack.await_engine(elsewhere.start())
    assert f"partition {stack.home()} is fetched from snapshots/" in elsewhere.text()
    assert stack.result(task) == sum(range(FILES))
    prove(stack, task.id, FILES, kills=0)
    stack.check_store(elsewhere, "other")


def test_the_changelog_is_lost_and_rebuilt_from_the_events(stack: Stack) -> None:
    engine = stack.engine()
    stack.worker(name="w")
    task = stack.submit("files", {"witness": str(stack.witness), "count": FILES})
    paused = stack.submit("gated", {"witness": str(stack.witness), "gate": "/nowhere"}, delay="1h")
    paused.pause()
    stack.await_witness("file", task.id, "10")
    refused = stack.process("too-early", "-m", "perdure.cli", "rebuild", "--from-events", "--yes").start()
    assert refused.ended() == 1
    assert "stop them first" in refused.text()
    engine.kill()
    topology.replace_topic(stack.log, topics.CHANGELOG)

    engine.start()
    assert engine.ended() == 1
    assert "the changelog was replaced" in engine.text()
    assert "perdure rebuild --from-events" in engine.text()

    until("the killed engine has left the group, and the rebuild", lambda: _rebuilt(stack))
    stack.await_engine(engine.start())
    assert stack.result(task) == sum(range(FILES))
    prove(stack, task.id, FILES, kills=FILES)  # what ran while there was no engine runs again: its lease is over
    assert paused.status().state == "PAUSED"
    stack.check_store(engine)


def _rebuilt(stack: Stack) -> bool:
    return stack.process("rebuild", "-m", "perdure.cli", "rebuild", "--from-events", "--yes").start().ended() == 0


def test_a_changelog_that_is_gone_altogether_is_rebuilt_too(stack: Stack) -> None:
    engine = stack.engine()
    paused = stack.submit("gated", {"witness": str(stack.witness), "gate": "/nowhere"}, delay="1h")
    paused.pause()
    until("its pause", lambda: paused.status().state == "PAUSED")
    engine.stop()
    admin, name = stack.log.admin(), topics.CHANGELOG.on(stack.prefix)
    admin.delete_topics([name])[name].result(10)

    until("its end", lambda: name not in admin.list_topics(timeout=10).topics)
    engine.start()
    assert engine.ended() != 0
    assert "is gone" in engine.text()
    assert "perdure rebuild --from-events" in engine.text()
    admin.create_topics([NewTopic(name, 1, 1)])[name].result(10)  # as a broker does that makes whatever is asked for
    until("the topic", lambda: name in admin.list_topics(timeout=10).topics)
    engine.start()
    assert engine.ended() != 0
    assert "has 1 partitions" in engine.text()
    until("the engine has left the group, and the rebuild", lambda: _rebuilt(stack))
    stack.await_engine(engine.start())
    assert paused.status().state == "PAUSED"
    stack.check_store(engine)


def test_a_replaced_topic_keeps_the_settings_that_were_made_for_it(stack: Stack) -> None:
    admin, name = stack.log.admin(), topics.CHANGELOG.on(stack.prefix)
    wanted = ConfigEntry("delete.retention.ms", "777777777", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ConfigResource.Type.TOPIC, name, incremental_configs=[wanted])
    admin.incremental_alter_configs([resource])[resource].result(10)
    topology.replace_topic(stack.log, topics.CHANGELOG)
    found = topology.settings_of(stack.log, [topics.CHANGELOG])[topics.CHANGELOG.name]
    assert found["delete.retention.ms"] == "777777777"
    assert found["cleanup.policy"] == topics.CHANGELOG.settings["cleanup.policy"]
