"""What every log has to do: one suite on the log in memory and on Kafka.

Whoever adds an implementation adds it to `bench`; whoever relies on a behaviour of the log adds a test here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import pytest

from perdure.schemas import limits
from perdure.schemas.errors import Fenced, InfrastructureError, ValueTooLarge
from perdure.streams.log import BEGIN, END, Log, Member, Producer, Reader, Record, TopicPartition, Transactional
from perdure.streams.memory_log import MemoryLog

COMMANDS, EVENTS, TELEMETRY = "task-commands", "task-events", "task-telemetry"
PARTITIONS = 2
T = TypeVar("T")
DEADLINE_S = 60.0


class Bench:
    """A log, and what a test opens on it: closed again when the test ends."""

    def __init__(self, log: Log, truncate: Callable[[str, int, int], None]) -> None:
        self.log = log
        self.truncate = truncate
        self._open: list[Any] = []

    def producer(self) -> Producer:
        return self._kept(self.log.producer())

    def transactional(self, name: str = "engine.0") -> Transactional:
        return self._kept(self.log.transactional(name))

    def reader(self, positions: dict[TopicPartition, int], *, committed: bool = True) -> Reader:
        reader = self._kept(self.log.reader(committed=committed))
        reader.assign(positions)
        return reader

    def watched(self, group: str, *topics: str, **more: Any) -> Watched:
        return self._kept(Watched(self.log, group, topics or (COMMANDS,), **more))

    def appended(self, topic: str, partition: int, *values: bytes) -> None:
        """Append and wait until it is acknowledged."""
        producer = self.producer()
        for value in values:
            producer.append(topic, partition, b"k", value)
        assert producer.flush(DEADLINE_S)

    def member(self) -> Member:
        """A member that has joined its group, so that it may commit."""
        watched = self.watched("g")
        wait_until(lambda: watched.mine == every(COMMANDS), watched)
        return watched.member

    def close(self) -> None:
        for opened in reversed(self._open):
            opened.close()

    def _kept(self, opened: T) -> T:
        self._open.append(opened)
        return opened


class Watched:
    """A member of a group, and what it has been told and given so far."""

    def __init__(
        self,
        log: Log,
        group: str,
        topics: Iterable[str],
        *,
        on_assigned: Callable[[Member, list[TopicPartition]], None] = lambda member, mine: None,
    ) -> None:
        self.mine: set[TopicPartition] = set()
        self.given: list[list[TopicPartition]] = []
        self.taken: list[tuple[list[TopicPartition], bool]] = []
        self.records: list[Record] = []
        self._then = on_assigned
        self._closed = False
        self.member = log.member(group, topics, on_assigned=self._assigned, on_revoked=self._revoked)

    def read(self, max_records: int = 100, timeout_s: float = 0.1) -> list[Record]:
        found = self.member.read(max_records, timeout_s)
        self.records += found
        return found

    def values(self) -> list[bytes | None]:
        return [record.value for record in self.records]

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.member.close()

    def _assigned(self, mine: list[TopicPartition]) -> None:
        self.given.append(mine)
        self.mine |= set(mine)
        self._then(self.member, mine)

    def _revoked(self, gone: list[TopicPartition], lost: bool) -> None:
        self.taken.append((gone, lost))
        self.mine -= set(gone)


class Readable(Protocol):
    def read(self, max_records: int, timeout_s: float) -> list[Record]: ...


def take(source: Readable, count: int) -> list[Record]:
    """The next `count` records; fails when they do not come."""
    found: list[Record] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(found) < count:
        assert time.monotonic() < deadline, f"only {len(found)} of {count} records came"
        found += source.read(count - len(found), 1.0)
    return found


def values(records: Iterable[Record]) -> list[bytes | None]:
    return [record.value for record in records]


def nothing_comes(source: Readable) -> bool:
    """Whether several reads in a row stay empty."""
    return all(not source.read(100, 0.15) for _ in range(4))


def wait_until(condition: Callable[[], bool], *members: Readable) -> None:
    """Read from the members, which runs their callbacks, until the condition holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        for member in members:
            member.read(100, 0.05)


def every(*topics: str) -> set[TopicPartition]:
    return {(topic, partition) for topic in topics for partition in range(PARTITIONS)}


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """An empty namespace of two partitions on each kind of log."""
    if request.param == "memory":
        memory = MemoryLog(lambda: time.time_ns() // 1_000_000, PARTITIONS)
        made = Bench(memory, memory.truncate)
    else:
        made = on_kafka(request.getfixturevalue("kafka_bootstrap"), request.getfixturevalue("topic_prefix"))
    yield made
    made.close()


def on_kafka(bootstrap: str, prefix: str) -> Bench:
    from confluent_kafka import TopicPartition as KafkaPartition

    from perdure.streams.kafka_log import KafkaLog
    from perdure.streams.topology import create_topics

    create_topics(bootstrap, prefix, partitions=PARTITIONS)
    log = KafkaLog(bootstrap, prefix, partitions=PARTITIONS)

    def truncate(topic: str, partition: int, first: int) -> None:
        admin, where = log.admin(), KafkaPartition(prefix + topic, partition, first)
        admin.delete_records([where])[where].result(DEADLINE_S)

    return Bench(log, truncate)


# Appending and reading -----------------------------------------------------------------------------------------------


def test_records_come_back_as_they_were_appended(bench: Bench) -> None:
    producer = bench.producer()
    written = [(b"a", b"1"), (None, b"2"), (b"a", None), (b"", b""), (b"\x00\xff", b"x" * 100_000)]
    for key, value in written:
        producer.append(EVENTS, 1, key, value)
    assert producer.flush(DEADLINE_S)

    records = take(bench.reader({(EVENTS, 1): BEGIN}), 5)

    assert [(r.key, r.value) for r in records] == written
    assert [(r.topic, r.partition, r.offset) for r in records] == [(EVENTS, 1, n) for n in range(5)]


def test_the_log_has_the_partitions_it_was_given(bench: Bench) -> None:
    assert bench.log.partitions == PARTITIONS
    for partition in range(PARTITIONS):
        bench.appended(EVENTS, partition, b"%d" % partition)
    records = take(bench.reader({(EVENTS, p): BEGIN for p in range(PARTITIONS)}), PARTITIONS)
    assert sorted((r.partition, r.value) for r in records) == [(p, b"%d" % p) for p in range(PARTITIONS)]


def test_commands_carry_log_time(bench: Bench) -> None:
    before = time.time_ns() // 1_000_000
    bench.appended(COMMANDS, 0, b"1", b"2", b"3")
    after = time.time_ns() // 1_000_000
    times = [record.at for record in take(bench.reader({(COMMANDS, 0): BEGIN}), 3)]
    assert times == sorted(times)
    assert before <= times[0] <= times[-1] <= after


def test_an_acknowledgement_names_the_offset(bench: Bench) -> None:
    acks: list[tuple[int, InfrastructureError | None]] = []
    producer = bench.producer()
    bench.appended(EVENTS, 0, b"before")
    for n in range(50):
        producer.append(EVENTS, 0, None, b"%d" % n, lambda offset, error: acks.append((offset, error)))
    assert producer.flush(DEADLINE_S)
    assert acks == [(offset, None) for offset in range(1, 51)]


def test_a_flush_waits_for_every_acknowledgement(bench: Bench) -> None:
    producer = bench.producer()
    for _ in range(20):
        acks: list[int] = []
        for n in range(10):
            producer.append(EVENTS, n % PARTITIONS, None, b"x", lambda offset, error, acks=acks: acks.append(offset))  # type: ignore[misc]
        assert producer.flush(DEADLINE_S)
        assert len(acks) == 10


def test_closing_a_producer_keeps_what_was_handed_over(bench: Bench) -> None:
    producer = bench.log.producer()
    for n in range(100):
        producer.append(EVENTS, 1, None, b"%d" % n)
    producer.close()
    assert values(take(bench.reader({(EVENTS, 1): BEGIN}), 100)) == [b"%d" % n for n in range(100)]


def test_threads_may_share_a_producer(bench: Bench) -> None:
    producer = bench.producer()

    def append(who: int) -> None:
        for n in range(100):
            producer.append(EVENTS, 0, b"%d" % who, b"%d" % n)

    threads = [threading.Thread(target=append, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert producer.flush(DEADLINE_S)

    records = take(bench.reader({(EVENTS, 0): BEGIN}), 400)
    for who in range(4):
        assert [r.value for r in records if r.key == b"%d" % who] == [b"%d" % n for n in range(100)]


@pytest.mark.parametrize(
    ("topic", "size"),
    [(COMMANDS, limits.RECORD_MAX + 1), (EVENTS, limits.TOPIC_RECORD_MAX + 1), (EVENTS, 3 * limits.TOPIC_RECORD_MAX)],
)
def test_a_record_above_its_topics_limit_is_refused_and_nothing_else(bench: Bench, topic: str, size: int) -> None:
    producer = bench.producer()
    with pytest.raises(ValueTooLarge):
        producer.append(topic, 0, None, b"x" * size)
    producer.append(topic, 0, None, b"next")
    assert producer.flush(DEADLINE_S)
    assert values(take(bench.reader({(topic, 0): BEGIN}), 1)) == [b"next"]


@pytest.mark.parametrize(("topic", "size"), [(COMMANDS, limits.RECORD_MAX - 1024), (EVENTS, limits.OUTPUT_MAX)])
def test_a_record_within_its_topics_limit_is_taken(bench: Bench, topic: str, size: int) -> None:
    acks: list[InfrastructureError | None] = []
    producer = bench.producer()
    producer.append(topic, 0, b"k" * 700, b"x" * size, lambda offset, error: acks.append(error))
    assert producer.flush(DEADLINE_S)
    assert acks == [None]


def test_a_reader_begins_where_it_is_told(bench: Bench) -> None:
    bench.appended(EVENTS, 0, b"0", b"1", b"2")
    assert values(take(bench.reader({(EVENTS, 0): BEGIN}), 3)) == [b"0", b"1", b"2"]
    assert values(take(bench.reader({(EVENTS, 0): 1}), 2)) == [b"1", b"2"]
    at_end = bench.reader({(EVENTS, 0): END})
    assert nothing_comes(at_end)
    bench.appended(EVENTS, 0, b"3")
    assert values(take(at_end, 1)) == [b"3"]


def test_an_assignment_replaces_the_one_before(bench: Bench) -> None:
    bench.appended(EVENTS, 0, b"a", b"b")
    bench.appended(EVENTS, 1, b"c")
    reader = bench.reader({(EVENTS, 0): BEGIN})
    take(reader, 1)
    reader.assign({(EVENTS, 1): BEGIN})
    assert values(take(reader, 1)) == [b"c"]
    assert nothing_comes(reader)
    reader.assign({(EVENTS, 0): 1})
    assert values(take(reader, 1)) == [b"b"]


def test_a_read_returns_at_most_what_was_asked_for(bench: Bench) -> None:
    bench.appended(EVENTS, 0, *(b"%d" % n for n in range(20)))
    reader = bench.reader({(EVENTS, 0): BEGIN})
    found: list[Record] = take(reader, 1)
    while len(found) < 20:
        more = reader.read(3, 1.0)
        assert len(more) <= 3
        found += more
    assert values(found) == [b"%d" % n for n in range(20)]


def test_a_read_waits_for_a_record(bench: Bench) -> None:
    reader = bench.reader({(EVENTS, 0): BEGIN})
    assert nothing_comes(reader)
    producer = bench.producer()
    later = threading.Timer(0.3, lambda: producer.append(EVENTS, 0, None, b"late"))
    later.start()
    begun = time.monotonic()
    assert values(take(reader, 1)) == [b"late"]
    assert time.monotonic() - begun < DEADLINE_S / 2
    later.join()


# Bounds and catching up ----------------------------------------------------------------------------------------------


def test_bounds_of_a_partition(bench: Bench) -> None:
    reader = bench.reader({})
    assert reader.bounds(EVENTS, 0) == (0, 0)
    bench.appended(EVENTS, 0, b"a", b"b", b"c")
    assert reader.bounds(EVENTS, 0) == (0, 3)
    assert reader.bounds(EVENTS, 1) == (0, 0)
    bench.truncate(EVENTS, 0, 2)
    assert reader.bounds(EVENTS, 0) == (2, 3)


def test_an_empty_partition_is_caught_up_at_once(bench: Bench) -> None:
    reader = bench.reader({(EVENTS, 0): BEGIN})
    assert reader.caught_up(EVENTS, 0, reader.bounds(EVENTS, 0)[1])


def catches_up(reader: Reader, target: int) -> list[bytes | None]:
    """Read until the reader says that it has caught up; the values read."""
    found: list[Record] = []
    deadline = time.monotonic() + DEADLINE_S
    while not reader.caught_up(EVENTS, 0, target):
        assert time.monotonic() < deadline, f"never caught up with {target}"
        found += reader.read(100, 0.5)
    return values(found)


@pytest.mark.parametrize("committed", [True, False], ids=["committed", "uncommitted"])
def test_a_reader_catches_up_with_what_was_there(bench: Bench, committed: bool) -> None:
    bench.appended(EVENTS, 0, b"a", b"b", b"c")
    reader = bench.reader({(EVENTS, 0): BEGIN}, committed=committed)
    _, end = reader.bounds(EVENTS, 0)
    assert not reader.caught_up(EVENTS, 0, end)
    assert catches_up(reader, end) == [b"a", b"b", b"c"]
    bench.appended(EVENTS, 0, b"d")
    assert reader.caught_up(EVENTS, 0, end)
    assert not reader.caught_up(EVENTS, 0, reader.bounds(EVENTS, 0)[1])


@pytest.mark.parametrize("committed", [True, False], ids=["committed", "uncommitted"])
@pytest.mark.parametrize("ends", ["commit", "abort"])
def test_transactions_at_the_end_are_passed_over(bench: Bench, committed: bool, ends: str) -> None:
    """Markers and aborted records have offsets, but are never handed out."""
    bench.appended(EVENTS, 0, b"a")
    writer, member = bench.transactional(), bench.member()
    writer.begin()
    writer.append(EVENTS, 0, None, b"b")
    take(bench.reader({(EVENTS, 0): 1}, committed=False), 1)
    if ends == "commit":
        writer.commit(member, {})
    else:
        writer.abort()
    reader = bench.reader({(EVENTS, 0): BEGIN}, committed=committed)
    _, end = reader.bounds(EVENTS, 0)
    assert end >= 2
    shown = ends == "commit" or not committed
    assert catches_up(reader, end) == ([b"a", b"b"] if shown else [b"a"])


def test_a_reader_at_the_end_is_caught_up(bench: Bench) -> None:
    writer, member = bench.transactional(), bench.member()
    writer.begin()
    writer.append(EVENTS, 0, None, b"a")
    writer.commit(member, {})
    reader = bench.reader({(EVENTS, 0): END})
    assert catches_up(reader, reader.bounds(EVENTS, 0)[1]) == []


def test_bounds_include_an_open_transaction_that_a_committed_reader_cannot_pass(bench: Bench) -> None:
    bench.appended(EVENTS, 0, b"a")
    writer, member = bench.transactional(), bench.member()
    writer.begin()
    writer.append(EVENTS, 0, None, b"b")
    seen = bench.reader({(EVENTS, 0): 1}, committed=False)
    assert values(take(seen, 1)) == [b"b"]
    reader = bench.reader({(EVENTS, 0): BEGIN})
    _, end = reader.bounds(EVENTS, 0)
    assert end == 2
    assert values(take(reader, 1)) == [b"a"]
    assert nothing_comes(reader)
    assert not reader.caught_up(EVENTS, 0, end)
    writer.commit(member, {})
    assert catches_up(reader, end) == [b"b"]


# Transactions --------------------------------------------------------------------------------------------------------


def test_a_transaction_shows_as_a_whole_when_it_is_committed(bench: Bench) -> None:
    everywhere = {(EVENTS, 0): BEGIN, (EVENTS, 1): BEGIN, (TELEMETRY, 1): BEGIN}
    reader, curious = bench.reader(everywhere), bench.reader(everywhere, committed=False)
    writer, member = bench.transactional(), bench.member()
    writer.begin()
    for topic, partition in everywhere:
        writer.append(topic, partition, b"k", f"{topic}/{partition}".encode())
    assert {(r.topic, r.partition) for r in take(curious, 3)} == set(everywhere)
    assert nothing_comes(reader)
    writer.commit(member, {})
    assert {(r.topic, r.partition) for r in take(reader, 3)} == set(everywhere)


def test_an_aborted_transaction_never_shows_to_committed_readers(bench: Bench) -> None:
    writer, member = bench.transactional(), bench.member()
    writer.begin()
    writer.append(EVENTS, 0, None, b"undone")
    curious = bench.reader({(EVENTS, 0): BEGIN}, committed=False)
    take(curious, 1)
    writer.abort()
    writer.begin()
    writer.append(EVENTS, 0, None, b"done")
    writer.commit(member, {})
    assert values(take(bench.reader({(EVENTS, 0): BEGIN}), 1)) == [b"done"]
    assert values(take(bench.reader({(EVENTS, 0): BEGIN}, committed=False), 2)) == [b"undone", b"done"]


def test_records_of_an_open_transaction_hold_back_what_comes_after_them(bench: Bench) -> None:
    writer, member = bench.transactional(), bench.member()
    writer.begin()
    writer.append(EVENTS, 0, None, b"first")
    take(bench.reader({(EVENTS, 0): BEGIN}, committed=False), 1)
    bench.appended(EVENTS, 0, b"second")
    reader = bench.reader({(EVENTS, 0): BEGIN})
    assert nothing_comes(reader)
    writer.commit(member, {})
    assert values(take(reader, 2)) == [b"first", b"second"]


def test_an_uncommitted_reader_waits_for_nobody(bench: Bench) -> None:
    """task-commands is read like this: nobody's open transaction can stall it."""
    writer = bench.transactional()
    writer.begin()
    writer.append(COMMANDS, 0, None, b"open")
    take(bench.reader({(COMMANDS, 0): BEGIN}, committed=False), 1)
    bench.appended(COMMANDS, 0, b"plain")
    assert values(take(bench.reader({(COMMANDS, 0): BEGIN}, committed=False), 2)) == [b"open", b"plain"]


def test_many_records_are_added_in_order_and_as_they_are(bench: Bench) -> None:
    writer, member = bench.transactional(), bench.member()
    many = [(None if n % 3 == 0 else b"k%d" % n, None if n % 5 == 0 else b"v%d" % n) for n in range(3_000)]
    writer.begin()
    writer.append(EVENTS, 0, b"first", b"1")
    writer.append_all(EVENTS, 0, many)
    writer.append(EVENTS, 0, b"last", b"2")
    writer.append_all(EVENTS, 1, [])
    writer.commit(member, {})
    records = take(bench.reader({(EVENTS, 0): BEGIN}), 3_002)
    assert [(r.key, r.value) for r in records] == [(b"first", b"1"), *many, (b"last", b"2")]


def test_acknowledgements_in_a_transaction_name_the_offsets(bench: Bench) -> None:
    writer, member = bench.transactional(), bench.member()
    acks: list[tuple[int, InfrastructureError | None]] = []
    for _ in range(2):
        writer.begin()
        for n in range(3):
            writer.append(EVENTS, 0, None, b"%d" % n, lambda offset, error: acks.append((offset, error)))
        writer.commit(member, {})
    records = take(bench.reader({(EVENTS, 0): BEGIN}), 6)
    assert acks == [(record.offset, None) for record in records]


def test_a_record_too_large_for_a_transaction_is_refused_by_itself(bench: Bench) -> None:
    writer, member = bench.transactional(), bench.member()
    writer.begin()
    writer.append(EVENTS, 0, None, b"a")
    with pytest.raises(ValueTooLarge):
        writer.append(EVENTS, 0, None, b"x" * (limits.TOPIC_RECORD_MAX + 1))
    writer.append(EVENTS, 0, None, b"b")
    writer.commit(member, {})
    assert values(take(bench.reader({(EVENTS, 0): BEGIN}), 2)) == [b"a", b"b"]


def test_a_newer_producer_of_the_same_name_fences_the_older(bench: Bench) -> None:
    older, member = bench.transactional("engine.0"), bench.member()
    older.begin()
    older.append(EVENTS, 0, None, b"older")
    take(bench.reader({(EVENTS, 0): BEGIN}, committed=False), 1)

    newer = bench.transactional("engine.0")
    newer.begin()
    newer.append(EVENTS, 0, None, b"newer")
    newer.commit(member, {})
    with pytest.raises(Fenced):
        older.commit(member, {(COMMANDS, 0): 5})

    assert values(take(bench.reader({(EVENTS, 0): BEGIN}), 1)) == [b"newer"]
    assert member.committed([(COMMANDS, 0)]) == {(COMMANDS, 0): None}


def test_a_fenced_producer_stays_fenced(bench: Bench) -> None:
    older, member = bench.transactional("engine.0"), bench.member()
    bench.transactional("engine.0")
    for _ in range(2):
        with pytest.raises(Fenced):
            attempt(older, member)
    bench.appended(EVENTS, 0, b"end")
    assert values(take(bench.reader({(EVENTS, 0): BEGIN}), 1)) == [b"end"]


def attempt(writer: Transactional, member: Member) -> None:
    writer.begin()
    writer.append(EVENTS, 0, None, b"late")
    writer.commit(member, {})


def test_taking_over_ends_the_open_transaction_of_the_one_before(bench: Bench) -> None:
    """Readers go on at once, not when the transaction times out."""
    older = bench.transactional("engine.0")
    older.begin()
    older.append(EVENTS, 0, None, b"open")
    take(bench.reader({(EVENTS, 0): BEGIN}, committed=False), 1)
    bench.appended(EVENTS, 0, b"behind")
    reader = bench.reader({(EVENTS, 0): BEGIN})
    assert nothing_comes(reader)
    bench.transactional("engine.0")
    assert values(take(reader, 1)) == [b"behind"]


def test_producers_of_different_names_do_not_fence_each_other(bench: Bench) -> None:
    one, two, member = bench.transactional("engine.0"), bench.transactional("engine.1"), bench.member()
    one.begin()
    two.begin()
    one.append(EVENTS, 0, None, b"one")
    two.append(EVENTS, 1, None, b"two")
    two.commit(member, {})
    one.commit(member, {})
    assert values(take(bench.reader({(EVENTS, 0): BEGIN}), 1)) == [b"one"]
    assert values(take(bench.reader({(EVENTS, 1): BEGIN}), 1)) == [b"two"]


# Offsets -------------------------------------------------------------------------------------------------------------


def test_offsets_are_committed_with_the_transaction_and_only_then(bench: Bench) -> None:
    writer, watched = bench.transactional(), bench.watched("g")
    wait_until(lambda: watched.mine == every(COMMANDS), watched)
    wanted = [(COMMANDS, 0), (COMMANDS, 1)]
    nowhere = {(COMMANDS, 0): None, (COMMANDS, 1): None}
    assert watched.member.committed(wanted) == nowhere

    writer.begin()
    writer.append(EVENTS, 0, None, b"a")
    assert watched.member.committed(wanted) == nowhere
    writer.abort()
    assert watched.member.committed(wanted) == nowhere

    writer.begin()
    writer.append(EVENTS, 0, None, b"a")
    writer.commit(watched.member, {(COMMANDS, 0): 7})
    assert watched.member.committed(wanted) == {(COMMANDS, 0): 7, (COMMANDS, 1): None}

    writer.begin()
    writer.commit(watched.member, {(COMMANDS, 0): 8, (COMMANDS, 1): 3})
    assert watched.member.committed(wanted) == {(COMMANDS, 0): 8, (COMMANDS, 1): 3}


def test_a_transaction_without_offsets_leaves_them_alone(bench: Bench) -> None:
    writer, watched = bench.transactional(), bench.watched("g")
    wait_until(lambda: watched.mine == every(COMMANDS), watched)
    writer.begin()
    writer.commit(watched.member, {(COMMANDS, 0): 7})
    writer.begin()
    writer.append(EVENTS, 0, None, b"a")
    writer.commit(watched.member, {})
    assert watched.member.committed([(COMMANDS, 0)]) == {(COMMANDS, 0): 7}


def test_groups_have_their_own_offsets(bench: Bench) -> None:
    writer, one, two = bench.transactional(), bench.watched("one"), bench.watched("two")
    wait_until(lambda: one.mine == two.mine == every(COMMANDS), one, two)
    writer.begin()
    writer.commit(one.member, {(COMMANDS, 0): 7})
    assert one.member.committed([(COMMANDS, 0)]) == {(COMMANDS, 0): 7}
    assert two.member.committed([(COMMANDS, 0)]) == {(COMMANDS, 0): None}


def test_a_member_that_has_left_commits_nothing(bench: Bench) -> None:
    """What it has read may be another member's by now."""
    writer, gone = bench.transactional(), bench.watched("g")
    wait_until(lambda: gone.mine == every(COMMANDS), gone)
    writer.begin()
    writer.append(EVENTS, 0, None, b"late")
    gone.close()
    with pytest.raises(InfrastructureError):
        writer.commit(gone.member, {(COMMANDS, 0): 7})
    there = bench.watched("g")
    wait_until(lambda: there.mine == every(COMMANDS), there)
    assert there.member.committed([(COMMANDS, 0)]) == {(COMMANDS, 0): None}


# Members of a group --------------------------------------------------------------------------------------------------


def test_a_lone_member_gets_everything_from_the_beginning(bench: Bench) -> None:
    for partition in range(PARTITIONS):
        bench.appended(COMMANDS, partition, b"%d" % partition)
    watched = bench.watched("g", COMMANDS, EVENTS)
    wait_until(lambda: len(watched.records) == PARTITIONS, watched)
    assert watched.mine == every(COMMANDS, EVENTS)
    assert sorted(value for value in watched.values() if value) == [b"0", b"1"]
    assert not watched.taken


def test_a_member_goes_on_from_the_committed_offset(bench: Bench) -> None:
    bench.appended(COMMANDS, 0, b"0", b"1", b"2")
    first, writer = bench.watched("g"), bench.transactional()
    wait_until(lambda: len(first.records) == 3, first)
    writer.begin()
    writer.commit(first.member, {(COMMANDS, 0): 1})
    first.close()
    second = bench.watched("g")
    wait_until(lambda: len(second.records) == 2, second)
    assert second.values() == [b"1", b"2"]


def test_a_members_isolation_is_as_asked(bench: Bench) -> None:
    writer = bench.transactional()
    writer.begin()
    writer.append(COMMANDS, 0, None, b"undone")
    take(bench.reader({(COMMANDS, 0): BEGIN}, committed=False), 1)
    writer.abort()
    bench.appended(COMMANDS, 0, b"plain")
    committed = bench.watched("g")
    wait_until(lambda: bool(committed.records), committed)
    assert committed.values() == [b"plain"]


def test_a_seek_reads_again_and_drops_what_was_fetched(bench: Bench) -> None:
    bench.appended(COMMANDS, 0, *(b"%d" % n for n in range(50)))
    watched = bench.watched("g")
    wait_until(lambda: bool(watched.read(5, 0.2)))
    watched.member.seek(COMMANDS, 0, 40)
    watched.records.clear()
    wait_until(lambda: len(watched.records) >= 10, watched)
    assert watched.values() == [b"%d" % n for n in range(40, 50)]
    watched.member.seek(COMMANDS, 0, 0)
    watched.records.clear()
    wait_until(lambda: len(watched.records) >= 50, watched)
    assert watched.values() == [b"%d" % n for n in range(50)]


def test_a_paused_partition_is_silent_and_loses_nothing(bench: Bench) -> None:
    watched = bench.watched("g")
    wait_until(lambda: watched.mine == every(COMMANDS), watched)
    watched.member.pause([(COMMANDS, 0)])
    bench.appended(COMMANDS, 0, b"held", b"back")
    bench.appended(COMMANDS, 1, b"other")
    wait_until(lambda: bool(watched.records), watched)
    assert nothing_comes(watched)
    assert watched.values() == [b"other"]
    watched.member.resume([(COMMANDS, 0)])
    wait_until(lambda: len(watched.records) == 3, watched)
    assert watched.values() == [b"other", b"held", b"back"]


def test_partitions_may_be_paused_and_moved_as_they_are_assigned(bench: Bench) -> None:
    """A host restores its state first: nothing may arrive before, and then from where the state ends."""
    bench.appended(COMMANDS, 0, b"0", b"1", b"2")
    watched = bench.watched("g", on_assigned=lambda member, mine: member.pause(mine))
    wait_until(lambda: watched.mine == every(COMMANDS), watched)
    assert nothing_comes(watched)
    watched.member.seek(COMMANDS, 0, 1)
    watched.member.resume(every(COMMANDS))
    wait_until(lambda: len(watched.records) >= 2, watched)
    assert watched.values() == [b"1", b"2"]


def test_two_members_share_the_partitions(bench: Bench) -> None:
    one = bench.watched("g", COMMANDS, EVENTS)
    wait_until(lambda: one.mine == every(COMMANDS, EVENTS), one)
    two = bench.watched("g", COMMANDS, EVENTS)

    def shared() -> bool:
        return bool(one.mine) and bool(two.mine) and one.mine | two.mine == every(COMMANDS, EVENTS)

    wait_until(lambda: shared() and not one.mine & two.mine, one, two)
    assert len(one.mine) == len(two.mine) == PARTITIONS
    for watched in (one, two):  # a host serves a partition of all topics
        assert {p for t, p in watched.mine if t == COMMANDS} == {p for t, p in watched.mine if t == EVENTS}
    assert one.taken
    assert not any(lost for _, lost in one.taken)

    for partition in range(PARTITIONS):
        bench.appended(COMMANDS, partition, b"%d" % partition)
    wait_until(lambda: len(one.records) + len(two.records) >= PARTITIONS, one, two)
    for watched in (one, two):
        assert {(record.topic, record.partition) for record in watched.records} <= watched.mine
    assert sorted(value for value in one.values() + two.values() if value) == [b"0", b"1"]

    two.close()
    wait_until(lambda: one.mine == every(COMMANDS, EVENTS), one)


def test_a_revocation_is_told_before_the_partitions_are_given_to_others(bench: Bench) -> None:
    order: list[str] = []
    one = bench.watched("g", on_assigned=lambda member, mine: order.append("one assigned"))
    wait_until(lambda: one.mine == every(COMMANDS), one)
    two = bench.watched("g", on_assigned=lambda member, mine: order.append(f"two assigned, one has {len(one.mine)}"))
    wait_until(lambda: bool(two.mine) and bool(one.mine) and not one.mine & two.mine, one, two)
    told = next(entry for entry in order if entry.startswith("two"))
    assert told in ("two assigned, one has 0", f"two assigned, one has {PARTITIONS // 2}")


# Truncation ----------------------------------------------------------------------------------------------------------


def test_deleted_records_are_gone_and_the_others_keep_their_offsets(bench: Bench) -> None:
    bench.appended(EVENTS, 0, b"0", b"1", b"2")
    bench.truncate(EVENTS, 0, 2)
    records = take(bench.reader({(EVENTS, 0): BEGIN}), 1)
    assert [(r.offset, r.value) for r in records] == [(2, b"2")]


def reads_until_refused(source: Readable) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        source.read(100, 0.5)


def test_a_position_below_the_logs_start_is_refused(bench: Bench) -> None:
    """G1: records that were deleted before they were read are never passed over in silence."""
    bench.appended(EVENTS, 0, b"0", b"1", b"2")
    bench.truncate(EVENTS, 0, 2)
    reader = bench.reader({(EVENTS, 0): 1})
    with pytest.raises(InfrastructureError):
        reads_until_refused(reader)


def test_a_position_above_the_logs_end_is_refused(bench: Bench) -> None:
    """The topic is not the one that was read before."""
    bench.appended(EVENTS, 0, b"0")
    reader = bench.reader({(EVENTS, 0): 5})
    with pytest.raises(InfrastructureError):
        reads_until_refused(reader)


def test_a_committed_offset_below_the_logs_start_is_refused(bench: Bench) -> None:
    bench.appended(COMMANDS, 0, b"0", b"1", b"2")
    first, writer = bench.watched("g"), bench.transactional()
    wait_until(lambda: first.mine == every(COMMANDS), first)
    writer.begin()
    writer.commit(first.member, {(COMMANDS, 0): 1})
    first.close()
    bench.truncate(COMMANDS, 0, 2)
    second = bench.watched("g")
    with pytest.raises(InfrastructureError):
        reads_until_refused(second)


# Identity ------------------------------------------------------------------------------------------------------------


def test_a_topic_id_names_this_topic_and_no_other(bench: Bench) -> None:
    assert bench.log.topic_id(EVENTS) == bench.log.topic_id(EVENTS)
    assert bench.log.topic_id(EVENTS) != bench.log.topic_id(COMMANDS)
