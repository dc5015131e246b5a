"""The stream workload on Perdure's own shell: the runner that carries the engine, with a table of one function."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from benchmarks.peers.stream import INPUT, OUTPUT, PARTITIONS
from perdure.schemas import topics
from perdure.streams.kafka_log import KafkaLog
from perdure.streams.log import Record
from perdure.streams.processor import Kind, Table, Transaction
from perdure.streams.runner import Runner

CHANGELOG = "bench-changelog"
_NOTE = "x" * 100
_decode, _encode = msgspec.json.Decoder().decode, msgspec.json.Encoder().encode


def handle(record: Record, tx: Transaction) -> None:
    """Count the record's key and keep its payload."""
    assert record.key is not None
    assert record.value is not None
    before = tx.get(record.key)
    count = 1 + (0 if before is None else _decode(before)["count"])
    tx.put(record.key, _encode({"count": count, "last": _decode(record.value), "note": _NOTE}))
    tx.emit(OUTPUT, record.key, _encode({"key": record.key.decode(), "count": count}))


def main() -> None:
    """Work until killed."""
    # The shell knows the limits of Perdure's own topics only.
    own = [topics.Topic(name, "key", (), (), "") for name in (INPUT, OUTPUT, CHANGELOG)]
    topics.BY_NAME.update({topic.name: topic for topic in own})
    kind = Kind(
        name="bench", inputs=(INPUT,), changelog=CHANGELOG, plain_changelog=True,
        open=lambda store, _: Table("bench", store, handle, (INPUT,)),
    )  # fmt: skip
    log = KafkaLog(os.environ["PEER_BOOTSTRAP"], "", partitions=PARTITIONS)
    Runner(log, kind, Path(os.environ["PEER_STATE"])).run()


if __name__ == "__main__":
    main()
