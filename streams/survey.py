"""What is really there of a namespace: its topics, their records and settings, and the engine's group.

For people and for `perdure doctor`; nothing here is created or changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from confluent_kafka import Consumer, IsolationLevel, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from perdure.schemas import topics
from perdure.schemas.topics import Topic
from perdure.streams.kafka_connection import ASK_S, patiently, quiet
from perdure.streams.kafka_log import KafkaLog
from perdure.streams.log import records_of
from perdure.streams.topology import settings_of, settings_off

_RETENTION = "retention.ms"
_Place = tuple[str, int]
"""Topic on the broker, partition."""


@dataclass(frozen=True)
class PartitionFacts:
    """One partition of a topic. Times in ms; None where there is no record."""

    partition: int
    leader: int
    """Broker id; -1: none."""
    replicas: int
    in_sync: int
    first: int
    """Offset of the first record kept."""
    end: int
    """Offset after the last record."""
    first_at: int | None
    last_at: int | None


@dataclass(frozen=True)
class TopicFacts:
    """A topic of the table, as the broker has it; without partitions it does not exist."""

    topic: Topic
    partitions: tuple[PartitionFacts, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def offsets(self) -> int:
        """Offsets in use: records, markers of transactions and gaps of compaction."""
        return sum(p.end - p.first for p in self.partitions)

    @property
    def replication(self) -> int:
        """Replicas of the partition that has the fewest."""
        return min((p.replicas for p in self.partitions), default=0)

    @property
    def off(self) -> list[str]:
        """Settings that are not as the table says, a line for each; a longer retention is the operator's to choose."""
        if not self.settings:
            return []
        wanted, found = self.topic.settings.get(_RETENTION), self.settings.get(_RETENTION, "-1")
        shorter = wanted is not None and found != "-1" and (wanted == "-1" or int(found) < int(wanted))
        return settings_off(self.topic, self.settings) + (
            [f"{_RETENTION} is {found}, should be at least {wanted}".replace("at least -1", "-1 (for ever)")]
            if shorter
            else []
        )


@dataclass(frozen=True)
class Owner:
    """A member of the engine's group."""

    client_id: str
    host: str
    instance: str | None
    partitions: tuple[int, ...]


@dataclass(frozen=True)
class GroupFacts:
    """The engine's consumer group."""

    state: str
    owners: tuple[Owner, ...]


def survey_topics(log: KafkaLog) -> list[TopicFacts]:
    """Every topic of the table. Blocks for some seconds at the most. Raises `Unreachable`."""
    known = log.ask(lambda admin: admin.list_topics(timeout=ASK_S), "no list of topics").topics
    present = [t for t in topics.ALL if t.on(log.prefix) in known]
    settings = settings_of(log, present) if present else {}
    where = [TopicPartition(t.on(log.prefix), p) for t in present for p in known[t.on(log.prefix)].partitions]
    first = _offsets(log, where, OffsetSpec.earliest())  # type: ignore[no-untyped-call]
    end = _offsets(log, where, OffsetSpec.latest())  # type: ignore[no-untyped-call]
    oldest = _offsets(log, where, OffsetSpec.for_timestamp(0))
    newest = _offsets(log, where, OffsetSpec.max_timestamp())  # type: ignore[no-untyped-call]

    def facts(topic: Topic) -> TopicFacts:
        name = topic.on(log.prefix)
        if name not in known:
            return TopicFacts(topic)
        found = []
        for number, about in sorted(known[name].partitions.items()):
            at = (name, number)
            found.append(PartitionFacts(
                number, about.leader, len(about.replicas), len(about.isrs), first[at][0], end[at][0], oldest[at][1],
                newest[at][1],
            ))  # fmt: skip
        return TopicFacts(topic, tuple(found), settings[topic.name])

    return [facts(topic) for topic in topics.ALL]


def open_since(log: KafkaLog, found: Iterable[TopicFacts]) -> dict[str, int]:
    """topic/partition -> log time, ms, of the record that readers of committed records wait at, where there is one."""
    facts = {(t.topic.on(log.prefix), p.partition): (t.topic.name, p) for t in found for p in t.partitions}
    where = [TopicPartition(name, partition) for name, partition in facts]
    stable = _offsets(log, where, OffsetSpec.latest(), IsolationLevel.READ_COMMITTED)  # type: ignore[no-untyped-call]
    waiting: dict[str, int] = {}
    for place, (name, p) in facts.items():
        if stable[place][0] < p.end:
            rest = records_of(log, name, p.partition, first=max(p.first, stable[place][0]), committed=False)
            first = next(rest, None)
            if first is not None:
                waiting[f"{name}/{p.partition}"] = first.at
    return waiting


def _offsets(
    log: KafkaLog,
    where: Iterable[TopicPartition],
    spec: Any,
    level: IsolationLevel = IsolationLevel.READ_UNCOMMITTED,
) -> dict[tuple[str, int], tuple[int, int | None]]:
    """(topic, partition) -> (offset, time of its record if the question was about times)."""
    wanted = dict.fromkeys(where, spec)

    def ask(admin: AdminClient) -> dict[_Place, tuple[int, int | None]]:
        if not wanted:
            return {}
        asked = admin.list_offsets(wanted, isolation_level=level, request_timeout=ASK_S)
        told = {(w.topic, w.partition): f.result() for w, f in asked.items()}
        return {place: (info.offset, info.timestamp if info.timestamp >= 0 else None) for place, info in told.items()}

    return log.ask(ask, "no offsets")


def offset_at(log: KafkaLog, topic: Topic, partitions: Iterable[int], at: int) -> dict[int, int]:
    """Partition -> offset of the first record that is not older than `at` (ms); -1 where there is none."""
    where = [TopicPartition(topic.on(log.prefix), p) for p in partitions]
    found = _offsets(log, where, OffsetSpec.for_timestamp(at))
    return {partition: offset for (_, partition), (offset, _) in found.items()}


def survey_group(log: KafkaLog, name: str) -> GroupFacts:
    """Who is in a processor's group. Raises `Unreachable`."""
    group = log.prefix + name

    def ask(admin: AdminClient) -> Any:
        return admin.describe_consumer_groups([group], request_timeout=ASK_S)[group].result()

    told = log.ask(ask, f"no description of group {group}")
    owners = tuple(
        Owner(
            m.client_id, m.host.lstrip("/"), m.group_instance_id,
            tuple(sorted(p.partition for p in m.assignment.topic_partitions)) if m.assignment else (),
        )
        for m in told.members
    )  # fmt: skip
    return GroupFacts(told.state.name, owners)


def committed_offsets(log: KafkaLog, name: str, topic: Topic, partitions: Iterable[int]) -> dict[int, int | None]:
    """A group's positions in a topic, without joining it; None where there is none. Raises `Unreachable`."""
    wanted = [TopicPartition(topic.on(log.prefix), p) for p in partitions]
    own = {"group.id": log.prefix + name, "isolation.level": "read_uncommitted", "error_cb": quiet}

    def ask() -> list[TopicPartition]:
        consumer = Consumer(log.config(own))
        try:
            return consumer.committed(wanted, ASK_S)
        finally:
            consumer.close()

    found = patiently(ask, f"no committed offsets of group {name}")
    return {f.partition: f.offset if f.offset >= 0 else None for f in found}
