"""Who reads no further although there is something to read."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from perdure import standstill
from perdure.schemas import topics
from perdure.standstill import Standstill
from perdure.streams.memory_log import MemoryLog

NAME = topics.EVENTS.name


class Group:
    """A group as it is measured, on a clock that the test moves."""

    def __init__(self) -> None:
        self.log = MemoryLog(lambda: 1_000, partitions=2)
        self.now = 0.0
        self.positions = [0, 0]
        self._standstill = Standstill(self.log, clock=lambda: self.now)

    def append(self, partition: int = 0) -> None:
        self.log.producer().append(NAME, partition, b"k", b"v")

    def mark(self, partition: int = 0) -> None:
        """What no reader gets: as the mark of a transaction."""
        undone = self.log.transactional("undone")
        undone.begin()
        undone.append(NAME, partition, b"k", b"v")
        undone.abort()

    def measured(self, after_s: float) -> list[str]:
        self.now += after_s
        ends = [self.log._data[NAME, p].end for p in range(2)]
        firsts = [self.log._data[NAME, p].first for p in range(2)]
        return self._standstill.found({(NAME, p): (self.positions[p], firsts[p], ends[p]) for p in range(2)})


@pytest.fixture
def group() -> Group:
    return Group()


def test_one_record_that_nobody_reads_is_found(group: Group) -> None:
    group.append(partition=1)
    assert group.measured(5) == []
    assert group.measured(80) == []
    assert group.measured(10) == [f"{NAME}/1 stands still at 0 of 1"]
    assert group.measured(5) == [f"{NAME}/1 stands still at 0 of 1"], "and as long as it is so"
    group.positions[1] = 1
    assert group.measured(5) == []


def test_who_moves_does_not_stand_still_however_far_it_is_behind(group: Group) -> None:
    for _ in range(50):
        group.append()
    for position in range(30):
        group.positions[0] = position
        assert group.measured(60) == []


@pytest.mark.parametrize("last", [Group.append, Group.mark], ids=["a record", "a mark"])
def test_a_record_is_new_after_a_long_time_without_any(group: Group, last: Callable[[Group], None]) -> None:
    last(group)
    group.positions[0] = int(last is Group.append)
    for _ in range(20):
        assert group.measured(60) == []
    group.append()
    assert group.measured(5) == []
    assert group.measured(80) == []
    assert group.measured(10) != []


def test_marks_alone_are_nothing_to_read(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(20):
        group.mark()
        assert group.measured(60) == []
    reads: list[object] = []
    reader = group.log.reader
    monkeypatch.setattr(group.log, "reader", lambda **k: (reads.append(k), reader(**k))[1])
    group.measured(300)
    group.measured(300)
    assert len(reads) <= 1, "what was looked at is not looked at again"


def test_what_a_transaction_that_hangs_hides_is_found(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standstill, "_LOOK_S", 0.01)
    hanging = group.log.transactional("hanging")
    hanging.begin()
    hanging.append(NAME, 0, b"k", b"v")
    assert group.measured(5) == []
    assert group.measured(100) == [], "a reader may be slow once"
    assert group.measured(5) == [f"{NAME}/0 stands still at 0 of 1"]
    hanging.abort()
    assert group.measured(5) == []


def test_a_group_that_stands_behind_the_end_of_the_log_is_found_at_once(group: Group) -> None:
    group.positions[1] = 7
    assert group.measured(5) == [f"{NAME}/1 ends at 0, before 7, where the group stands"]


def test_a_log_that_is_deleted_under_a_group_does_not_move_it(group: Group) -> None:
    for _ in range(9):
        group.append()
    group.measured(5)
    for first in (1, 2):
        group.log.truncate(NAME, 0, first)
        assert group.measured(40) == []
    group.log.truncate(NAME, 0, 3)
    assert group.measured(20) == [f"{NAME}/0 stands still at 0 of 9"]


def test_a_group_that_reads_what_is_not_committed_is_followed_by_such_a_reader(group: Group) -> None:
    followed = Standstill(group.log, committed=False, clock=lambda: group.now)
    hanging = group.log.transactional("hanging")
    hanging.begin()
    hanging.append(NAME, 0, b"k", b"v")
    for now, found in ((0, []), (100, [f"{NAME}/0 stands still at 0 of 1"])):
        group.now = now
        assert followed.found({(NAME, 0): (0, 0, 1)}) == found, "it could read that"
