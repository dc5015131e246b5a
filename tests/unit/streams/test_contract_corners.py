"""Corners of the contract where several rules meet: each of these is a way in which a task could wait, or move, for ever."""

from __future__ import annotations

import json
from typing import Any

import pytest

from perdure.schemas import codec, commands, events, ids, limits
from perdure.streams import evolve
from tests import world as says
from tests.world import CLIENT, HOUR, MINUTE, SECOND, ScriptedWorker, World, step

NEWER = 100
"""A version of the type's configuration that no world has at first."""


def apply_newer(world: World) -> None:
    """Version NEWER of the type is applied."""
    record = commands.ApplyConfig(name="type/noop", version=NEWER, content=b'{"policy": {}}')
    world.host(record, world.partition_of("default/any"))


@pytest.mark.parametrize("meanwhile", ["waits", "delayed", "paused", "paused and resumed", "timed out"])
def test_a_task_that_was_held_for_a_version_runs_once_it_is_applied(meanwhile: str) -> None:
    """G6: whatever became of it while it was held."""
    world = World(1)
    ScriptedWorker(world, beating=True).start()
    delay = world.now + MINUTE if meanwhile == "delayed" else None
    task_id = world.submit(policy_version=NEWER, queue_timeout=30 * SECOND, not_before=delay)
    if meanwhile.startswith("paused"):
        world.do(commands.PauseTask, task_id)
    if meanwhile == "paused and resumed":
        world.do(commands.ResumeTask, task_id)
    if meanwhile == "timed out":
        world.advance(40 * SECOND)
    apply_newer(world)
    if meanwhile == "paused":
        world.do(commands.ResumeTask, task_id)
    if meanwhile == "timed out":
        world.do(commands.RetryTask, task_id)
    world.advance(2 * MINUTE if delay else SECOND)
    assert world.task(task_id).epoch > 0


def test_a_step_whose_outcome_is_unknown_runs_again_after_a_person_has_looked() -> None:
    world = World(1)
    worker = ScriptedWorker(world).start()
    task_id = world.submit()
    grant = worker.run()
    worker.report(grant, step("pay", None, begun=True), step("done"), says.failed("perdure.OutcomeUnknown", final=True))
    world.do(commands.RetryTask, task_id)
    again = worker.grant(task_id)
    assert (again.begun_steps, again.steps_total) == ([], 1)


def breaking_over_the_other(s: Any, event: Any) -> None:
    """A defect half way through the decision on one task."""
    evolve.evolve(s, event)
    if isinstance(event, events.TaskQueued) and event.task_id == "b/local":
        raise RuntimeError("told to")


@pytest.mark.parametrize("batch", [1, 100])
@pytest.mark.parametrize("gone", [False, True], ids=["two", "one undone"])
def test_a_local_id_finds_the_same_task_however_the_input_is_batched(
    monkeypatch: pytest.MonkeyPatch, batch: int, gone: bool
) -> None:
    """G5: what the open transaction has changed is no nearer than what is committed."""
    world = World(1, batch=batch)
    for queue in ("a", "b"):
        world.configure(f"queue/{queue}", {})
    world.pump()
    world.submit(task_id="a/local")
    if gone:
        monkeypatch.setattr("perdure.streams.engine.evolve", breaking_over_the_other)
    world.append(commands.SubmitTask(command_id="other", task_id="b/local", type="noop"), 0)
    world.send(commands.PauseTask(command_id="pause", task_id="local", reply_to=CLIENT), 0)
    assert world.known("b/local") != gone
    assert world.reply("pause").task_id == "a/local"


def test_an_id_is_found_by_its_beginning_among_many_of_other_queues() -> None:
    world = World(1)
    for queue in ("aaa", "bbb"):
        world.configure(f"queue/{queue}", {})
    world.pump()
    for i in range(limits.FIND_IDS_MAX + 1):
        world.submit(task_id=f"aaa/0192f3{i:03d}")
    world.submit(task_id="bbb/0192f3zzz")
    world.send(commands.FindTasks(command_id="find", prefix="bbb/0192f3", reply_to=CLIENT), 0)
    assert json.loads(world.reply("find").body or b"") == {"ids": ["bbb/0192f3zzz"]}


@pytest.mark.parametrize("kind", [commands.PauseTask, commands.DescribeTask], ids=lambda k: k.__name__)
def test_a_command_ends_although_partitions_know_different_configurations(kind: type[commands.Control]) -> None:
    """One partition has applied the queue of the id already, the queue's own has not."""
    world = World(2, types={})
    origin = world.partition_of("default/any")
    queue = next(q for i in range(100) if ids.partition_of(q := f"q{i}", 2) != origin)
    world.host(commands.ApplyConfig(name=f"queue/{queue}", version=NEWER, content=b"{}"), origin)
    world.append(kind(command_id="c", task_id=f"{queue}/nothing", reply_to=CLIENT), origin)
    world.engine.pump(rounds=100)
    assert world.reply("c").reason.startswith("not_found")


@pytest.mark.parametrize("task_type", ["noop", "unknown"])
@pytest.mark.parametrize("value", [" ", "task: ", "notify:\t"])
def test_a_blank_outcome_is_refused_whether_the_type_is_known_or_not(task_type: str, value: str) -> None:
    world = World(1)
    world.submit(task_type, task_id="default/t", on_failure=value, command_id="c")
    assert (world.reply("c").accepted, world.reply("c").field) == (False, "on_failure")
    assert not world.quarantined()


def test_many_workers_that_die_together_are_all_given_up_in_time() -> None:
    """DESIGN 9: tasks of a lost worker run elsewhere within 15 s, also when many are lost at once."""
    world = World(1)
    workers = [ScriptedWorker(world, f"w{i}", slots=1).start() for i in range(80)]
    for _ in workers:
        world.submit()
    for worker in workers:
        worker.run()
        worker.beat()
    silent = world.now
    world.advance(30 * SECOND)
    lost = world.of_kind(events.AttemptLost)
    assert len(lost) == len(workers)
    assert max(e.at for e in lost) <= silent + 15 * SECOND


@pytest.mark.parametrize("how", ["checkpoint", "end"])
def test_steps_are_forgotten_by_reading_each_a_few_times_at_most(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """DESIGN 5: a task with 100,000 steps stays cheap."""
    count, read = 3_000, 0
    world = World(1)
    worker = ScriptedWorker(world).start()
    task_id = world.submit()
    grant = worker.grant()
    for first in range(0, count, 1_000):
        worker.report(grant, *(step(f"p@{n:012d}/s") for n in range(first, first + 1_000)))
    plain = codec.decode

    def counting(data: bytes) -> object:
        nonlocal read
        read += 1
        return plain(data)

    monkeypatch.setattr("perdure.streams.state.codec.decode", counting)
    if how == "checkpoint":
        worker.report(grant, says.begun(), says.checkpoint(1, p=count))
        world.advance(SECOND)
        assert world.task(task_id).steps_kept == 0
    else:
        worker.report(grant, says.completed())
        world.advance(limits.RETAIN_MS + HOUR)
        assert not world.known(task_id)
    assert read < 2 * count
