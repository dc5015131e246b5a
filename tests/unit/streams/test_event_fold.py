"""The fold of task-events: the durable rows and no others; what the log has lost is named."""

from __future__ import annotations

from typing import Any

import pytest

from perdure.schemas.errors import EventsIncomplete
from perdure.streams import event_fold, tables
from perdure.streams.event_fold import EventFold, fold_events
from perdure.streams.store import MemoryStore
from tests.unit.streams.test_evolve import a_life, durable
from tests.world import HOUR, ScriptedWorker, World, completed


def folded(found: list[Any], partition: int = 0, partitions: int = 2) -> tuple[EventFold, dict[bytes, bytes]]:
    store = MemoryStore()
    fold = fold_events(found, store, partition, partitions)
    return fold, dict(store.scan(b""))


@pytest.mark.parametrize("batch", [1, 3, 1_000])
def test_the_rows_are_the_same_however_often_they_are_written(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_fold, "BATCH", batch)
    world = World()
    a_life(world)
    for partition in range(world.partitions):
        fold, rows = folded(world.events(partition=partition), partition)
        assert rows == durable(world, partition)
        fold.require_whole(0)


def test_a_fold_goes_on_where_another_has_left_its_store() -> None:
    world = World()
    a_life(world)
    found = world.events(partition=0)
    for cut in range(0, len(found), 7):
        store = MemoryStore()
        fold_events(found[:cut], store, 0, world.partitions)
        fold_events(found[cut:], store, 0, world.partitions)
        assert dict(store.scan(b"")) == durable(world, 0)


def two_tasks(world: World) -> tuple[str, str]:
    """One that has ended, then one that waits."""
    worker = ScriptedWorker(world, slots=1).start()
    ended = world.submit()
    worker.report(worker.run(), completed(1))
    return ended, world.submit(not_before=world.now + HOUR)


def test_an_open_task_without_its_beginning_is_named_and_passed_over() -> None:
    world = World()
    _, waiting = two_tasks(world)
    found = world.events(partition=world.partition_of(waiting))
    cut = next(n for n, e in enumerate(found) if getattr(e, "task_id", None) == waiting) + 1
    fold, rows = folded(found[cut:], world.partition_of(waiting))
    assert fold.headless[waiting].first == 2
    assert not any(key.startswith(tables.task(waiting)) for key in rows)
    with pytest.raises(EventsIncomplete, match=rf"task-events/\d.*{waiting} \(from event 2\)"):
        fold.require_whole(cut)


def test_a_task_that_has_ended_is_not_missed_but_a_cut_log_is_never_whole() -> None:
    world = World()
    ended, waiting = two_tasks(world)
    found = world.events(partition=world.partition_of(ended))
    cut = next(n for n, e in enumerate(found) if getattr(e, "task_id", None) == ended) + 1
    fold, _ = folded(found[cut:], world.partition_of(ended))
    assert not fold.headless[ended].open
    assert fold.state.task(waiting) is not None
    with pytest.raises(EventsIncomplete, match=f"begins at offset {cut}"):
        fold.require_whole(cut)


def test_a_retired_task_is_forgotten_and_its_id_may_come_again() -> None:
    world = World()
    ended, _ = two_tasks(world)
    world.advance(100 * 24 * HOUR)
    assert not world.known(ended)
    world.submit(task_id=ended)
    found = world.events(partition=world.partition_of(ended))
    cut = next(n for n, e in enumerate(found) if getattr(e, "task_id", None) == ended) + 1
    fold, _ = folded(found[cut:], world.partition_of(ended))
    assert ended not in fold.headless
    assert fold.state.known(ended).seq == world.task(ended).seq


def test_an_event_missing_in_between_is_named() -> None:
    world = World()
    _, waiting = two_tasks(world)
    for gone in range(1, len(found := world.events(partition=world.partition_of(waiting))) - 1):
        kind = type(found[gone]).__name__
        if kind in ("TaskQueued", "TaskGranted", "ConfigApplied", "AttemptStarted"):
            with pytest.raises(EventsIncomplete, match=r"task-events/\d does not hold together at the event"):
                folded(found[:gone] + found[gone + 1 :], world.partition_of(waiting))
