"""The worker: Kafka on one side, child processes on the other, and no user code in between.

Threads:
- the main thread decides everything: it waits on child channels, pipes, the fork server and a mailbox (`Events`), and
  owns sessions, slots and attempts;
- one thread reads `worker-inbox` and puts what it finds into the mailbox;
- the log's own thread brings acknowledgements: from there they go straight to the child that waits (`Reporter`, `Link`,
  both locked), and the next batch of reports leaves;
- one thread appends log lines and metrics, so that neither waits for anything else.

Order of a start: let the fork server load the user's modules and meanwhile connect, read `config` and publish our
schemas; publish the types; fork; note the end of each inbox; announce the sessions. Order of an end: tell the engine,
stop the children, report, and only then let go of the log.
"""

from __future__ import annotations

import logging
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, assert_never

import psutil

from perdure import process
from perdure.children import Events
from perdure.connectors.checkpoints import store_id
from perdure.connectors.large_values import Place
from perdure.forkserver import ForkServer, Loaded
from perdure.lending import share_out
from perdure.reporter import Reporter
from perdure.schemas import codec, topics
from perdure.schemas.commands import CHECKPOINT_STORE, HEARS_CHECKPOINTS
from perdure.schemas.errors import ConfigurationError
from perdure.schemas.inbox import (
    CancelAttempt,
    CheckpointAccepted,
    EndSession,
    InboxRecord,
    PauseAttempt,
    RevokeAttempt,
    RunAttempt,
    StepPage,
)
from perdure.schemas.signing import Keys
from perdure.session import (
    Config,
    Inbox,
    Lane,
    Session,
    Sessions,
    new_session_id,
    publish,
    read_config,
    routing_by_partition,
)
from perdure.slots import Slots
from perdure.streams.host_slots import HostSlot, host_id, worker_name
from perdure.streams.log import Log
from perdure.streams.schema_lookup import SchemaLookup
from perdure.worker_logs import METRICS_MS, Activity, LogWriter, Machine

SUPERSEDED = 75
"""Exit code of a worker whose id a newer one has taken."""
FLUSH_S = 10.0
"""How long a worker that ends waits for its last reports to be in the log."""
IDLE_WAIT_MS = 1_000
TICK_MS = 5
"""How long what others bring may keep the main loop from looking at what is due: looking costs as much as a step."""
FILES_PER_SLOT = 4
FILES_BESIDES = 256
LOG = logging.getLogger("perdure.worker")


class Worker:
    """One life of a worker process. `run` once, in the main thread where signals are to be heard."""

    def __init__(
        self,
        log: Log,
        keys: Keys,
        server: ForkServer,
        *,
        queues: list[str] | None = None,
        slots: int,
        name: str | None = None,
        state_dir: Path,
        checkpoint_dir: Path,
        async_slots: int = 1_000,
        drain_timeout_s: float = 60.0,
        large: Place | None = None,
    ) -> None:
        """`server`: of the tasks' modules; started by `run` if it does not run yet, ended by it in any case.
        `queues`: None for those of the loaded types. `slots`: tasks of process types at the same time, `async_slots`
        of async ones. `name`: None for one made of host id and host slot. `drain_timeout_s`: how long tasks may take
        to stop when the worker does; they are killed then. `large`: where values too large for a record lie; None: they
        have to fit.

        Raises `ConfigurationError` for slots below 1.
        """
        if slots < 1 or async_slots < 1:
            raise ConfigurationError(f"a worker needs at least one slot of each kind, not {slots} and {async_slots}")
        self._log, self._keys, self._queues, self._name = log, keys, queues, name
        self._slot_counts = {"process": slots, "async": async_slots}
        self._state_dir, self._checkpoints = state_dir, checkpoint_dir
        self._drain_ms = round(drain_timeout_s * 1000)
        self._server = server
        server.checkpoints, server.large = checkpoint_dir, large
        self._events = Events()
        self._stops = 0
        self._drained_by: int | None = None
        self._code: int | None = None
        self._failure: Exception | None = None
        self._metrics_due = 0
        self._tick_at = 0

    def request_stop(self) -> None:
        """Drain and end; a second call kills what still runs. For any thread, and for signal handlers."""
        self._events.post(self._stop)

    def run(self) -> int:
        """Work until stopped; the exit code. Blocks. Raises `PerdureError` when the worker cannot go on."""
        with ExitStack() as stack:
            stack.callback(self._events.close)
            if threading.current_thread() is threading.main_thread():
                stack.enter_context(_no_strays())
            name = self._name or self._take_name(stack)
            _allow_files(self._slot_counts["process"])
            self._server.start()
            stack.callback(self._server.stop)
            self._connect(stack, name)
            config = self._configured(name)
            loaded = self._server.loaded()
            executors = {task_type: content["policy"]["executor"] for task_type, content in loaded.types.items()}
            self._slots = Slots(
                self._server, self._events, self._reporter, self._logs.offer, executors, self._slot_counts,
                self._freed, _clock, _wall,
            )  # fmt: skip
            stack.callback(self._slots.close)
            self._join(stack, config, name, loaded, executors)
            with _signals(self.request_stop):
                while self._code is None:
                    self._turn()
            if self._code == 0 and not self._reporter.flush(FLUSH_S):
                LOG.warning("the last reports are not known to be in the log; the engine finds out by itself")
            return self._code

    # Start -----------------------------------------------------------------------------------------------------------

    def _take_name(self, stack: ExitStack) -> str:
        host = host_id(self._state_dir)
        slot = HostSlot(self._state_dir, "worker")
        stack.callback(slot.release)
        return worker_name(host, slot)

    def _connect(self, stack: ExitStack, name: str) -> None:
        """All that writes to the log."""
        lookup = SchemaLookup(self._log)
        stack.callback(lookup.close)
        stack.callback(codec.learn_from(lookup))
        self._producer = self._log.producer()
        stack.callback(self._producer.close)
        signer = self._keys.newest_worker()
        self._reporter = Reporter(self._producer, signer, name, _clock)
        store = store_id(self._checkpoints)
        labels = {CHECKPOINT_STORE: store, HEARS_CHECKPOINTS: "yes"}
        self._sessions = Sessions(self._producer, signer, self._reporter.release, labels)
        machine = Machine(name, self._checkpoints, store, self._log.partitions)
        self._logs = LogWriter(self._log.producer(), machine, self._fail)
        self._logs.start()
        stack.callback(self._logs.close, FLUSH_S)

    def _configured(self, name: str) -> Config:
        """What `config` holds, our schemas included from now on."""
        config = read_config(self._log)
        publish(self._log, config, codec.unpublished_schemas(config), name, _wall())
        return config

    def _join(self, stack: ExitStack, config: Config, name: str, loaded: Loaded, executors: dict[str, str]) -> None:
        """Publish the types, fork, note where each inbox ends, read on from there, and announce the sessions."""
        types = {f"type/{task_type}": content for task_type, content in loaded.types.items()}
        published = publish(self._log, config, types, name, _wall())
        versions = {key.removeprefix("type/"): version for key, version in published.items()}
        self._lanes = _lanes(name, executors, versions, self._slot_counts)
        queues = self._queues or [content["queue"] for content in loaded.types.values()]
        self._routing = routing_by_partition(queues, config, self._log.partitions)
        self._slots.open()
        reader = self._log.reader()
        ends = {p: reader.bounds(topics.INBOX.name, p)[1] for p in self._routing}
        reader.assign({(topics.INBOX.name, p): end for p, end in ends.items()})
        inbox = Inbox(reader, self._producer, [lane.worker_id for lane in self._lanes], self._deliver, self._fail)
        stack.callback(inbox.close)
        inbox.start()
        for lane in self._lanes:
            session_id = new_session_id()
            lent = share_out(lane.slots, {p: len(routing_keys) for p, routing_keys in self._routing.items()})
            for p, routing_keys in self._routing.items():
                self._sessions.begin(lane, p, session_id, routing_keys, lent[p], ends[p], _clock())
            LOG.info("worker %s runs %s on %s", lane.worker_id, ", ".join(lane.types), ", ".join(self._queue_names()))

    # The main loop ---------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Wait for what others bring; then, within `TICK_MS` of it, see what time brings.

        Never more often than that: a due time that stays in the past would take a core, and nobody would notice.
        """
        now = _clock()
        if now >= self._tick_at:
            self._tick_at = max(self._tick(now), now + TICK_MS)
        if self._events.wait(self._tick_at - _clock()):
            self._tick_at = min(self._tick_at, now + TICK_MS)

    def _tick(self, now: int) -> int:
        """What time brings; when it brings something again, unless something else happens before."""
        if self._failure is not None:
            raise self._failure
        self._give_up_orphans(now)
        self._sessions.beat(now, self._free)
        self._reporter.tick(now)
        self._slots.tick(now)
        if now >= self._metrics_due:
            self._metrics_due = now + METRICS_MS
            self._measure("draining" if self._stops else "running")
        if self._drained_by is not None:
            if not self._slots.running():
                self._measure("stopped")
                self._code = 0
                return now
            if now >= self._drained_by:
                self._drained_by = now + IDLE_WAIT_MS
                self._slots.kill()
        due = (self._sessions.next_beat(), self._reporter.next_due(), self._slots.next_due(), self._drained_by)
        return min((at for at in due if at is not None), default=now + IDLE_WAIT_MS)

    def _give_up_orphans(self, now: int) -> None:
        """No beat has been acknowledged for so long that others must be taken to have the tasks by now."""
        for session in self._sessions:
            if session.orphaned(now):
                LOG.error("no beat reached partition %s for 10 minutes: its tasks are stopped here", session.partition)
                self._over(session)

    def _stop(self) -> None:
        self._stops += 1
        if self._stops == 1:
            self._sessions.stop("shutdown")
            self._drained_by = _clock() + self._drain_ms
            self._slots.drain()
        elif self._stops == 2:
            self._drained_by = _clock()

    def _measure(self, state: str) -> None:
        slots = sum(lane.slots for lane in self._lanes)
        session = next((session.id for session in self._sessions), "")
        self._logs.measure(Activity(session, self._queue_names(), slots, self._slots.running(), state), _wall())

    def _free(self, session: Session) -> int:
        return 0 if self._stops else self._slots.free(session)

    def _freed(self, executor: str) -> None:
        self._sessions.beat_after_decline(executor, self._slots.idle(executor), _clock())

    def _queue_names(self) -> list[str]:
        return sorted(key for routing_keys in self._routing.values() for key in routing_keys)

    # What the engine says --------------------------------------------------------------------------------------------

    def _deliver(self, partition: int, message: InboxRecord) -> None:
        self._events.post(partial(self._take, partition, message))

    def _fail(self, error: Exception) -> None:
        """A thread cannot go on, so the worker cannot. For any thread."""
        self._failure = error
        self._events.post(lambda: None)

    def _take(self, partition: int, message: InboxRecord) -> None:
        session = self._sessions.find(partition, message.session)
        if session is None:
            return
        match message:
            case RunAttempt():
                self._slots.take(session, message)
            case StepPage():
                self._slots.page(message)
            case PauseAttempt():
                self._slots.pause(message)
            case CancelAttempt():
                self._slots.cancel(message)
            case CheckpointAccepted():
                self._slots.accepted(message)
            case RevokeAttempt():
                self._slots.revoke(message.task_id, message.epoch)
            case EndSession():
                self._ended(session, message.why)
            case _:
                assert_never(message)

    def _ended(self, session: Session, why: str) -> None:
        if why == "superseded":
            LOG.error("a newer worker has taken the id %s: this one ends", session.lane.worker_id)
            self._code = SUPERSEDED
        else:
            LOG.warning("the session of partition %s has expired: its tasks are stopped here", session.partition)
            self._over(session)

    def _over(self, session: Session) -> None:
        """Stop what runs under the session, and begin a new one."""
        self._slots.give_up(session)
        self._reporter.close(session)
        if self._stops:
            self._sessions.end(session)
        else:
            self._sessions.renew(session, _clock())


def _lanes(name: str, executors: dict[str, str], versions: dict[str, int], slots: dict[str, int]) -> list[Lane]:
    """A lane for each executor that has types; the first one bears the worker's own name."""
    used = [e for e in ("process", "async") if e in executors.values()]
    return [
        Lane(
            name if executor == used[0] else f"{name}.{executor}", executor,
            {t: versions[t] for t, e in executors.items() if e == executor}, slots[executor],
        )
        for executor in used
    ]  # fmt: skip


def _allow_files(slots: int) -> None:
    """Raise the limit of open files as far as the slots need it and the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_BESIDES + FILES_PER_SLOT * slots
    if soft != resource.RLIM_INFINITY and soft < wanted:
        enough = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


@contextmanager
def _no_strays() -> Iterator[None]:
    """Processes that detached themselves come to us when the fork server is killed; in the end they are killed too."""
    before = set(psutil.Process().children())
    process.adopt_orphans()
    try:
        yield
    finally:
        for stray in set(psutil.Process().children(recursive=True)) - before:
            with suppress(psutil.Error):
                stray.kill()


@contextmanager
def _signals(stop: Any) -> Iterator[None]:
    """SIGTERM and SIGINT stop the worker, where it runs in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, lambda _number, _frame: stop()) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _clock() -> int:
    return time.monotonic_ns() // 1_000_000


def _wall() -> int:
    return time.time_ns() // 1_000_000
