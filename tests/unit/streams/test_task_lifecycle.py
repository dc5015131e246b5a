"""Commands against every state of a task: CONTRACT section 1's table, row by row."""

from __future__ import annotations

from typing import Any

import pytest

from perdure.schemas import commands, events
from perdure.schemas.codec import decode, replace
from perdure.schemas.rows import TaskState
from perdure.streams import tables
from perdure.streams.task_lifecycle import DEAD, ENDED, LEGAL
from tests.world import HOUR, SECOND, ScriptedWorker, World, completed, failed, stopped

TYPES = {
    "noop": {},
    "retried": {"retry": {"max_attempts": 2, "delay": HOUR, "backoff": "fixed", "jitter": False}},
    "timed": {"run_timeout": SECOND},
}
STATES = (
    "PENDING queued", "PENDING delayed", "PENDING retry_backoff", "RUNNING none", "RUNNING pausing",
    "RUNNING cancelling", "RUNNING timing_out", "RUNNING draining", "PAUSED", "PAUSED retry_backoff", "COMPLETED",
    "FAILED", "FAILED discarded", "TIMED_OUT", "CANCELLED",
)  # fmt: skip
RUNNING = tuple(s for s in STATES if s.startswith("RUNNING"))
PENDING = tuple(s for s in STATES if s.startswith("PENDING"))
PAUSED = ("PAUSED", "PAUSED retry_backoff")

# Command -> state before -> state and stopping after it; what is not named is refused.
ACCEPTED: dict[type[Any], dict[str, str]] = {
    commands.PauseTask: {s: "PAUSED none" for s in PENDING}
    | {"RUNNING none": "RUNNING pausing", "RUNNING draining": "RUNNING pausing"},
    commands.ResumeTask: {s: "PENDING none" for s in PAUSED} | {"RUNNING pausing": "RUNNING none"},
    commands.CancelTask: {s: "CANCELLED none" for s in (*PENDING, *PAUSED)}
    | {s: "RUNNING cancelling" for s in RUNNING if s != "RUNNING cancelling"},
    commands.RetryTask: {s: "PENDING none" for s in ("FAILED", "FAILED discarded", "TIMED_OUT")},
    commands.DiscardDeadLetter: {"FAILED": "FAILED none", "TIMED_OUT": "TIMED_OUT none"},
}
CASES = [(kind, state) for kind in ACCEPTED for state in STATES]


@pytest.fixture
def world() -> World:
    return World(types=TYPES)


def make(world: World, state: str) -> str:
    """A task in the state, made by what makes it in life; no worker is left that could take it up."""
    name, _, more = state.partition(" ")
    if state == "PENDING queued":
        return world.submit()
    if state == "PENDING delayed":
        return world.submit(not_before=world.now + HOUR)
    worker = ScriptedWorker(world, slots=1, types=dict.fromkeys(TYPES, 0)).start()
    if more == "retry_backoff":
        task_id = world.submit("retried")
        worker.report(worker.run(), failed())
        if name == "PAUSED":
            world.do(commands.PauseTask, task_id)
    elif name == "TIMED_OUT" or more == "timing_out":
        task_id = world.submit("timed")
        grant = worker.run()
        world.advance(2 * SECOND)
        if name == "TIMED_OUT":
            worker.report(grant, stopped("timed_out"))
    else:
        task_id = world.submit()
        _bring(world, worker, task_id, state)
    if name != "RUNNING":
        worker.stop()
    assert world.task(task_id).state == name
    return task_id


def _bring(world: World, worker: ScriptedWorker, task_id: str, state: str) -> None:
    grant = worker.run()
    match state:
        case "RUNNING pausing":
            world.do(commands.PauseTask, task_id)
        case "RUNNING cancelling":
            world.do(commands.CancelTask, task_id, reason="first")
        case "RUNNING draining":
            worker.stop()
        case "PAUSED":
            world.do(commands.PauseTask, task_id)
            worker.report(grant, stopped("paused"))
        case "COMPLETED":
            worker.report(grant, completed({"x": 1}))
        case "FAILED" | "FAILED discarded":
            worker.report(grant, failed())
            if state == "FAILED discarded":
                world.do(commands.DiscardDeadLetter, task_id)
        case "CANCELLED":
            world.do(commands.CancelTask, task_id)
            worker.report(grant, stopped("cancelled"))


def content(world: World, task_id: str) -> dict[bytes, Any]:
    """All that the engine keeps, but for counters of events and positions, and answers."""
    found: dict[bytes, Any] = {}
    scope = tables.task(task_id)
    for key, data in world.rows(world.partition_of(task_id)).items():
        if key == scope + tables.STATE:
            found[key] = replace(decode(data), seq=0, updated_at=0)
        elif not key.startswith((scope + tables.ANSWERS, tables.POSITION, tables.COUNTERS, b"\xff")):
            found[key] = data
    return found


def stands(t: TaskState) -> str:
    return f"{t.state} {t.stopping}"


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_made_as_named(world: World, state: str) -> None:
    t = world.task(make(world, state))
    name, _, more = state.partition(" ")
    assert t.state == name
    if name == "RUNNING":
        assert t.stopping == more
    elif more == "discarded":
        assert not t.dead_letter
    elif name == "PENDING":
        assert t.reason == more


@pytest.mark.parametrize(("kind", "state"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_each_command_in_each_state(world: World, kind: type[Any], state: str) -> None:
    task_id = make(world, state)
    before, kinds = content(world, task_id), world.kinds(task_id)
    reply = world.do(kind, task_id, command_id="once")
    expected = ACCEPTED[kind].get(state)
    if expected is None:
        assert not reply.accepted
        assert reply.reason
        assert world.kinds(task_id) == [*kinds, "CommandRejected"]
        assert content(world, task_id) == before
    else:
        assert reply.accepted, reply.reason
        assert stands(world.task(task_id)) == expected
        assert len(world.kinds(task_id)) > len(kinds)
    assert not world.quarantined()


@pytest.mark.parametrize("stores", ["kept", "empty", 1])
@pytest.mark.parametrize(("kind", "state"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_the_same_command_id_gets_the_same_answer_also_after_a_restart(
    world: World, kind: type[Any], state: str, stores: str | int
) -> None:
    task_id = make(world, state)
    first = world.do(kind, task_id, command_id="once")
    after, kinds = content(world, task_id), world.kinds(task_id)
    world.restart(stores)
    again = world.do(kind, task_id, command_id="once")
    assert (again.accepted, again.reason, again.field) == (first.accepted, first.reason, first.field)
    assert world.kinds(task_id) == kinds
    assert content(world, task_id) == after


@pytest.mark.parametrize("state", STATES)
def test_submitting_the_same_task_again_changes_nothing_and_another_one_is_refused(world: World, state: str) -> None:
    task_id = make(world, state)
    spec = world.of_engine(world.partition_of(task_id)).state.spec(task_id)
    said = {"type": spec.type, "input": spec.input}
    if state == "PENDING delayed":
        said["not_before"] = world.of_kind(events.TaskSubmitted, task_id)[0].not_before
    before, kinds = content(world, task_id), world.kinds(task_id)
    assert world.do(commands.SubmitTask, task_id, **said).accepted
    assert world.kinds(task_id) == kinds
    refused = world.do(commands.SubmitTask, task_id, command_id="other", **(said | {"input": b"[]"}))
    assert (refused.accepted, refused.field) == (False, "task_id")
    assert content(world, task_id) == before
    assert world.do(commands.SubmitTask, task_id, command_id="other", **(said | {"input": b"[]"})) == refused
    assert world.kinds(task_id) == [*kinds, "CommandRejected"]


def test_a_command_for_a_task_that_is_not_there_is_refused_and_leaves_no_state(world: World) -> None:
    where = world.partition_of("default/none")
    for kind in ACCEPTED:
        reply = world.do(kind, "default/none")
        assert (reply.accepted, reply.field) == (False, "task_id")
    assert len(world.of_kind(events.CommandRejected)) == len(ACCEPTED)
    assert all(e.task_id is None for e in world.of_kind(events.CommandRejected))
    assert not [k for k in world.rows(where) if k.startswith(b"t")]


@pytest.mark.parametrize(
    ("first", "then", "stopping"),
    [
        (commands.PauseTask, commands.CancelTask, "cancelling"),
        (commands.CancelTask, commands.PauseTask, "cancelling"),
        (commands.CancelTask, commands.ResumeTask, "cancelling"),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_the_stronger_stop_wins(world: World, first: type[Any], then: type[Any], stopping: str) -> None:
    task_id = make(world, "RUNNING none")
    world.do(first, task_id)
    world.do(then, task_id)
    assert world.task(task_id).stopping == stopping


def test_the_table_names_every_state_and_ends_in_the_ends() -> None:
    assert set(LEGAL) == {s.partition(" ")[0] for s in STATES}
    assert set().union(*LEGAL.values()) <= set(LEGAL)
    assert {s for s in LEGAL if not LEGAL[s]} == ENDED - DEAD
    assert all(LEGAL[s] == {"PENDING"} for s in DEAD)


def test_a_paused_task_keeps_its_place(world: World) -> None:
    first, second = world.submit(), world.submit()
    world.do(commands.PauseTask, first)
    world.do(commands.ResumeTask, first)
    worker = ScriptedWorker(world, slots=1).start()
    assert worker.grant().task_id == first
    worker.report(worker.run(), completed())
    assert worker.grant().task_id == second


def test_a_paused_delay_goes_on_when_resumed(world: World) -> None:
    task_id = world.submit(not_before=world.now + HOUR)
    due = world.task(task_id).due
    world.do(commands.PauseTask, task_id)
    world.advance(HOUR // 2)
    world.do(commands.ResumeTask, task_id)
    assert world.task(task_id).due == due
    assert world.task(task_id).reason == "delayed"
    world.advance(HOUR // 2 - SECOND)
    assert not world.task(task_id).ready
    world.advance(2 * SECOND)
    assert world.task(task_id).ready


def test_a_redrive_takes_a_new_place_and_new_input_and_keeps_steps_and_checkpoint(world: World) -> None:
    task_id = make(world, "FAILED")
    world.submit()
    world.do(commands.RetryTask, task_id, input=b"[2]")
    t = world.task(task_id)
    assert (t.state, t.attempt, t.epoch, t.dead_letter, t.error is not None) == ("PENDING", 0, 1, False, True)
    worker = ScriptedWorker(world, slots=2).start()
    assert [g.task_id for g in worker.grants()][-1] == task_id
    assert (worker.grant(task_id).input, worker.grant(task_id).attempt, worker.grant(task_id).epoch) == (b"[2]", 1, 2)
