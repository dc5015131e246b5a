"""When a host sends ticks, and what it says in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from perdure.schemas import codec, commands, events, inbox, limits
from perdure.schemas.errors import DecodeError, InfrastructureError
from perdure.schemas.reports import ReportBatch
from perdure.schemas.signing import signed
from perdure.streams import attempts, leases, policies, ready_queue, tables, task_lifecycle, timers
from perdure.streams.decision import Moment, Outputs
from perdure.streams.state import State
from perdure.streams.timers import bind_tasks
from tests.auditing import assert_sound
from tests.world import KEYS, MINUTE, SECOND, ScriptedWorker, World, begun, completed, step

SOFT = tables.SOFT_TIMERS


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


def test_what_a_tick_fails_at_is_left_out_and_all_else_that_is_due_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """One task that the engine has a defect with costs the others of its partition a tick, each ten minutes."""
    world = World(partitions=1)
    worker = ScriptedWorker(world, slots=9, beating=True).start()
    broken = [world.submit(not_before=world.now + 3 * SECOND) for _ in range(3)]
    sound = world.submit(not_before=world.now + 4 * SECOND)
    with failing_at(monkeypatch, *broken):
        world.advance(5 * SECOND)
        assert [grant.task_id for grant in worker.grants()] == [sound]
        advance_with_few_ticks(world, 8 * MINUTE)
        assert named(world, *broken) == dict.fromkeys(broken, 1)
        world.advance(3 * MINUTE)
        assert named(world, *broken) == dict.fromkeys(broken, 2)
    world.advance(10 * MINUTE)
    assert {grant.task_id for grant in worker.grants()} == {sound, *broken}


def test_another_process_tries_at_once_what_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(partitions=1)
    worker = ScriptedWorker(world, beating=True).start()
    task = world.submit(not_before=world.now + 3 * SECOND)
    with failing_at(monkeypatch, task):
        world.advance(5 * SECOND)
    assert not worker.grants()
    world.restart("kept")
    world.advance(SECOND)
    assert [grant.task_id for grant in worker.grants()] == [task]


def test_a_session_that_cannot_be_ended_keeps_no_other_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(partitions=1)
    silent = [ScriptedWorker(world, f"w{n}", slots=1).start() for n in range(2)]
    world.submit()
    world.submit()
    stuck, sound = (worker.run().task_id for worker in silent)
    with failing_at(monkeypatch, stuck):
        world.advance(20 * SECOND)
        assert [e.task_id for e in world.of_kind(events.AttemptLost)] == [sound]
    world.advance(11 * MINUTE)
    assert [e.task_id for e in world.of_kind(events.AttemptLost)] == [sound, stuck]


@pytest.mark.parametrize("how", ["silence", "a successor"])
def test_a_task_that_cannot_be_lost_keeps_no_other_of_its_session_waiting(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    world = World(partitions=1)
    older = ScriptedWorker(world, slots=3).start()
    tasks = [world.submit() for _ in range(3)]
    for task in tasks:
        older.run(task)
    stuck = tasks[1]
    with failing_at(monkeypatch, stuck):
        if how == "silence":
            world.advance(20 * SECOND)
            heir = ScriptedWorker(world, "w2", slots=3, beating=True).start()
        else:
            older.beating = True
            heir = older.restart()
        assert {grant.task_id for grant in heir.grants()} == {*tasks} - {stuck}
        advance_with_few_ticks(world, 8 * MINUTE)
        assert named(world, stuck) == {stuck: 1}
    world.advance(3 * MINUTE)
    assert {grant.task_id for grant in heir.grants()} == {*tasks}
    assert older.session not in world.of_engine(0).state.sessions


def test_an_unseen_grant_that_cannot_be_lost_ends_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(partitions=1)
    worker = ScriptedWorker(world, slots=3).start()
    seen, stuck, unseen = (world.submit() for _ in range(3))
    with failing_at(monkeypatch, stuck):
        for _ in range(15):
            worker.beat(grants_seen=1)
            world.advance(2 * SECOND)
        lost = {e.task_id: e.why for e in world.of_kind(events.AttemptLost)}
        assert lost == {unseen: "unseen"}
        assert world.task(seen).state == "RUNNING"
        assert named(world, stuck) == {stuck: 1}


def test_a_task_that_cannot_be_bound_keeps_no_other_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(partitions=1)
    tasks = [world.submit("odd") for _ in range(3)]
    bind = policies.bind
    with monkeypatch.context() as broken:
        broken.setattr(policies, "bind", lambda s, m, task: (raising if task == tasks[1] else bind)(s, m, task))
        world.configure_type("odd")
        world.advance(SECOND)
        assert [e.task_id for e in world.of_kind(events.TaskPolicyBound)] == [tasks[0], tasks[2]]
    worker = ScriptedWorker(world, types={"odd": 0}, slots=3).start()
    assert [grant.task_id for grant in worker.grants()] == tasks
    assert world.of_engine(0).state.spec(tasks[1]).policy is not None, "bound with its grant"


def test_a_task_that_cannot_be_drained_keeps_no_other_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(partitions=1)
    worker = ScriptedWorker(world, slots=3).start()
    tasks = [world.submit() for _ in range(3)]
    drain = leases._drain
    with monkeypatch.context() as broken:
        broken.setattr(leases, "_drain", lambda s, m, task: (raising if task == tasks[1] else drain)(s, m, task))
        worker.stop()
    assert [world.task(task).stopping for task in tasks] == ["draining", "none", "draining"]


@pytest.mark.parametrize("error", [ZeroDivisionError, DecodeError])
def test_reports_that_cannot_be_taken_in_cost_their_own_attempt_alone(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """What several attempts have to say comes as one record. A row that cannot be read does not make it unreadable."""

    def raising(*_: object) -> Outputs:
        raise error("a defect")
        yield

    world = World(partitions=1)
    worker = ScriptedWorker(world, slots=3).start()
    tasks = [world.submit() for _ in range(3)]
    said = [codec.decode_as(ReportBatch, worker.batch(worker.grant(task), begun(), step("a"))) for task in tasks]
    stranger = codec.replace(said[0].entries[0], token=b"x" * len(said[0].entries[0].token))
    batch = ReportBatch(session=worker.session, entries=[*(b.entries[0] for b in said), stranger])
    take = attempts._step
    with monkeypatch.context() as broken:
        broken.setattr(attempts, "_step", lambda s, m, task, r: (raising if task == tasks[1] else take)(s, m, task, r))
        world.send(signed(batch, *KEYS.newest_worker()), 0)
    assert [e.task_id for e in world.of_kind(events.StepCompleted)] == [tasks[0], tasks[2]]
    assert [world.task(task).started for task in tasks] == [True, False, True]
    assert [(e.task_id, e.why) for e in world.of_kind(events.AttemptLost)] == [(tasks[1], "crashed")]
    assert [m.task_id for m in world.inbox(worker.session, inbox.RevokeAttempt)] == [tasks[1]]
    assert world.task(tasks[1]).epoch == 2, "granted again"
    (record,) = world.quarantined()
    assert record.cause == "defect"
    assert record.detail.startswith(f"{tasks[1]}: ")
    assert [e.why for e in world.of_kind(events.ReportRejected)] == ["token"]
    assert_sound(world.log)
    again = ReportBatch(session=worker.session, entries=batch.entries[:3])
    world.send(signed(again, *KEYS.newest_worker()), 0)  # its append seemed to have failed: what counted is repeated
    for task in (tasks[0], tasks[2]):
        worker.report(worker.grant(task), completed())
        assert world.task(task).state == "COMPLETED"
    assert_sound(world.log)


def test_an_end_that_can_never_be_taken_in_is_a_dead_letter_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker has given the slot away and says nothing more: nobody else would notice."""
    world = World(partitions=1)
    worker = ScriptedWorker(world, slots=1).start()
    task = world.submit()
    with monkeypatch.context() as broken:
        broken.setattr(attempts, "_completed", raising)
        for _ in range(limits.CRASHES_MAX):
            worker.report(worker.grant(task), begun(), completed())
    assert world.of_kind(events.TaskFailed)[0].why == "crash_loop"
    assert_sound(world.log)


def test_a_defect_with_very_many_rows_leaves_room_for_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is tried once in ten minutes, some hundred with each tick, and few records of it are set aside."""
    world = World(partitions=1)
    worker = ScriptedWorker(world, slots=9, beating=True).start()
    monkeypatch.setattr(limits, "TRACEBACK_MAX", 1_600)
    monkeypatch.setattr(limits, "TEXT_MAX", 100)
    broken = [world.submit(not_before=world.now + 3 * SECOND) for _ in range(450)]
    sound = world.submit(not_before=world.now + 4 * SECOND)
    with failing_at(monkeypatch, *broken):
        world.advance(5 * SECOND)
        assert [grant.task_id for grant in worker.grants()] == [sound]
        advance_with_few_ticks(world, 8 * MINUTE)
        found = world.quarantined()
        assert 5 <= len(found) <= 10
        assert all(len(record.detail) <= limits.TRACEBACK_MAX for record in found)
        assert found[0].detail.endswith("more")


def test_a_cursor_that_cannot_go_on_holds_no_timer_up(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(partitions=1)
    worker = ScriptedWorker(world, beating=True).start()
    for _ in range(timers.BINDS_AT_ONCE + 1):
        world.submit("odd")
    task = world.submit(not_before=world.now + 3 * SECOND)
    with monkeypatch.context() as broken:
        broken.setattr(timers, "bind_tasks", bound_in_part)
        world.configure_type("odd")
        world.advance(5 * SECOND)
    assert [q.cause for q in world.quarantined()] == ["defect"]
    assert task in [grant.task_id for grant in worker.grants()]


@pytest.mark.parametrize("first", [True, False], ids=["before all else", "behind what it did"])
def test_a_tick_that_fails_at_nothing_of_its_own_is_tried_again_once_a_second(
    monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """What it should have done stays due, and each trial is a record in quarantine for ever."""
    world = World(partitions=1)
    worker = ScriptedWorker(world, slots=2, beating=True).start()
    stuck = world.submit(not_before=world.now + 3 * SECOND)
    sound = world.submit(not_before=world.now + 3 * SECOND)
    due = timers._due
    with failing_at(monkeypatch, stuck), monkeypatch.context() as broken:
        if first:
            broken.setattr(leases, "tell", raising)
        else:
            broken.setattr(timers, "_due", lambda s, scope, now: due(s, scope, now) if scope != SOFT else 1 / 0)
        world.advance(23 * SECOND)
    causes = [q.cause for q in world.quarantined()]
    assert set(causes) == {"defect"}
    assert world.quarantined()[0].detail.startswith("Traceback"), "what stopped all of it is said first"
    assert 15 <= len(causes) <= 27
    world.advance(2 * SECOND)
    assert sound in [grant.task_id for grant in worker.grants()]


def test_a_grant_that_fails_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(partitions=1)
    worker = ScriptedWorker(world, slots=9, beating=True).start()
    run = ready_queue._run_attempt
    with monkeypatch.context() as broken:
        broken.setattr(
            ready_queue, "_run_attempt", lambda s, task, *more: 1 / 0 if "bad" in task else run(s, task, *more)
        )
        tasks = [world.submit(task_id=f"default/{name}") for name in ("bad1", "good1", "bad2", "good2")]
        assert [grant.task_id for grant in worker.grants()] == [t for t in tasks if "good" in t]
        for grant in worker.grants():
            worker.run(grant.task_id)
        world.advance(9 * MINUTE)
        assert [q.cause for q in world.quarantined()] == ["defect"] * 2
    world.advance(2 * MINUTE)
    assert {grant.task_id for grant in worker.grants()} == {*tasks}


def test_a_type_none_of_whose_tasks_can_be_granted_costs_each_input_a_few_tries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(partitions=1)
    tasks = [world.submit(task_id=f"default/bad{n:02}") for n in range(40)]
    with monkeypatch.context() as broken:
        broken.setattr(ready_queue, "_run_attempt", lambda *_: 1 / 0)
        worker = ScriptedWorker(world, slots=99, beating=True).start()
        world.advance(SECOND)
        assert named(world, *tasks[:3]) == dict.fromkeys(tasks[:3], 1)
        assert 5 <= len(world.quarantined()) <= 10, "all of them were tried"
        world.advance(8 * MINUTE)
        assert len(world.quarantined()) <= 10
    world.advance(3 * MINUTE)
    assert {grant.task_id for grant in worker.grants()} == {*tasks}


def test_a_search_for_what_can_be_granted_that_fails_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(partitions=1)
    worker = ScriptedWorker(world, beating=True).start()
    with monkeypatch.context() as broken:
        broken.setattr(ready_queue, "_candidate", lambda *_: 1 / 0)
        task = world.submit()
    assert not worker.grants()
    world.advance(SECOND)
    assert [grant.task_id for grant in worker.grants()] == [task]
    assert_sound(world.log)  # the submit stands, and was answered


def test_what_an_aborted_transaction_failed_at_is_tried_again_and_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(partitions=1)
    ScriptedWorker(world, beating=True).start()
    task = world.submit(not_before=world.now + 3 * SECOND)
    with failing_at(monkeypatch, task):
        world.now += 4 * SECOND
        world.fault("aborted")
        world.pump()
        assert [q.cause for q in world.quarantined()] == ["defect"]


def test_two_types_that_are_bound_at_once_hold_no_timer_up() -> None:
    world = World(partitions=1)
    waiting = world.submit(queue_timeout=2 * SECOND)
    for kind in ("a", "b"):
        for first in range(0, 10 * timers.BINDS_AT_ONCE, 50):
            tasks = [
                commands.SubmitTask(command_id=f"{kind}{n}", task_id=f"default/{kind}{n}", type=kind, queue="default")
                for n in range(first, first + 50)
            ]
            world.send(commands.SubmitBatch(command_id=f"{kind}-{first}", tasks=tasks), 0)
    world.now += 3 * SECOND
    for kind in ("a", "b"):
        world.configure_type(kind)
    for _ in range(4):  # the records of the configuration, then a tick or two
        world.engine.step()
    assert world.task(waiting).state == "TIMED_OUT"
    assert any(s.startswith(timers.BINDING) for s, _ in world.of_engine(0).state.scan(tables.MARKS)), "not done yet"


@pytest.mark.parametrize("how", ["refused", "too large"])
def test_a_version_that_could_not_be_handed_over_holds_up_nothing(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    world = World(partitions=1)
    worker = ScriptedWorker(world, types={"noop": 0}, beating=True).start()
    append, failed = world.engine._producer.append, []

    def failing(topic: str, partition: int, key: bytes | None, value: bytes, on_ack: Any = None) -> None:
        if not failed and isinstance(codec.decode(value), commands.ApplyConfig):
            failed.append(value)
            on_ack(-1, InfrastructureError("not appended"))
        else:
            append(topic, partition, key, value, on_ack)

    if how == "refused":
        monkeypatch.setattr(world.engine._producer, "append", failing)
        version = world.configure_type("noop", {"cancel_grace": 5})
        world.advance(SECOND)
        assert failed
        task = world.submit(policy_version=version)
    else:
        world.configure("queue/etl", {"routing_keys": ["x" * 200 + str(n) for n in range(4_000)]})
        world.advance(SECOND)
        task = world.submit()
    world.advance(SECOND)
    assert [grant.task_id for grant in worker.grants()] == [task]


def bound_in_part(s: State, m: Moment, task_type: str, after: str = "") -> Outputs:
    """The first chunk is bound, and with the next a defect shows."""
    yield from raising() if after else bind_tasks(s, m, task_type)


def raising(*_: object) -> Outputs:
    raise ZeroDivisionError("a defect")
    yield


@contextmanager
def failing_at(monkeypatch: pytest.MonkeyPatch, *tasks: str) -> Iterator[None]:
    """A defect that shows with these tasks: when they become ready, and when they are lost."""

    def unless_broken(sound: Any) -> Any:
        return lambda s, m, task_id, *more: (raising if task_id in tasks else sound)(s, m, task_id, *more)

    with monkeypatch.context() as broken:
        broken.setitem(timers._KINDS, tables.NOT_BEFORE, unless_broken(timers._KINDS[tables.NOT_BEFORE]))
        broken.setattr(task_lifecycle, "lost", unless_broken(task_lifecycle.lost))
        yield


def advance_with_few_ticks(world: World, ms: int) -> None:
    """Let time pass, in which ticks come for what is due alone."""
    before = len(ticks(world))
    world.advance(ms)
    assert len(ticks(world)) - before < 60


def named(world: World, *tasks: str) -> dict[str, int]:
    """How often each task was set aside for a defect."""
    found = [q.detail for q in world.quarantined() if q.cause == "defect"]
    return {task: sum(f"{task}: Traceback" in detail for detail in found) for task in tasks}


def ticks(world: World) -> list[commands.Tick]:
    return [m for r in world.log.records("task-commands") if isinstance(m := world.decode(r), commands.Tick)]
