"""Commands find their partition: forwarding, acknowledgements, look-ups; each taken once whatever the hosts repeat."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest

from perdure.schemas import codec, commands, events, ids, limits
from perdure.schemas.codec import encode
from perdure.schemas.errors import InfrastructureError
from perdure.schemas.signing import signed
from perdure.streams import tables
from perdure.streams.config_view import ConfigView
from perdure.streams.duties import Duties
from tests.world import CLIENT, KEYS, MINUTE, SECOND, ScriptedWorker, World, completed

HOME = ids.partition_of("default", 2)
AWAY = 1 - HOME


def elsewhere(partition: int, partitions: int = 2) -> str:
    """A queue of the partition."""
    return next(name for n in range(100) if ids.partition_of(name := f"q{n}", partitions) == partition)


def outbox(world: World, source: int, target: int) -> list[bytes]:
    return [k for k in world.rows(source) if k.startswith(tables.outbox(target))]


def submitted(world: World) -> list[str]:
    return [e.task_id for e in world.of_kind(events.TaskSubmitted)]


def test_json_on_the_wrong_partition_is_executed_at_home_once() -> None:
    world = World()
    world.json(AWAY, command="SubmitTask", type="noop", task_id="t", reply_to=CLIENT, command_id="c")
    assert submitted(world) == ["default/t"]
    assert [e.cause.partition for e in world.of_kind(events.TaskSubmitted)] == [HOME]
    assert [r.accepted for r in world.replies("c")] == [True]
    assert not outbox(world, AWAY, HOME)
    assert len(world.of_kind(events.ForwardAcknowledged)) == 1


def test_ids_that_are_missing_come_from_the_first_partition_and_offset() -> None:
    world = World()
    offset = world.json(AWAY, command="SubmitTask", type="noop", reply_to=CLIENT)
    task_id = submitted(world)[0]
    assert task_id.startswith("default/")
    assert world.of_kind(events.TaskSubmitted)[0].cause.command_id == f"log-{AWAY}-{offset}"
    assert world.replies(f"log-{AWAY}-{offset}")[0].task_id == task_id
    world.json(AWAY, command="SubmitTask", type="noop")
    assert len(set(submitted(world))) == 2


def test_commands_of_one_origin_keep_their_order() -> None:
    world = World()
    for n in range(30):
        world.append(json.dumps({"command": "SubmitTask", "type": "noop", "task_id": f"t{n}"}).encode(), AWAY)
        world.append(json.dumps({"command": "CancelTask", "task_id": f"default/t{n}"}).encode(), AWAY)
    world.pump()
    assert submitted(world) == [f"default/t{n}" for n in range(30)]
    assert {world.task(f"default/t{n}").state for n in range(30)} == {"CANCELLED"}


@pytest.mark.parametrize("queue", ["queue1", "queue4", "queue6"])
def test_commands_for_a_task_of_an_unknown_queue_take_the_way_that_its_submit_took(queue: str) -> None:
    """Two ways keep no order between them: what overtakes a submit is told that there is no such task."""
    world = World(partitions=8)
    origin, home = 2, ids.partition_of(queue, 8)
    world.json(origin, command="SubmitTask", type="unheard", task_id=f"{queue}/t")
    world.json(origin, command="PauseTask", task_id=f"{queue}/t")
    assert [(e.cause.partition, e.target) for e in world.of_kind(events.ForwardQueued)] == [(origin, home)] * 2
    assert world.task(f"{queue}/t").state == "PAUSED"


# Repeats, disorder, loss, forgery -----------------------------------------------------------------------------------


def forwarded(world: World) -> list[tuple[int, bytes]]:
    """(partition, bytes) of every Forwarded on task-commands."""
    records = world.log.records("task-commands")
    return [(r.partition, r.value or b"") for r in records if isinstance(_decoded(r.value), commands.Forwarded)]


def acknowledgements(world: World) -> list[tuple[int, bytes]]:
    records = world.log.records("task-commands")
    return [(r.partition, r.value or b"") for r in records if isinstance(_decoded(r.value), commands.ForwardedAck)]


def _decoded(value: bytes | None) -> Any:
    return None if value is None or value[:1] == b"{" else codec.decode(value)


def stands(world: World) -> list[dict[bytes, bytes]]:
    """What the partitions hold, but for their positions and the count of their events."""
    found = []
    for partition in range(world.partitions):
        rows = world.rows(partition)
        found.append({k: v for k, v in rows.items() if k[:1] not in (tables.POSITION, b"\xff", tables.MARKS)})
    return found


def test_repeats_of_forwarded_records_and_acknowledgements_change_nothing() -> None:
    world = World()
    for n in range(5):
        world.json(AWAY, command="SubmitTask", type="noop", task_id=f"t{n}")
    before, count = stands(world), len(world.events())
    for _ in range(2):
        for partition, data in reversed([*forwarded(world), *acknowledgements(world)]):
            world.send(data, partition)
    assert stands(world) == before
    assert len(world.events()) == count
    assert not world.quarantined()


def test_forwarded_records_that_come_in_disorder_are_taken_in_order() -> None:
    world = World()
    inner = [
        encode(commands.SubmitTask(command_id=f"c{n}", task_id=f"default/t{n}", type="noop", queue="default"))
        for n in range(4)
    ]
    records = [commands.Forwarded(source=AWAY, target=HOME, number=n + 1, record=r) for n, r in enumerate(inner)]
    for n in (2, 1, 3, 0, 2, 1, 3, 2, 3):
        world.host(records[n], HOME)
    assert submitted(world) == [f"default/t{n}" for n in range(4)]
    taken = [e.number for e in world.of_kind(events.ForwardTaken)]
    assert taken == [1, 2, 3, 4]


def test_a_forwarded_record_that_is_lost_is_sent_again() -> None:
    """The source's host dies after its commit and before it sends: the next one finds the outbox."""
    world = World()
    world.append(b'{"command":"SubmitTask","type":"noop","task_id":"t"}', AWAY)
    shard = world.engine.shards[AWAY]
    records = [r for r in world.log.records("task-commands", AWAY) if r.offset >= world.executed(AWAY)]
    shard.run_batch(records)
    assert outbox(world, AWAY, HOME)
    assert not submitted(world)
    world.restart()
    world.pump()
    assert submitted(world) == ["default/t"]
    assert not outbox(world, AWAY, HOME)


@pytest.mark.parametrize("fault", ["aborted", "unknown, lost", "unknown, committed"])
def test_what_is_to_be_forwarded_is_sent_however_its_transaction_ended(fault: str) -> None:
    """Also when nobody heard that it was committed, and nothing follows it."""
    world = World()
    world.append(b'{"command":"SubmitTask","type":"noop","task_id":"t"}', AWAY)
    world.fault(fault)
    world.pump()
    world.advance(SECOND)
    assert submitted(world) == ["default/t"]
    assert not outbox(world, AWAY, HOME)


def test_a_lost_acknowledgement_is_given_again_when_the_record_is_sent_again() -> None:
    world = World()
    world.append(b'{"command":"SubmitTask","type":"noop","task_id":"t"}', AWAY)
    for partition in (AWAY, HOME):  # the target takes the record; its host dies before it acknowledges
        shard = world.engine.shards[partition]
        shard.run_batch(
            [r for r in world.log.records("task-commands", partition) if r.offset >= world.executed(partition)]
        )
        if partition == AWAY:
            world.engine.duties[AWAY].after_commit(world.now)
    assert submitted(world) == ["default/t"]
    assert outbox(world, AWAY, HOME)
    world.restart()
    world.advance(limits.FORWARD_RESEND_MS + SECOND)
    assert not outbox(world, AWAY, HOME)
    assert submitted(world) == ["default/t"]


def test_an_acknowledgement_that_never_comes_is_asked_for_by_sending_again() -> None:
    world = World()
    duties = world.engine.duties[HOME]
    append, lost = duties._append, list[bytes]()

    def lossy(partition: int, value: bytes, on_ack: Any = None) -> None:
        if not lost and isinstance(codec.decode(value), commands.ForwardedAck):
            lost.append(value)
        else:
            append(partition, value, on_ack)

    duties._append = lossy  # type: ignore[method-assign]
    world.append(b'{"command":"SubmitTask","type":"noop","task_id":"t"}', AWAY)
    world.pump()
    assert lost
    assert outbox(world, AWAY, HOME)
    world.advance(limits.FORWARD_RESEND_MS + SECOND)
    assert not outbox(world, AWAY, HOME)
    assert submitted(world) == ["default/t"]


def test_a_long_outbox_is_cleared_in_chunks() -> None:
    world = World(batch=2_000)
    count = limits.STEPS_CHUNK * 2 + 50
    for n in range(count):
        world.append(json.dumps({"command": "CancelTask", "task_id": f"default/t{n}"}).encode(), AWAY)
    world.pump()
    world.advance(SECOND)
    assert not outbox(world, AWAY, HOME)
    assert len(world.of_kind(events.CommandRejected)) == count
    cleared = [e.up_to for e in world.of_kind(events.ForwardAcknowledged)]
    assert max(b - a for a, b in zip([0, *cleared], cleared, strict=False)) <= limits.STEPS_CHUNK


INNER = encode(commands.SubmitTask(command_id="x", task_id="default/x", type="noop"))


@pytest.mark.parametrize(
    ("record", "signed_by"),
    [
        (commands.Forwarded(source=AWAY, target=HOME, number=1, record=INNER), None),
        (commands.Forwarded(source=AWAY, target=HOME, number=1, record=INNER), ("e1", b"x" * 32)),
        (commands.Forwarded(source=AWAY, target=HOME, number=1, record=INNER), ("w1", b"w" * 32)),
        (commands.Forwarded(source=HOME, target=AWAY, number=1, record=INNER), KEYS.newest_engine()),
        (commands.Forwarded(source=AWAY, target=HOME, number=1, record=b"junk"), KEYS.newest_engine()),
        (commands.Forwarded(source=AWAY, target=HOME, number=1, record=encode(commands.Tick(due=0, host_clock=0))),
         KEYS.newest_engine()),
        (commands.ForwardedAck(source=HOME, target=AWAY, up_to=1), None),
        (commands.ForwardedAck(source=HOME, target=AWAY, up_to=1), ("e1", b"x" * 32)),
        (commands.LookUp(record=INNER, left=[]), None),
    ],
)  # fmt: skip
def test_forged_and_impossible_host_records_end_in_quarantine_and_nothing_else(record: Any, signed_by: Any) -> None:
    world = World()
    before = stands(world)
    world.send(encode(record) if signed_by is None else signed(record, *signed_by), HOME)
    assert len(world.quarantined()) == 1
    assert not submitted(world)
    assert not [e for e in world.events() if "Rejected" in type(e).__name__]
    if not (signed_by == KEYS.newest_engine() and record.target == HOME):
        assert stands(world) == before
    world.json(HOME, command="SubmitTask", type="noop", task_id="next")
    assert submitted(world) == ["default/next"]


@pytest.mark.parametrize("up_to", [0, 1, 2, 10**12])
def test_an_acknowledgement_of_what_was_never_sent_clears_nothing(up_to: int) -> None:
    world = World()
    world.append(b'{"command":"CancelTask","task_id":"default/t"}', AWAY)
    shard = world.engine.shards[AWAY]
    shard.run_batch([r for r in world.log.records("task-commands", AWAY) if r.offset >= world.executed(AWAY)])
    ack = commands.ForwardedAck(source=AWAY, target=HOME, up_to=up_to)
    world.append(signed(ack, *KEYS.newest_engine()), AWAY)
    shard.run_batch([r for r in world.log.records("task-commands", AWAY) if r.offset >= world.executed(AWAY)])
    assert len(outbox(world, AWAY, HOME)) == (0 if up_to == 1 else 1)


# Look-ups ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", range(4))
def test_an_id_without_its_routing_key_is_found_from_every_partition(origin: int) -> None:
    world = World(4)
    for partition in range(4):
        queue = elsewhere(partition, 4)
        world.configure(f"queue/{queue}", {})
        world.pump()
        world.submit(task_id=f"{queue}/local-{partition}")
    for partition in range(4):
        command = commands.CancelTask(command_id=f"c{partition}", task_id=f"local-{partition}", reply_to=CLIENT)
        world.send(command, origin)
        reply = world.reply(f"c{partition}")
        assert (reply.accepted, reply.task_id) == (True, f"{elsewhere(partition, 4)}/local-{partition}")
    assert len(world.of_kind(events.TaskCancelled)) == 4
    world.send(commands.CancelTask(command_id="none", task_id="nowhere", reply_to=CLIENT), origin)
    assert len(world.replies("none")) == 1
    assert (world.reply("none").accepted, world.reply("none").field) == (False, "task_id")
    assert len(world.of_kind(events.CommandRejected)) == 1


def test_a_query_finds_its_task_too_and_leaves_no_event_of_it() -> None:
    world = World()
    world.submit(task_id="default/t")
    for command_id, task_id in (("a", "t"), ("b", "default/t")):
        world.send(commands.DescribeTask(command_id=command_id, task_id=task_id, reply_to=CLIENT), AWAY)
        assert json.loads(world.reply(command_id).body or b"")["task_id"] == "default/t"
    assert world.kinds("default/t") == ["TaskSubmitted", "TaskQueued"]
    world.send(commands.DescribeTask(command_id="c", task_id="default/none", reply_to=CLIENT), AWAY)
    assert (world.reply("c").accepted, world.reply("c").reason) == (False, "not_found")


def test_a_local_id_with_slashes_is_found() -> None:
    world = World()
    world.json(HOME, command="SubmitTask", type="noop", task_id="2026/11/21")
    assert submitted(world) == ["default/2026/11/21"]
    world.send(commands.CancelTask(command_id="c", task_id="2026/11/21", reply_to=CLIENT), AWAY)
    assert world.reply("c").accepted


def test_a_task_of_a_queue_that_no_configuration_names_is_found_by_its_whole_id() -> None:
    world = World()
    queue = elsewhere(HOME)
    world.json(AWAY, command="SubmitTask", type="noop", queue=queue, task_id="t")
    assert submitted(world) == [f"{queue}/t"]
    world.json(AWAY, command="CancelTask", task_id=f"{queue}/t", command_id="c", reply_to=CLIENT)
    assert world.reply("c").accepted


def test_ids_are_found_by_prefix_in_each_partition_by_itself() -> None:
    world = World()
    other = elsewhere(AWAY)
    world.configure(f"queue/{other}", {})
    world.pump()
    for n in range(3):
        world.submit(task_id=f"default/report-2026-{n}")
    world.submit(task_id=f"{other}/report-2026-9")
    found = {}
    for partition in (HOME, AWAY):
        for prefix in ("report-2026", "default/report-2026-1"):
            command_id = world.new_id("find")
            world.send(commands.FindTasks(command_id=command_id, prefix=prefix, reply_to=CLIENT), partition)
            found[partition, prefix] = json.loads(world.reply(command_id).body or b"")["ids"]
    assert found == {
        (HOME, "report-2026"): [f"default/report-2026-{n}" for n in range(3)],
        (AWAY, "report-2026"): [f"{other}/report-2026-9"],
        (HOME, "default/report-2026-1"): ["default/report-2026-1"],
        (AWAY, "default/report-2026-1"): [],
    }
    assert not world.of_kind(events.CommandRejected)


# Queues and types ----------------------------------------------------------------------------------------------------


def test_the_queue_comes_from_the_id_else_the_queue_else_the_type_else_default() -> None:
    world = World(types={})
    typed, named, known = "typed", "named", "known"
    world.configure_type("job", queue=typed)
    world.configure(f"queue/{known}", {})
    world.pump()
    where = ids.partition_of(typed, 2)
    cases: list[tuple[dict[str, str], str]] = [
        ({"type": "job", "task_id": f"{known}/1", "queue": named}, f"{known}/1"),
        ({"type": "job", "task_id": "other/2", "queue": named}, f"{named}/other/2"),
        ({"type": "job", "task_id": f"{named}/3", "queue": named}, f"{named}/3"),
        ({"type": "job", "task_id": "4"}, f"{typed}/4"),
        ({"type": "job", "task_id": "other/5"}, f"{typed}/other/5"),
        ({"type": "nobody", "task_id": "6", "queue": named}, f"{named}/6"),
        ({"type": "nobody", "task_id": f"{known}/7"}, f"{known}/7"),
        ({"type": "nobody", "task_id": "8"}, "default/8"),
        ({"type": "nobody", "task_id": "9", "key": "k"}, "default/9"),
    ]
    for fields, task_id in cases:
        world.json(where, command="SubmitTask", **fields)
        assert submitted(world)[-1] == task_id or task_id in submitted(world)
    assert len(submitted(world)) == len(cases)


@pytest.mark.parametrize("fields", [{}, {"key": "k"}])
def test_a_submit_of_an_unknown_type_without_queue_or_id_is_refused(fields: dict[str, str]) -> None:
    world = World(types={})
    world.json(AWAY, command="SubmitTask", type="nobody", command_id="c", reply_to=CLIENT, **fields)
    assert (world.reply("c").accepted, world.reply("c").field) == (False, "type")
    assert [e.field for e in world.of_kind(events.CommandRejected)] == ["type"]
    assert not submitted(world)


def test_a_queue_with_several_routing_keys_spreads_and_finds_its_tasks() -> None:
    world = World(4)
    keys = [elsewhere(p, 4) for p in range(4)]
    world.configure("queue/big", {"routing_keys": keys})
    world.configure_type("job", queue="big")
    world.pump()
    for n in range(40):
        world.json(n % 4, command="SubmitTask", type="job", task_id=f"t{n}")
        world.json((n + 1) % 4, command="SubmitTask", type="job", task_id=f"t{n}")  # the same task again
    assert len(submitted(world)) == 40
    assert {t.partition("/")[0] for t in submitted(world)} == set(keys)
    for n in range(40):
        world.send(commands.CancelTask(command_id=f"c{n}", task_id=f"t{n}", reply_to=CLIENT), n % 4)
        assert world.reply(f"c{n}").accepted
    workers = [ScriptedWorker(world, f"w{p}", types={"job": 0}, queues=(key,)).start() for p, key in enumerate(keys)]
    world.json(0, command="SubmitTask", type="job", task_id="last")
    granted = [w for w in workers if w.grants()]
    assert len(granted) == 1
    granted[0].report(granted[0].run(), completed(1))
    assert world.task(granted[0].grant().task_id).state == "COMPLETED"


def test_a_batch_is_decided_task_by_task() -> None:
    world = World(types={"noop": {}})
    other = elsewhere(AWAY)
    tasks = [
        commands.SubmitTask(command_id="a", task_id="default/a", type="noop"),
        commands.SubmitTask(command_id="", task_id="default/b", type="noop"),
        commands.SubmitTask(command_id="c", type="nobody"),
        commands.SubmitTask(command_id="d", task_id=f"{other}/d", type="noop", queue=other),
        commands.SubmitTask(command_id="e", type="noop", priority=77),
        commands.SubmitTask(command_id="f", type="noop"),
    ]
    world.send(commands.SubmitBatch(command_id="batch", reply_to=CLIENT, tasks=tasks), HOME)
    assert set(submitted(world)) >= {"default/a", "default/b", f"{other}/d"}
    assert len(submitted(world)) == 4
    answers = {i: world.reply(i).accepted for i in ("a", "batch-1", "c", "d", "e", "f")}
    assert answers == {"a": True, "batch-1": True, "c": False, "d": True, "e": False, "f": True}
    assert [e.cause.index for e in world.of_kind(events.TaskSubmitted, "default/b")] == [1]
    worker = ScriptedWorker(world, slots=9).start()
    assert [g.task_id for g in worker.grants()][:2] == ["default/a", "default/b"]


@pytest.mark.parametrize("count", [0, limits.BATCH_TASKS_MAX + 1])
def test_a_batch_of_no_or_too_many_tasks_is_refused_whole(count: int) -> None:
    world = World()
    tasks = [commands.SubmitTask(command_id=f"c{n}", task_id=f"default/{n}", type="noop") for n in range(count)]
    world.send(commands.SubmitBatch(command_id="batch", reply_to=CLIENT, tasks=tasks), HOME)
    assert (world.reply("batch").accepted, world.reply("batch").field) == (False, "tasks")
    assert not submitted(world)


def test_what_has_not_landed_is_not_sent_over_and_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits in the producer while a partition has no leader, for hours maybe, and goes out by itself."""
    world = World()
    tried: list[int] = []
    duties = world.engine.duties[AWAY]
    monkeypatch.setattr(duties, "_append", lambda partition, value, on_ack=None: tried.append(world.now))
    world.append(b'{"command":"SubmitTask","type":"noop","task_id":"t"}', AWAY)
    start = world.now
    world.advance(11 * MINUTE)
    assert [(at - start) // MINUTE for at in tried] == [0, 5, 10]
    monkeypatch.undo()
    world.advance(6 * MINUTE)
    assert submitted(world) == ["default/t"]
    assert not outbox(world, AWAY, HOME)


@pytest.mark.parametrize("behind", [True, False])
def test_only_who_has_read_config_says_what_was_deleted_from_it(behind: bool) -> None:
    world = World()
    world.configure_type("young")
    world.advance(SECOND)
    assert world.of_engine(0).state.get(tables.CONFIG, b"type/young") is not None
    view = ConfigView(world.log)
    before = [world.log.records("task-commands", p) for p in range(2)]
    if not behind:
        view.refresh()
        del view.names["type/young"]
    Duties(world.of_engine(0), KEYS, world.log.producer(), view)
    said = [world.decode(r) for p in range(2) for r in world.log.records("task-commands", p)[len(before[p]) :]]
    assert [(r.name, r.content) for r in said] == ([] if behind else [("type/young", None)])


def test_a_deletion_that_could_not_be_handed_over_is_offered_again() -> None:
    world = World()
    world.configure_type("young")
    world.advance(SECOND)
    view = ConfigView(world.log)
    view.refresh()
    del view.names["type/young"]
    said: list[Any] = []

    class Refusing:
        def append(self, topic: str, partition: int, key: Any, value: bytes, on_ack: Any = None) -> None:
            message = codec.decode(value)
            if isinstance(message, commands.ApplyConfig):
                said.append(message.name)
                on_ack(-1, InfrastructureError("not appended") if len(said) == 1 else None)

    duties = Duties(world.of_engine(0), KEYS, cast("Any", Refusing()), view)
    for _ in range(3):
        duties.perform(world.now)
    assert said == ["type/young"] * 2
