"""A changelog that was hurt on a real broker: the right state, or a refusal that names it (G5)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic  # type: ignore[attr-defined]

from perdure.schemas import topics
from perdure.schemas.errors import RestoreStuck
from perdure.streams import restore_watch
from perdure.streams import shard as shard_module
from perdure.streams.local_engine import engine_kind
from perdure.streams.shard import Shard
from perdure.streams.store import META, MemoryStore
from tests.integration.stack import Process, Stack, stack_on, until
from tests.integration.traffic import traffic_on

pytestmark = pytest.mark.kafka
CHANGELOG = topics.CHANGELOG


@pytest.fixture
def stack(kafka_bootstrap: str, topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    """A namespace of one partition whose engine has done something and has ended."""
    with stack_on(kafka_bootstrap, topic_prefix, tmp_path, partitions=1) as made:
        engine = made.engine()
        with traffic_on(made, engine) as traffic:
            traffic.flows()
            traffic.stop()
        assert engine.stop() == 0
        yield made


def refused(stack: Stack, host: str) -> str:
    """What an engine on this host says when it ends."""
    engine: Process = stack.process(f"engine-{host}", "-m", "perdure.cli", "engine", host=host).start()
    assert engine.ended() not in (0, None)
    return engine.text()


def test_deleted_records_are_no_loss_to_who_has_read_them_and_a_refusal_to_others(stack: Stack) -> None:
    _, end = stack.log.offsets(CHANGELOG.name, 0)
    read = end - 1  # the last one is the mark of a commit, which nobody reads
    where = TopicPartition(CHANGELOG.on(stack.prefix), 0, read)
    configure(stack, {"cleanup.policy": "delete"})  # from a topic that is only compacted a broker deletes nothing
    until("the deletion", lambda: _deleted(stack, where))
    configure(stack, {"cleanup.policy": "compact"})
    said = refused(stack, "new-host")
    assert f"{CHANGELOG.name}/0 begins at {read}: rows were deleted from it" in said
    engine = stack.engine()
    with traffic_on(stack, engine) as traffic:
        traffic.flows()
        traffic.stop()
    assert engine.stop() == 0


def _deleted(stack: Stack, where: TopicPartition) -> bool:
    """False while the broker has not yet heard of the topic's new policy."""
    try:
        stack.log.admin().delete_records([where])[where].result(30)
    except KafkaException as error:
        if error.args[0].code() == KafkaError.POLICY_VIOLATION:
            return False
        raise
    return True


def test_a_changelog_that_was_made_anew_is_not_an_empty_state(stack: Stack) -> None:
    """The commands are all there still: an engine that took the state for empty would execute them again."""
    admin, name = stack.log.admin(), CHANGELOG.on(stack.prefix)
    events = len(stack.messages(topics.EVENTS.name))
    admin.delete_topics([name])[name].result(30)
    until("the end of the topic", lambda: name not in admin.list_topics(timeout=10).topics)
    admin.create_topics([NewTopic(name, 1, 1, config=CHANGELOG.settings)])[name].result(30)
    until("the new topic", lambda: name in admin.list_topics(timeout=10).topics)
    assert "the changelog was replaced, or has lost its end" in refused(stack, "state")
    assert len(stack.messages(topics.EVENTS.name)) == events


def test_a_transaction_that_others_left_open_is_named(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = Producer({"bootstrap.servers": stack.bootstrap, "transactional.id": f"{stack.prefix}x", "log_level": 0})
    foreign.init_transactions(30)
    foreign.begin_transaction()
    foreign.produce(CHANGELOG.on(stack.prefix), b"", b"\xfeforeign", partition=0)
    assert foreign.flush(30) == 0
    shard = restoring(stack)
    monkeypatch.setattr(restore_watch, "_STUCK_S", 1.0)
    with pytest.raises(RestoreStuck, match=r"engine-changelog/0: nothing could be read .* a transaction of another"):
        _to_the_end(shard)
    monkeypatch.undo()
    ends = threading.Timer(0.5, foreign.abort_transaction, (30,))
    ends.start()
    _to_the_end(shard)
    ends.join()
    shard.close()


@pytest.mark.slow
def test_compaction_takes_nothing_from_a_restore_under_way(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, before = stack.changelog()[0], kept(stack)
    monkeypatch.setattr(shard_module, "RESTORE_BATCH", 5)
    store = MemoryStore()
    shard = restoring(stack, store)
    for _ in range(5):
        assert not shard.restore_some()
    configure(stack, {"segment.ms": "100", "min.cleanable.dirty.ratio": "0.0001", "min.compaction.lag.ms": "0"})
    others = Producer({"bootstrap.servers": stack.bootstrap, "log_level": 0})

    def compacted() -> bool:
        """A newer segment is needed for the older ones to be cleaned: a key that no engine has, again and again."""
        others.produce(CHANGELOG.on(stack.prefix), None, b"\xfeothers", partition=0)
        assert others.flush(30) == 0
        return kept(stack) - len(wanted) < (before - len(wanted)) / 2

    until("the end of half of the rows that are outdated", compacted)
    _to_the_end(shard)
    assert {k: v for k, v in store.scan(b"") if not k.startswith((META, b"\xfeothers"))} == wanted
    shard.close()


def configure(stack: Stack, settings: dict[str, str]) -> None:
    """Change settings of the changelog."""
    changes = [ConfigEntry(k, v, incremental_operation=AlterConfigOpType.SET) for k, v in settings.items()]
    topic = ConfigResource(ConfigResource.Type.TOPIC, CHANGELOG.on(stack.prefix), incremental_configs=changes)
    stack.log.admin().incremental_alter_configs([topic])[topic].result(30)


def kept(stack: Stack) -> int:
    """How many records the changelog holds."""
    reader = stack.log.reader()
    reader.assign({(CHANGELOG.name, 0): 0})
    _, end = reader.bounds(CHANGELOG.name, 0)
    count = 0
    while not reader.caught_up(CHANGELOG.name, 0, end):
        count += len(reader.read(1_000, 0.5))
    reader.close()
    return count


def restoring(stack: Stack, store: MemoryStore | None = None) -> Shard:
    """The partition, as an engine on a new host opens it."""
    member = stack.log.member("engine", [topics.COMMANDS.name], on_assigned=lambda _: None, on_revoked=lambda *_: None)
    kind = engine_kind(1, stack.keys)
    return Shard(kind, 0, log=stack.log, store=store or MemoryStore(), member=member, transactional_id="engine.0")


def _to_the_end(shard: Shard) -> None:
    until("the end of the restore", shard.restore_some)
