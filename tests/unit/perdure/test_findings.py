"""What the doctor says: one line a check, wrong only where something is, and always with what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from perdure.findings import Facts, Finding, examine
from perdure.schemas import topics
from perdure.schemas.public import WorkerMetrics
from perdure.streams.survey import GroupFacts, Owner, PartitionFacts, TopicFacts

NOW = 1_800_000_000_000
DAY = 86_400_000


def partition(number: int, **changed: Any) -> PartitionFacts:
    plain = PartitionFacts(number, leader=1, replicas=3, in_sync=3, first=0, end=100, first_at=NOW - DAY, last_at=NOW)
    return replace(plain, **changed)


def topic(about: topics.Topic, **changed: Any) -> TopicFacts:
    count = 4 if about.partitioned else 1
    settings = {"min.insync.replicas": "2", "retention.ms": "-1", **about.settings}
    return replace(TopicFacts(about, tuple(partition(p) for p in range(count)), settings), **changed)


def worker(name: str, **changed: Any) -> WorkerMetrics:
    plain: dict[str, Any] = {
        "worker_id": name, "session": f"s-{name}", "at": NOW, "host": f"host-{name}", "pid": 1, "queues": ["etl"],
        "slots": 4, "running": ["etl/1"], "cpu_percent": 1.0, "rss": 1, "load": 0.1, "memory_available": 1,
        "disk_free": 10**11, "checkpoint_store": "shared",
    }  # fmt: skip
    return WorkerMetrics(**plain | changed)


WELL = Facts(
    now=NOW, brokers=3, version="4.2.2", topics={t.name: topic(t) for t in topics.ALL}, pinned=4,
    group=GroupFacts("STABLE", (Owner("c", "h1", "i1", (0, 1)), Owner("c", "h2", "i2", (2, 3)))),
    committed=dict.fromkeys(range(4), 100), unread_at={}, answers=4, answer_ms=12, skews={"this machine": 5},
    beats={"s-a": NOW - 1_000, "s-b": NOW - 2_000}, workers=(worker("a"), worker("b")),
)  # fmt: skip


def with_topic(name: str, **changed: Any) -> dict[str, Any]:
    return {"topics": {**WELL.topics, name: replace(WELL.topics[name], **changed)}}


def with_setting(name: str, setting: str, value: str) -> dict[str, Any]:
    return with_topic(name, settings={**WELL.topics[name].settings, setting: value})


def one(found: list[Finding], check: str) -> list[Finding]:
    return [f for f in found if f.check == check]


def test_all_is_well() -> None:
    assert {f.state for f in examine(WELL)} == {"ok"}
    assert len({f.check for f in examine(WELL)}) == len(examine(WELL))


def with_partitions(name: str, change: Callable[[PartitionFacts], PartitionFacts]) -> dict[str, Any]:
    return with_topic(name, partitions=tuple(map(change, WELL.topics[name].partitions)))


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("topics", with_topic("alerts", partitions=(), settings={}), "missing: alerts"),
    ("topics", with_setting("task-events", "cleanup.policy", "compact"), "task-events: cleanup.policy is compact"),
    ("topics", with_setting("task-events", "retention.ms", "1000"), r"retention.ms is 1000, should be -1 \(for ever\)"),
    ("topics", with_partitions("task-logs", lambda p: replace(p, leader=-1)), "without a leader: task-logs/0"),
    ("partitions", {"pinned": None}, "no partition count is pinned"),
    ("partitions", with_topic("task-logs", partitions=(partition(0),)), "pinned to 4, but task-logs has 1"),
    ("replication", with_setting("task-events", "min.insync.replicas", "4"), "above the copies: task-events"),
    ("replication", with_setting("task-events", "min.insync.replicas", "1"), "min.insync.replicas is 1: task-events"),
    ("replication", with_partitions("task-logs", lambda p: replace(p, in_sync=2)), "4 partitions have replicas out of"),
    ("replication", with_partitions("task-logs", lambda p: replace(p, replicas=2, in_sync=2)), "2 copies of each"),
    ("retention", with_partitions("task-commands", lambda p: replace(p, first=101, end=200)), "deleted unread in"),
    ("retention", {"unread_at": {2: NOW - 6 * DAY}}, "oldest unread input is 6d old, and inputs are kept for 7d"),
    (
        "transactions",
        {"open_since": {"task-commands/2": NOW - 300_000, "task-events/1": NOW - 1_000}},
        "not ended for 5m: task-commands/2; readers",
    ),
    ("engine", {"group": GroupFacts("EMPTY", ())}, "no engine runs"),
    ("engine", {"group": GroupFacts("STABLE", WELL.group.owners[:1])}, "nobody owns partitions 2, 3"),
    (
        "lag",
        {"unread_at": {2: NOW - 60_000}, "committed": {0: 100, 1: 100, 2: 60, 3: 100}},
        "40 inputs unread, in part",
    ),
    ("answers", {"answers": 3}, "3 of 4 partitions answered"),
    (
        "checkpoints",
        {"workers": (worker("a"), worker("b", checkpoint_store="own"))},
        "etl has workers on host-a, host-b",
    ),
    ("workers", {"workers": (worker("a", disk_free=10),)}, "disk nearly full: host-a"),
    ("clocks", {"skews": {"this machine": 0, "worker b": 3_600_000}}, "worker b is 1h ahead"),
]


@pytest.mark.parametrize(("check", "changed", "told"), WRONG, ids=[f"{c}-{n}" for n, (c, _, _) in enumerate(WRONG)])
def test_what_is_wrong_is_told_with_what_to_do(check: str, changed: dict[str, Any], told: str) -> None:
    found = examine(replace(WELL, **changed))
    wrong = [f for f in found if f.state == "wrong"]
    assert wrong[0].check == check
    assert {f.check for f in wrong} <= {check, "lag"}
    assert re.search(told, wrong[0].told), wrong[0].told
    assert wrong[0].advice


NOTES: list[tuple[str, dict[str, Any], str]] = [
    (
        "quarantine",
        {"quarantined": (2, "defect at task-commands/1 offset 7")},
        "2 records set aside; the newest: defect",
    ),
    ("dead letters", {"dead_letters": 1}, "1 task waiting for a person"),
    ("workers", {"workers": ()}, "none is live"),
    ("workers", {"beats": {"s-a": NOW, "s-b": NOW - 13_000}}, "silent: b on host-b"),
]


@pytest.mark.parametrize(("check", "changed", "told"), NOTES, ids=[told for _, _, told in NOTES])
def test_what_somebody_may_want_to_know_is_a_note(check: str, changed: dict[str, Any], told: str) -> None:
    found = examine(replace(WELL, **changed))
    assert not [f for f in found if f.state == "wrong"]
    (noted,) = [f for f in found if f.state == "note"]
    assert (noted.check, told in noted.told) == (check, True)


def test_workers_of_different_queues_need_no_common_store() -> None:
    apart = (worker("a"), worker("b", queues=["mail"], checkpoint_store="own"))
    assert one(examine(replace(WELL, workers=apart)), "checkpoints")[0].state == "ok"


def test_a_worker_that_has_stopped_is_not_missed() -> None:
    gone = (worker("a"), worker("b", state="stopped"))
    assert {f.state for f in examine(replace(WELL, workers=gone, beats={"s-a": NOW}))} == {"ok"}


def test_one_broker_is_for_development() -> None:
    alone = {t: replace(f, partitions=tuple(replace(p, replicas=1, in_sync=1) for p in f.partitions),
                        settings={**f.settings, "min.insync.replicas": "1"}) for t, f in WELL.topics.items()}  # fmt: skip
    (found,) = one(examine(replace(WELL, brokers=1, topics=alone)), "replication")
    assert (found.state, "a lost disk loses the namespace" in found.told) == ("note", True)
