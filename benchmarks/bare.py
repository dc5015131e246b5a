"""What the broker itself does in the same run: the ceiling of every other figure."""

from __future__ import annotations

import threading
import time

from benchmarks.measure import Row, percentile, repeat
from perdure.schemas import ids, topics
from perdure.streams.kafka_log import KafkaLog

_RECORDS = 20_000
_SIZE = 100


def rows(log: KafkaLog, runs: int) -> list[Row]:
    """Appends, reads and transactions without any of Perdure's work."""
    return [
        Row("bare: append 100 B, acks=all", "/s", "", repeat(runs, lambda: _append(log))),
        Row("bare: read 100 B", "/s", "", repeat(runs, lambda: _read(log))),
        Row("bare: one append acknowledged, p50", "ms", "", repeat(runs, lambda: _one_append(log))),
        Row("bare: transaction of 20 records, p50", "ms", "", repeat(runs, lambda: _transaction(log))),
    ]


def _append(log: KafkaLog) -> float:
    producer = log.producer()
    began = time.perf_counter()
    for _ in range(_RECORDS):
        producer.append(topics.LOGS.name, 0, None, bytes(_SIZE))
    producer.flush(60)
    rate = _RECORDS / (time.perf_counter() - began)
    producer.close()
    return rate


def _read(log: KafkaLog) -> float:
    reader = log.reader()
    first, end = reader.bounds(topics.LOGS.name, 0)
    reader.assign({(topics.LOGS.name, 0): first})
    began = time.perf_counter()
    count = 0
    while not reader.caught_up(topics.LOGS.name, 0, end):
        count += len(reader.read(5_000, 1.0))
    rate = count / (time.perf_counter() - began)
    reader.close()
    return rate


def _one_append(log: KafkaLog) -> float:
    producer = log.producer()
    times = []
    for _ in range(300):
        acknowledged = threading.Event()
        began = time.perf_counter()
        producer.append(topics.LOGS.name, 0, None, bytes(_SIZE), lambda *_, done=acknowledged: done.set())  # type: ignore[misc]
        acknowledged.wait(5)
        times.append((time.perf_counter() - began) * 1e3)
    producer.close()
    return percentile(times, 0.5)


def _transaction(log: KafkaLog) -> float:
    member = log.member(f"bare-{ids.new_local_id()}", [topics.METRICS.name], on_assigned=lambda _: None,
                        on_revoked=lambda *_: None)  # fmt: skip
    producer = log.transactional("bare")
    times = []
    for _ in range(100):
        began = time.perf_counter()
        producer.begin()
        producer.append_all(topics.LOGS.name, 1, [(None, bytes(_SIZE))] * 20)
        member.read(1, 0)
        producer.commit(member, {})
        times.append((time.perf_counter() - began) * 1e3)
    producer.close()
    member.close()
    return percentile(times, 0.5)
