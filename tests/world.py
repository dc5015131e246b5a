"""The engine on the in-memory log under a virtual clock, driven by hand: clients, workers, crashes, readers.

`World.now` is the true time and the hosts' clock; `World.skew` is by how much the broker's clock is ahead of it. Nothing
happens by itself: `pump` lets the engine do all that it has to do at this moment, `advance` lets time pass.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from perdure.schemas import codec, commands, ids, inbox, reports, topics
from perdure.schemas.common import ErrorInfo, Usage
from perdure.schemas.public import ConfigRecord, Quarantined
from perdure.schemas.rows import TaskState
from perdure.schemas.signing import Keys, signed
from perdure.streams import tables
from perdure.streams.engine import Engine
from perdure.streams.local_engine import LocalEngine
from perdure.streams.log import OutcomeUnknown, Record, TransactionAborted
from perdure.streams.memory_log import Clock, MemoryLog, MemoryMember, MemoryTransactional
from perdure.streams.store import MemoryStore, Store

T = TypeVar("T")
T0 = 1_800_000_000_000
"""True time at the beginning of every world, ms."""
SECOND, MINUTE, HOUR = 1_000, 60_000, 3_600_000
KEYS = Keys(worker={"w1": b"w" * 32}, engine={"e1": b"e" * 32})
CLIENT = "client-1"


class Crash(BaseException):
    """The engine's process dies here."""


class FaultyLog(MemoryLog):
    """A log whose next commit ends as it is told (see `World.fault`), and that notes the true time of each append."""

    def __init__(self, clock: Clock, partitions: int, true_clock: Clock) -> None:
        super().__init__(clock, partitions)
        self.fault = ""
        self.true_clock = true_clock
        self.true_time: dict[tuple[str, int, int], int] = {}

    def _append(self, topic: str, partition: int, *rest: Any, **more: Any) -> Any:
        self.true_time[topic, partition, self._data[topic, partition].end] = self.true_clock()
        return super()._append(topic, partition, *rest, **more)

    def transactional(self, name: str) -> MemoryTransactional:
        plain = super().transactional(name)
        return _FaultyTransactional(self, name, plain._epoch)


class _FaultyTransactional(MemoryTransactional):
    def commit(self, member: MemoryMember, offsets: Mapping[tuple[str, int], int]) -> None:
        log = self._log
        assert isinstance(log, FaultyLog)
        fault, log.fault = log.fault, ""
        if fault == "aborted":
            raise TransactionAborted("told to")
        if fault == "crash before commit":
            raise Crash
        if fault == "unknown, lost":
            self.abort()
            raise OutcomeUnknown("told to")
        super().commit(member, offsets)
        if fault == "crash after commit":
            raise Crash
        if fault == "unknown, committed":
            raise OutcomeUnknown("told to")


class HistoryStore(MemoryStore):
    """A store that can be taken back to what it was some batches ago."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[dict[bytes, bytes | None]] = []

    def apply(self, writes: Mapping[bytes, bytes | None]) -> None:
        self.batches.append(dict(writes))
        super().apply(writes)

    def without_last(self, batches: int) -> HistoryStore:
        """A store that lacks the last batches."""
        older = HistoryStore()
        for writes in self.batches[: max(0, len(self.batches) - batches)]:
            older.apply(writes)
        return older


class World:
    """A namespace: its log, its engine (all partitions), and what clients and hosts do to it."""

    def __init__(
        self,
        partitions: int = 2,
        *,
        batch: int = 100,
        types: Mapping[str, Any] | None = None,
        log: type[FaultyLog] = FaultyLog,
    ) -> None:
        self.now, self.skew, self._batch = T0, 0, batch
        self.log = log(lambda: self.now + self.skew, partitions, lambda: self.now)
        self.partitions = partitions
        self.producer = self.log.producer()
        self.stores: dict[int, Store] = {p: HistoryStore() for p in range(partitions)}
        self._numbers = itertools.count(1)
        self._decoded: dict[tuple[str, int, int], Any] = {}
        self.workers: list[ScriptedWorker] = []
        for name, policy in ({"noop": {}} if types is None else types).items():
            self.configure_type(name, policy)
        self.engine = self._new_engine()
        self.pump()

    # The engine's life -----------------------------------------------------------------------------------------------

    def _new_engine(self) -> LocalEngine:
        return LocalEngine(self.log, KEYS, lambda: self.now, self.stores, self._batch)

    def restart(self, stores: str | int = "kept") -> None:
        """A new engine process: on the same stores, on empty ones, or on stores that lack the last n batches."""
        self.engine.close()
        if stores == "empty":
            self.stores = {p: HistoryStore() for p in range(self.partitions)}
        elif isinstance(stores, int):
            self.stores = {p: s.without_last(stores) for p, s in self.stores.items() if isinstance(s, HistoryStore)}
        self.engine = self._new_engine()

    def fault(self, kind: str) -> None:
        """How the next commit ends: 'aborted', 'crash before commit', 'crash after commit', 'unknown, lost' or
        'unknown, committed'. After a crash the world restarts the engine on the same stores."""
        self.log.fault = kind

    def pump(self) -> None:
        """Let the engine do everything that is to be done at this moment."""
        try:
            self.engine.pump()
        except Crash:
            self.restart()
            self.engine.pump()

    def advance(self, ms: int) -> None:
        """Let time pass; ticks come when a host would send them, and beating workers beat."""
        end = self.now + ms
        while True:
            for worker in self.workers:
                worker.beat_if_due()
            self.pump()
            if self.now >= end:
                return
            self.now = min(end, self._next_event())

    def _next_event(self) -> int:
        wanted = [due for p, d in self.engine.duties.items() if self._has_duties(p) and (due := d.next_due(self.now))]
        later = self.engine.next_due()
        beats = [w.beat_due for w in self.workers if w.beating]
        found = [*wanted, *beats, *([] if later is None else [later])]
        return max(self.now + 10, min(found, default=self.now + 24 * HOUR))

    def _has_duties(self, partition: int) -> bool:
        """Whether something is due at once or under way; what is due later the engine's own timer says."""
        engine = self.engine.engine(partition)
        wanted = engine.next_tick()
        sending = any(next(engine.state.scan(tables.outbox(t)), None) for t in range(self.partitions))
        return sending or (wanted is not None and wanted <= self.now)

    # What others append ----------------------------------------------------------------------------------------------

    def new_id(self, prefix: str) -> str:
        """An id that no other thing of this world has."""
        return f"{prefix}{next(self._numbers)}"

    def partition_of(self, task_id: str) -> int:
        """The partition that owns a whole task id."""
        return ids.partition_of(ids.split(task_id)[0], self.partitions)

    def append(self, message: Any, partition: int) -> int:
        """Append a record (or bytes) to task-commands as it is; its offset."""
        offsets: list[int] = []
        value = message if message is None or isinstance(message, bytes) else codec.encode(message)
        self.producer.append(topics.COMMANDS.name, partition, None, value, lambda o, _: offsets.append(o))
        return offsets[0]

    def send(self, message: Any, partition: int | None = None) -> int:
        """Append a record to the partition of its task (if none is given) and pump; its offset."""
        where = self.partition_of(message.task_id) if partition is None else partition
        offset = self.append(message, where)
        self.pump()
        return offset

    def json(self, partition: int, **content: Any) -> int:
        """Append a JSON command, as any producer may, and pump."""
        return self.send(json.dumps(content).encode(), partition)

    def host(self, message: Any, partition: int) -> int:
        """Append a record with the engine key's signature and pump."""
        return self.send(signed(message, *KEYS.newest_engine()), partition)

    def tick(self, partition: int, due: int | None = None, host_clock: int | None = None) -> int:
        """Append a tick of anybody's and pump."""
        clock = self.now if host_clock is None else host_clock
        return self.send(commands.Tick(due=self.now if due is None else due, host_clock=clock), partition)

    def configure(self, name: str, content: Any) -> int:
        """Set a configuration name; its version. Hosts see it with the next pump."""
        versions: list[int] = []
        record = ConfigRecord(name=name, content=json.dumps(content).encode())
        self.producer.append("config", 0, name.encode(), codec.encode(record), lambda o, _: versions.append(o))
        return versions[0]

    def configure_type(self, name: str, policy: Mapping[str, Any] | None = None, queue: str = "default") -> int:
        """Set a type's configuration, as a worker does; its version."""
        return self.configure(f"type/{name}", {"queue": queue, "policy": dict(policy or {}), "code_version": "1"})

    def submit(self, task_type: str = "noop", task_id: str = "", **fields: Any) -> str:
        """Submit a task to its own partition and pump; its id."""
        task_id = task_id or f"default/{self.new_id('t')}"
        command_id = fields.pop("command_id", None) or self.new_id("submit-")
        reply_to = fields.pop("reply_to", CLIENT)
        self.send(
            commands.SubmitTask(command_id=command_id, task_id=task_id, type=task_type, reply_to=reply_to, **fields)
        )
        return task_id

    def do(self, kind: type[Any], task_id: str, **fields: Any) -> inbox.CommandReply:
        """Send a command for a task; the engine's answer."""
        command_id = fields.pop("command_id", None) or self.new_id("do-")
        self.send(kind(command_id=command_id, task_id=task_id, reply_to=CLIENT, **fields))
        return self.reply(command_id)

    def status(self, task_id: str) -> dict[str, Any]:
        """What `DescribeTask` answers."""
        body = self.do(commands.DescribeTask, task_id).body
        assert body is not None, f"{task_id} is not known"
        found: dict[str, Any] = json.loads(body)
        return found

    # What can be read ------------------------------------------------------------------------------------------------

    def decode(self, record: Record) -> Any:
        """A committed record, decoded."""
        where = (record.topic, record.partition, record.offset)
        if where not in self._decoded:
            self._decoded[where] = codec.decode(record.value or b"")
        return self._decoded[where]

    def all(self, topic: topics.Topic, partition: int | None = None) -> list[Any]:
        """Every committed record of a topic, by partition and offset."""
        return [self.decode(r) for r in self.log.records(topic.name, partition)]

    def events(self, task_id: str | None = None, partition: int | None = None) -> list[Any]:
        """Events on task-events; of one task, if one is named."""
        found = self.all(topics.EVENTS, partition)
        return found if task_id is None else [e for e in found if getattr(e, "task_id", None) == task_id]

    def kinds(self, task_id: str) -> list[str]:
        """Names of a task's events, in order."""
        return [type(e).__name__ for e in self.events(task_id)]

    def of_kind(self, kind: type[T], task_id: str | None = None) -> list[T]:
        """The events of one class."""
        return [e for e in self.events(task_id) if isinstance(e, kind)]

    def replies(self, command_id: str) -> list[inbox.CommandReply]:
        """Every answer to a command."""
        return [r for r in self.all(topics.REPLIES) if r.command_id == command_id]

    def reply(self, command_id: str) -> inbox.CommandReply:
        """The newest answer to a command."""
        found = self.replies(command_id)
        assert found, f"no answer to {command_id}"
        return found[-1]

    def inbox(self, session: str, kind: type[T]) -> list[T]:
        """What a session was told, of one class."""
        return [m for m in self.all(topics.INBOX) if isinstance(m, kind) and getattr(m, "session", None) == session]

    def quarantined(self) -> list[Quarantined]:
        """Every record that was set aside."""
        return self.all(topics.QUARANTINE)

    def of_engine(self, partition: int) -> Engine:
        """The engine of a partition."""
        return self.engine.engine(partition)

    def task(self, task_id: str) -> TaskState:
        """How the engine sees a task that exists."""
        return self.of_engine(self.partition_of(task_id)).state.known(task_id)

    def known(self, task_id: str) -> bool:
        """Whether the engine knows the task."""
        return self.of_engine(self.partition_of(task_id)).state.task(task_id) is not None

    def rows(self, partition: int) -> dict[bytes, bytes]:
        """Everything in a partition's store."""
        return dict(self.stores[partition].scan(b""))

    def executed(self, partition: int) -> int:
        """Next offset of task-commands."""
        return self.of_engine(partition).positions().get(topics.COMMANDS.name, 0)


class ScriptedWorker:
    """A session of a worker that says what it is told to say."""

    def __init__(
        self,
        world: World,
        worker_id: str = "w1",
        *,
        types: Mapping[str, int] | None = None,
        queues: tuple[str, ...] = ("default",),
        slots: int = 2,
        session: str = "",
        beating: bool = False,
    ) -> None:
        self.world, self.worker_id, self.queues, self.slots = world, worker_id, queues, slots
        self.types = {"noop": 0} if types is None else dict(types)
        self.labels: dict[str, str] = {}
        self.session = session or f"s{world.new_id('')!s:0>6}"
        self.partition = ids.partition_of(queues[0], world.partitions)
        self.beating, self.beat_due = beating, world.now
        self._numbers: dict[tuple[str, int], int] = {}
        world.workers.append(self)

    # Session records -------------------------------------------------------------------------------------------------

    def say(self, message: Any) -> int:
        """Append a signed record to the session's partition and pump; its offset."""
        return self.world.send(signed(message, *KEYS.newest_worker()), self.partition)

    def start(self) -> ScriptedWorker:
        """Announce the session."""
        self.say(self.started())
        self.beat_due = self.world.now + 2 * SECOND
        return self

    def started(self) -> commands.WorkerStarted:
        """The session's announcement."""
        return commands.WorkerStarted(
            session=self.session, worker_id=self.worker_id, types=self.types, queues=list(self.queues),
            slots=self.slots, labels=self.labels,
        )  # fmt: skip

    def beat(self, grants_seen: int | None = None) -> None:
        """Say that the session lives, and which grants it has read (all, if not told)."""
        seen = len(self.grants()) if grants_seen is None else grants_seen
        self.say(commands.WorkerBeat(session=self.session, grants_seen=seen, free=self.slots))
        self.beat_due = self.world.now + 2 * SECOND

    def beat_if_due(self) -> None:
        """The beat of a worker that beats by itself."""
        if self.beating and self.world.now >= self.beat_due:
            self.beat()

    def stop(self) -> None:
        """Say that it shuts down."""
        self.say(commands.WorkerStopping(session=self.session))

    def restart(self) -> ScriptedWorker:
        """A newer session of the same worker."""
        beating, self.beating = self.beating, False
        newer = ScriptedWorker(
            self.world, self.worker_id, types=self.types, queues=self.queues, slots=self.slots, beating=beating
        )
        return newer.start()

    # Grants and reports ----------------------------------------------------------------------------------------------

    def grants(self) -> list[inbox.RunAttempt]:
        """Every grant of this session."""
        return self.world.inbox(self.session, inbox.RunAttempt)

    def grant(self, task_id: str | None = None) -> inbox.RunAttempt:
        """The newest grant, of a task if one is named."""
        found = [g for g in self.grants() if task_id in (None, g.task_id)]
        assert found, f"no grant of {task_id or 'anything'} to {self.session}"
        return found[-1]

    def batch(self, grant: inbox.RunAttempt, *said: Any, **forged: Any) -> bytes:
        """A signed batch with reports; those numbered 0 get the next number of the epoch."""
        key, numbered = (grant.task_id, grant.epoch), []
        for report in said:
            seq = report.seq or self._numbers.get(key, 0) + 1
            self._numbers[key] = max(seq, self._numbers.get(key, 0))
            numbered.append(codec.replace(report, seq=seq))
        entry = reports.ReportEntry(
            task_id=grant.task_id, epoch=forged.get("epoch", grant.epoch), token=forged.get("token", grant.token),
            reports=numbered,
        )  # fmt: skip
        session = forged.get("session", self.session)
        return signed(reports.ReportBatch(session=session, entries=[entry]), *forged.get("key", KEYS.newest_worker()))

    def report(self, grant: inbox.RunAttempt, *said: Any, **forged: Any) -> bytes:
        """Append a batch and pump; its bytes, for sending them again."""
        data = self.batch(grant, *said, **forged)
        self.world.send(data, self.partition)
        return data

    def run(self, task_id: str | None = None) -> inbox.RunAttempt:
        """Start the newest grant's attempt."""
        grant = self.grant(task_id)
        self.report(grant, begun())
        return grant


# Reports, numbered when they are sent --------------------------------------------------------------------------------


def begun() -> reports.AttemptStarted:
    """User code is about to run."""
    return reports.AttemptStarted(seq=0)


def step(name: str, result: bytes | None = b"1", **fields: Any) -> reports.ReportStep:
    """A step of the root scope, or with a whole id (one that holds a slash), is done."""
    step_id = name if "/" in name else f"/{name}"
    return reports.ReportStep(seq=0, step_id=step_id, name=name.rpartition("/")[2], result=result, **fields)


def checkpoint(version: int, **positions: int) -> reports.ReportCheckpoint:
    """A checkpoint is in its store."""
    return reports.ReportCheckpoint(
        seq=0, version=version, uri=f"file:{version}", sha256="0" * 64, size=10, positions=positions
    )


def completed(result: Any = None) -> reports.AttemptCompleted:
    """User code returned."""
    return reports.AttemptCompleted(seq=0, result=json.dumps(result).encode(), usage=Usage())


def failed(*error_types: str, message: str = "it broke", final: bool = False) -> reports.AttemptFailed:
    """User code raised."""
    names = list(error_types) or ["builtins.ValueError", "builtins.Exception"]
    return reports.AttemptFailed(seq=0, error_types=names, message=message, traceback="", usage=Usage(), final=final)


def failed_step(name: str) -> reports.ReportStep:
    """A step raised."""
    return step(name, None, error=ErrorInfo(type="ValueError", message="no", error_types=["builtins.ValueError"]))


def crashed(*, innocent: bool = False) -> reports.AttemptCrashed:
    """The child died without a word."""
    return reports.AttemptCrashed(seq=0, usage=Usage(), signal=9, innocent=innocent)


def stopped(why: str) -> reports.AttemptStopped:
    """The attempt stopped as it was asked to."""
    return reports.AttemptStopped(seq=0, why=why, usage=Usage())


def declined(reason: str = "full") -> reports.AttemptDeclined:
    """The worker does not run the grant."""
    return reports.AttemptDeclined(seq=0, reason=reason)


def progress(fraction: float, **fields: Any) -> reports.ReportProgress:
    """Where the attempt stands."""
    return reports.ReportProgress(seq=0, fraction=fraction, **fields)


def milestone(name: str) -> reports.ReportMilestone:
    """A named point was passed."""
    return reports.ReportMilestone(seq=0, name=name)
