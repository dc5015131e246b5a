"""Who is granted what: slots, queues, types, the most idle first; and how much a worker is told."""

from __future__ import annotations

from collections import Counter

from perdure.schemas import commands, ids, limits
from tests.world import SECOND, ScriptedWorker, World, completed, stopped


def test_never_more_grants_than_slots() -> None:
    world = World()
    worker = ScriptedWorker(world, slots=3).start()
    for _ in range(10):
        world.submit()
    assert len(worker.grants()) == 3
    worker.report(worker.grants()[0], completed())
    assert len(worker.grants()) == 4


def test_a_slot_that_was_taken_at_the_last_beat_is_filled_as_soon_as_it_is_free() -> None:
    world = World()
    worker = ScriptedWorker(world, slots=1).start()
    first, second = world.submit(), world.submit()
    worker.run(first)
    worker.say(commands.WorkerBeat(session=worker.session, grants_seen=1, free=0))
    worker.report(worker.grant(first), completed())
    assert worker.grant(second)


def test_a_beat_says_how_many_slots_there_are_from_now_on() -> None:
    world = World()
    worker = ScriptedWorker(world, slots=2).start()
    tasks = [world.submit() for _ in range(6)]

    def beat(slots: int) -> int:
        seen = len(worker.grants())
        worker.say(commands.WorkerBeat(session=worker.session, grants_seen=seen, free=1, slots=slots))
        return len(worker.grants())

    assert (len(worker.grants()), beat(4), beat(0), beat(-7), beat(3)) == (2, 4, 4, 4, 4)
    for task_id in tasks[:2]:
        worker.report(worker.grant(task_id), completed())
    assert len(worker.grants()) == 5, "three at a time from now on"


def test_the_most_idle_worker_is_served_first() -> None:
    world = World()
    small, large = ScriptedWorker(world, "w1", slots=2).start(), ScriptedWorker(world, "w2", slots=6).start()
    for _ in range(6):
        world.submit()
    assert (len(small.grants()), len(large.grants())) == (1, 5)


def test_a_worker_gets_only_its_queues_and_types() -> None:
    world = World(types={"a": {}, "b": {}})
    other = next(n for i in range(50) if ids.partition_of(n := f"o{i}", 2) == ids.partition_of("default", 2))
    for queue in ("default", other):
        for task_type in ("a", "b"):
            world.submit(task_type, f"{queue}/{task_type}", queue=queue)
    workers = {
        (queue, kind): ScriptedWorker(world, f"w{queue}{kind}", types={kind: 0}, queues=(queue,), slots=9).start()
        for queue in ("default", other)
        for kind in ("a", "b")
    }
    for (queue, kind), worker in workers.items():
        assert [g.task_id for g in worker.grants()] == [f"{queue}/{kind}"]


def test_priority_holds_across_the_types_and_queues_of_a_worker() -> None:
    world = World(types={"a": {}, "b": {}})
    low, high, later = world.submit("a", priority=1), world.submit("b", priority=8), world.submit("a", priority=8)
    worker = ScriptedWorker(world, types={"a": 0, "b": 0}, slots=1).start()
    order = []
    for _ in range(3):
        order.append(worker.run().task_id)
        worker.report(worker.grant(), completed())
    assert order == [high, later, low]


def test_more_grants_than_one_record_may_give_are_given_all_the_same() -> None:
    world = World()
    count = 250
    for first in range(0, count, 50):
        tasks = [
            commands.SubmitTask(command_id=f"c{n}", task_id=f"default/t{n:04}", type="noop")
            for n in range(first, first + 50)
        ]
        world.send(commands.SubmitBatch(command_id=f"b{first}", tasks=tasks), world.partition_of("default/"))
    worker = ScriptedWorker(world, slots=1_000).start()
    world.advance(SECOND)
    assert [g.task_id for g in worker.grants()] == [f"default/t{n:04}" for n in range(count)]
    assert [g.grant for g in worker.grants()] == list(range(1, count + 1))


def test_grants_go_on_after_a_restart_without_any_new_record() -> None:
    world = World()
    world.submit()
    world.restart("empty")
    worker = ScriptedWorker(world).start()
    assert len(worker.grants()) == 1
    world.restart("empty")
    world.pump()
    assert Counter(g.epoch for g in worker.grants()) == {1: 1}


def test_a_grant_says_what_a_worker_needs() -> None:
    world = World(types={"noop": {"run_timeout": 60_000, "total_timeout": 3_600_000, "cancel_grace": 7}})
    worker = ScriptedWorker(world, slots=1).start()
    task_id = world.submit(input=b'{"a":1}', priority=7, labels={"k": "v"}, resources=b'{"cpu":1}')
    grant = worker.grant()
    assert (grant.worker_id, grant.session, grant.grant, grant.task_id) == ("w1", worker.session, 1, task_id)
    assert (grant.input, grant.priority, grant.labels, grant.resources) == (b'{"a":1}', 7, {"k": "v"}, b'{"cpu":1}')
    assert (grant.attempt, grant.epoch, grant.steps_total, grant.checkpoint) == (1, 1, 0, None)
    assert (grant.deadline, grant.run_timeout_left) == (world.now + 3_600_000, 60_000)
    assert grant.policy.cancel_grace == 7
    assert len(grant.token) == 32
    worker.report(worker.run(), stopped("drained"))
    assert worker.grant().token != grant.token


def test_no_slots_no_grants() -> None:
    world = World()
    workers = [ScriptedWorker(world, f"w{n}", slots=n).start() for n in (0, -5)]
    world.submit()
    assert not any(w.grants() for w in workers)
    assert limits.DEFAULT_PRIORITY == 5
