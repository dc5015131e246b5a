"""Members of a consumer group that come and go."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from perdure.schemas import topics
from perdure.streams.kafka_consumers import KafkaMember
from perdure.streams.kafka_log import KafkaLog
from perdure.streams.topology import create_topics
from tests.integration.stack import until

pytestmark = pytest.mark.kafka
NAME = topics.COMMANDS.name


def test_what_was_asked_for_a_partition_that_is_taken_away_is_forgotten(
    kafka_bootstrap: str, topic_prefix: str
) -> None:
    """A lane asks from its own thread to read from somewhere; a rebalance may come before that is done."""
    create_topics(kafka_bootstrap, topic_prefix, partitions=2)
    log = KafkaLog(kafka_bootstrap, topic_prefix)
    held: dict[str, list[Any]] = {"first": [], "second": []}

    def taken(partitions: list[Any], lost: bool) -> None:
        held["first"].clear()
        lane = threading.Thread(target=lambda: [first.seek(topic, p, 0) for topic, p in partitions])
        lane.start()
        lane.join()

    first: KafkaMember = log.member(
        "engine", [NAME], instance="host-0", on_assigned=held["first"].extend, on_revoked=taken
    )
    until("both partitions", lambda: first.read(1, 0.1) is not None and len(held["first"]) == 2)
    second = log.member(
        "engine", [NAME], instance="host-1", on_assigned=held["second"].extend, on_revoked=lambda *_: None
    )
    until(
        "one partition for each",
        lambda: first.read(1, 0.1) == second.read(1, 0.1) == [] and len(held["first"]) == len(held["second"]) == 1,
    )
    assert first.read(1, 0.1) == []
    first.close()
    second.close()
