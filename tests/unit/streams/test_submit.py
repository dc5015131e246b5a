"""Submitting: new tasks, the same ones again, refusals; and which policy holds for them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from perdure.schemas import commands, events, ids, limits
from perdure.schemas.commands import SubmitTask
from perdure.schemas.common import Retry
from perdure.schemas.references import Reference
from perdure.streams import tables
from perdure.streams.submit import digests
from tests.world import CLIENT, HOUR, MINUTE, SECOND, ScriptedWorker, World, completed, failed

HOME = ids.partition_of("default", 2)
AWAY = 1 - HOME


def submitted(world: World) -> list[str]:
    return [e.task_id for e in world.of_kind(events.TaskSubmitted)]


def policy(world: World, task_id: str) -> Any:
    return world.of_engine(world.partition_of(task_id)).state.spec(task_id).policy


# The same again ------------------------------------------------------------------------------------------------------


def test_the_same_id_with_the_same_content_is_the_same_task() -> None:
    world = World()
    for n in range(3):
        world.json(n % 2, command="SubmitTask", type="noop", task_id="t", input={"b": 1, "a": [2]}, labels={"x": "1"})
    world.json(0, command="SubmitTask", type="noop", task_id="t", labels={"x": "1"}, input={"a": [2], "b": 1})
    assert submitted(world) == ["default/t"]
    assert not world.of_kind(events.CommandRejected)


@pytest.mark.parametrize(
    "other", [{"input": 2}, {"type": "else"}, {"priority": 1}, {"labels": {"a": "b"}}, {"key": "k"}]
)
def test_the_same_id_with_other_content_is_refused_once_per_command(other: dict[str, Any]) -> None:
    world = World(types={"noop": {}, "else": {}})
    first = {"command": "SubmitTask", "type": "noop", "task_id": "t", "input": 1}
    world.json(HOME, **first)
    for _ in range(3):
        world.json(HOME, **(first | other), command_id="c", reply_to=CLIENT)
    assert {(r.accepted, r.field, r.task_id) for r in world.replies("c")} == {(False, "task_id", "default/t")}
    assert world.kinds("default/t") == ["TaskSubmitted", "TaskQueued", "CommandRejected"]


@pytest.mark.parametrize("partition", [HOME, AWAY])
def test_the_same_key_and_input_are_the_same_task_whatever_else_is_said(partition: int) -> None:
    world = World()
    base = {"command": "SubmitTask", "type": "noop", "key": "2026-11", "input": {"x": 1}}
    world.json(partition, **base)
    world.json(1 - partition, **base, priority=9)
    world.send(SubmitTask(command_id="avro", type="noop", key="2026-11", input=b'{"x":1}', reply_to=CLIENT), partition)
    assert submitted(world) == [f"default/{ids.keyed_local_id('default', 'noop', '2026-11')}"]
    assert world.reply("avro").accepted
    assert world.reply("avro").task_id == submitted(world)[0]


def test_the_same_key_with_another_input_is_refused_and_the_refusal_is_remembered() -> None:
    world = World()
    base = {"command": "SubmitTask", "type": "noop", "key": "2026-11"}
    world.json(HOME, **base, input=1)
    for _ in range(3):
        world.json(HOME, **base, input=2, command_id="c", reply_to=CLIENT)
    assert {(r.accepted, r.field, r.task_id) for r in world.replies("c")} == {(False, "key", submitted(world)[0])}
    assert world.kinds(submitted(world)[0]) == ["TaskSubmitted", "TaskQueued", "CommandRejected"]


def test_the_same_key_in_another_queue_or_type_is_another_task() -> None:
    world = World(types={"noop": {}, "else": {}})
    base = {"command": "SubmitTask", "key": "k"}
    for more in ({"type": "noop"}, {"type": "else"}, {"type": "noop", "queue": "other"}):
        world.json(HOME, **base, **more)
    assert len(set(submitted(world))) == 3


@pytest.mark.parametrize("first", ["x", ""])
def test_a_key_stands_for_one_task_also_under_an_id_of_its_own(first: str) -> None:
    world = World()
    base = {"command": "SubmitTask", "type": "noop", "key": "k", "input": 1, "reply_to": CLIENT}
    world.json(HOME, **base, task_id=first)
    (holder,) = submitted(world)
    for n, task_id in enumerate(sorted({"x", "", "y"} - {first})):
        world.json(HOME, **base, command_id=str(n), task_id=task_id)
        refused = world.reply(str(n))
        assert (refused.accepted, refused.field) == (False, "key")
        assert holder in refused.reason
    world.json(HOME, **base, command_id="again", task_id=first)
    assert world.reply("again").accepted
    assert submitted(world) == [holder]
    world.do(commands.CancelTask, holder, reason="enough")
    world.advance(limits.RETAIN_MS + HOUR)
    world.json(HOME, **base, command_id="later", task_id="y")
    assert world.reply("later").accepted, "the key is free again once its task is forgotten"


def test_the_same_input_in_another_writing_is_the_same_input() -> None:
    world = World()
    for n, value in enumerate((b'{"a":1,"b":[2.5]}', b'{ "b": [2.5], "a": 1 }')):
        world.send(SubmitTask(command_id=str(n), type="noop", key="k", input=value, reply_to=CLIENT), HOME)
        assert world.reply(str(n)).accepted
    assert len(submitted(world)) == 1


# Values too large for a record ------------------------------------------------------------------------------------------


def large(digest: str = "ab" * 32, day: int = 20_000) -> bytes:
    return Reference(day=day, sha256=digest, size=limits.VALUE_MAX + 1, preview="[1,").encode()


def test_a_reference_travels_to_the_worker_in_place_of_the_input() -> None:
    world = World()
    worker = ScriptedWorker(world).start()
    task_id = world.submit(input=large())
    grant = worker.grant()
    assert (grant.input, grant.input_ref) == (None, large().decode())
    (event,) = world.of_kind(events.TaskSubmitted)
    assert event.input == large()
    worker.report(grant, failed())
    world.do(commands.RetryTask, task_id, input=large("cd" * 32))
    assert worker.grant().input_ref == large("cd" * 32).decode()


@pytest.mark.parametrize("task_id", ["", "default/t"])
def test_a_large_input_that_was_written_again_later_is_the_same_input(task_id: str) -> None:
    world = World()
    for n, value in enumerate((large(), large(day=20_001), large(digest="cd" * 32), b'"small"')):
        world.send(
            SubmitTask(command_id=str(n), task_id=task_id, type="noop", key="k", input=value, reply_to=CLIENT), HOME
        )
    assert [world.reply(str(n)).accepted for n in range(4)] == [True, True, False, False]
    assert [world.reply(str(n)).field for n in (2, 3)] == ["key", "key"]
    (event,) = world.of_kind(events.TaskSubmitted)
    assert event.input == large()


def test_the_same_id_with_a_large_input_that_was_written_again_is_the_same_task() -> None:
    world = World()
    for n, value in enumerate((large(), large(day=20_001), large(digest="cd" * 32))):
        world.send(SubmitTask(command_id=str(n), task_id="default/t", type="noop", input=value, reply_to=CLIENT), HOME)
    assert [world.reply(str(n)).accepted for n in range(3)] == [True, True, False]


@pytest.mark.parametrize("bad", [b"@", b"@{}", large() + b" x", large()[:-2]])
def test_bytes_that_are_neither_value_nor_reference_are_refused(bad: bytes) -> None:
    world = World()
    world.send(SubmitTask(command_id="c", task_id="default/t", type="noop", input=bad, reply_to=CLIENT), HOME)
    assert (world.reply("c").accepted, world.reply("c").field) == (False, "input")


def test_what_looks_like_a_reference_in_json_is_a_value() -> None:
    world = World()
    worker = ScriptedWorker(world).start()
    world.json(HOME, command="SubmitTask", type="noop", input=large().decode())
    grant = worker.grant()
    assert (json.loads(grant.input or b""), grant.input_ref) == (large().decode(), None)


def test_a_command_that_names_itself_and_no_task_is_one_task_however_often_it_is_sent() -> None:
    """I7: a producer that sends its record again makes no second task."""
    world = World()
    for partition in (HOME, AWAY, HOME):
        world.json(partition, command="SubmitTask", type="noop", command_id="mine", input=1, reply_to=CLIENT)
    assert len(submitted(world)) == 1
    assert {(r.accepted, r.task_id) for r in world.replies("mine")} == {(True, submitted(world)[0])}
    world.json(HOME, command="SubmitTask", type="noop", command_id="yours", input=1)
    world.json(HOME, command="SubmitTask", type="noop", key="mine", input=1)
    assert len(submitted(world)) == 3


def test_an_ended_and_forgotten_id_may_be_used_again() -> None:
    world = World()
    worker = ScriptedWorker(world).start()
    task_id = world.submit(input=b"1")
    worker.report(worker.run(), completed(1))
    world.advance(limits.RETAIN_MS + HOUR)
    world.submit(task_id=task_id, input=b"2")
    assert submitted(world) == [task_id, task_id]
    assert world.task(task_id).state == "PENDING"


def test_the_digest_does_not_depend_on_fields_that_say_nothing() -> None:
    """A field that a later build adds, with its default, must not turn a repeat into another task."""
    command = SubmitTask(command_id="c", task_id="t", type="noop", input=b"1", retry=Retry(max_attempts=2))
    older = object.__new__(SubmitTask)
    older.__dict__.update(command.__dict__)
    del older.__dict__["notify"], older.__dict__["labels"], older.__dict__["priority"]
    assert digests(older) == digests(command)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"after": ["default/x"]}, "after"), ({"priority": 10}, "priority"), ({"queue": "No Queue"}, "queue"),
        ({"input": "v" * limits.VALUE_MAX}, "input"), ({"task_id": "default/" + "i" * 600}, "task_id"),
        ({"labels": {f"l{n}": "v" * 1_000 for n in range(40)}}, "labels"),
        ({"agent_config": {"a": "v" * 40_000}}, "agent_config"), ({"run_timeout": -1}, "run_timeout"),
        ({"retry": {"max_attempts": 0}}, "retry.max_attempts"), ({"unknown": 1}, "unknown"),
        ({"on_failure": "mail:me"}, "on_failure"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("partition", [HOME, AWAY])
def test_what_cannot_be_carried_out_is_refused_with_its_field(
    fields: dict[str, Any], field: str, partition: int
) -> None:
    world = World()
    content = {"command": "SubmitTask", "type": "noop", "task_id": "t", "command_id": "c", "reply_to": CLIENT} | fields
    world.json(partition, **content)
    assert [(r.accepted, r.field) for r in world.replies("c")] == [(False, field)]
    assert [e.field for e in world.of_kind(events.CommandRejected)] == [field]
    assert not submitted(world)
    assert not world.quarantined()


# Delays and order ----------------------------------------------------------------------------------------------------


def test_a_start_time_that_has_passed_is_now() -> None:
    world = World()
    task_id = world.submit(not_before=world.now - HOUR)
    assert world.task(task_id).ready
    assert world.task(task_id).reason == "queued"


def test_higher_priority_first_then_the_order_of_submission() -> None:
    world = World()
    worker = ScriptedWorker(world, slots=1).start()
    running = world.submit()
    waiting = [world.submit(priority=p) for p in (5, 1, 9, 5, 0, 9)]
    worker.report(worker.run(), completed())
    order = []
    for _ in waiting:
        order.append(worker.run().task_id)
        worker.report(worker.grant(), completed())
    assert [waiting.index(t) for t in order] == [2, 5, 0, 3, 1, 4]
    assert running not in order


# Policies ------------------------------------------------------------------------------------------------------------

TYPE = {
    "retry": {"max_attempts": 4, "delay": 7_000},
    "run_timeout": HOUR,
    "on_failure": "notify:a",
    "queue_timeout": HOUR,
}


def test_what_the_submitter_sets_goes_over_the_type_and_the_type_over_the_defaults() -> None:
    world = World(types={"noop": TYPE})
    task_id = world.submit(run_timeout=MINUTE, retry=Retry(max_attempts=2), on_failure="notify:b")
    found = policy(world, task_id)
    assert (found.run_timeout, found.queue_timeout, found.on_failure, found.on_shutdown) == (
        MINUTE, HOUR, "notify:b", "drain",
    )  # fmt: skip
    assert found.retry.max_attempts == 2
    plain = policy(world, world.submit())
    assert (plain.retry.max_attempts, plain.retry.delay, plain.run_timeout) == (4, 7_000, HOUR)


def test_a_task_keeps_the_policy_it_was_submitted_with() -> None:
    world = World(types={"noop": TYPE})
    task_id = world.submit()
    world.configure_type("noop", {"run_timeout": SECOND})
    world.pump()
    assert policy(world, task_id).run_timeout == HOUR
    assert policy(world, world.submit()).run_timeout == SECOND


def test_a_task_whose_type_is_unknown_binds_its_policy_when_the_type_is() -> None:
    world = World(types={})
    task_id = world.submit("late", queue="default", run_timeout=MINUTE)
    assert policy(world, task_id) is None
    version = world.configure_type("late", TYPE)
    world.pump()
    assert world.kinds(task_id) == ["TaskSubmitted", "TaskQueued", "TaskPolicyBound"]
    assert (policy(world, task_id).run_timeout, policy(world, task_id).queue_timeout) == (MINUTE, HOUR)
    assert "queue" in world.task(task_id).timers
    worker = ScriptedWorker(world, types={"late": version}).start()
    assert worker.grant().policy == policy(world, task_id)


def test_a_task_is_held_until_the_version_is_applied_that_its_submitter_saw() -> None:
    world = World()
    worker = ScriptedWorker(world, slots=2).start()
    held = world.submit(policy_version=7)
    other = world.submit()
    assert [g.task_id for g in worker.grants()] == [other], "what is held does not hold up what is not"
    assert policy(world, held) is None
    assert world.status(held)["reason"] == "queued"
    assert "version 7" in world.status(held)["why"]
    while world.configure_type("noop", TYPE) < 6:
        pass
    world.pump()
    assert len(worker.grants()) == 1
    assert world.configure_type("noop", TYPE | {"run_timeout": 5 * HOUR}) == 7
    world.pump()
    assert worker.grant().task_id == held
    assert worker.grant().policy.run_timeout == 5 * HOUR


@pytest.mark.parametrize("stop", [commands.PauseTask, commands.CancelTask], ids=lambda k: k.__name__)
def test_a_held_task_can_be_stopped(stop: Any) -> None:
    world = World()
    task_id = world.submit(policy_version=1)
    world.do(stop, task_id)
    world.configure_type("noop")
    world.pump()
    worker = ScriptedWorker(world).start()
    assert not worker.grants()
    if stop is commands.PauseTask:
        world.do(commands.ResumeTask, task_id)
        assert worker.grant().task_id == task_id


def test_many_tasks_are_bound_in_chunks_and_those_that_wait_for_more_block_nobody() -> None:
    world = World(types={})
    count = 2 * limits.CHUNK
    for first in range(0, count, 100):
        numbers = range(first, first + 100)
        tasks = [
            SubmitTask(command_id=f"c{n}", task_id=f"default/t{n:03}", type="late", queue="default",
                       policy_version=None if n % 2 else 99, queue_timeout=HOUR, total_timeout=HOUR)
            for n in numbers
        ]  # fmt: skip
        world.send(commands.SubmitBatch(command_id=f"b{first}", tasks=tasks), HOME)
    keys: list[int] = []
    state = world.of_engine(HOME).state
    mark = state.mark
    state.mark = lambda: (keys.append(len({(u[0], u[1]) for u in state._undo})), mark())  # type: ignore[method-assign]
    world.configure_type("late")
    world.advance(SECOND)
    bound = [e.task_id for e in world.of_kind(events.TaskPolicyBound)]
    assert sorted(bound) == [f"default/t{n:03}" for n in range(1, count, 2)]
    assert max(keys) <= limits.DECISION_KEYS
    assert not [k for k in world.rows(HOME) if k[:1] == tables.MARKS], "no cursor goes on for ever"


def test_a_configuration_that_is_deleted_keeps_its_tasks_waiting() -> None:
    world = World(types={"noop": {}})
    worker = ScriptedWorker(world).start()
    world.producer.append("config", 0, b"type/noop", None)
    world.pump()
    task_id = world.submit()
    assert not worker.grants()
    assert policy(world, task_id) is None
    world.configure_type("noop", TYPE)
    world.pump()
    assert worker.grant().policy.run_timeout == HOUR


def test_a_worker_gets_nothing_of_a_type_whose_version_has_not_arrived_here() -> None:
    world = World()
    worker = ScriptedWorker(world, types={"noop": 1}).start()
    world.submit()
    assert not worker.grants()
    world.configure_type("noop")
    world.pump()
    assert worker.grants()


def test_an_older_version_that_arrives_late_is_ignored() -> None:
    world = World(types={"noop": TYPE})
    version = world.configure_type("noop", {"run_timeout": MINUTE})
    world.pump()
    count = len(world.of_kind(events.ConfigApplied))
    for old in (0, version, -1):
        world.host(commands.ApplyConfig(name="type/noop", version=old, content=b'{"policy":{}}'), HOME)
    assert len(world.of_kind(events.ConfigApplied)) == count
    assert policy(world, world.submit()).run_timeout == MINUTE


def test_the_input_of_a_task_arrives_as_it_was_given() -> None:
    world = World()
    worker = ScriptedWorker(world).start()
    world.json(AWAY, command="SubmitTask", type="noop", input={"ä": [1.5, None, True, "\u2028"]}, agent_config={"m": 1})
    assert json.loads(worker.grant().input or b"") == {"ä": [1.5, None, True, "\u2028"]}
    assert json.loads(worker.grant().agent_config or b"") == {"m": 1}
