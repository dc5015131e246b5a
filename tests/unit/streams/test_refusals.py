"""A partition that cannot be gone on with is refused by name; the others of its process go on (G5)."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from perdure.schemas import codec, events, topics
from perdure.schemas.errors import LogTruncated, RestoreStuck
from perdure.streams import lane as lane_module
from perdure.streams import runner as runner_module
from perdure.streams.local_engine import engine_kind
from perdure.streams.log import Record
from perdure.streams.memory_log import MemoryLog
from perdure.streams.processor import Kind, Table, Transaction
from perdure.streams.runner import Runner
from perdure.streams.shard import Shard
from tests.integration.stack import until
from tests.world import KEYS

INPUT = topics.COMMANDS.name


class Running:
    """A runner in a thread of its own."""

    def __init__(self, log: MemoryLog, kind: Kind, folder: Path) -> None:
        self.log, self.runner = log, Runner(log, kind, folder)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.runner.run()
        except LogTruncated as error:
            self.error = error

    def ended(self) -> BaseException | None:
        """What it has ended by itself with."""
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.error

    def goes_on(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        self.runner.stop()
        self.ended()


@contextmanager
def running(log: MemoryLog, folder: Path, kind: Kind | None = None) -> Iterator[Running]:
    it = Running(log, kind or engine_kind(log.partitions, KEYS), folder)
    try:
        yield it
    finally:
        it.close()


@pytest.fixture
def log() -> MemoryLog:
    return MemoryLog(lambda: 1_000, partitions=2)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "_REFUSED_S", 0.01)


def submit(log: MemoryLog, partition: int, name: str) -> None:
    command = {"command": "SubmitTask", "type": "noop", "task_id": f"default/{name}"}
    log.producer().append(INPUT, partition, None, json.dumps(command).encode())


def lose(log: MemoryLog, partition: int) -> None:
    """One record more, and nobody has it any longer."""
    with log._changed:
        submit(log, partition, "lost")
        log.truncate(INPUT, partition, log._data[INPUT, partition].end)


def executed(log: MemoryLog, partition: int) -> int:
    """Commands that a partition has taken in."""
    found = (codec.decode(r.value or b"") for r in log.records(topics.EVENTS.name, partition))
    return sum(isinstance(e, events.ForwardQueued | events.TaskSubmitted) for e in found)


def executes(log: MemoryLog, partition: int, name: str) -> None:
    """Until a new command of the partition is executed."""
    before = executed(log, partition)
    submit(log, partition, name)
    until(f"{name} is executed", lambda: executed(log, partition) > before)


def all_execute(log: MemoryLog) -> None:
    """Until each partition has executed its first command."""
    for partition in range(log.partitions):
        executes(log, partition, f"first{partition}")


def test_a_partition_that_is_refused_at_the_start_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two processes share the namespace, and one is refused one of its two partitions."""
    monkeypatch.setattr(lane_module, "_ALONE_S", 0.2)
    log = MemoryLog(lambda: 1_000, partitions=4)
    with running(log, tmp_path):
        all_execute(log)
    whole = list(log._data[INPUT, 0].entries)
    lose(log, 0)
    with running(log, tmp_path) as it, running(log, tmp_path):
        until("the refusal", lambda: set(it.runner.refused()) == {0})
        for partition in (1, 2, 3):
            executes(log, partition, f"second{partition}")
        assert "records were deleted before they were read" in str(it.runner.refused()[0])
        assert f"engine/0 is refused: {INPUT}/0 begins at 2" in caplog.text
        with log._changed:  # somebody puts it right
            log._data[INPUT, 0].entries[:], log._data[INPUT, 0].first = whole, 0
        executes(log, 0, "third")
        assert not it.runner.refused()
        assert it.goes_on()


def test_who_begins_alone_and_is_refused_a_partition_ends(
    log: MemoryLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loudest there is: it is all of the namespace's engine."""
    monkeypatch.setattr(lane_module, "_ALONE_S", 0.5)
    with running(log, tmp_path):
        for partition in range(2):
            executes(log, partition, f"first{partition}")
    lose(log, 0)
    with running(log, tmp_path) as it:
        assert "begins at 2, but engine has executed only up to 1" in str(it.ended())


def test_a_partition_that_is_refused_under_way_holds_up_no_other(log: MemoryLog, tmp_path: Path) -> None:
    with running(log, tmp_path) as it:
        for partition in range(2):
            executes(log, partition, f"first{partition}")
        lose(log, 0)
        until("the refusal", lambda: set(it.runner.refused()) == {0})
        executes(log, 1, "second")
        assert it.goes_on()


def test_a_log_that_loses_records_again_and_again_ends_the_runner(tmp_path: Path) -> None:
    """Each time all partitions begin again: a new process, which refuses at its start, costs the others less."""
    log = MemoryLog(lambda: 1_000, partitions=3)
    with running(log, tmp_path) as it:
        for partition in range(3):
            executes(log, partition, f"first{partition}")
        lose(log, 0)
        until("the refusal", lambda: set(it.runner.refused()) == {0})
        executes(log, 2, "second")
        lose(log, 1)
        assert isinstance(it.ended(), LogTruncated)


def test_a_runner_all_of_whose_partitions_are_refused_ends(log: MemoryLog, tmp_path: Path) -> None:
    """A process that does nothing for anybody is to be seen."""
    with running(log, tmp_path):
        all_execute(log)
    for partition in range(2):
        lose(log, partition)
    with running(log, tmp_path) as it:
        assert "begins at 2, but engine has executed only up to 1" in str(it.ended())


def test_what_was_read_before_a_refusal_is_read_again(log: MemoryLog, tmp_path: Path) -> None:
    """Records that wait in the process are not the next ones any more."""
    taken: list[int] = []
    entered, go_on, sound = threading.Event(), threading.Event(), threading.Event()

    def handle(record: Record, _: Transaction) -> None:
        if record.partition:
            return
        if record.offset == 1 and not sound.is_set():
            entered.set()
            assert go_on.wait(60)
            raise RestoreStuck("told to")
        taken.append(record.offset)

    kind = Kind("told", (INPUT,), None, lambda store, _: Table("told", store, handle, (INPUT,)))
    with running(log, tmp_path, kind) as it:
        submit(log, 0, "0")
        until("the first", lambda: taken == [0])
        submit(log, 0, "1")
        assert entered.wait(60)
        for n in (2, 3):
            submit(log, 0, str(n))
        until("they wait", lambda: len(it.runner._lanes[0]._records) == 2)
        go_on.set()
        until("the refusal", lambda: set(it.runner.refused()) == {0})
        submit(log, 0, "4")
        sound.set()
        until("all are executed", lambda: len(taken) == 5)
    assert taken == [0, 1, 2, 3, 4]


def test_a_changelog_that_lost_its_end_meanwhile_is_refused_again(
    log: MemoryLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the group said when the partition was assigned is older than what was executed since."""
    with running(log, tmp_path) as it:
        all_execute(log)
        committed = it.runner.member.committed
        monkeypatch.setattr(
            it.runner.member, "committed", lambda wanted, **_: dict.fromkeys(committed(wanted))
        )  # as at its assignment
        log.replace(topics.CHANGELOG.name)
        refuse(it, 0)
        until("the refusal", lambda: "it has lost its end" in str(it.runner.refused().get(0)))
        assert executed(log, 0) == 1, "nothing is executed again"


def refuse(it: Running, partition: int) -> None:
    """The next record of the partition cannot be gone on with, once."""
    shard_of, told = Shard.run_batch, []

    def run_batch(self: Shard, *given: Any, **more: Any) -> bool:
        if self.partition == partition and not told:
            told.append(partition)
            raise RestoreStuck("told to")
        return shard_of(self, *given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shard, "run_batch", run_batch)
        submit(it.log, partition, "refused")
        until("it was told to", lambda: told)


def test_a_group_is_told_again_what_may_never_have_arrived(
    log: MemoryLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "_TELL_S", 0.0)
    monkeypatch.setattr(runner_module, "_TELL_AGAIN_S", 0.0)
    with running(log, tmp_path):
        executes(log, 0, "first")
        until("the group knows", lambda: log.committed("engine", [(INPUT, 0)])[INPUT, 0] == 1)
        log._offsets.clear()
        until("it is told again", lambda: log.committed("engine", [(INPUT, 0)])[INPUT, 0] == 1)
