"""Looks a namespace and this machine over, for `perdure doctor`. Asks the engine one question; changes nothing."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from perdure.client import Client
from perdure.findings import DISK_MIN, METRICS_MS, Facts, Finding, examine, note, ok, wrong
from perdure.schemas import codec, commands, topics
from perdure.schemas.commands import FindTasks
from perdure.schemas.errors import ConfigurationError, DecodeError, InfrastructureError
from perdure.schemas.public import Quarantined, WorkerMetrics
from perdure.settings import Settings, is_loopback
from perdure.streams.kafka_log import KafkaLog
from perdure.streams.log import Record, records_of
from perdure.streams.survey import (
    TopicFacts,
    committed_offsets,
    offset_at,
    open_since,
    survey_group,
    survey_topics,
)
from perdure.streams.topology import pinned

if TYPE_CHECKING:
    from perdure.connectors.embedded_kafka import RunningKafka

R = TypeVar("R")
_LOOK_BACK_MS = 60_000
_TAIL = 2_000
"""Records of a partition's end that are looked at."""
_NOBODY = "perdure-doctor"
"""No task's id begins so."""


def diagnose(settings: Settings) -> list[Finding]:
    """Every check there is. Blocks for some seconds. Raises `Unreachable` when no broker answers."""
    log = KafkaLog(settings.require_bootstrap(), settings.namespace, options=settings.kafka, partitions=1)
    cluster = log.ask(lambda admin: admin.list_topics(timeout=3), "no answer")
    found = {t.topic.name: t for t in survey_topics(log)}
    ours = _own_broker(settings)
    if not any(t.partitions for t in found.values()):
        told = f"{log.bootstrap} has no namespace {log.prefix!r}"
        return [
            ok("broker", f"{len(cluster.brokers)} broker(s)"),
            wrong("topics", told, "make its topics: perdure topics create"),
            *of_this_machine(settings, ours),
        ]
    count = pinned(log) if found[topics.CONFIG.name].partitions else None
    facts = _gather(settings, log, len(cluster.brokers), found, count, ours)
    return [*examine(facts), *of_this_machine(settings, ours)]


def _own_broker(settings: Settings) -> RunningKafka | None:
    """The broker, if it is one of this machine's own."""
    from perdure.connectors.embedded_kafka import running

    broker = running(settings.data_dir / "kafka")
    return broker if broker is not None and broker.bootstrap == settings.bootstrap else None


# The namespace -------------------------------------------------------------------------------------------------------


def _gather(
    settings: Settings, log: KafkaLog, brokers: int, found: dict[str, TopicFacts], count: int | None,
    ours: RunningKafka | None,
) -> Facts:  # fmt: skip
    inputs = found[topics.COMMANDS.name].partitions
    numbers = [p.partition for p in inputs]
    committed = committed_offsets(log, topics.ENGINE_GROUP, topics.COMMANDS, numbers) if numbers else {}
    unread = {p.partition: committed.get(p.partition) or p.first for p in inputs}
    unread_at = {p.partition: at for p in inputs if unread[p.partition] < p.end
                 and (at := _time_of(log, p.partition, unread[p.partition])) is not None}  # fmt: skip
    group = survey_group(log, topics.ENGINE_GROUP)
    whole = count is not None and len(inputs) == count
    answers, answer_ms, skew = _ask(settings) if whole and group.owners else (0, 0, 0)
    now = _wall() - skew
    ticks, beats = _recent(log, numbers, now)
    workers = _workers(log, found[topics.METRICS.name])
    skews = {"this machine": skew} | ticks | {
        f"worker {w.worker_id}": w.at - beats[w.session]
        for w in workers if w.session in beats and abs(w.at - beats[w.session]) > METRICS_MS
    }  # fmt: skip
    return Facts(
        now=now, brokers=brokers, version=ours.kafka_version if ours else None, topics=found, pinned=count,
        group=group, committed=committed, unread_at=unread_at, answers=answers, answer_ms=answer_ms, skews=skews,
        beats=beats, workers=workers, quarantined=_quarantined(log, found[topics.QUARANTINE.name]),
        dead_letters=_dead_letters(log, found[topics.DEAD_LETTERS.name]), open_since=open_since(log, found.values()),
    )  # fmt: skip


def _time_of(log: KafkaLog, partition: int, offset: int) -> int | None:
    """Log time of the first input from an offset on; None if it is gone again."""
    for record in records_of(log, topics.COMMANDS.name, partition, first=offset, committed=False):
        return record.at
    return None


def _ask(settings: Settings) -> tuple[int, int, int]:
    """(partitions that answered, ms until the last did, this machine's clock minus the broker's)."""
    with Client(settings=settings) as client:
        begun = _wall()
        answers = client.ask_all(FindTasks(**client.head(), prefix=_NOBODY))
        ended = _wall()
        if not answers:
            return 0, ended - begun, 0
        # The answer carries the log time of the question, which lies between the two moments if the clocks agree.
        ahead = max(0, begun - max(a.at for a in answers))
        behind = max(0, min(a.at for a in answers) - ended)
        return len(answers), ended - begun, ahead - behind


def _recent(log: KafkaLog, partitions: list[int], now: int) -> tuple[dict[str, int], dict[str, int]]:
    """(worst skew of the engine hosts' ticks, session -> log time of its last beat) of the last minute."""
    worst = 0
    beats: dict[str, int] = {}
    begins = offset_at(log, topics.COMMANDS, partitions, now - _LOOK_BACK_MS) if partitions else {}
    for partition, first in begins.items():
        if first < 0:
            continue
        for record in records_of(log, topics.COMMANDS.name, partition, first=first, committed=False):
            message = codec.decode_if((commands.Tick, commands.WorkerBeat, commands.WorkerStarted), record.value or b"")
            if isinstance(message, commands.Tick):
                worst = max(worst, message.host_clock - record.at, key=abs)
            elif isinstance(message, commands.WorkerBeat | commands.WorkerStarted):
                beats[message.session] = max(record.at, beats.get(message.session, 0))
    return {"the engine's hosts": worst}, beats


def _workers(log: KafkaLog, facts: TopicFacts) -> tuple[WorkerMetrics, ...]:
    newest: dict[str, WorkerMetrics] = {}
    for record in _tail(log, facts):
        w = _read(WorkerMetrics, record)
        if w is None:
            continue
        if w.worker_id not in newest or newest[w.worker_id].at <= w.at:
            newest[w.worker_id] = w
    return tuple(newest.values())


def _quarantined(log: KafkaLog, facts: TopicFacts) -> tuple[int, str]:
    count, newest = 0, None
    for p in facts.partitions:
        for record in records_of(log, topics.QUARANTINE.name, p.partition):
            count += 1
            q = _read(Quarantined, record)
            newest = q if q is not None and (newest is None or q.at >= newest.at) else newest
    if newest is None:
        return count, "unreadable"
    return count, f"{newest.cause} at {newest.topic}/{newest.partition} offset {newest.offset}"


def _read(cls: type[R], record: Record) -> R | None:
    """What a public record holds; None for one that is not of its topic: anybody may write there."""
    try:
        return codec.decode_as(cls, record.value or b"")
    except DecodeError:
        return None


def _dead_letters(log: KafkaLog, facts: TopicFacts) -> int:
    letters: set[bytes] = set()
    for p in facts.partitions:
        for record in records_of(log, topics.DEAD_LETTERS.name, p.partition):
            (letters.discard if record.value is None else letters.add)(record.key or b"")
    return len(letters)


def _tail(log: KafkaLog, facts: TopicFacts) -> Iterator[Record]:
    """The last records of each partition that can be read."""
    for p in facts.partitions:
        yield from records_of(log, facts.topic.name, p.partition, first=max(p.first, p.end - _TAIL))


def _wall() -> int:
    return time.time_ns() // 1_000_000


# This machine --------------------------------------------------------------------------------------------------------


def of_this_machine(settings: Settings, ours: RunningKafka | None) -> list[Finding]:
    """Keys, blob store, and for a broker of its own Java and disk."""
    return [*_keys(settings), *_blobs(settings), *(_own(ours) if ours is not None else ())]


def _keys(settings: Settings) -> Iterator[Finding]:
    if settings.keys_file is None:
        if is_loopback(settings.require_bootstrap()):
            own = settings.data_dir / "keys.json"
            yield note("keys", "no key file is set", f"engines and workers of this folder share {own}")
        else:
            advice = "perdure keys new FILE, and PERDURE_KEYS_FILE for every engine and worker"
            yield wrong("keys", "no key file is set, and the broker can be reached by others", advice)
        return
    from perdure.schemas.signing import Keys

    try:
        keys = Keys.load(settings.keys_file)
    except ConfigurationError as error:
        yield wrong("keys", str(error), "chmod 600, or make a new one: perdure keys new")
    else:
        told = f"{settings.keys_file}, for its owner only: {len(keys.worker)} worker and {len(keys.engine)} engine keys"
        yield ok("keys", told)


def _blobs(settings: Settings) -> Iterator[Finding]:
    if settings.blobs is None:
        yield note(
            "blob store",
            "none is set: no snapshots, no values above 192 KiB",
            "PERDURE_BLOBS=file:///shared/path on every host",
        )
        return
    from perdure.connectors.blobs import DirectoryBlobs, open_blobs

    try:
        blobs = open_blobs(settings.blobs)
        if isinstance(blobs, DirectoryBlobs) and not blobs.directory.is_dir():
            there = next(p for p in blobs.directory.absolute().parents if p.exists())
            advice = "made when it is needed; if it is to be shared by several hosts, mount it first"
            say = note if there.is_dir() and os.access(there, os.W_OK) else wrong
            yield say("blob store", f"{blobs.directory} is not there", advice)
            return
        yield ok("blob store", f"{settings.blobs}, {len(blobs.list('snapshots')):,} files of snapshots")
    except InfrastructureError as error:
        yield wrong("blob store", str(error), "see that it is there and can be reached from this machine")


def _own(broker: RunningKafka) -> Iterator[Finding]:
    from perdure.connectors.java import find_java

    try:
        java = find_java()
        yield ok("java", f"Java {java.major} at {java.path}")
    except ConfigurationError as error:
        yield wrong("java", str(error), "the broker will not start again without it")
    free = shutil.disk_usage(broker.data_dir).free
    told = f"{free / 1e9:.1f} GB free for the broker's data in {broker.data_dir}"
    yield ok("disk", told) if free >= DISK_MIN else wrong("disk", told, "free some space")
