"""Two hosts that both believe a partition to be theirs: whoever was fenced goes on where the other has stopped (G2)."""

from __future__ import annotations

from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest

from perdure.schemas import codec, limits, topics
from perdure.schemas.errors import Unreachable
from perdure.schemas.public import Quarantined
from perdure.schemas.signing import Keys
from perdure.streams import log as log_module
from perdure.streams import shard as shard_module
from perdure.streams.crash_marks import CrashMarks
from perdure.streams.local_engine import engine_kind
from perdure.streams.log import BEGIN, Member, Record, TransactionAborted
from perdure.streams.memory_log import MemoryLog
from perdure.streams.processor import Kind, Out, Table, Transaction
from perdure.streams.shard import Shard
from perdure.streams.store import MemoryStore

INPUTS = 6
KEYS = Keys.generate()


def log_of_garbage() -> MemoryLog:
    """Records that nobody can read: each execution of one leaves a record in quarantine."""
    log = MemoryLog(lambda: 1_000, partitions=1)
    producer = log.producer()
    for n in range(INPUTS):
        producer.append(topics.COMMANDS.name, 0, None, f"garbage {n}".encode())
    return log


@pytest.fixture
def log() -> MemoryLog:
    return log_of_garbage()


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_module, "REVOCATION_S", 0.0)


def member_of(log: MemoryLog) -> Member:
    return log.member("engine", [topics.COMMANDS.name], on_assigned=lambda _: None, on_revoked=lambda *_: None)


def host(log: MemoryLog) -> Shard:
    """An engine that takes the partition, with a disk of its own."""
    made = Shard(
        engine_kind(1, KEYS), 0, log=log, store=MemoryStore(), member=member_of(log), transactional_id="engine.0"
    )
    while not made.restore_some():
        pass
    return made


def inputs(log: MemoryLog) -> list[Record]:
    reader = log.reader()
    reader.assign({(topics.COMMANDS.name, 0): BEGIN})
    return reader.read(100, 0)


def executed(log: MemoryLog) -> list[int]:
    """Offsets of the inputs that were executed, in order."""
    return [codec.decode_as(Quarantined, r.value or b"").offset for r in log.records(topics.QUARANTINE.name, 0)]


@pytest.mark.parametrize("done", range(INPUTS + 1))
def test_who_is_fenced_executes_only_what_the_other_has_not(log: MemoryLog, done: int) -> None:
    stopped = host(log)
    held = inputs(log)  # in its memory, when its machine stands still
    successor = host(log)
    if done:
        assert successor.run_batch(held[:done])
    assert stopped.run_batch(held)
    assert executed(log) == list(range(INPUTS))
    assert successor.run_batch(held[done:] or held)
    assert executed(log) == list(range(INPUTS))


def test_what_a_host_holds_in_memory_may_be_older_than_the_state(log: MemoryLog) -> None:
    stopped = host(log)
    held = inputs(log)
    assert stopped.run_batch(held[:1])
    successor = host(log)
    assert successor.run_batch(held[1:5])
    assert stopped.run_batch(held[1:3]), "committed by the other"
    assert stopped.run_batch(held[3:4]), "the next of what it holds: committed by the other as well"
    assert stopped.run_batch(held[4:])
    assert executed(log) == list(range(INPUTS))
    assert stopped.processor.positions() == {topics.COMMANDS.name: INPUTS}


def test_a_host_that_comes_back_to_nothing_new_knows_how_far_it_is(log: MemoryLog) -> None:
    """The group was told a second before the kill at best, and would show a lag for ever."""
    assert host(log).run_batch(inputs(log))
    again = host(log)
    again.start_positions()
    assert again.reached == {(topics.COMMANDS.name, 0): INPUTS}


def _echo(record: Record, t: Transaction) -> None:
    t.out.append(Out(topics.DEAD_LETTERS.name, None, record.value))


def test_without_positions_in_a_changelog_a_host_that_was_put_out_commits_nothing(log: MemoryLog) -> None:
    """It has no other way to learn what its successor has executed."""
    kind = Kind("echo", (topics.COMMANDS.name,), None, lambda store, _: Table("echo", store, _echo, kind.inputs))
    member = member_of(log)
    shard = Shard(kind, 0, log=log, store=MemoryStore(), member=member, transactional_id="echo.0")
    held = inputs(log)
    assert shard.run_batch(held[:1])
    member.close()
    tries = chain((True, True), repeat(False))
    assert not shard.run_batch(held[1:], lambda: next(tries))
    assert len(log.records(topics.DEAD_LETTERS.name)) == 1


def test_what_leads_to_no_record_needs_no_transaction(log: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store says how far it is, and the group is told, for who looks at lags."""
    begun: list[object] = []

    def sometimes(record: Record, t: Transaction) -> None:
        t.put(b"last", record.value)
        if record.offset == 3:
            _echo(record, t)

    def begins() -> None:
        begun.append(1)
        begin()

    kind = Kind("echo", (topics.COMMANDS.name,), None, lambda store, _: Table("echo", store, sometimes, kind.inputs))
    store, member, held = MemoryStore(), member_of(log), inputs(log)
    shard = Shard(kind, 0, log=log, store=store, member=member, transactional_id="echo.0")
    begin = shard._producer.begin
    monkeypatch.setattr(shard._producer, "begin", begins)
    for record in held:
        assert shard.run_batch([record])
    assert len(begun) == len(log.records(topics.DEAD_LETTERS.name)) == 1
    assert shard.reached == {(topics.COMMANDS.name, 0): INPUTS}
    assert store.get(b"last") == held[-1].value
    again = Shard(kind, 0, log=log, store=store, member=member, transactional_id="echo.0")
    assert again.start_positions() == {topics.COMMANDS.name: INPUTS}


def test_what_is_handed_over_twice_is_executed_once(log: MemoryLog) -> None:
    """As when it was read before a seek, and comes again."""
    assert host(log).run_batch([*inputs(log), *inputs(log)])
    assert executed(log) == list(range(INPUTS))


def test_what_the_broker_goes_on_refusing_is_said(
    log: MemoryLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shard_module, "AGAIN_S", 0.0)
    shard = host(log)
    monkeypatch.setattr(shard._producer, "commit", _aborting(shard, 3))
    assert shard.run_batch(inputs(log))
    assert executed(log) == list(range(INPUTS))
    assert [r.message for r in caplog.records if "no right to write" in r.message] == [
        "engine/0 tries again, the broker refuses: no right to write"
    ] * 2


def test_what_killed_its_process_is_passed_over_in_its_own_topic_alone(log: MemoryLog, tmp_path: Path) -> None:
    """Inputs of a processor share their offsets."""
    both = (topics.COMMANDS.name, topics.EVENTS.name)
    log.producer().append(topics.EVENTS.name, 0, None, b"an event")
    seen: list[tuple[str, int]] = []
    kind = Kind(
        "echo", both, None,
        lambda store, _: Table("echo", store, lambda r, _: seen.append((r.topic, r.offset)), both),
    )  # fmt: skip

    def opened() -> Shard:
        marks = CrashMarks(tmp_path / "executing")
        return Shard(
            kind, 0, log=log, store=MemoryStore(), member=member_of(log), transactional_id="echo.0", crash_marks=marks
        )

    def dies(_: Record, __: Transaction) -> None:
        raise KeyboardInterrupt

    event = log.records(topics.EVENTS.name, 0)[0]
    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch:
            shard = opened()
            patch.setattr(shard.processor, "handle", dies)
            with pytest.raises(KeyboardInterrupt):
                shard.run_batch([event])
    assert opened().run_batch([inputs(log)[0], event])
    assert seen == [(topics.COMMANDS.name, 0)]


def test_a_topic_with_a_transaction_that_never_ends_is_not_read_for_ever(
    log: MemoryLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "STILL_S", 0.0)
    open_one = log.transactional("echo.0")
    open_one.begin()
    open_one.append(topics.EVENTS.name, 0, None, b"")
    with pytest.raises(Unreachable, match="task-events/0 stands still before 1: a transaction on it is open"):
        list(log_module.records_of(log, topics.EVENTS.name, 0))


def _aborting(shard: Shard, times: int) -> Any:
    commit, left = shard._producer.commit, [times]

    def aborted(*given: Any) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise TransactionAborted("no right to write")
        commit(*given)

    return aborted


HOUR = 3_600_000


@pytest.mark.parametrize(("hours", "noted"), [(0.9, 0), (1.1, 1), (1.9, 1), (2.1, 0), (60.0, 0)])
def test_who_has_slept_for_long_does_not_call_its_store_fresh(log: MemoryLog, hours: float, noted: int) -> None:
    """Its partition may have been another's meanwhile: what was deleted there since, it would never learn."""
    shard = host(log)
    before = shard.rows_written
    shard.stay_fresh(shard._as_of + int(hours * HOUR))
    assert shard.rows_written - before == noted


def letters(log: MemoryLog, store: MemoryStore) -> Shard:
    """A processor whose input is its changelog, on a host of its own: it writes a letter for each record."""

    def handle(record: Record, tx: Transaction) -> None:
        tx.put(b"newest", str(record.offset).encode())
        tx.emit(topics.DEAD_LETTERS.name, b"task", str(record.offset).encode())

    inputs = (topics.COMMANDS.name,)
    kind = Kind("letters", inputs, None, lambda s, _: Table("letters", s, handle, inputs))
    member = log.member("letters", list(inputs), on_assigned=lambda _: None, on_revoked=lambda *_: None)
    shard = Shard(kind, 0, log=log, store=store, member=member, transactional_id="letters.0")
    shard.start_positions()
    return shard


def test_who_has_to_read_again_what_others_have_written_undoes_none_of_it(log: MemoryLog) -> None:
    """It may be interrupted: the last letter of a key would then be an old one, and its owner would not write it again."""
    held = inputs(log)
    assert letters(log, MemoryStore()).run_batch(held[:4])
    late = letters(log, MemoryStore())
    assert late.run_batch(held[:2])
    assert [r.value for r in log.records(topics.DEAD_LETTERS.name)] == [b"0", b"1", b"2", b"3"]
    assert late.reached == {(topics.COMMANDS.name, 0): 4}
    assert late.run_batch(held)
    assert [r.value for r in log.records(topics.DEAD_LETTERS.name)] == [b"0", b"1", b"2", b"3", b"4", b"5"]
    assert late._store.get(b"newest") == b"5"


def test_a_public_state_that_was_made_anew_is_made_again_from_the_beginning(log: MemoryLog) -> None:
    inputs_of = (topics.COMMANDS.name,)

    def handle(record: Record, tx: Transaction) -> None:
        tx.put(str(record.offset).encode(), b"row")

    def shard() -> Shard:
        kind = Kind("rows", inputs_of, topics.PROGRESS.name, lambda s, _: Table("rows", s, handle, inputs_of),
                    plain_changelog=True)  # fmt: skip
        member = log.member("rows", list(inputs_of), on_assigned=lambda _: None, on_revoked=lambda *_: None)
        made = Shard(kind, 0, log=log, store=MemoryStore(), member=member, transactional_id="rows.0")
        while not made.restore_some():
            pass
        return made

    first = shard()
    assert first.start_positions() == {topics.COMMANDS.name: None}
    assert first.run_batch(inputs(log))
    assert shard().start_positions() == {topics.COMMANDS.name: INPUTS}
    log.replace(topics.PROGRESS.name)
    assert shard().start_positions() == {topics.COMMANDS.name: None}


@pytest.mark.parametrize(("error", "blamed"), [(Unreachable("config"), False), (MemoryError("none left"), True)])
def test_a_record_is_to_blame_only_for_what_may_be_its_own_doing(
    log: MemoryLog, tmp_path: Path, error: Exception, blamed: bool
) -> None:
    """A schema that nobody could be asked for is not; a process that has no memory left may be killed by it again."""

    def handle(record: Record, tx: Transaction) -> None:
        raise error

    names = (topics.COMMANDS.name,)
    for _ in range(limits.KILLER_DEATHS):
        kind = Kind("failing", names, None, lambda s, _: Table("failing", s, handle, names))
        member = log.member("failing", list(names), on_assigned=lambda _: None, on_revoked=lambda *_: None)
        shard = Shard(
            kind, 0, log=log, store=MemoryStore(), member=member, transactional_id="failing.0",
            crash_marks=CrashMarks(tmp_path / "marks"),
        )  # fmt: skip
        with pytest.raises(type(error)):
            shard._transact(inputs(log))
    assert CrashMarks(tmp_path / "marks").is_killer(0) == blamed
