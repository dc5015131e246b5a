"""What holds after every step, whatever happened: checked from the topics and the stores, sharing no decision of the engine.

The numbers are those of the guarantees (G) and of the checker's list of invariants (I): accepted commands are never lost
(I1, G1), steps are recorded once (I2, G3), transitions are legal and without gaps (I3, G2), only the present grant's
reports count (G4), state is the fold of events and of the changelog (I4, I5, G5), positions only grow (I6), an answer is
given once and for ever (I7), nothing is visible whose input is not committed (I8), timers never fire early (I11), no
session that was heard of ends, and no task is forgotten (G6).

After a step only what the step has changed is looked at again; after a new start of the engine everything is.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from perdure.schemas import codec, commands, events, inbox, limits, rows, topics
from perdure.schemas.common import Cause
from perdure.schemas.inbox import CommandReply
from perdure.schemas.reports import ReportBatch
from perdure.schemas.rows import TaskState
from perdure.schemas.signing import authentic
from perdure.streams import tables, timers
from perdure.streams.engine import Engine
from perdure.streams.event_fold import EventFold
from perdure.streams.log import Record
from perdure.streams.state import State
from perdure.streams.store import META, MemoryStore
from tests.world import KEYS, SECOND, HistoryStore, World

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
PLACES = (b"q", b"h", b"g", tables.TIMERS, tables.START_TIMERS)
"""Kinds of rows that hang on a task and are found by their order."""
Grant = tuple[str, bytes]
"""Session and token."""


@dataclass
class Seen:
    """A task as its events tell it."""

    type: str = ""
    state: str = ""
    seq: int = 0
    epoch: int = 0
    steps: dict[str, int] = field(default_factory=dict)
    """Step id -> epoch that recorded it."""
    milestones: set[str] = field(default_factory=set)
    answers: dict[str, tuple[int, bool]] = field(default_factory=dict)
    """Command id -> (offset of its cause, whether it was accepted)."""
    not_before: int = 0
    """True time before which the task must not become ready by itself."""


class _Partition:
    """How far one partition's topics and store were read, and what was made of them."""

    def __init__(self, partition: int, partitions: int) -> None:
        self.folded = HistoryStore()
        self.fold = EventFold(self.folded, partition, partitions)
        self.changelog: dict[bytes, bytes] = {}
        self.read: dict[str, int] = defaultdict(int)
        self.position = self.sequence = 0
        self.taken: dict[int, int] = defaultdict(int)
        self.versions: dict[str, int] = {}
        self.store: HistoryStore | None = None
        self.batches = 0
        self.named: dict[str, set[bytes]] = {}
        """Task -> the places that its state names."""
        self.names: Counter[bytes] = Counter()
        self.session_of: dict[str, str] = {}
        self.running: Counter[str] = Counter()
        self.heard: dict[str, int] = {}
        """Session -> true time of the last record of it that was executed."""
        self.late_ticks: list[int] = []
        """True times of ticks that said they were late; not all of them speak the truth."""


class Invariants:
    """Checks a world again and again, reading on from where it was."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.tasks: dict[str, Seen] = {}
        self.forgotten: set[str] = set()
        self.replies: dict[tuple[str, str], CommandReply] = {}
        self.answered: set[str] = set()
        self.grants: dict[tuple[str, int], Grant] = {}
        self._parts = [_Partition(p, world.partitions) for p in range(world.partitions)]

    def check_all(self) -> None:
        """Everything that holds at any time, in every partition."""
        for partition in range(self.world.partitions):
            self.check(partition)

    def check(self, partition: int) -> None:
        """Everything that holds at any time, as far as it may have changed."""
        part = self._parts[partition]
        self._check_positions(part, partition)
        for record in self._new(topics.INBOX.name, partition):
            message = self.world.decode(record)
            if isinstance(message, inbox.RunAttempt):
                self.grants[message.task_id, message.epoch] = (message.session, message.token)
        folded = self._check_events(part, partition)
        for record in self._new(topics.REPLIES.name, partition):
            self._check_reply(self.world.decode(record))
        for record in self._new(topics.QUARANTINE.name, partition):
            found = self.world.decode(record)
            assert found.cause != "defect", f"G7: a defect was met: {found.detail}"
        changed = self._check_rows(part, partition, folded)
        self._check_tasks(part, partition, changed)

    def _new(self, topic: str, partition: int) -> list[Record]:
        read = self._parts[partition].read
        found, read[topic] = self.world.log._slice((topic, partition), read[topic], 1_000_000, committed=True)
        return found

    # Events ----------------------------------------------------------------------------------------------------------

    def _check_positions(self, part: _Partition, partition: int) -> None:
        """I6."""
        executed = self.world.executed(partition)
        assert part.position <= executed <= self.world.log._data[topics.COMMANDS.name, partition].end
        committed = self.world.log._offsets.get("engine", {}).get((topics.COMMANDS.name, partition), 0)
        assert committed <= executed, "I6: the group never says more than the state"
        part.position = executed

    def _check_events(self, part: _Partition, partition: int) -> set[bytes]:
        """The events of every input, in the order of inputs; the keys that their fold has changed."""
        for record in self._new(topics.EVENTS.name, partition):
            e = self.world.decode(record)
            assert (e.cause.partition, e.cause.offset < part.position) == (partition, True), (
                "I8: its input is committed"
            )
            for heard in self._inputs(part, partition, e.cause.offset):
                self._hear(part, heard)
            part.fold.apply(e)
            self._check_event(part, partition, e)
        for heard in self._inputs(part, partition, part.position - 1):
            self._hear(part, heard)
        part.fold.flush()
        writes, part.folded.batches = part.folded.batches, []
        return {key for batch in writes for key in batch}

    def _inputs(self, part: _Partition, partition: int, last: int) -> list[Record]:
        """The inputs up to an offset that were not looked at before."""
        begin = part.read[topics.COMMANDS.name]
        if begin > last:
            return []
        where = (topics.COMMANDS.name, partition)
        found, part.read[topics.COMMANDS.name] = self.world.log._slice(where, begin, last + 1 - begin, committed=True)
        return found

    def _hear(self, part: _Partition, record: Record) -> None:
        """Note when a session was heard of."""
        try:
            message = self.world.decode(record)
        except codec.DecodeError:
            return
        at = self.world.log.true_time[record.topic, record.partition, record.offset]
        if isinstance(message, commands.Tick) and record.at - message.due > limits.BEAT_MS:
            part.late_ticks.append(at)
        if not isinstance(message, commands.SessionRecord):
            return
        if isinstance(message, commands.WorkerStarted):
            part.heard.setdefault(message.session, at)
        elif authentic(record.value or b"", message, KEYS.worker):
            part.heard[message.session] = at

    def _check_event(self, part: _Partition, partition: int, e: Any) -> None:
        if getattr(e, "task_id", None) is None:
            assert e.seq == part.sequence + 1, "I3: the partition's events have no gaps"
            part.sequence = e.seq
            if isinstance(e, events.ForwardTaken):
                assert e.number == part.taken[e.source] + 1, f"{e.number} of {e.source} is taken out of turn"
                part.taken[e.source] = e.number
            elif isinstance(e, events.ConfigApplied):
                assert e.version > part.versions.get(e.name, -1), f"version {e.version} of {e.name} comes too late"
                part.versions[e.name] = e.version
            return
        assert self.world.partition_of(e.task_id) == partition
        seen = self.tasks.setdefault(e.task_id, Seen())
        assert e.seq == seen.seq + 1, f"I3: event {e.seq} of {e.task_id} after {seen.seq}"
        seen.seq = e.seq
        self._check_transition(seen, e)
        self._check_epoch(seen, e)
        self._check_report(seen, e)
        self._check_loss(part, e)
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
        if isinstance(e, events.TaskSubmitted):
            seen.type = e.type

    def _check_epoch(self, seen: Seen, e: Any) -> None:
        """I2, G3, G4."""
        if isinstance(e, events.TaskGranted):
            assert e.epoch == seen.epoch + 1
            seen.epoch = e.epoch
        elif isinstance(e, OF_THE_EPOCH):
            assert e.epoch == seen.epoch, "G4: only the present epoch's reports count"
        if isinstance(e, events.StepCompleted):
            assert e.step_id not in seen.steps, f"I2: step {e.step_id} of {e.task_id} is recorded twice"
            seen.steps[e.step_id] = e.epoch
        elif isinstance(e, events.MilestoneReached):
            assert e.name not in seen.milestones
            seen.milestones.add(e.name)

    def _check_report(self, seen: Seen, e: Any) -> None:
        """G4: what a report brings about was said by the session that has the grant, with the grant's token."""
        if not isinstance(e, OF_THE_EPOCH):
            return
        value = self.world.log._data[topics.COMMANDS.name, e.cause.partition].entries[e.cause.offset].record
        batch = self.world.decode(value)
        if isinstance(batch, ReportBatch):
            session, token = self.grants[e.task_id, e.epoch]
            said = [(batch.session, x.token) for x in batch.entries if (x.task_id, x.epoch) == (e.task_id, e.epoch)]
            assert (session, token) in said, f"G4: {type(e).__name__} of {e.task_id} was not said under its grant"

    def _check_loss(self, part: _Partition, e: Any) -> None:
        """A lease ends by silence only after a term and a beat of it, and not while the broker was away meanwhile."""
        if not isinstance(e, events.AttemptLost) or e.why != "session_ended":
            return
        session, _ = self.grants[e.task_id, e.epoch]
        happened = self._true_time(e)
        since = part.heard[session]
        outages = [back for back in self._outages(e.cause) if since <= back <= happened]
        # There is one more term between two beats. A tick that said before that it was late has used it up.
        spent = any(since <= late < back for back in outages[:1] for late in part.late_ticks)
        if len(outages) == 1 and not spent:
            since = max(since, outages[0] - limits.BEAT_MS)
        silence = happened - since
        assert silence >= limits.LEASE_MS + limits.BEAT_MS - SECOND, f"{e.task_id} is lost after {silence} ms"

    def _outages(self, cause: Cause) -> list[int]:
        """True times at which something came after so long a silence of everybody that none of it is believed."""
        times = [self.world.log.true_time[topics.COMMANDS.name, cause.partition, n] for n in range(cause.offset + 1)]
        return [b for a, b in pairwise(times) if b - a > limits.LEASE_MS + limits.BEAT_MS]

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
        happened = self._true_time(e)
        if isinstance(e, events.RetryScheduled):
            seen.not_before = happened + e.delay
        elif isinstance(e, events.TaskSubmitted) and e.not_before is not None:
            seen.not_before = e.not_before
        elif isinstance(e, events.TaskQueued) and e.due is None:
            early = seen.not_before - happened
            assert early <= EARLY, f"I11: {e.task_id} is ready {early} ms early"
            seen.not_before = 0
        elif isinstance(e, events.TaskRedriven):
            seen.not_before = 0

    def _true_time(self, e: Any) -> int:
        return self.world.log.true_time[topics.COMMANDS.name, e.cause.partition, e.cause.offset]

    def _check_reply(self, reply: CommandReply) -> None:
        """I1, I7."""
        self.answered.add(reply.command_id)
        if reply.body is not None or reply.reason == "not_found":
            return
        first = self.replies.setdefault((reply.task_id, reply.command_id), reply)
        if reply.reason.startswith("not_found") or first.reason.startswith("not_found"):
            return
        assert (first.accepted, first.reason, first.field) == (reply.accepted, reply.reason, reply.field), "I7"
        if reply.accepted:
            known = reply.task_id in self.tasks or reply.task_id in self.forgotten
            assert known, f"I1: {reply.task_id} was accepted and is not there"

    # Rows ------------------------------------------------------------------------------------------------------------

    def _check_rows(self, part: _Partition, partition: int, changed: set[bytes]) -> set[bytes]:
        """I4, I5, G5: the keys that may have changed; in the store, the fold and the changelog they are the same."""
        changelog, fold = part.changelog, part.folded
        for record in self._new(topics.CHANGELOG.name, partition):
            assert record.key is not None
            changed.add(record.key)
            changelog.pop(record.key, None) if record.value is None else changelog.update({record.key: record.value})
        store = self.world.stores[partition]
        assert isinstance(store, HistoryStore)
        if store is not part.store:
            part.store, part.batches = store, len(store.batches)
            changed |= changelog.keys() | {key for key, _ in store.scan(b"")} | {key for key, _ in fold.scan(b"")}
        for batch in store.batches[part.batches :]:
            changed |= batch.keys()
        part.batches = len(store.batches)
        changed = {key for key in changed if not key.startswith(META)}
        _same({k: changelog.get(k) for k in changed}, store, "the compacted changelog")
        _same({k: fold.get(k) for k in changed if tables.is_durable(k)}, store, "the fold of task-events")
        return changed

    def _check_tasks(self, part: _Partition, partition: int, changed: set[bytes]) -> None:
        """G6, and that places, leases and timers are exactly those that tasks name."""
        state = self.world.of_engine(partition).state
        store = self.world.stores[partition]
        places = {key for key in changed if key[:1] in PLACES}
        sessions = {key[1:].decode() for key in changed if key[:1] == tables.SESSIONS}
        for scope, task_id in {tables.task_of(key) for key in changed if key[:1] == b"t"}:
            data = store.get(scope + tables.STATE)
            t: TaskState | None = None if data is None else codec.decode(data)
            before, after = part.named.pop(task_id, set()), set() if t is None else self._named(state, task_id, t)
            part.names.subtract(before)
            part.names.update(after)
            part.named[task_id] = after
            places |= before | after
            held, holds = part.session_of.pop(task_id, ""), t.session if t is not None else ""
            part.session_of[task_id] = holds
            part.running[held] -= 1
            part.running[holds] += 1
            sessions |= {held, holds}
            if t is not None:
                self._check_open(state, task_id, t)
        for key in places:
            assert (store.get(key) is not None) == (part.names[key] == 1), f"{key!r} and what tasks name differ"
        for session_id in sessions:
            row = state.sessions.get(session_id)
            assert row is None or row.running == part.running[session_id], f"{row} holds {part.running[session_id]}"
            assert row is not None or not session_id or not part.running[session_id], f"G6: {session_id} is not there"

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

    def _check_open(self, state: State, task_id: str, t: TaskState) -> None:
        seen = self.tasks[task_id]
        assert (seen.state, seen.seq, seen.epoch) == (t.state, t.seq, t.epoch)
        if t.state == "PENDING":
            waits = not {"due", tables.NOT_BEFORE}.isdisjoint(t.timers)
            assert t.ready != waits, f"G6: {task_id} waits for nothing: {t}"
        elif t.state == "RUNNING":
            session = state.sessions.get(t.session)
            assert session is not None, f"G6: {task_id} runs in a session that is not there"
            assert session.state != "ended" or state.get(tables.MARKS, b"ending/" + t.session.encode()) is not None
            assert t.started != ("start" in t.timers), f"G6: {task_id} has no start deadline: {t}"
        else:
            assert (t.ready, t.session, t.started) == (False, "", False)
        assert t.state == "RUNNING" or t.stopping == "none"

    # At the end ------------------------------------------------------------------------------------------------------

    def under_way(self) -> list[str]:
        """What the engine has not finished yet, beside tasks."""
        found = []
        for partition in range(self.world.partitions):
            state = self.world.of_engine(partition).state
            found += [f"outbox of {partition}: {key!r}" for key, _ in self.world.stores[partition].scan(b"o")]
            found += [f"mark {suffix!r}" for suffix, _ in state.scan(tables.MARKS) if suffix != timers.SKEW]
            found += [f"timer to set right: {suffix!r}" for suffix in state.suffixes(tables.WINDOW)]
            due = self.world.of_engine(partition).next_tick()
            found += [f"tick due since {due}"] if due is not None and due < self.world.now - SECOND else []
        return found

    def check_end(self) -> None:
        """The whole store once more."""
        for partition, part in enumerate(self._parts):
            part.store = None
            self.check(partition)

    def check_replay(self, draw: random.Random) -> None:
        """G5: the same input into a fresh engine gives the same records, byte for byte, however it is batched."""
        for partition, part in enumerate(self._parts):
            store, outs = MemoryStore(), defaultdict(list)
            engine = Engine(store, partition, self.world.partitions, KEYS)
            records = self.world.log.records(topics.COMMANDS.name, partition)[: part.position]
            while records:
                size = draw.choice((1, 2, 10, 100))
                batch, records = records[:size], records[size:]
                for record in batch:
                    engine.execute(record)
                for out in engine.take_out():
                    outs[out.topic].append((out.key, out.value))
                store.apply(engine.writes())
                engine.committed()
                if draw.random() < 0.1:
                    engine = Engine(store, partition, self.world.partitions, KEYS)
            written = (topics.EVENTS, topics.REPLIES, topics.INBOX, topics.TELEMETRY, topics.QUARANTINE)
            for topic in written:
                first = [(r.key, r.value) for r in self.world.log.records(topic.name, partition)]
                assert outs[topic.name] == first, f"G5: replay of {topic.name}/{partition} differs"
            stored = {k: v for k, v in self.world.rows(partition).items() if k[:1] != META}
            _same(dict.fromkeys(store._values.keys() - stored.keys()) | stored, store, "replay")


def _same(wanted: dict[bytes, bytes | None], store: Any, what: str) -> None:
    found = [key for key, value in sorted(wanted.items()) if store.get(key) != value]
    shown = [(key, _show(wanted[key]), _show(store.get(key))) for key in found[:5]]
    assert not found, f"{what} is not the store: {len(found)} rows differ: {shown}"


def _show(data: bytes | None) -> Any:
    return None if data is None else codec.decode(data)
