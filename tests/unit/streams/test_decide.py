"""Poison: whatever a record holds, it ends in exactly one place and the next record is executed (G7)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from perdure.schemas import codec, commands, events, ids, inbox, limits, reports, topics
from perdure.schemas.codec import encode, replace
from perdure.schemas.common import Policy, Retry, Usage
from perdure.schemas.rows import Mark
from perdure.schemas.signing import signed
from perdure.streams import attempts, decide, submit, tables, task_lifecycle, timers
from perdure.streams.decision import Note
from tests.world import CLIENT, KEYS, MINUTE, SECOND, ScriptedWorker, World, begun, completed, step

HOME = ids.partition_of("default", 2)
AWAY = 1 - HOME
SUBMIT = commands.SubmitTask(command_id="x", task_id="default/x", type="noop", queue="default")


def outcomes(world: World) -> dict[str, int]:
    """How many records ended in each of the places for what cannot be executed."""
    found = {"quarantine": len(world.quarantined())}
    for kind in (events.CommandRejected, events.ReportRejected):
        found[kind.__name__] = len(world.of_kind(kind))
    return {name: count for name, count in found.items() if count}


def json_bytes(**content: Any) -> bytes:
    return json.dumps(content).encode()


def forged(message: Any, by: tuple[str, bytes] = ("e1", b"x" * 32)) -> bytes:
    return signed(message, *by)


FORWARDED = commands.Forwarded(source=AWAY, target=HOME, number=1, record=encode(SUBMIT))
APPLY = commands.ApplyConfig(name="type/noop", version=10**9, content=b'{"policy":{"run_timeout":1}}')
STARTED = commands.WorkerStarted(session="s", worker_id="w", types={"noop": 0}, queues=["default"], slots=9)
BATCH = reports.ReportBatch(session="s", entries=[])
DEEP = b'{"command":"SubmitTask","type":"noop","input":' + b"[" * 5_000 + b"]" * 5_000 + b"}"

POISON: list[tuple[str, bytes | None, str, str]] = [
    ("no value", None, "quarantine", "undecodable"),
    ("empty", b"", "quarantine", "undecodable"),
    ("noise", bytes(range(256)), "quarantine", "undecodable"),
    ("cut", encode(SUBMIT)[:-1], "quarantine", "undecodable"),
    ("longer", encode(SUBMIT) + b"x", "quarantine", "undecodable"),
    ("header only", encode(SUBMIT)[:10], "quarantine", "undecodable"),
    ("unknown schema", b"\xc3\x01" + b"\x01" * 8 + b"body", "quarantine", "unknown_schema"),
    ("foreign record", encode(Usage()), "quarantine", "undecodable"),
    ("an event", encode(inbox.EndSession(worker_id="w", session="s", why="expired")), "quarantine", "undecodable"),
    ("no JSON", b"{", "quarantine", "undecodable"),
    ("bad UTF-8", b'{"command":"SubmitTask","type":"\xff"}', "quarantine", "undecodable"),
    ("JSON without command", b"{}", "quarantine", "undecodable"),
    ("JSON twice", b'{"command":"SubmitTask","type":"noop","type":"noop"}', "quarantine", "undecodable"),
    ("NaN", b'{"command":"SubmitTask","type":"noop","input":NaN}', "quarantine", "undecodable"),
    ("deep", DEEP, "quarantine", "undecodable"),
    ("JSON report", json_bytes(command="AttemptCompleted", task_id="default/x"), "quarantine", "json_not_allowed"),
    ("JSON batch", json_bytes(command="ReportBatch", session="s"), "quarantine", "json_not_allowed"),
    ("JSON tick", json_bytes(command="Tick", due=0, host_clock=0), "quarantine", "json_not_allowed"),
    ("JSON config", json_bytes(command="ApplyConfig", name="type/x"), "quarantine", "json_not_allowed"),
    ("JSON session", json_bytes(command="WorkerStarted", session="s"), "quarantine", "json_not_allowed"),
    ("unknown field", json_bytes(command="SubmitTask", type="noop", colour=1), "CommandRejected", "colour"),
    ("bad field", json_bytes(command="PauseTask"), "CommandRejected", "task_id"),
    ("wrong type", json_bytes(command="SubmitTask", type=5), "CommandRejected", "type"),
    ("surrogate", b'{"command":"SubmitTask","type":"\\ud800"}', "CommandRejected", "type"),
    ("illegal Avro", encode(replace(SUBMIT, priority=77)), "CommandRejected", "priority"),
    ("Avro input that is no JSON", encode(replace(SUBMIT, input=b"{")), "CommandRejected", "input"),
    ("unknown task", encode(commands.PauseTask(command_id="x", task_id="default/none")), "CommandRejected", "task_id"),
    ("unsigned session", encode(STARTED), "ReportRejected", "not_authentic"),
    ("forged session", forged(STARTED, ("w1", b"x" * 32)), "ReportRejected", "not_authentic"),
    ("session signed by an engine", forged(STARTED, ("e1", b"e" * 32)), "ReportRejected", "not_authentic"),
    ("unsigned batch", encode(BATCH), "ReportRejected", "not_authentic"),
    ("batch of nobody", signed(BATCH, *KEYS.newest_worker()), "ReportRejected", "stale_session"),
    ("unsigned config", encode(APPLY), "quarantine", "not_authentic"),
    ("forged config", forged(APPLY), "quarantine", "not_authentic"),
    ("config signed by a worker", forged(APPLY, ("w1", b"w" * 32)), "quarantine", "not_authentic"),
    ("config that is no object", signed(replace(APPLY, content=b"[]"), *KEYS.newest_engine()), "quarantine", "undecodable"),
    ("config that is no policy", signed(replace(APPLY, content=b'{"policy":{"run_timeout":-1}}'), *KEYS.newest_engine()),
     "quarantine", "undecodable"),
    ("unsigned forward", encode(FORWARDED), "quarantine", "not_authentic"),
    ("forged forward", forged(FORWARDED), "quarantine", "not_authentic"),
    ("forward of junk", signed(replace(FORWARDED, record=b"junk"), *KEYS.newest_engine()), "quarantine", "undecodable"),
    ("forward of a forward", signed(replace(FORWARDED, record=encode(FORWARDED)), *KEYS.newest_engine()),
     "quarantine", "undecodable"),
    ("forward of an illegal command", signed(replace(FORWARDED, record=encode(replace(SUBMIT, priority=77))),
                                             *KEYS.newest_engine()), "CommandRejected", "priority"),
    ("unsigned acknowledgement", encode(commands.ForwardedAck(source=HOME, target=AWAY, up_to=1)),
     "quarantine", "not_authentic"),
    ("bare look-up", encode(commands.LookUp(record=encode(SUBMIT), left=[])), "quarantine", "not_authentic"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "place", "detail"), [p[1:] for p in POISON], ids=[p[0] for p in POISON])
def test_poison_ends_in_exactly_one_place_and_the_next_record_is_executed(
    data: bytes | None, place: str, detail: str
) -> None:
    world = World()
    before = world.executed(HOME)
    world.append(data, HOME)
    world.append(commands.SubmitTask(command_id="next", task_id="default/next", type="noop", reply_to=CLIENT), HOME)
    world.pump()
    assert outcomes(world) == {place: 1}
    if place == "quarantine":
        (record,) = world.quarantined()
        assert (record.cause, record.partition, record.offset) == (detail, HOME, before)
        assert (record.record or b"") == (data or b"")[: limits.QUARANTINE_KEPT]
        assert record.size == len(data or b"")
    elif place == "CommandRejected":
        assert [e.field for e in world.of_kind(events.CommandRejected)] == [detail]
    else:
        assert [e.why for e in world.of_kind(events.ReportRejected)] == [detail]
    assert world.reply("next").accepted
    assert not world.known("default/x")
    assert not world.of_engine(HOME).state.sessions


def test_an_oversized_record_is_quarantined_with_its_beginning() -> None:
    world = World()
    data = b'{"command":"SubmitTask","type":"noop","input":"' + b"v" * (limits.RECORD_MAX - 1_000) + b'"}'
    world.append(data, HOME)
    world.submit()
    assert outcomes(world) in ({"quarantine": 1}, {"CommandRejected": 1})
    assert len(world.of_kind(events.TaskSubmitted)) == 1


@pytest.mark.parametrize("kind", [commands.CancelTask, commands.SubmitTask], ids=lambda k: k.__name__)
def test_an_illegal_avro_command_for_a_known_task_is_answered_the_same_and_leaves_one_event(kind: Any) -> None:
    world = World()
    task_id = world.submit()
    more = (
        {"reason": "r" * 2_000} if kind is commands.CancelTask else {"type": "noop", "priority": 12, "queue": "default"}
    )
    for _ in range(3):
        assert not world.do(kind, task_id, command_id="c", **more).accepted
    assert len({(r.reason, r.field) for r in world.replies("c")}) == 1
    assert world.kinds(task_id) == ["TaskSubmitted", "TaskQueued", "CommandRejected"]


def test_a_command_that_is_illegal_in_itself_leaves_one_event_of_a_known_task() -> None:
    world = World()
    task_id = world.submit()
    pause = {"command": "PauseTask", "task_id": task_id, "command_id": "p", "reply_to": CLIENT}
    world.json(HOME, **pause)
    for command_id in ("p", "q", "q"):
        world.json(HOME, **(pause | {"command_id": command_id, "bogus": 1}))
    assert [r.accepted for r in world.replies("p")] == [True, True]
    assert {(r.accepted, r.field) for r in world.replies("q")} == {(False, "bogus")}
    assert world.kinds(task_id) == ["TaskSubmitted", "TaskQueued", "TaskPaused", "CommandRejected"]


# Defects of decisions ------------------------------------------------------------------------------------------------


def raising(*_: Any, **__: Any) -> Iterator[Any]:
    raise RuntimeError("a defect")
    yield


def half(s: Any, m: Any, command: Any) -> Iterator[Any]:
    """A decision that fails when half of it has been evolved."""
    yield from submit_before(s, m, command)
    raise RuntimeError("a defect")


submit_before = submit.submit


@pytest.mark.parametrize("defect", [raising, half], ids=["at once", "half way"])
def test_a_decision_that_raises_costs_its_own_record_alone(monkeypatch: pytest.MonkeyPatch, defect: Any) -> None:
    world = World()
    before = {k: v for k, v in world.rows(HOME).items() if k[:1] not in (b"z", b"\xff")}
    with monkeypatch.context() as patch:
        patch.setattr(submit, "submit", defect)
        world.submit()
    (record,) = world.quarantined()
    assert record.cause == "defect"
    assert "RuntimeError: a defect" in record.detail
    assert {k: v for k, v in world.rows(HOME).items() if k[:1] not in (b"z", b"\xff")} == before
    assert not world.of_kind(events.TaskSubmitted)
    assert world.known(world.submit())


def unwritable(*_: Any, **__: Any) -> Iterator[Any]:
    """A decision whose row nothing can write: seen only when all of a batch's rows are."""
    yield Note(tables.MARKS, b"defect", Mark(value=1 << 64))


def test_a_row_that_cannot_be_written_costs_the_record_that_made_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """G7: the others of its batch are not concerned."""
    world = World()
    for n in range(3):
        world.append(commands.SubmitTask(command_id=f"{n}", task_id=f"default/{n}", type="noop"), HOME)
    world.append(commands.Tick(due=0, host_clock=world.now), HOME)
    world.append(commands.SubmitTask(command_id="last", task_id="default/last", type="noop"), HOME)
    with monkeypatch.context() as patch:
        patch.setattr(timers, "tick", unwritable)
        world.pump()
    assert [q.cause for q in world.quarantined()] == ["defect"]
    assert len(world.of_kind(events.TaskSubmitted)) == 4
    assert world.known(world.submit())


@pytest.mark.parametrize("host_clock", [-(1 << 63), (1 << 63) - 1])
def test_a_tick_of_an_impossible_clock_fires_nothing_and_stops_nothing(host_clock: int) -> None:
    world = World()
    world.send(commands.Tick(due=-(1 << 63), host_clock=host_clock), HOME)
    assert world.known(world.submit())
    assert not world.quarantined()


@pytest.mark.parametrize("defect", [raising, half], ids=["at once", "half way"])
def test_a_forwarded_record_whose_decision_raises_is_taken_once_and_its_source_goes_on(
    monkeypatch: pytest.MonkeyPatch, defect: Any
) -> None:
    world = World()
    with monkeypatch.context() as patch:
        patch.setattr(submit, "submit", defect)
        world.json(AWAY, command="SubmitTask", type="noop", task_id="bad")
    world.json(AWAY, command="SubmitTask", type="noop", task_id="good")
    world.advance(3 * limits.FORWARD_RESEND_MS)
    assert [q.cause for q in world.quarantined()] == ["defect"]
    assert [e.number for e in world.of_kind(events.ForwardTaken)] == [1, 2]
    assert [e.task_id for e in world.of_kind(events.TaskSubmitted)] == ["default/good"]
    assert not [k for k in world.rows(AWAY) if k[:1] == b"o"]


@pytest.mark.parametrize(
    "where",
    [(decide, "_batch"), (attempts, "_step"), (task_lifecycle, "completed"), (timers, "tick")],
    ids=lambda w: f"{w[0].__name__}.{w[1]}".rpartition("streams.")[2],
)
def test_a_defect_anywhere_is_quarantined_and_undone(monkeypatch: pytest.MonkeyPatch, where: Any) -> None:
    world = World()
    worker = ScriptedWorker(world, slots=1).start()
    task_id = world.submit(queue_timeout=MINUTE)
    worker.run()
    before = world.task(task_id)
    lost = where[0] in (attempts, task_lifecycle)  # what an attempt has said is undone, and the attempt is over
    with monkeypatch.context() as patch:
        patch.setattr(*where, raising)
        shard = world.engine.shards[HOME]
        if where[0] is timers:
            world.append(commands.Tick(due=world.now, host_clock=world.now), HOME)
        else:
            world.append(worker.batch(worker.grant(), step("a"), completed(1)), HOME)
        shard.run_batch([r for r in world.log.records("task-commands", HOME) if r.offset >= world.executed(HOME)])
    assert [q.cause for q in world.quarantined()] == ["defect"]
    assert (world.task(task_id) == before) != lost
    assert (world.task(task_id).steps_kept, world.task(task_id).crashes) == (0, int(lost))
    world.advance(SECOND)
    assert world.known(world.submit())


def test_a_machine_without_memory_sets_no_record_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any) -> Iterator[Any]:
        raise MemoryError
        yield

    world = World()
    with monkeypatch.context() as patch:
        patch.setattr(submit, "submit", exhausted)
        with pytest.raises(MemoryError):
            world.submit(task_id="default/good")
    world.restart()
    world.pump()
    assert world.known("default/good")
    assert not world.quarantined()


def test_an_output_that_fits_no_topic_costs_its_own_record_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    with monkeypatch.context() as patch:
        patch.setattr(limits, "OUTPUT_MAX", 80_000)
        world.submit(input=json.dumps("v" * 100_000).encode())
    assert [q.cause for q in world.quarantined()] == ["too_large"]
    assert not world.of_kind(events.TaskSubmitted)
    assert world.known(world.submit())


def test_a_task_that_no_grant_can_carry_fails_and_holds_up_nobody() -> None:
    """PENDING to FAILED: cannot be run."""
    world = World(types={"noop": {"code_version": "v" * limits.INBOX_MAX}})
    task_id = world.submit()
    world.configure_type("noop")
    world.pump()
    other = world.submit()
    worker = ScriptedWorker(world, slots=1).start()
    assert [g.task_id for g in worker.grants()] == [other]
    assert world.task(task_id).state == "FAILED"
    assert world.of_kind(events.TaskFailed, task_id)[0].error.type == "too_large"
    assert not world.quarantined()


def test_the_largest_submit_can_be_granted() -> None:
    world = World()
    worker = ScriptedWorker(world).start()
    world.submit(
        input=json.dumps("v" * (limits.VALUE_MAX - 2)).encode(), labels={f"l{n}": "v" * 480 for n in range(60)}
    )
    assert worker.run().attempt == 1
    assert max(len(r.value or b"") for r in world.log.records("worker-inbox")) <= limits.INBOX_MAX


def test_many_waiters_are_answered_a_few_with_each_decision() -> None:
    world = World()
    worker = ScriptedWorker(world, slots=1).start()
    task_id = world.submit()
    count = 5 * task_lifecycle.WAITERS_AT_ONCE + 3
    for n in range(count):
        wait = commands.AwaitTask(command_id=f"w{n}", task_id=task_id, reply_to=CLIENT, timeout=MINUTE)
        world.append(wait, HOME)
    world.pump()
    worker.report(worker.grant(), begun(), completed(1))
    world.advance(SECOND)
    assert all(len(world.replies(f"w{n}")) == 1 for n in range(count))
    assert not [k for k in world.rows(HOME) if k[:1] in (b"w", b"m")]


def test_many_waiters_that_expire_together_are_all_answered() -> None:
    world = World()
    task_id = world.submit()
    count = 5 * task_lifecycle.WAITERS_AT_ONCE + 3
    for n in range(count):
        world.append(commands.AwaitTask(command_id=f"w{n}", task_id=task_id, reply_to=CLIENT, timeout=SECOND), HOME)
    world.pump()
    world.advance(3 * SECOND)
    assert all(len(world.replies(f"w{n}")) == 1 for n in range(count))
    assert not [k for k in world.rows(HOME) if k[:1] in (b"w", b"D")]


def test_unknown_values_in_known_places_are_refused_by_the_codec_not_the_engine() -> None:
    """A report kind outside the union cannot even be encoded; nothing reaches the log."""
    with pytest.raises((TypeError, ValueError, KeyError)):
        codec.encode(reports.ReportEntry(task_id="t", epoch=1, token=b"", reports=[Usage()]))  # type: ignore[list-item]


def test_replies_go_to_who_asked_and_to_nobody_else() -> None:
    world = World()
    world.json(HOME, command="SubmitTask", type="noop", task_id="t")
    world.json(HOME, command="DescribeTask", task_id="default/t")
    world.json(HOME, command="CancelTask", task_id="default/t")
    assert not world.all(topics.REPLIES)


def test_what_is_quarantined_says_the_same_in_every_process() -> None:
    """G5: no address of an object is in it, wherever a record is cut."""
    world, worker = World(1), ScriptedWorker(World(1))
    grant = inbox.RunAttempt(
        worker_id="w", session="s", grant=1, task_id="default/t", type="noop", input=b"1", policy=Policy(retry=Retry()),
        attempt=1, epoch=1,
    )  # fmt: skip
    data = worker.batch(grant, completed())
    for cut in range(1, len(data)):
        world.append(data[:cut], 0)
    world.pump()
    assert len(world.quarantined()) == len(data) - 1
    assert not [q.detail for q in world.quarantined() if " at 0x" in q.detail]
