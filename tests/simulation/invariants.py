"""What holds after every step, whatever happened: checked from the topics and the stores, sharing no decision of the engine.

The numbers are those of the guarantees (G) and of the checker's list of invariants (I): accepted commands are never lost
(I1, G1), steps are recorded once (I2, G3), transitions are legal and without gaps (I3, G2), state is the fold of events
and of the changelog (I4, I5, G5), positions only grow (I6), an answer is given once and for ever (I7), nothing is visible
whose input is not committed (I8), timers never fire early (I11), and no task is forgotten (G6).
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from perdure.schemas import codec, events, rows, topics
from perdure.schemas.inbox import CommandReply
from perdure.schemas.rows import TaskState
from perdure.streams import tables
from perdure.streams.engine import Engine
from perdure.streams.event_fold import EventFold
from perdure.streams.log import Record
from perdure.streams.state import State
from perdure.streams.store import META, MemoryStore
from tests.world import KEYS, SECOND, World

EARLY = 5 * SECOND

# CONTRACT section 1, written down once more.
LEGAL = {
    "": {"PENDING"},
    "PENDING": {"RUNNING", "PAUSED", "CANCELLED", "FAILED", "TIMED_OUT"},
    "RUNNING": {"COMPLETED", "FAILED", "TIMED_OUT", "CANCELLED", "PAUSED", "PENDING"},
    "PAUSED": {"PENDING", "CANCELLED", "TIMED_OUT"},
    "FAILED": {"PENDING"}, "TIMED_OUT": {"PENDING"}, "COMPLETED": set(), "CANCELLED": set(),
}  # fmt: skip
LEADS_TO: dict[type, str] = {
    events.TaskSubmitted: "PENDING", events.TaskQueued: "PENDING", events.TaskGranted: "RUNNING",
    events.TaskPaused: "PAUSED", events.AttemptLost: "PENDING", events.RetryScheduled: "PENDING",
    events.TaskCompleted: "COMPLETED", events.TaskFailed: "FAILED", events.TaskTimedOut: "TIMED_OUT",
    events.TaskCancelled: "CANCELLED", events.TaskRedriven: "PENDING",
}  # fmt: skip
OF_THE_EPOCH = (events.AttemptStarted, events.StepStarted, events.StepCompleted, events.StepFailed,
                events.MilestoneReached, events.CheckpointRecorded, events.AttemptLost, events.AttemptFailed,
                events.TaskCompleted)  # fmt: skip


@dataclass
class Seen:
    """A task as its events tell it."""

    state: str = ""
    seq: int = 0
    epoch: int = 0
    steps: set[str] = field(default_factory=set)
    milestones: set[str] = field(default_factory=set)
    answers: dict[str, tuple[int, bool]] = field(default_factory=dict)
    """Command id -> (offset of its cause, whether it was accepted)."""
    not_before: int = 0
    """True time before which the task must not become ready by itself."""


class Invariants:
    """Checks a world again and again, reading on from where it was."""

    def __init__(self, world: World) -> None:
        self.world = world
        count = range(world.partitions)
        self.tasks: dict[str, Seen] = {}
        self.forgotten: set[str] = set()
        self.replies: dict[tuple[str, str], CommandReply] = {}
        self._read: dict[tuple[str, int], int] = defaultdict(int)
        self._sequence = dict.fromkeys(count, 0)
        self._position = dict.fromkeys(count, 0)
        self._folded = {p: MemoryStore() for p in count}
        self._folds = {p: EventFold(self._folded[p], p, world.partitions) for p in count}
        self._changelogs: dict[int, dict[bytes, bytes]] = {p: {} for p in count}

    def check(self) -> None:
        """Everything that holds at any time."""
        for partition in range(self.world.partitions):
            self._check_positions(partition)
            for record in self._new(topics.EVENTS.name, partition):
                self._check_event(record)
            for record in self._new(topics.REPLIES.name, partition):
                self._check_reply(self.world.decode(record))
            self._check_rows(partition)
            self._check_tasks(partition)

    def _new(self, topic: str, partition: int) -> list[Record]:
        found = self.world.log.records(topic, partition)
        begin = self._read[topic, partition]
        self._read[topic, partition] = len(found)
        return found[begin:]

    # Events ----------------------------------------------------------------------------------------------------------

    def _check_positions(self, partition: int) -> None:
        """I6."""
        executed = self.world.executed(partition)
        end = len(self.world.log.records(topics.COMMANDS.name, partition))
        assert self._position[partition] <= executed <= end
        committed = self.world.log._offsets.get("engine", {}).get((topics.COMMANDS.name, partition), 0)
        assert committed == executed, "the group's position and the state's are one"
        self._position[partition] = executed

    def _check_event(self, record: Record) -> None:
        e, partition = self.world.decode(record), record.partition
        assert e.cause.partition == partition
        assert e.cause.offset < self._position[partition], "I8: the event's input is committed"
        self._folds[partition].apply(e)
        if getattr(e, "task_id", None) is None:
            assert e.seq == self._sequence[partition] + 1, "I3: the partition's events have no gaps"
            self._sequence[partition] = e.seq
            return
        assert self.world.partition_of(e.task_id) == partition
        seen = self.tasks.setdefault(e.task_id, Seen())
        assert e.seq == seen.seq + 1, f"I3: event {e.seq} of {e.task_id} after {seen.seq}"
        seen.seq = e.seq
        self._check_transition(seen, e)
        self._check_epoch(seen, e)
        self._check_answer(seen, e)
        self._check_time(seen, e)
        if isinstance(e, events.TaskRetired):
            del self.tasks[e.task_id]
            self.forgotten.add(e.task_id)

    def _check_transition(self, seen: Seen, e: Any) -> None:
        after = LEADS_TO.get(type(e), seen.state)
        waits = (events.TaskQueued, events.TaskResumed)
        assert after == seen.state or after in LEGAL[seen.state], f"I3: {type(e).__name__} in {seen.state}"
        assert after != seen.state or type(e) not in LEADS_TO or isinstance(e, waits)
        seen.state = after

    def _check_epoch(self, seen: Seen, e: Any) -> None:
        """I2, G3, G4."""
        if isinstance(e, events.TaskGranted):
            assert e.epoch == seen.epoch + 1
            seen.epoch = e.epoch
        elif isinstance(e, OF_THE_EPOCH):
            assert e.epoch == seen.epoch, "G4: only the present epoch's reports count"
        if isinstance(e, events.StepCompleted):
            assert e.step_id not in seen.steps, f"I2: step {e.step_id} of {e.task_id} is recorded twice"
            seen.steps.add(e.step_id)
        elif isinstance(e, events.MilestoneReached):
            assert e.name not in seen.milestones
            seen.milestones.add(e.name)

    def _check_answer(self, seen: Seen, e: Any) -> None:
        """I7."""
        command_id = e.cause.command_id
        if command_id is None:
            return
        answer = (e.cause.offset, not isinstance(e, events.CommandRejected))
        first = seen.answers.setdefault(command_id, answer)
        assert first == answer, f"I7: {command_id} is decided at {first} and again at {answer}"

    def _check_time(self, seen: Seen, e: Any) -> None:
        """I11: what waits for a time becomes ready by a tick, and not before that time."""
        where = (topics.COMMANDS.name, e.cause.partition, e.cause.offset)
        happened = self.world.log.true_time[where]
        if isinstance(e, events.RetryScheduled):
            seen.not_before = happened + e.delay
        elif isinstance(e, events.TaskSubmitted) and e.not_before is not None:
            seen.not_before = e.not_before
        elif isinstance(e, events.TaskQueued) and e.due is None:
            assert happened >= seen.not_before - EARLY, (
                f"I11: {e.task_id} is ready {seen.not_before - happened} ms early"
            )
            seen.not_before = 0
        elif isinstance(e, events.TaskRedriven):
            seen.not_before = 0

    def _check_reply(self, reply: CommandReply) -> None:
        """I1, I7."""
        if reply.body is not None or reply.reason == "not_found":
            return
        first = self.replies.setdefault((reply.task_id, reply.command_id), reply)
        if reply.reason.startswith("not_found") or first.reason.startswith("not_found"):
            return
        assert (first.accepted, first.reason, first.field) == (reply.accepted, reply.reason, reply.field), "I7"
        if reply.accepted:
            assert reply.task_id in self.tasks or reply.task_id in self.forgotten, (
                f"I1: {reply.task_id} was accepted and is not there"
            )

    # Rows ------------------------------------------------------------------------------------------------------------

    def _check_rows(self, partition: int) -> None:
        """I4, I5, G5."""
        stored = {k: v for k, v in self.world.rows(partition).items() if not k.startswith(META)}
        self._folds[partition].flush()
        folded = dict(self._folded[partition].scan(b""))
        _same(folded, {k: v for k, v in stored.items() if tables.is_durable(k)}, "the fold of task-events")
        changelog = self._changelogs[partition]
        for record in self._new(topics.CHANGELOG.name, partition):
            assert record.key is not None
            changelog.pop(record.key, None) if record.value is None else changelog.update({record.key: record.value})
        _same(changelog, stored, "the compacted changelog")

    def _check_tasks(self, partition: int) -> None:
        """G6, and that places, leases and timers are exactly those that tasks name."""
        state = self.world.of_engine(partition).state
        named: set[bytes] = set()
        running: dict[str, int] = defaultdict(int)
        for key, data in self.world.rows(partition).items():
            if key[:1] == b"t":
                scope, task_id = tables.task_of(key)
                if key == scope + tables.STATE:
                    t = codec.decode(data)
                    named |= self._named(state, task_id, t)
                    running[t.session] += t.state == "RUNNING"
                    self._check_open(partition, task_id, t)
        kinds = (b"q", b"h", b"g", tables.TIMERS, tables.START_TIMERS)
        stored = {k for k in self.world.rows(partition) if k[:1] in kinds}
        assert stored == named, f"left over {stored - named}, missing {named - stored}"
        for session in state.sessions.values():
            assert session.running == running[session.session], f"{session} holds {running[session.session]}"

    def _named(self, state: State, task_id: str, t: TaskState) -> set[bytes]:
        found = {tables.timers(kind) + tables.timer(due, kind, task_id) for kind, due in t.timers.items()}
        spec: rows.TaskSpec = state.spec(task_id)
        if t.ready:
            held = spec.policy is None and spec.policy_version is not None
            scope = (tables.held if held else tables.ready)(spec.queue, spec.type)
            found.add(scope + tables.place(spec.priority, t.order))
        if t.session:
            found.add(tables.leases(t.session) + tables.number(t.grant))
        return found

    def _check_open(self, partition: int, task_id: str, t: TaskState) -> None:
        state = self.world.of_engine(partition).state
        seen = self.tasks[task_id]
        assert (seen.state, seen.seq, seen.epoch) == (t.state, t.seq, t.epoch)
        if t.state == "PENDING":
            assert t.ready != (not {"due", tables.NOT_BEFORE}.isdisjoint(t.timers)), (
                f"G6: {task_id} waits for nothing: {t}"
            )
        elif t.state == "RUNNING":
            session = state.sessions.get(t.session)
            assert session is not None, f"G6: {task_id} runs in a session that is not there"
            assert session.state != "ended" or state.get(tables.MARKS, b"ending/" + t.session.encode()) is not None
            assert t.started != ("start" in t.timers), f"G6: {task_id} has no start deadline: {t}"
        else:
            assert not (t.ready)
            assert not (t.session)
            assert not (t.started)
        assert t.state == "RUNNING" or t.stopping == "none"

    # At the end ------------------------------------------------------------------------------------------------------

    def check_replay(self, seed: int) -> None:
        """G5: the same input into a fresh engine gives the same records, byte for byte, however it is batched."""
        draw = random.Random(seed)
        for partition in range(self.world.partitions):
            store, outs = MemoryStore(), defaultdict(list)
            engine = Engine(store, partition, self.world.partitions, KEYS)
            records = self.world.log.records(topics.COMMANDS.name, partition)[: self._position[partition]]
            while records:
                size = draw.choice((1, 2, 10, 100))
                batch, records = records[:size], records[size:]
                for record in batch:
                    engine.execute(record)
                for out in engine.take_out():
                    outs[out.topic].append((out.key, out.value))
                store.apply(engine.writes())
                engine.committed()
                if draw.random() < 0.2:
                    engine = Engine(store, partition, self.world.partitions, KEYS)
            written = (topics.EVENTS, topics.REPLIES, topics.INBOX, topics.TELEMETRY, topics.QUARANTINE)
            for topic in written:
                first = [(r.key, r.value) for r in self.world.log.records(topic.name, partition)]
                assert outs[topic.name] == first, f"replay of {topic.name}/{partition} differs"
            _same(
                dict(store.scan(b"")), {k: v for k, v in self.world.rows(partition).items() if k[:1] != META}, "replay"
            )


def _same(one: dict[bytes, bytes], other: dict[bytes, bytes], what: str) -> None:
    if one != other:
        keys = [k for k in sorted(one.keys() | other.keys()) if one.get(k) != other.get(k)]
        shown = [(k, _show(one.get(k)), _show(other.get(k))) for k in keys[:5]]
        raise AssertionError(f"{what} is not the store: {len(keys)} rows differ: {shown}")


def _show(data: bytes | None) -> Any:
    return None if data is None else codec.decode(data)
