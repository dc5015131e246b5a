"""When a host sends ticks, and what it says in them."""

from __future__ import annotations

import pytest

from perdure.schemas import commands, events
from perdure.streams import tables, timers
from tests.world import SECOND, ScriptedWorker, World


def test_a_grant_to_a_worker_that_has_gone_silent_gives_it_no_second_term() -> None:
    """What the grant makes due lies before it. Taken for the lateness of the tick, it restarted every lease."""
    world = World(partitions=1)
    worker = ScriptedWorker(world, slots=2).start()
    first = world.submit()
    worker.beat()
    world.advance(8 * SECOND)
    second = world.submit()
    world.advance(5 * SECOND)
    assert [(e.task_id, e.why) for e in world.of_kind(events.AttemptLost)] == [
        (first, "session_ended"), (second, "session_ended"),
    ]  # fmt: skip


def test_a_tick_that_could_not_be_written_in_time_is_late() -> None:
    """As after an outage, in which nobody could beat. What was due in it is a start, long before any lease is over."""
    world = World(partitions=1)
    worker = ScriptedWorker(world).start()
    world.submit()
    worker.beat()
    world.submit(not_before=world.now + 3 * SECOND)
    world.now += 9 * SECOND
    world.advance(8 * SECOND)
    assert world.of_kind(events.AttemptLost) == []
    world.advance(8 * SECOND)
    assert world.of_kind(events.AttemptLost) != []


def test_a_host_whose_clock_is_ahead_sends_no_more_ticks_for_it() -> None:
    world = World(partitions=1)
    world.log.clock = lambda: world.now - 20 * SECOND
    ScriptedWorker(world, beating=True).start()
    world.advance(5 * SECOND)
    before = len(ticks(world))
    world.advance(60 * SECOND)
    assert len(ticks(world)) - before < 60 / 2


def test_a_tick_that_fails_is_tried_again_once_a_second_until_the_defect_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it should have done stays due, and each trial is a record in quarantine for ever."""
    world = World(partitions=1)
    worker = ScriptedWorker(world, beating=True).start()
    task = world.submit(not_before=world.now + 3 * SECOND)
    with monkeypatch.context() as broken:
        broken.setitem(timers._KINDS, tables.NOT_BEFORE, lambda *_: 1 / 0)
        world.advance(23 * SECOND)
    causes = [q.cause for q in world.quarantined()]
    assert set(causes) == {"defect"}
    assert 15 <= len(causes) <= 25
    world.advance(2 * SECOND)
    assert [grant.task_id for grant in worker.grants()] == [task]


def ticks(world: World) -> list[commands.Tick]:
    return [m for r in world.log.records("task-commands") if isinstance(m := world.decode(r), commands.Tick)]
