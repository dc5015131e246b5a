"""Each rule of the audit is broken here by a log that breaks no other, and a sound log breaks none."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from fastavro import schemaless_writer
from fastavro.schema import fingerprint, to_parsing_canonical_form

from perdure.projections.audit import TOPICS, Audit
from perdure.projections.audit_rules import RULES, SILENT, TRANSITIONS
from perdure.schemas import codec, commands, events, ids, limits, reports, rows, topics
from perdure.schemas.public import ConfigRecord, Quarantined
from perdure.schemas.signing import signed
from perdure.streams import tables
from perdure.streams.log import Record
from perdure.streams.task_lifecycle import LEGAL
from tests.world import (
    CLIENT,
    HOUR,
    KEYS,
    MINUTE,
    SECOND,
    ScriptedWorker,
    World,
    checkpoint,
    completed,
    failed,
    milestone,
    progress,
    step,
    stopped,
)

TYPES: dict[str, dict[str, Any]] = {"noop": {"run_timeout": MINUTE, "retry": {"max_attempts": 2, "delay": SECOND}}}
COMMANDS, EVENTS, CHANGELOG = topics.COMMANDS.name, topics.EVENTS.name, topics.CHANGELOG.name
AVRO = Path(__file__).parents[3] / "schemas" / "avro"
DONE, RUNS, WAITS = "default/done", "default/runs", "default/waits"


def life() -> World:
    """A small world in which everything has happened that the rules ask about."""
    world = World(2, types=TYPES)
    here = world.partition_of(DONE)
    worker = ScriptedWorker(world, beating=True, slots=3).start()
    world.submit(task_id=DONE)
    grant = worker.run(DONE)
    worker.report(grant, step("files@000000000000/a"), milestone("m"), step("files@000000000001/a"))
    worker.report(grant, checkpoint(1, files=1), step("b"), progress(0.5))
    world.do(commands.PauseTask, DONE, command_id="pause")
    worker.report(grant, stopped("paused"))
    world.do(commands.ResumeTask, DONE, command_id="resume")
    worker.report(worker.run(DONE), failed())
    world.advance(5 * SECOND)
    grant = worker.run(DONE)
    worker.report(grant, step("c"), completed({"n": 1}))
    world.send(commands.PauseTask(command_id="late", task_id=DONE), here)
    world.submit(task_id=RUNS)
    worker.report(worker.run(RUNS), step("a"))
    world.submit(task_id=WAITS, not_before=world.now + 10 * MINUTE)
    world.send(commands.DescribeTask(command_id="look", task_id=WAITS), here)
    world.json(1 - here, command="SubmitTask", type="noop", key="k", input=[1], reply_to=CLIENT)
    world.json(1 - here, command="CancelTask", task_id="default/nobody", command_id="nobody", reply_to=CLIENT)
    world.send(b"no record", here)
    world.configure("queue/default", {"routing_keys": ["default"]})
    world.advance(3 * SECOND)
    return world


@dataclass
class History:
    """The records of a log, to be spoiled."""

    records: list[Record]
    partition: int

    @classmethod
    def of(cls, world: World) -> History:
        found = [replace(r) for topic in TOPICS for r in world.log.records(topic)]
        return cls(found, world.partition_of(DONE))

    def audit(self) -> Audit:
        audit = Audit()
        audit.feed(self.records)
        audit.check()
        audit.check()
        return audit

    def first(self, topic: str, wanted: Callable[[Any], bool]) -> Record:
        """The first record of a topic in the tasks' partition whose content is the one."""
        return next(r for r in self.records if r.topic == topic and wanted(read(r)) and r.partition == self.partition)

    def event(self, kind: type[Any], task_id: str | None = DONE, **said: Any) -> Record:
        def wanted(e: Any) -> bool:
            known = isinstance(e, kind) and getattr(e, "task_id", None) == task_id
            return known and all(getattr(e, name) == value for name, value in said.items())

        return self.first(EVENTS, wanted)

    def given(self, kind: type[Any], **said: Any) -> Record:
        return self.first(
            COMMANDS, lambda m: isinstance(m, kind) and all(getattr(m, n) == value for n, value in said.items())
        )

    def input(self, offset: int) -> Record:
        """The record of task-commands at an offset."""
        return next(r for r in self.records if (r.topic, r.partition, r.offset) == (COMMANDS, self.partition, offset))

    def reply(self, command_id: str) -> Record:
        return self.first(topics.REPLIES.name, lambda r: r.command_id == command_id)

    def row(self, key: bytes) -> Record:
        """The newest record of a row."""
        return next(
            r for r in reversed(self.records) if (r.topic, r.partition, r.key) == (CHANGELOG, self.partition, key)
        )

    def named(self, kind: str, task_id: str) -> Record:
        """The newest record of a task's timer."""
        due = codec.decode(self.row(tables.task(task_id) + tables.STATE).value or b"").timers[kind]
        return self.row(tables.timers(kind) + tables.timer(due, kind, task_id))

    def drop(self, record: Record) -> None:
        self.records.remove(record)

    def add(self, record: Record, **changed: Any) -> None:
        """Another record at the end of a record's partition."""
        last = max(r.offset for r in self.records if (r.topic, r.partition) == (record.topic, record.partition))
        self.records.append(replace(record, offset=last + 1, **changed))


def read(record: Record) -> Any:
    try:
        return codec.decode(record.value or b"")
    except codec.DecodeError:
        return None


def say(record: Record, **changed: Any) -> None:
    """Have a record say something else."""
    record.value = codec.encode(codec.replace(read(record), **changed))


def say_signed(record: Record, **changed: Any) -> None:
    """Have a record of a worker's say something else."""
    record.value = signed(codec.replace(read(record), **changed), *KEYS.newest_worker())


@pytest.fixture(scope="module")
def world() -> World:
    return life()


@pytest.fixture
def history(world: World) -> History:
    return History.of(world)


# How to break each rule ----------------------------------------------------------------------------------------------

BREAKS: list[tuple[str, Callable[[History], None]]] = []


def breaks(rule: str) -> Callable[[Callable[[History], None]], Callable[[History], None]]:
    def note(spoil: Callable[[History], None]) -> Callable[[History], None]:
        BREAKS.append((rule, spoil))
        return spoil

    return note


@breaks("input-accounted")
def a_command_without_any_effect(h: History) -> None:
    h.given(commands.DescribeTask, command_id="look").value = codec.encode(
        commands.PauseTask(command_id="lost", task_id=WAITS)
    )


@breaks("input-accounted")
def a_submit_without_any_effect(h: History) -> None:
    h.given(commands.DescribeTask, command_id="look").value = codec.encode(
        commands.SubmitTask(command_id="lost", task_id="default/lost", type="noop")
    )


@breaks("input-accounted")
def a_report_without_its_event(h: History) -> None:
    record = h.given(reports.ReportBatch)
    (entry,) = read(record).entries
    more = codec.replace(entry, reports=[*entry.reports, codec.replace(step("lost"), seq=2)])
    say_signed(record, entries=[more])


@breaks("input-accounted")
def what_cannot_be_read_is_not_in_quarantine(h: History) -> None:
    h.drop(h.first(topics.QUARANTINE.name, lambda q: q.cause == "undecodable"))


@breaks("input-accounted")
def a_version_that_was_never_applied(h: History) -> None:
    record = h.given(commands.ApplyConfig, name="type/noop")
    record.value = signed(codec.replace(read(record), name="type/other"), *KEYS.newest_engine())


@breaks("one-refusal")
def a_rejected_command_is_in_quarantine_too(h: History) -> None:
    offset = h.given(commands.PauseTask, command_id="late").offset
    known = h.first(topics.QUARANTINE.name, lambda q: q.cause == "undecodable")
    more = Quarantined(
        topic=COMMANDS, partition=h.partition, offset=offset, at=0, reader="engine", cause="undecodable", detail=""
    )
    h.records.insert(h.records.index(known), replace(known, value=codec.encode(more)))


@breaks("one-refusal")
def a_record_is_in_quarantine_twice(h: History) -> None:
    h.add(h.first(topics.QUARANTINE.name, lambda q: q.cause == "undecodable"))


@breaks("decided-once")
def a_repeated_command_is_decided_again(h: History) -> None:
    say(h.given(commands.ResumeTask), command_id="pause")
    for kind in (events.TaskResumed, events.TaskQueued):
        record = h.first(EVENTS, lambda e, kind=kind: isinstance(e, kind) and e.cause.command_id == "resume")
        say(record, cause=codec.replace(read(record).cause, command_id="pause"))
    say(h.reply("resume"), command_id="pause")


@breaks("reply-once")
def a_command_is_answered_twice(h: History) -> None:
    h.add(h.reply("pause"))


@breaks("reply-once")
def a_command_is_not_answered(h: History) -> None:
    h.drop(h.reply("pause"))


@breaks("reply-once")
def an_answer_that_says_something_else(h: History) -> None:
    say(h.reply("pause"), accepted=False)


@breaks("forward-order")
def a_number_is_left_out(h: History) -> None:
    record = h.event(events.ForwardTaken, None, number=2)
    say(record, number=3)


@breaks("forward-order")
def what_nobody_sent_is_taken(h: History) -> None:
    h.records = [r for r in h.records if r.partition == h.partition or r.topic not in (EVENTS, COMMANDS, CHANGELOG,
                 topics.QUARANTINE.name, topics.REPLIES.name)]  # fmt: skip
    other = Record(CHANGELOG, 1 - h.partition, 0, 0, tables.POSITION, codec.encode(rows.Position(offset=0)))
    h.records.append(other)


@breaks("position-grows")
def the_position_goes_back(h: History) -> None:
    found = [r for r in h.records if (r.topic, r.partition, r.key) == (CHANGELOG, h.partition, tables.POSITION)]
    found[3].value, found[4].value = found[4].value, found[3].value


@breaks("readable")
def a_row_that_cannot_be_read(h: History) -> None:
    h.row(tables.CONFIG + b"queue/default").value = b"\xc3\x01nothing of ours"


@breaks("readable")
def an_event_of_a_kind_that_a_later_build_knows(h: History) -> None:
    schema = json.loads((AVRO / "events" / "TaskQueued.avsc").read_text()) | {"name": "TaskPondered"}
    identity = bytes.fromhex(fingerprint(to_parsing_canonical_form(schema), "CRC-64-AVRO"))
    published = ConfigRecord(name="schema/later", content=json.dumps(schema).encode())
    h.records.insert(0, Record(topics.CONFIG.name, 0, 0, 0, b"schema/later", codec.encode(published)))
    record = h.event(events.TaskQueued)
    value = record.value or b""
    record.value = value[:2] + identity + value[10:]


@breaks("task-sequence")
def an_event_is_missing(h: History) -> None:
    h.drop(h.event(events.TaskQueued))


@breaks("task-sequence")
def an_event_is_there_twice(h: History) -> None:
    record = h.event(events.StepCompleted)
    h.records.insert(h.records.index(record), record)


@breaks("task-sequence")
def two_events_have_changed_places(h: History) -> None:
    one, other = h.event(events.StepCompleted), h.event(events.MilestoneReached)
    one.value, other.value = other.value, one.value


@breaks("task-sequence")
def a_task_without_its_first_event(h: History) -> None:
    h.drop(h.event(events.TaskSubmitted))


@breaks("partition-sequence")
def a_number_of_the_partition_is_wrong(h: History) -> None:
    record = h.event(events.ForwardTaken, None, number=1)
    say(record, seq=read(record).seq + 1)


@breaks("legal-transition")
def a_completed_task_is_asked_to_pause(h: History) -> None:
    record = h.event(events.CommandRejected)
    e = read(record)
    record.value = codec.encode(events.PauseRequested(
        task_id=DONE, seq=e.seq, at=e.at, cause=e.cause, build=e.build, feature_level=e.feature_level
    ))  # fmt: skip


@breaks("cause")
def a_cancel_pauses(h: History) -> None:
    known = read(h.given(commands.PauseTask, command_id="pause"))
    h.given(commands.PauseTask, command_id="pause").value = codec.encode(
        commands.CancelTask(command_id="pause", task_id=known.task_id, reply_to=known.reply_to)
    )


@breaks("cause")
def an_event_of_an_input_that_was_long_ago(h: History) -> None:
    record = h.event(events.TaskGranted, epoch=2)
    say(record, cause=codec.replace(read(record).cause, offset=1))


@breaks("cause")
def an_event_of_an_input_that_is_not_there(h: History) -> None:
    h.drop(h.given(commands.WorkerStarted))
    h.drop(h.first(COMMANDS, lambda m: m is None))
    h.drop(h.first(topics.QUARANTINE.name, lambda q: q.cause == "undecodable"))
    h.drop(h.given(commands.PauseTask, command_id="late"))


@breaks("step-once")
def a_step_is_recorded_twice(h: History) -> None:
    say(h.event(events.StepCompleted, step_id="/b"), step_id="files@000000000001/a")


@breaks("step-once")
def a_step_before_the_checkpoint_is_recorded_again(h: History) -> None:
    say(h.event(events.StepCompleted, step_id="/b"), step_id="files@000000000000/a")


@breaks("step-once")
def a_step_is_dropped_that_no_checkpoint_covers(h: History) -> None:
    record = h.event(events.CheckpointRecorded)
    say(record, positions={"files": 0})
    given = h.input(read(record).cause.offset)
    (entry,) = read(given).entries
    told = [codec.replace(r, positions={"files": 0}) if hasattr(r, "positions") else r for r in entry.reports]
    say_signed(given, entries=[codec.replace(entry, reports=told)])


@breaks("epoch-fence")
def a_step_of_an_older_epoch(h: History) -> None:
    say(h.event(events.StepCompleted, step_id="/c"), epoch=1)


@breaks("epoch-fence")
def a_grant_that_leaves_an_epoch_out(h: History) -> None:
    say(h.event(events.TaskGranted, epoch=2), epoch=3)


@breaks("report-backed")
def a_step_that_nobody_reported(h: History) -> None:
    cause = read(h.event(events.StepCompleted, RUNS)).cause
    record = h.input(cause.offset)
    (entry,) = read(record).entries
    other = codec.replace(entry, reports=[codec.replace(progress(0.1), seq=2)])
    say_signed(record, entries=[other])


@breaks("report-backed")
def a_step_that_another_session_reported(h: History) -> None:
    """The batch is another session's, and is refused; the event is there all the same."""
    cause = read(h.event(events.StepCompleted, RUNS)).cause
    record = h.input(cause.offset)
    say_signed(record, session="other", entries=[])


@breaks("report-backed")
def a_step_is_recorded_with_another_result(h: History) -> None:
    say(h.event(events.StepCompleted, RUNS), result=b"7")


@breaks("changelog-fold")
def a_row_says_another_attempt(h: History) -> None:
    say(h.row(tables.task(DONE) + tables.STATE), attempt=7)


@breaks("changelog-fold")
def a_recorded_result_has_changed(h: History) -> None:
    say(h.row(tables.task(DONE) + tables.step("/b")), result=b"2")


@breaks("changelog-fold")
def a_row_was_not_written(h: History) -> None:
    h.drop(h.row(tables.task(DONE) + tables.RESULT))


@breaks("changelog-fold")
def a_row_that_no_event_made(h: History) -> None:
    h.add(h.row(tables.CONFIG + b"queue/default"), key=tables.CONFIG + b"queue/other")


@breaks("next-wake-up")
def a_due_time_is_lost(h: History) -> None:
    h.add(h.named("not_before", WAITS), value=None)


@breaks("next-wake-up")
def a_timeout_is_lost(h: History) -> None:
    h.add(h.named("run", RUNS), value=None)


@breaks("next-wake-up")
def a_lease_is_lost(h: History) -> None:
    session = read(h.event(events.TaskGranted, RUNS)).session
    grant = read(h.row(tables.task(RUNS) + tables.STATE)).grant
    h.add(h.row(tables.leases(session) + tables.number(grant)), value=None)


@breaks("next-wake-up")
def a_session_is_forgotten_with_its_leases(h: History) -> None:
    session = read(h.event(events.TaskGranted, RUNS)).session
    h.add(h.row(tables.SESSIONS + session.encode()), value=None)


@breaks("next-wake-up")
def a_session_has_ended_and_its_leases_have_not(h: History) -> None:
    session = h.row(tables.SESSIONS + read(h.event(events.TaskGranted, RUNS)).session.encode())
    h.add(session, value=codec.encode(codec.replace(read(session), state="ended")))


@breaks("stray-row")
def a_timer_that_its_task_does_not_name(h: History) -> None:
    h.add(h.named("run", RUNS), key=tables.TIMERS + tables.timer(5, "queue", RUNS))


@breaks("stray-row")
def a_lease_of_a_task_that_has_ended(h: History) -> None:
    session = read(h.event(events.TaskGranted)).session
    row = rows.Lease(task_id=DONE, epoch=1, granted=0)
    h.add(h.row(tables.SESSIONS + session.encode()), key=tables.leases(session) + tables.number(99),
          value=codec.encode(row))  # fmt: skip


# The tests -----------------------------------------------------------------------------------------------------------


def test_a_sound_history_breaks_no_rule(history: History) -> None:
    audit = history.audit()
    assert not audit.violations
    read = audit.summary()["read"]
    assert (read["tasks"], read["partial"], read["partitions"]) == (4, 0, 2)
    assert read["records"] == len(history.records)


@pytest.mark.parametrize(("rule", "spoil"), BREAKS, ids=[spoil.__name__ for _, spoil in BREAKS])
def test_what_breaks_a_rule_breaks_that_rule_alone(
    history: History, rule: str, spoil: Callable[[History], None]
) -> None:
    spoil(history)
    audit = history.audit()
    assert set(audit.counts) == {rule}, [v.line() for v in audit.violations]
    assert not audit.summary()["clean"]
    places = {(r.topic, r.partition, r.offset) for r in history.records}
    assert {(v.topic, v.partition, v.offset) for v in audit.violations} <= places


def test_every_rule_is_broken_above() -> None:
    assert {rule for rule, _ in BREAKS} == {rule.name for rule in RULES}


def test_the_guarantees_are_all_proved() -> None:
    assert {rule.guarantee for rule in RULES} == {f"G{n}" for n in range(1, 7)}


def test_the_page_of_guarantees_has_every_rule() -> None:
    page = (Path(__file__).parents[3] / "docs" / "guarantees.md").read_text()
    rows = [f"| `{rule.name}` | {rule.guarantee} | {rule.says} |" for rule in RULES]
    assert "\n".join(rows) in page
    for guarantee in {rule.guarantee for rule in RULES}:
        names = ", ".join(f"`{rule.name}`" for rule in RULES if rule.guarantee == guarantee)
        assert f"by the audit: {names} |" in next(x for x in page.splitlines() if x.startswith(f"| {guarantee} |"))


def test_the_auditors_table_of_transitions_is_the_contracts() -> None:
    """Written down twice, by the engine and by the auditor, and the same."""
    moves = {(before, after) for states, after in TRANSITIONS.values() for before in states if after}
    legal = {(before, after) for before, states in LEGAL.items() for after in states}
    assert {m for m in moves if m[0] and m[0] != m[1]} == legal
    assert all(reason for reason in SILENT.values())


def test_reading_on_finds_what_reading_at_once_finds(history: History) -> None:
    """Batch by batch, as `--follow` reads: checked whenever the changelog's position has moved."""
    a_step_is_recorded_twice(history)
    audit = Audit()
    for record in sorted(history.records, key=lambda r: (r.at, r.topic == EVENTS)):
        audit.feed([record])
    audit.check()
    assert [v.line() for v in audit.violations] == [v.line() for v in history.audit().violations]


def test_what_was_deleted_is_not_held_against_the_rest(world: World) -> None:
    here = world.partition_of(DONE)
    middle = next(
        r for r in world.log.records(EVENTS, here)
        if isinstance(e := read(r), events.TaskGranted) and (e.task_id, e.epoch) == (DONE, 2)
    )  # fmt: skip
    cause = read(middle).cause.offset
    starts = {(EVENTS, here): middle.offset, (COMMANDS, here): cause, (topics.REPLIES.name, here): 3}
    audit = Audit(starts)
    for topic in TOPICS:
        audit.feed(r for r in world.log.records(topic) if r.offset >= starts.get((topic, r.partition), 0))
    audit.check()
    assert not audit.violations
    assert audit.summary()["read"]["partial"] == 1


def test_an_id_is_as_long_as_its_bytes() -> None:
    """Too long for the engine, which answers under an id of its own."""
    world = World(1, types=TYPES)
    world.json(0, command="SubmitTask", type="noop", command_id="é" * (limits.TEXT_MAX // 2 + 1), reply_to=CLIENT)
    world.advance(SECOND)
    assert len(world.of_kind(events.CommandRejected)) == 1
    assert not History.of(world).audit().violations


def test_a_key_is_another_one_in_another_queue() -> None:
    world = World(1, types=TYPES)
    worker = ScriptedWorker(world, queues=("a", "b")).start()
    world.configure("queue/a", {})
    world.configure("queue/b", {})

    def submit(queue: str, command_id: str) -> str:
        world.send(commands.SubmitTask(command_id=command_id, task_id="", type="noop", queue=queue, key="k"), 0)
        return f"{queue}/{ids.keyed_local_id(queue, 'noop', 'k')}"

    first, second = submit("a", "1"), submit("b", "2")
    world.do(commands.PauseTask, first)
    worker.report(worker.run(second), completed({}))
    world.advance(8 * 24 * HOUR)
    assert (world.known(first), world.known(second)) == (True, False)
    submit("a", "3")
    world.advance(SECOND)
    assert not History.of(world).audit().violations


@pytest.mark.parametrize("content", [b"[]", b"{}", b"5", b'{"type": "record", "name": "x", "fields": [{"name": 5}]}'])
def test_whatever_is_published_as_a_schema_the_audit_goes_on(history: History, content: bytes) -> None:
    record = ConfigRecord(name="schema/0011223344556677", content=content)
    data = codec.encode(record)
    audit = Audit()
    audit.feed([Record(topics.CONFIG.name, 0, 1_000, 0, record.name.encode(), data)])
    audit.feed(history.records)
    audit.check()
    assert set(audit.counts) <= {"readable"}


def test_what_was_deleted_before_it_was_executed_is_found(history: History) -> None:
    end = read(history.row(tables.POSITION)).offset
    audit = Audit({(COMMANDS, history.partition): end + 3})
    audit.feed(r for r in history.records if r.topic != COMMANDS or r.partition != history.partition)
    audit.check()
    audit.check()
    assert [(v.rule, v.offset) for v in audit.violations] == [("input-accounted", end + 3)]


@pytest.mark.parametrize("published", [True, False])
def test_another_builds_records_are_read_by_the_schemas_that_it_publishes(history: History, published: bool) -> None:
    schema = json.loads((AVRO / "events" / "TaskQueued.avsc").read_text())
    schema["fields"].append({"name": "mood", "type": "string", "default": ""})
    identity = fingerprint(to_parsing_canonical_form(schema), "CRC-64-AVRO")
    record, body = history.event(events.TaskQueued), io.BytesIO()
    queued = read(record).__dict__ | {"mood": "good"}
    schemaless_writer(body, schema, queued | {"cause": queued["cause"].__dict__})
    record.value = b"\xc3\x01" + bytes.fromhex(identity) + body.getvalue()
    if published:
        name = f"schema/{identity}"
        told = codec.encode(ConfigRecord(name=name, content=json.dumps(schema).encode()))
        history.records.insert(0, Record("config", 0, 99, 0, name.encode(), told))
    audit = history.audit()
    assert ("readable" in audit.counts) == (not published)
    assert published == (not audit.violations)


def test_a_fault_after_the_beginning_of_a_shortened_log_is_found(history: History) -> None:
    middle = history.event(events.TaskGranted, epoch=2)
    starts = {(EVENTS, history.partition): middle.offset, (COMMANDS, history.partition): read(middle).cause.offset}
    say(history.event(events.StepCompleted, step_id="/c"), epoch=1)
    audit = Audit(starts)
    audit.feed(r for r in history.records if r.offset >= starts.get((r.topic, r.partition), 0))
    audit.check()
    assert set(audit.counts) == {"epoch-fence"}
