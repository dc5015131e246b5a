"""Topic ids name directories and blobs."""

from __future__ import annotations

from perdure.connectors.blobs import checked
from perdure.streams.kafka_connection import as_kafka_writes


def test_a_topic_id_is_one_part_of_a_name() -> None:
    topic_id = as_kafka_writes("EgzYGh9dSr++c/ovztjnLg")
    assert topic_id == "EgzYGh9dSr--c_ovztjnLg"
    name = f"snapshots/{topic_id}/3/files"
    assert checked(name) == name
    assert name.count("/") == 3
