"""Reading keeps the pace of the transactions: what comes during one waits for its end, and is then read at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from perdure.schemas import limits, topics
from perdure.streams import lane as lane_module
from perdure.streams import runner as runner_module
from perdure.streams.log import Record
from perdure.streams.memory_log import MemoryLog
from perdure.streams.processor import Kind, Table, Transaction
from perdure.streams.runner import Runner
from tests.integration.stack import until

NAME = topics.COMMANDS.name


class Waits(threading.Event):
    """Tells that somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.begun.set()
        return super().wait(timeout)


class Slow:
    """A runner whose first transaction takes until it is let go."""

    def __init__(self, folder: Path) -> None:
        self.entered, self.let_go = threading.Event(), threading.Event()
        kind = Kind("slow", (NAME,), None, lambda store, _: Table("slow", store, self._execute, (NAME,)))
        self.log = MemoryLog(lambda: 1_000, partitions=1)
        self.runner = Runner(self.log, kind, folder)
        self.runner.finished = self.waits = Waits()
        self._thread = threading.Thread(target=self.runner.run)
        self._thread.start()
        self.append()
        assert self.entered.wait(60)

    def _execute(self, transaction: Transaction, record: Record) -> None:
        self.entered.set()
        assert self.let_go.wait(60)

    def append(self) -> None:
        """Another input."""
        self.log.producer().append(NAME, 0, b"k", b"v")

    def waiting(self) -> list[int]:
        """Offsets that were read, and are not executed yet."""
        return [record.offset for record in self.runner._lanes[0]._records]

    def await_executed(self, count: int) -> None:
        """Until so many are."""
        until(f"{count} executed", lambda: self.runner._lanes[0].reached.get((NAME, 0)) == count)

    def close(self) -> None:
        """End it."""
        self.let_go.set()
        self.runner.stop()
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    monkeypatch.setattr(runner_module, "_GATHER_S", 600.0)
    made = Slow(tmp_path)
    yield made
    made.close()


def test_what_comes_during_a_transaction_is_read_after_its_end(slow: Slow) -> None:
    slow.waits.begun.clear()
    slow.append()
    assert slow.waits.begun.wait(60), "the second is read, and nothing after it"
    slow.append()
    slow.append()
    assert slow.waiting() == [1]
    slow.let_go.set()
    slow.await_executed(4)


def test_who_reads_as_much_as_it_can_goes_on_reading(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BATCH_RECORDS", 1)
    slow.append()
    until("the second is read", lambda: slow.waiting() == [1])
    slow.append()
    slow.append()
    until("all are read", lambda: slow.waiting() == [1, 2, 3])
    slow.let_go.set()
    slow.await_executed(4)


def test_a_partition_that_comes_back_full_is_not_read_before_it_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lane is another one: that no more were fetched for the last one says nothing of it."""
    monkeypatch.setattr(runner_module, "_GATHER_S", 0.0)
    monkeypatch.setattr(runner_module, "most_waiting", lambda _: 3)
    slow = Slow(tmp_path)
    for _ in range(3):
        slow.append()
    lane, member = slow.runner._lanes[0], slow.runner.member
    until("no more are fetched", lambda: (NAME, 0) in member._paused)
    opening, reads = threading.Event(), Counted(member.read)
    open_store = lane_module.open_store
    monkeypatch.setattr(lane_module, "open_store", lambda *given: (opening.wait(60), open_store(*given))[1])
    monkeypatch.setattr(member, "read", reads)
    member._pending += [("revoked", []), ("assigned", [(NAME, 0)])]  # both within one read
    slow.let_go.set()
    until("another lane", lambda: slow.runner._lanes.get(0, lane) is not lane)
    begun = reads.count
    until("some more reads", lambda: reads.count > begun + 3)
    assert (NAME, 0) in member._paused
    opening.set()
    slow.await_executed(4)
    slow.close()


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self.count = function, 0

    def __call__(self, *given: Any) -> Any:
        self.count += 1
        return self._function(*given)
