from __future__ import annotations

import json
import threading

import pytest

from perdure.schemas import codec, ids, limits
from perdure.schemas.commands import WorkerBeat, WorkerStarted, WorkerStopping
from perdure.schemas.errors import InfrastructureError, Unreachable
from perdure.schemas.inbox import EndSession, InboxRecord
from perdure.schemas.public import ConfigRecord, Quarantined
from perdure.session import Inbox, Lane, Session, Sessions, publish, read_config, routing_by_partition
from perdure.streams.memory_log import MemoryLog
from tests.unit.perdure.answering import KEYS, Answering

LANE = Lane("w", "process", {"t": 7}, 8)


@pytest.fixture
def producer() -> Answering:
    return Answering()


@pytest.fixture
def heard() -> list[Session]:
    return []


@pytest.fixture
def sessions(producer: Answering, heard: list[Session]) -> Sessions:
    return Sessions(producer, KEYS.newest_worker(), heard.append)


def test_queues_are_routed_by_their_configured_keys() -> None:
    config = {"queue/etl": (3, {"routing_keys": ["etl", "etl~1"]})}
    routing = routing_by_partition(["mail", "etl"], config, 8)
    keys = [key for part in routing.values() for key in part]
    assert sorted(keys) == ["etl", "etl~1", "mail"]
    assert all(ids.partition_of(key, 8) == p for p, part in routing.items() for key in part)


def test_only_what_differs_is_published_and_versions_are_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    log = MemoryLog(lambda: 1)
    first = publish(log, {}, {"type/a": {"queue": "x"}, "type/b": {"queue": "y"}}, "w", 5)
    assert sorted(first.values()) == [0, 1]
    again = publish(log, read_config(log), {"type/a": {"queue": "x"}, "type/b": {"queue": "z"}}, "w", 6)
    assert again["type/a"] == first["type/a"]
    assert again["type/b"] == 2
    assert len(log.records("config")) == 3
    with monkeypatch.context() as patch:
        patch.setattr(log, "producer", None)  # a producer takes its time to close, and every start comes by here
        assert publish(log, read_config(log), {"type/b": {"queue": "z"}}, "w", 7) == {"type/b": 2}
    newest = log.records("config")[2]
    assert newest.key == b"type/b"
    assert newest.value is not None
    assert codec.decode(newest.value) == ConfigRecord(name="type/b", content=b'{"queue":"z"}', issued_by="w", at=6)


def test_deleted_configuration_is_not_known() -> None:
    log = MemoryLog(lambda: 1)
    publish(log, {}, {"queue/a": {"routing_keys": ["a"]}}, "w", 5)
    log.producer().append("config", 0, b"queue/a", None)
    assert read_config(log) == {}


@pytest.mark.parametrize(
    "foreign",
    [b"{}", b"", codec.MARKER + b"8 unknown", codec.encode(ConfigRecord(name="queue/b", content=b"{"))],
)
def test_what_is_no_configuration_keeps_no_worker_from_starting(foreign: bytes) -> None:
    log = MemoryLog(lambda: 1)
    publish(log, {}, {"queue/a": {"routing_keys": ["a"]}}, "w", 5)
    for key in (b"queue/a", b"queue/\xff"):
        log.producer().append("config", 0, key, foreign)
    assert read_config(log) == {"queue/a": (0, {"routing_keys": ["a"]})}


def test_a_session_is_announced_then_beats_until_it_stops(sessions: Sessions, producer: Answering) -> None:
    session = sessions.begin(LANE, 3, "s-1", ["etl"], 4, 17, now=1_000)
    session.grants_seen = 2
    sessions.beat(1_000, lambda s: 1)
    sessions.beat(2_999, lambda s: 1)
    assert sessions.next_beat() == 1_000 + limits.BEAT_MS
    sessions.beat(3_000, lambda s: 0)
    sessions.stop("shutdown")
    started, first, second, stopping = [message for _, _, message in producer.sent]
    assert {(topic, p) for topic, p, _ in producer.sent} == {("task-commands", 3)}
    assert isinstance(started, WorkerStarted)
    assert (started.session, started.worker_id, started.types) == ("s-1", "w", {"t": 7})
    assert (started.queues, started.slots, started.inbox_offset) == (["etl"], 4, 17)
    assert isinstance(first, WorkerBeat)
    assert (first.session, first.grants_seen, first.free) == ("s-1", 2, 1)
    assert isinstance(second, WorkerBeat)
    assert second.free == 0
    assert isinstance(stopping, WorkerStopping)


def test_a_session_counts_as_heard_since_its_newest_acknowledged_beat_was_sent(
    sessions: Sessions, producer: Answering, heard: list[Session]
) -> None:
    session = sessions.begin(LANE, 0, "s-1", ["etl"], 1, 0, now=0)
    for now in (0, 2_000, 4_000):
        sessions.beat(now, lambda s: 1)
    assert not session.stale(8_000)
    assert session.stale(8_001)
    producer.answer()  # the announcement, sent at 0
    producer.answer()  # the beat of 0
    assert session.stale(8_001)
    producer.answer()  # the beat of 2,000
    assert not session.stale(10_000)
    assert session.stale(10_001)
    assert heard == [session] * 3
    assert not session.orphaned(602_001), "it runs nothing"
    session.take_slot()
    assert not session.orphaned(602_000)
    assert session.orphaned(602_001)


def test_beats_that_do_not_land_are_not_piled_up(sessions: Sessions, producer: Answering) -> None:
    """An outage of hours: whoever comes back says once how it is, and not what it was every two seconds."""
    session = sessions.begin(LANE, 0, "s-1", ["etl"], 1, 0, now=0)
    for beat in range(1_000):
        sessions.beat(beat * limits.BEAT_MS, lambda s: 1)
    assert len(producer.sent) == 1 + 3
    assert sessions.next_beat() == 999 * limits.BEAT_MS + 200
    while not producer.flush(0):
        producer.answer(Unreachable("away"))
    session.grants_seen = 5
    sessions.beat(1_000 * limits.BEAT_MS, lambda s: 1)
    beats = [m for _, _, m in producer.sent if isinstance(m, WorkerBeat)]
    assert [beat.grants_seen for beat in beats] == [0, 0, 0, 5]


def test_of_one_free_slot_one_partition_is_told(sessions: Sessions, producer: Answering) -> None:
    """The one that has waited longest; another one that granted as well would be declined again."""
    of = [sessions.begin(LANE, p, "s-1", ["etl"], 1, 0, now=0) for p in range(3)]
    sessions.beat(0, lambda s: 0)
    of.append(sessions.begin(LANE, 3, "s-1", ["etl"], 1, 0, now=0))
    of[3].running = 1
    of[3].declined, of[3].beat_due = True, 1_000  # it could not take the slot
    for session, due in zip(of, (2_000, 1_500, 1_800), strict=False):
        session.declined, session.beat_due = True, due
    sessions.beat_after_decline("process", 1, 1_000)
    assert [session.declined for session in of] == [True, False, True, True]
    producer.sent.clear()
    sessions.beat(1_000, lambda s: 1)
    assert [partition for _, partition, _ in producer.sent] == [1, 3]
    sessions.beat(1_800, lambda s: 1)
    assert [session.declined for session in of] == [True, False, False, False], "a beat of its own has told it too"


def test_a_beat_that_fails_is_not_heard_and_a_failed_announcement_is_repeated(
    sessions: Sessions, producer: Answering, heard: list[Session]
) -> None:
    session = sessions.begin(LANE, 0, "s-1", ["etl"], 1, 0, now=0)
    producer.answer(InfrastructureError("timed out"))
    sessions.beat(2_000, lambda s: 1)
    assert [type(m) for _, _, m in producer.sent] == [WorkerStarted, WorkerStarted, WorkerBeat]
    producer.answer()
    producer.answer(InfrastructureError("timed out"))
    assert session.heard == 2_000
    assert heard == [session]
    sessions.beat(4_000, lambda s: 1)
    assert [type(m) for _, _, m in producer.sent][3:] == [WorkerBeat]


def test_a_renewed_session_replaces_the_old_one_in_its_partition_only(sessions: Sessions) -> None:
    old = sessions.begin(LANE, 0, "s-1", ["etl"], 2, 9, now=0)
    other = sessions.begin(LANE, 1, "s-1", ["mail"], 1, 4, now=0)
    new = sessions.renew(old, now=50)
    assert sessions.find(0, "s-1") is None
    assert sessions.find(0, new.id) is new
    assert sessions.find(1, "s-1") is other
    assert sessions.find(2, "s-1") is None
    assert (new.routing_keys, new.lent, new.heard) == (["etl"], 2, 50)


def test_the_inbox_delivers_what_is_ours_and_quarantines_what_nobody_can_read() -> None:
    log = MemoryLog(lambda: 1)
    delivered: list[tuple[int, InboxRecord]] = []
    came = threading.Event()

    def deliver(partition: int, message: InboxRecord) -> None:
        delivered.append((partition, message))
        came.set()

    def fail(error: Exception) -> None:
        raise error

    reader = log.reader()
    reader.assign({("worker-inbox", 2): 0})
    inbox = Inbox(reader, log.producer(), ["w"], deliver, fail)
    inbox.start()
    end = EndSession(worker_id="w", session="s-1", why="expired")
    producer = log.producer()
    producer.append("worker-inbox", 2, b"another", codec.encode(codec.replace(end, worker_id="another")))
    producer.append("worker-inbox", 2, b"w", b"\xc3\x01 no record")
    producer.append("worker-inbox", 2, b"w", codec.encode(end))
    assert came.wait(10)
    inbox.close()
    assert delivered == [(2, end)]
    (bad,) = log.records("quarantine", 2)
    assert bad.value is not None
    note = codec.decode_as(Quarantined, bad.value)
    assert (note.topic, note.partition, note.offset, note.reader) == ("worker-inbox", 2, 1, "worker")
    assert note.record == b"\xc3\x01 no record"


def test_an_inbox_that_cannot_be_read_says_so() -> None:
    log = MemoryLog(lambda: 1)
    failures: list[Exception] = []
    reader = log.reader()
    reader.assign({("worker-inbox", 2): 0})
    log.producer().append("worker-inbox", 2, b"w", json.dumps({}).encode())
    log.truncate("worker-inbox", 2, 1)
    inbox = Inbox(reader, log.producer(), ["w"], lambda p, m: None, failures.append)
    inbox.start()
    inbox.join(10)
    assert len(failures) == 1
