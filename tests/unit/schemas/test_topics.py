"""The one table of topics: its names and settings, and that what is written fits."""

from __future__ import annotations

import pytest

from perdure.schemas import limits, topics
from perdure.schemas.topics import ALL, Topic

DAY_MS = 24 * 3600 * 1000
EVERY_TOPIC = pytest.mark.parametrize("topic", ALL, ids=lambda t: t.name)


def test_the_topics_are_those_of_the_contract() -> None:
    """Other programs rely on these names: none may go or change."""
    assert [topic.name for topic in ALL] == [
        "task-commands",
        "task-intake",
        "task-events",
        "task-telemetry",
        "command-replies",
        "worker-inbox",
        "engine-changelog",
        "task-progress",
        "task-dead-letters",
        "task-logs",
        "worker-metrics",
        "config",
        "alerts",
        "quarantine",
    ]
    assert {topic.name: topic for topic in ALL} == topics.BY_NAME


def test_every_topic_of_the_module_is_in_the_table() -> None:
    assert {id(value) for value in vars(topics).values() if isinstance(value, Topic)} == {id(topic) for topic in ALL}


def test_a_name_on_the_broker_begins_with_the_prefix() -> None:
    assert topics.EVENTS.on("perdure.") == "perdure.task-events"
    assert len({topic.on("a.") for topic in ALL} | {topic.on("b.") for topic in ALL}) == 2 * len(ALL)


@EVERY_TOPIC
def test_a_topic_says_what_it_is(topic: Topic) -> None:
    assert topic.doc.endswith(".")
    assert topic.key
    assert topic.writers
    assert topic.readers


@EVERY_TOPIC
def test_settings_are_ones_that_kafka_knows(topic: Topic) -> None:
    known = {
        "cleanup.policy",
        "retention.ms",
        "max.message.bytes",
        "message.timestamp.type",
        "delete.retention.ms",
        "min.compaction.lag.ms",
    }
    assert set(topic.settings) <= known
    assert all(isinstance(value, str) for value in topic.settings.values())
    assert topic.settings["cleanup.policy"] in ("delete", "compact")


@EVERY_TOPIC
def test_a_topic_is_either_compacted_or_has_a_retention(topic: Topic) -> None:
    assert (topic.settings["cleanup.policy"] == "delete") == ("retention.ms" in topic.settings)


def test_latest_states_are_compacted_and_histories_are_not() -> None:
    compacted = {topic.name for topic in ALL if topic.settings["cleanup.policy"] == "compact"}
    assert compacted == {"engine-changelog", "task-progress", "task-dead-letters", "config"}


def test_commands_outlive_any_weekend_and_carry_log_time() -> None:
    """G1 holds while retention exceeds the outage; the engine's clock is the log's."""
    assert int(topics.COMMANDS.settings["retention.ms"]) >= 7 * DAY_MS
    assert topics.COMMANDS.settings["message.timestamp.type"] == "LogAppendTime"


def test_the_log_of_record_is_kept_for_ever() -> None:
    assert topics.EVENTS.settings["retention.ms"] == "-1"


def test_only_the_configuration_has_one_partition() -> None:
    assert [topic.name for topic in ALL if not topic.partitioned] == ["config"]


def test_only_the_engine_writes_what_its_transactions_write() -> None:
    """An engine transaction writes these; nobody else's open transaction may stall their committed readers."""
    engines = [topic.name for topic in ALL if topic.writers == ("engine",)]
    assert engines == ["task-events", "task-telemetry", "command-replies", "worker-inbox", "engine-changelog"]
    assert not [topic.name for topic in ALL if "engine" in topic.writers and topic.name not in engines]


@EVERY_TOPIC
def test_record_sizes(topic: Topic) -> None:
    """The broker's limit is for batches; a producer that is not ours makes them of 1,000,000 bytes."""
    assert int(topic.settings["max.message.bytes"]) == limits.TOPIC_RECORD_MAX > 1_000_000 + limits.FRAMING
    assert topic.record_max == limits.RECORD_MAX if topic is topics.COMMANDS else topic.record_max > limits.OUTPUT_MAX
