"""Sessions of workers: registration, beats, and how silence becomes the loss of a lease."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from perdure.schemas import commands, events, inbox, limits
from perdure.schemas.codec import replace
from perdure.schemas.rows import Session
from perdure.schemas.signing import signed
from tests.world import HOUR, KEYS, MINUTE, SECOND, ScriptedWorker, World, completed, declined, stopped

LEASE, BEAT = limits.LEASE_MS, limits.BEAT_MS


def row(worker: ScriptedWorker) -> Session | None:
    """The session as the engine sees it."""
    return worker.world.of_engine(worker.partition).state.sessions.get(worker.session)


def rejected(world: World) -> list[str]:
    return [e.why for e in world.of_kind(events.ReportRejected)]


def losses(world: World) -> list[str]:
    return [e.why for e in world.of_kind(events.AttemptLost)]


def many(world: World, count: int, **fields: Any) -> list[str]:
    """Many tasks of the default queue."""
    found = []
    for first in range(0, count, limits.BATCH_TASKS_MAX):
        numbers = range(first, min(count, first + limits.BATCH_TASKS_MAX))
        tasks = [
            commands.SubmitTask(command_id=f"c{n}", task_id=f"default/many{n}", type="noop", **fields) for n in numbers
        ]
        found += [t.task_id for t in tasks]
        world.send(commands.SubmitBatch(command_id=f"many{first}", tasks=tasks), world.partition_of("default/"))
    return found


# Registration --------------------------------------------------------------------------------------------------------


def test_a_repeated_announcement_changes_nothing() -> None:
    world = World()
    worker = ScriptedWorker(world).start()
    world.submit()
    before = row(worker)
    worker.say(worker.started())
    worker.say(replace(worker.started(), slots=50))
    assert row(worker) == before
    assert not rejected(world)


def test_an_announcement_that_somebody_copies_to_another_partition_ends_no_session_there() -> None:
    world = World()
    here = ScriptedWorker(world, session="s1").start()
    queue = next(queue for queue in ("a", "b", "c", "d") if world.partition_of(f"{queue}/") != here.partition)
    there = ScriptedWorker(world, session="s2", queues=(queue,)).start()
    world.send(signed(there.started(), *KEYS.newest_worker()), here.partition)
    before = row(here)
    assert before is not None
    assert before.state == "live"
    assert [(e.why, e.detail) for e in world.of_kind(events.ReportRejected)] == [
        ("illegal", f"{queue} is no queue of this partition")
    ]
    assert not world.inbox(here.session, inbox.EndSession)


def test_a_newer_session_of_the_same_worker_ends_the_older_one_at_once() -> None:
    world = World()
    older = ScriptedWorker(world, slots=1).start()
    task_id = world.submit()
    grant = older.run()
    newer = older.restart()
    assert losses(world) == ["superseded"]
    assert (newer.grant().task_id, newer.grant().epoch) == (task_id, 2)
    assert [m.why for m in world.inbox(older.session, inbox.EndSession)] == ["superseded"]
    older.report(grant, completed(1))
    older.beat()
    older.stop()
    assert rejected(world) == ["stale_session"] * 3
    assert world.task(task_id).state == "RUNNING"


def test_an_older_session_that_comes_late_is_refused_and_told() -> None:
    world = World()
    older = ScriptedWorker(world, session="s1")
    newer = ScriptedWorker(world, session="s2", slots=1).start()
    world.submit()
    older.start()
    assert row(older) is None
    assert row(newer) is not None
    assert rejected(world) == ["stale_session"]
    assert [m.why for m in world.inbox("s1", inbox.EndSession)] == ["superseded"]
    assert not losses(world)


def test_session_records_with_a_false_signature_are_refused() -> None:
    world = World()
    worker = ScriptedWorker(world)
    forged = [
        worker.started(),
        replace(worker.started(), key_id="w1", hmac=b"x" * 32),
        replace(worker.started(), key_id="nobody", hmac=b"x" * 32),
        commands.WorkerBeat(session=worker.session, grants_seen=0, free=1, key_id="w1", hmac=bytes(32)),
        commands.WorkerStopping(session=worker.session),
    ]
    for message in forged:
        world.send(message, worker.partition)
    assert rejected(world) == ["not_authentic"] * len(forged)
    assert row(worker) is None
    assert not world.quarantined()


def test_a_beat_of_an_unknown_session_is_refused_and_it_is_told_to_end() -> None:
    world = World()
    worker = ScriptedWorker(world)
    worker.beat()
    worker.stop()
    assert rejected(world) == ["stale_session"] * 2
    assert [m.why for m in world.inbox(worker.session, inbox.EndSession)] == ["expired"]


# Leases --------------------------------------------------------------------------------------------------------------


def test_a_lease_ends_with_the_second_tick_that_finds_it_silent() -> None:
    world = World()
    worker = ScriptedWorker(world, slots=1).start()
    task_id = world.submit()
    worker.run()
    world.advance(LEASE - 100)
    assert row(worker) is not None
    assert row(worker).state == "live"  # type: ignore[union-attr]
    world.advance(200)
    assert row(worker).state == "suspect"  # type: ignore[union-attr]
    assert "not been heard of" in world.status(task_id)["why"]
    world.advance(BEAT - 200)
    assert world.task(task_id).state == "RUNNING"
    world.advance(300)
    assert (world.task(task_id).state, losses(world)) == ("PENDING", ["session_ended"])
    assert row(worker) is None
    assert [m.why for m in world.inbox(worker.session, inbox.EndSession)] == ["expired"]


def test_a_beat_between_the_two_looks_saves_the_lease() -> None:
    world = World()
    worker = ScriptedWorker(world, slots=1).start()
    world.submit()
    worker.run()
    for _ in range(5):
        world.advance(LEASE + BEAT - 200)
        assert row(worker).state == "suspect"  # type: ignore[union-attr]
        worker.beat()
        assert row(worker).state == "live"  # type: ignore[union-attr]
    assert not losses(world)


def test_a_suspect_gets_no_work_until_it_beats() -> None:
    world = World()
    worker = ScriptedWorker(world).start()
    world.advance(LEASE + 100)
    world.submit()
    assert not worker.grants()
    worker.beat()
    assert worker.grants()


def test_a_late_tick_restarts_the_leases_once_between_two_beats() -> None:
    world = World()
    worker = ScriptedWorker(world, slots=1).start()
    world.submit()
    worker.run()
    silent = LEASE + 3 * SECOND
    world.now += silent  # no tick all the while
    world.pump()
    assert row(worker).state == "live"  # type: ignore[union-attr]
    world.advance(LEASE - SECOND)
    assert not losses(world)
    world.now += silent
    world.pump()
    world.advance(BEAT + 200)
    assert losses(world) == ["session_ended"]


@pytest.mark.parametrize("heard", [ScriptedWorker.beat, ScriptedWorker.stop])
def test_what_a_worker_says_allows_another_restart(heard: Callable[[ScriptedWorker], None]) -> None:
    world = World()
    worker = ScriptedWorker(world, slots=1).start()
    world.submit()
    worker.run()
    for _ in range(3):
        world.now += LEASE + 3 * SECOND
        world.pump()
        assert row(worker).state != "suspect"  # type: ignore[union-attr]
        world.advance(LEASE - SECOND)
        heard(worker)
    assert not losses(world)


def test_a_worker_that_stops_after_the_second_outage_has_a_whole_term_to_hand_back() -> None:
    world = World()
    worker = ScriptedWorker(world, slots=1).start()
    world.submit()
    worker.run()
    world.now += 3 * HOUR
    world.pump()
    world.now += 10 * MINUTE
    worker.stop()  # the first that anybody says
    world.advance(LEASE + BEAT - SECOND)
    assert not losses(world)
    world.advance(2 * SECOND)
    assert losses(world) == ["session_ended"]


@pytest.mark.parametrize("stores", ["kept", "empty"])
def test_leases_live_through_a_restart_of_the_engine(stores: str) -> None:
    world = World()
    worker = ScriptedWorker(world, slots=1).start()
    task_id = world.submit()
    grant = worker.run()
    world.restart(stores)
    world.advance(LEASE - SECOND)
    worker.beat()
    worker.report(grant, completed(1))
    assert world.task(task_id).state == "COMPLETED"
    assert not rejected(world)


def test_the_silence_of_one_worker_costs_the_others_nothing() -> None:
    world = World()
    silent = ScriptedWorker(world, "w1", slots=1).start()
    beating = ScriptedWorker(world, "w2", slots=2, beating=True).start()
    tasks = [world.submit() for _ in range(3)]
    silent.run()
    for task_id in {g.task_id for g in beating.grants()}:
        beating.run(task_id)
    world.advance(MINUTE)
    assert losses(world) == ["session_ended"]
    assert [world.task(t).state for t in tasks].count("RUNNING") == 2


# Grants that are not seen, not started, declined ---------------------------------------------------------------------


def beat_on(world: World, worker: ScriptedWorker, beats: int) -> None:
    """So many beats that have seen no grant."""
    for _ in range(beats):
        world.advance(BEAT)
        worker.beat(grants_seen=0)


def test_a_grant_that_is_not_seen_within_a_lease_is_lost_although_beats_arrive() -> None:
    world = World()
    worker = ScriptedWorker(world, slots=1).start()
    task_id = world.submit()
    beat_on(world, worker, LEASE // BEAT)
    assert not losses(world)
    beat_on(world, worker, LEASE // BEAT + 2)
    assert losses(world) == ["unseen"]
    assert world.task(task_id).epoch == 2


@pytest.mark.parametrize("silent", [20 * SECOND, 50 * SECOND])
def test_after_a_silence_a_grant_has_a_whole_lease_again_to_be_seen(silent: int) -> None:
    """The reader of a worker comes back later than what it says does."""
    world = World()
    worker = ScriptedWorker(world, slots=1).start()
    world.submit()
    worker.beat(grants_seen=0)
    world.advance(1_100)
    world.now += silent
    for _ in range(4):
        worker.beat(grants_seen=0)
        world.advance(BEAT)
    worker.beat(grants_seen=0)
    assert not losses(world)


def test_beats_cannot_see_more_grants_than_were_given() -> None:
    world = World()
    worker = ScriptedWorker(world, slots=1).start()
    worker.beat(grants_seen=1_000_000)
    world.submit()
    beat_on(world, worker, 2 * LEASE // BEAT + 2)
    assert losses(world) == ["unseen"]


@pytest.mark.parametrize("batch", [1, 100])
def test_what_an_engine_grants_late_is_not_held_against_beats_that_came_before(batch: int) -> None:
    """It was away for minutes: the worker could not see what was not given yet. One deadline for the start is over."""
    world = World(1, batch=batch)
    worker = ScriptedWorker(world, slots=1).start()
    task_id = world.new_id("t")
    world.append(commands.SubmitTask(command_id="c", task_id=f"default/{task_id}", type="noop", queue="default"), 0)
    for _ in range(150):
        world.now += BEAT
        data = signed(commands.WorkerBeat(session=worker.session, grants_seen=0, free=1), *KEYS.newest_worker())
        world.append(data, 0)
    world.advance(LEASE)
    assert losses(world) == ["not_started"]
    worker.run()
    assert world.of_kind(events.AttemptStarted)[-1].epoch == 2


def test_a_declined_grant_returns_at_no_cost_and_is_not_given_again_before_the_next_beat() -> None:
    world = World()
    worker = ScriptedWorker(world, slots=2).start()
    task_id = world.submit()
    later = world.submit()
    world.do(commands.CancelTask, later)
    worker.report(worker.grant(later), stopped("cancelled"))
    worker.report(worker.grant(task_id), declined())
    t = world.task(task_id)
    assert (t.state, t.attempt, t.crashes, t.sessions_lost) == ("PENDING", 1, 0, 0)
    assert len(worker.grants()) == 2
    worker.beat()
    assert len(worker.grants()) == 3
    assert (worker.grant().task_id, worker.grant().attempt, worker.grant().epoch) == (task_id, 1, 2)


def test_a_declined_grant_goes_to_another_worker_at_once_and_keeps_its_place() -> None:
    world = World()
    full = ScriptedWorker(world, "w1", slots=2).start()
    first, second = world.submit(), world.submit()
    full.report(full.grant(first), declined())
    other = ScriptedWorker(world, "w2", slots=1).start()
    assert other.grant().task_id == first
    assert world.task(second).worker_id == "w1"


# Workers that stop ---------------------------------------------------------------------------------------------------


def test_a_stopping_worker_gets_no_more_grants_and_its_tasks_drain() -> None:
    world = World()
    worker = ScriptedWorker(world, slots=2).start()
    task_id = world.submit()
    worker.run()
    worker.stop()
    worker.stop()
    assert world.task(task_id).stopping == "draining"
    assert len(world.of_kind(events.DrainRequested)) == 1
    world.submit()
    worker.beat()
    assert len(worker.grants()) == 1


def test_a_stopping_worker_that_falls_silent_loses_its_leases_like_any_other() -> None:
    world = World()
    worker = ScriptedWorker(world, slots=1).start()
    task_id = world.submit()
    worker.run()
    worker.stop()
    world.advance(LEASE + 2 * BEAT)
    assert (world.task(task_id).state, losses(world)) == ("PENDING", ["session_ended"])


# Many leases ---------------------------------------------------------------------------------------------------------

MANY = 2 * limits.CHUNK + 20


@pytest.mark.parametrize("how", ["expired", "superseded", "draining"])
def test_many_leases_end_in_chunks_that_each_fit_a_decision(how: str) -> None:
    world = World()
    timeouts = {"run_timeout": MINUTE, "queue_timeout": MINUTE, "total_timeout": MINUTE}
    tasks = many(world, MANY, **timeouts)
    worker = ScriptedWorker(world, slots=MANY).start()
    world.advance(SECOND)
    assert len(worker.grants()) == MANY
    for grant in worker.grants():
        worker.report(grant, completed(1)) if grant.task_id == tasks[0] else None
    keys: list[int] = []
    state = world.of_engine(worker.partition).state
    mark = state.mark
    state.mark = lambda: (keys.append(len({(u[0], u[1]) for u in state._undo})), mark())  # type: ignore[method-assign]
    if how == "expired":
        world.advance(LEASE + 2 * BEAT)
    elif how == "superseded":
        worker.slots = 1
        newer = worker.restart()
        world.advance(SECOND)
        assert len(newer.grants()) == 1
    else:
        worker.stop()
        world.advance(SECOND)
    keys.append(len({(u[0], u[1]) for u in state._undo}))
    if how == "draining":
        assert sum(world.task(t).stopping == "draining" for t in tasks) == MANY - 1
        assert row(worker) is not None
    else:
        assert row(worker) is None
        assert len(losses(world)) == MANY - 1
        assert sum(world.task(t).state == "PENDING" for t in tasks) >= MANY - 2
    assert max(keys) <= limits.DECISION_KEYS
    assert not world.quarantined()


def test_a_session_that_is_being_ended_in_chunks_is_over_for_its_worker_at_once() -> None:
    world = World()
    tasks = many(world, MANY)
    worker = ScriptedWorker(world, slots=MANY).start()
    world.advance(SECOND)
    where = worker.partition
    newer = replace(worker.started(), session="z")
    world.append(signed(newer, *KEYS.newest_worker()), where)
    world.append(worker.batch(worker.grants()[-1], completed(1)), where)
    world.append(signed(worker.started(), *KEYS.newest_worker()), where)
    world.advance(SECOND)
    assert rejected(world)[0] == "stale_session"
    assert {world.task(t).state for t in tasks} == {"RUNNING"}
    assert {world.task(t).session for t in tasks} == {"z"}
    assert list(world.of_engine(where).state.sessions) == ["z"]
