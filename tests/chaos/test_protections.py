"""Each protection matters: with it the faults of a campaign do no harm, and without it the violation is seen.

Every test runs twice, on the log in memory: with the protection, and with that one thing switched off.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from perdure.schemas import codec, topics
from perdure.schemas.events import StepCompleted, TaskEvent
from perdure.streams import attempts
from perdure.streams.engine import Engine
from perdure.streams.log import Record
from perdure.streams.processor import Out
from perdure.streams.shard import CHANGELOG_POSITION, Shard
from perdure.streams.state import TaskState
from perdure.streams.store import META
from tests.world import Crash, ScriptedWorker, World, crashed, step

protected = pytest.mark.parametrize("protected", [True, False], ids=["with", "without"])


def violations(world: World) -> list[str]:
    """What an auditor would say of the log, and of the stores beside it."""
    wrong = []
    seen: Counter[str] = Counter()
    recorded: Counter[tuple[str, str]] = Counter()
    for event in world.events():
        if isinstance(event, TaskEvent):
            seen[event.task_id] += 1
            if event.seq != seen[event.task_id]:
                wrong.append(f"{event.task_id}: event {event.seq} is its {seen[event.task_id]}.")
        if isinstance(event, StepCompleted):
            recorded[event.task_id, event.step_id] += 1
    wrong += [f"{task}: {name} is recorded {count} times" for (task, name), count in recorded.items() if count > 1]
    for partition in range(world.partitions):
        rows: dict[bytes, bytes | None] = {
            r.key or b"": r.value for r in world.log.records(topics.CHANGELOG.name, partition)
        }
        held = {key: value for key, value in world.rows(partition).items() if not key.startswith(META)}
        if held != {key: value for key, value in rows.items() if value is not None}:
            wrong.append(f"partition {partition}: store and changelog differ")
    return wrong


def verdict(world: World, protected: bool) -> None:
    """With the protection nothing is wrong, without it something is."""
    assert bool(violations(world)) is not protected, violations(world)


def working() -> tuple[World, ScriptedWorker, str]:
    """A world with a worker in the middle of a task."""
    world = World(partitions=1)
    worker = ScriptedWorker(world, beating=True).start()
    task = world.submit()
    worker.run(task)
    assert violations(world) == []
    return world, worker, task


@protected
def test_the_store_is_written_after_the_commit(protected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a death before the commit leaves a store with what never happened."""
    world, worker, task = working()
    if not protected:
        execute_all = Shard._execute_all

        def store_first(self: Shard, records: list[Record]) -> tuple[list[Out], dict[bytes, bytes | None]]:
            out, writes = execute_all(self, records)
            self._write(dict(writes))
            return out, writes

        monkeypatch.setattr(Shard, "_execute_all", store_first)
    world.fault("crash before commit")
    worker.report(worker.grant(task), step("a"))
    verdict(world, protected)


@protected
def test_an_aborted_transaction_drops_what_it_had_changed(protected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the records count as executed, and their events are missing."""
    world, worker, task = working()
    if not protected:
        monkeypatch.setattr(Engine, "rolled_back", lambda self: None)
    world.fault("aborted")
    worker.report(worker.grant(task), step("a"))
    worker.report(worker.grant(task), step("b"))
    verdict(world, protected)


@protected
def test_rows_and_their_position_are_written_as_one(protected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a death between the two leaves out what was committed, and it is executed a second time."""
    world, worker, task = working()
    write = Shard._write
    deaths = iter([True])

    def dies(self: Shard, writes: dict[bytes, bytes | None]) -> None:
        if next(deaths, False):
            if not protected:
                self._store.apply({CHANGELOG_POSITION: writes[CHANGELOG_POSITION]})
            raise Crash
        write(self, writes)

    monkeypatch.setattr(Shard, "_write", dies)
    worker.report(worker.grant(task), step("a"))
    verdict(world, protected)


@protected
def test_an_unknown_outcome_is_read_back(protected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a batch that was committed is executed a second time."""
    world, worker, task = working()
    if not protected:
        monkeypatch.setattr(Shard, "_found_committed", lambda self, last, still_mine: _only_a_new_producer(self))
    world.fault("unknown, committed")
    worker.report(worker.grant(task), step("a"))
    verdict(world, protected)


def _only_a_new_producer(shard: Shard) -> bool:
    shard._producer = shard._log.transactional(shard._id)
    return False


@protected
def test_an_older_epoch_is_fenced(protected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise what the process of an attempt that is over says late is recorded beside what the next one has done."""
    world, worker, task = working()
    old = worker.grant(task)
    worker.report(old, crashed())
    new = worker.run(task)
    assert (old.epoch, new.epoch) == (1, 2)
    if not protected:
        fault = attempts._fault

        def no_fence(t: TaskState | None, session: str, entry: Any, token_holds: bool) -> str | None:
            found = fault(t, session, entry, token_holds)
            return None if found == "stale_epoch" else found

        monkeypatch.setattr(attempts, "_fault", no_fence)
    worker.report(old, codec.replace(step("b"), seq=2))  # as the new attempt would go on
    accepted = [e for e in world.of_kind(StepCompleted, task) if e.name == "b"]
    assert bool(accepted) is not protected, "a report of the first epoch, after the second was granted"
