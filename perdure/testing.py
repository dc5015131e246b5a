"""A test kit for durable tasks: engine, worker and client in one process, on a log in memory, on virtual time.

```python
from perdure.testing import Kit

def test_survives_everything():
    with Kit(tasks=[myapp.tasks]) as kit:
        handle = kit.submit("process_large_dataset", {"dataset_path": "large.csv"})
        kit.kill_task(handle, at=handle.after_report(7))
        kit.advance("2h")
        kit.crash_worker(down="10m")
        assert handle.result() == {"sum": 499_500}
```

Engine, client, sessions, reports, steps and checkpoints are the real ones; processes, sockets and Kafka are left out.
Time passes only when the test lets it: thirty hours take as long as the code under test computes. Nothing happens at
the same time as anything else, so a test that passes once passes always.

A task waits in virtual time with `kit.sleep` (`monkeypatch.setattr("time.sleep", kit.sleep)`), an async one also with
`asyncio.sleep`. It may use threads that do not wait in virtual time; an async one cannot wait for real sockets.
"""

from __future__ import annotations

import datetime as dt
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import ModuleType, TracebackType
from typing import Any, Self, Unpack, cast

from perdure.client import Client
from perdure.connectors.blobs import MemoryBlobs
from perdure.connectors.checkpoints import MemoryCheckpoints
from perdure.connectors.large_values import LargeValues
from perdure.schemas import ids, limits
from perdure.schemas.codec import replace as replace_record
from perdure.schemas.durations import Duration, to_ms
from perdure.schemas.errors import ConfigurationError, InvalidRequest, WaitTimeout
from perdure.schemas.signing import Keys
from perdure.session import publish
from perdure.streams.local_engine import LocalEngine
from perdure.streams.log import Log
from perdure.streams.memory_log import MemoryLog
from perdure.streams.task_lifecycle import ENDED
from perdure.submission import SubmitOptions
from perdure.tasks import Registry, TaskType, default_registry, task, type_config
from perdure.testing_client import ClientLog, KitHandle, Moment
from perdure.testing_strands import START_MS, Strand, VirtualClock
from perdure.testing_worker import InlineWorker

__all__ = ["START_MS", "Kit", "KitHandle", "Moment", "VirtualClock"]

CODE_VERSION = "under-test"
Tasks = ModuleType | Registry | Callable[..., Any]


class Kit:
    """A whole namespace for one test. Its methods are for the thread that made it, and most of them also for the tasks
    that run in it: a step may call `kit.kill_task` to die right there.

    tasks: modules, registries or functions; functions need no `@task`. queues: those that the worker serves; None for
    those of the tasks. slots: tasks of each kind (sync, async) that run at the same time. partitions: of each topic.
    """

    def __init__(
        self, tasks: Iterable[Tasks], *, queues: Iterable[str] | None = None, slots: int = 8, partitions: int = 2
    ) -> None:
        self._types = _types(tasks)
        self._queues = [found.queue for found in self._types.values()] if queues is None else list(queues)
        self._slots = slots
        self._home = threading.current_thread()
        self._clock = VirtualClock()
        self.log = MemoryLog(self._clock, partitions)
        self._log = cast("Log", self.log)
        self._keys = Keys.generate()
        self._store = MemoryCheckpoints()
        self._engine = LocalEngine(self._log, self._keys, self._clock)
        self._client_log = ClientLog(self._log, self._decide)
        blobs = MemoryBlobs()
        self._large = LargeValues(lambda: (blobs, "kit"), day=lambda: 0)
        self.client = Client(self._client_log, clock=self._clock, large_values=self._large)
        self._closed = False
        self._submitted = self._lives = 0
        self._said: Counter[str] = Counter()
        self._deaths: dict[Moment, list[Callable[[], None]]] = {}
        self._dropped: list[Strand] = []
        self._root_level = logging.root.level
        if logging.root.level == logging.WARNING:
            logging.root.setLevel(logging.INFO)  # as a worker's child does: what tasks log at INFO is in their log
        self._versions = self._publish()
        self._engine.pump()
        self._worker: InlineWorker | None = None
        self._worker_due = 0
        self._start_worker()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of everything. Code of tasks that still run, or were killed, gets to its `finally` blocks only now."""
        if self._closed:
            return
        self._closed = True
        if self._worker is not None:
            self._worker.die()
            self._worker = None
        for strand in self._dropped:
            strand.unwind()
        self._dropped.clear()
        self._client_log.close()
        self.client.close()
        self._engine.close()
        logging.root.setLevel(self._root_level)

    # Tasks ------------------------------------------------------------------------------------------------------------

    def submit(self, type: str | Callable[..., Any], input: Any = None, **options: Unpack[SubmitOptions]) -> KitHandle:
        """Submit a task, by type name or function; see `perdure.Client.submit`. It is decided when this returns, and
        runs when time passes or `run` is called. Ids count up, so that every run of a test is the same.

        Raises what `Client.submit` raises, and `CommandRefused`.
        """
        name = type if isinstance(type, str) else self._name_of(type)
        if options.get("id") is None and options.get("key") is None:
            self._submitted += 1
            options["id"] = f"task-{self._submitted}"
        handle = self.client.submit(name, input, **options)
        handle.status()
        return KitHandle(self, handle.id)

    def handle(self, task_id: str) -> KitHandle:
        """The handle of a task by its id, for tasks that others have submitted. Raises `NotFound`."""
        return KitHandle(self, self.client.get(task_id).id)

    def reports(self, task_id: str) -> int:
        """See `KitHandle.reports`."""
        return self._said[task_id]

    # Time -------------------------------------------------------------------------------------------------------------

    @property
    def now(self) -> dt.datetime:
        """Virtual time, UTC."""
        return dt.datetime.fromtimestamp(self._clock.now / 1000, dt.UTC)

    def time(self) -> float:
        """Virtual time as `time.time` gives it: seconds since 1970."""
        return self._clock.now / 1000

    def sleep(self, seconds: float) -> None:
        """What `time.sleep` is, in virtual time: for tasks; a test that calls it lets time pass for all."""
        strand = self._caller()
        if strand is None:
            self.advance(seconds)
            return
        ms = max(1, math.ceil(seconds * 1000))
        attempt = None if self._worker is None else self._worker.find(strand)
        if attempt is None:
            strand.stand()  # its process was killed, and now its code is being unwound
        else:
            attempt.sleep(ms)

    def run(self) -> None:
        """Let everything happen that can happen without time passing."""
        self._check_caller("run")
        while True:
            self._engine.pump()
            worker = self._worker
            if worker is None:
                return
            came = worker.take()
            attempt = worker.next()
            if attempt is not None:
                worker.go(attempt)
            elif not came and not worker.flush_progress():
                return

    def advance(self, duration: Duration) -> None:
        """Let time pass: every timer fires and every task goes on in its turn. Plain numbers are seconds."""
        end = self._clock.now + to_ms(duration, field="duration", positive=False)
        self.run()
        while (due := self._next_due()) is not None and due <= end:
            self._pass_to(due)
        self._pass_to(end)

    def run_until(self, *handles: KitHandle, within: Duration = "365d") -> None:
        """Let time pass until these tasks have ended.

        Raises `WaitTimeout` after `within`, and, saying why the task stands, when nothing would happen any more.
        """
        end = self._clock.now + to_ms(within, field="within", positive=False)
        for handle in handles:
            handle.status()  # raises for a task that does not exist
            self.run()
            while not self._has_ended(handle.id):
                due = self._next_due()
                if due is None or due > end:
                    status = handle.status()
                    more = f"in {within}" if due is not None else "however long you wait"
                    raise WaitTimeout(f"task {handle.id} does not end {more}: {status.state}, {status.why}")
                self._pass_to(due)

    # Deaths -----------------------------------------------------------------------------------------------------------

    def kill_task(self, handle: KitHandle, *, at: Moment | None = None) -> None:
        """SIGKILL to the task's process, now or at a moment (`handle.before_report(3)`): nothing after that line runs.
        Called in the task itself, it does not return.

        Raises `InvalidRequest` for a task that does not run now.
        """
        self._die(at, lambda: self._living().kill(handle.id))

    def crash_worker(self, *, down: Duration = 0, at: Moment | None = None) -> None:
        """SIGKILL to the worker with all its tasks, now or at a moment. A new one of the same name starts after `down`;
        until then the leases of its tasks run out. Called in a task, it does not return.
        """
        ms = to_ms(down, field="down", positive=False)

        def crash() -> None:
            self._living().die()
            self._worker, self._worker_due = None, self._clock.now + ms
            if not ms:
                self._start_worker()

        self._die(at, crash)

    def restart_worker(self, *, drain_timeout: Duration = "60s") -> None:
        """SIGTERM to the worker: tasks hand back at their next boundary, those that reach none within `drain_timeout`
        are killed; then a new worker starts. Virtual time passes as needed.
        """
        self._check_caller("restart_worker")
        end = self._clock.now + to_ms(drain_timeout, field="drain_timeout", positive=False)
        self.run()
        worker = self._living()
        worker.drain()
        self.run()
        while worker.running() and self._clock.now < end:
            due = self._next_due()
            self._pass_to(end if due is None else min(due, end))
        worker.give_up()
        worker.die()
        self._start_worker()

    def crash_engine(self, *, lose_disk: bool = False, at: Moment | None = None) -> None:
        """SIGKILL to the engine, now or at a moment, and a new one in its place. With `lose_disk` it starts from the
        changelog alone. Tasks go on meanwhile.
        """

        def crash() -> None:
            self._engine.close()
            stores = None if lose_disk else self._engine.stores
            self._engine = LocalEngine(self._log, self._keys, self._clock, stores)

        self._die(at, crash)

    def _die(self, at: Moment | None, death: Callable[[], None]) -> None:
        if at is None:
            self._in_kit(death)
        elif at.number <= self._said[at.task_id]:
            raise InvalidRequest(
                f"task {at.task_id} is past its report {at.number}: it has made {self._said[at.task_id]}"
            )
        else:
            self._deaths.setdefault(at, []).append(death)

    def _watch(self, task_id: str, said: bool) -> None:
        """A task makes a report, or has made it: is this somebody's last moment?"""
        if not said:
            self._said[task_id] += 1
        deaths = self._deaths.pop(Moment(task_id, self._said[task_id], said), None)
        if deaths is not None:
            self._in_kit(lambda: [death() for death in deaths])

    # Inside -----------------------------------------------------------------------------------------------------------

    def _publish(self) -> dict[str, int]:
        versions: dict[str, int] = {}
        for name, found in sorted(self._types.items()):
            config = f"type/{name}"
            versions[name] = publish(self._log, {}, {config: type_config(found)}, "kit", self._clock.now)[config]
        return versions

    def _start_worker(self) -> None:
        self._lives += 1
        self._worker = InlineWorker(
            self._log, self._keys.newest_worker(), self._types, self._versions, clock=self._clock, store=self._store,
            large=self._large, queues=self._queues, slots=self._slots, life=self._lives, watch=self._watch,
            dropped=self._dropped,
        )  # fmt: skip

    def _living(self) -> InlineWorker:
        if self._worker is None:
            raise InvalidRequest("the worker is down; advance the kit until it has come back")
        return self._worker

    def _name_of(self, function: Callable[..., Any]) -> str:
        for name, found in self._types.items():
            if found.function == function:
                return name
        raise InvalidRequest(f"{function!r} is no task of this kit: give it to Kit(tasks=[...])", field="type")

    def _in_kit(self, action: Callable[[], object]) -> None:
        """Have `action` done by the kit's thread, also when user code asks for it."""
        strand = self._caller()
        if strand is None:
            action()
        else:
            strand.ask(action)

    def _decide(self) -> None:
        self._in_kit(lambda: self._engine.pump())  # of the present engine, which may have crashed since

    def _caller(self) -> Strand | None:
        """The strand that calls; None: the test. Raises `InvalidRequest` for any other thread."""
        strand = Strand.current()
        if strand is None and threading.current_thread() is not self._home:
            raise InvalidRequest(
                "the kit is used by a thread that a task or the test has started: only the task's own thread and the "
                "one that made the kit can wait in virtual time or give commands"
            )
        return strand

    def _check_caller(self, what: str) -> None:
        if self._caller() is not None:
            raise InvalidRequest(f"kit.{what} inside a task: only the test itself lets time pass; use kit.sleep here")

    def _has_ended(self, task_id: str) -> bool:
        partition = ids.partition_of(ids.split(task_id)[0], self.log.partitions)
        found = self._engine.engine(partition).state.task(task_id)
        return found is None or found.state in ENDED

    def _pass_to(self, at: int) -> None:
        """It is `at` now. The engine's ticks say so first, then come the worker's beats, then the tasks go on."""
        self._clock.now = max(at, self._clock.now)
        self._engine.step()
        if self._worker is not None:
            self._worker.tick()
        elif at >= self._worker_due:
            self._start_worker()
        self.run()

    def _next_due(self) -> int | None:
        """When something happens next. A beat is no event: one at the end of a time in which nothing happens does."""
        dues = [self._worker_due if self._worker is None else self._worker.next_due()]
        for partition in range(self.log.partitions):
            dues.append(self._engine_due(partition))
        return min((due for due in dues if due is not None), default=None)

    def _engine_due(self, partition: int) -> int | None:
        engine = self._engine.engine(partition)
        due = engine.next_tick()
        if due is None:
            return None
        if due <= self._clock.now:
            return self._clock.now + limits.TICK_SPACING_MS
        worker, state = self._worker, engine.state
        if worker is not None and all(worker.lives(session) for session in state.sessions):
            return state.next_due()
        return due  # somebody is silent: the engine's looks at the sessions count


def _types(tasks: Iterable[Tasks]) -> Mapping[str, TaskType]:
    """The types of what a test gave as its tasks. Raises `ConfigurationError`."""
    if isinstance(tasks, (str, ModuleType, Registry)) or not isinstance(tasks, Iterable):
        raise ConfigurationError(f"tasks is a list of modules, registries or functions, not {tasks!r}")
    chosen = Registry()
    for given in tasks:
        for found in _types_in(given):
            policy = replace_record(found.policy, code_version=CODE_VERSION)
            chosen.add(replace(found, policy=policy, code_version=CODE_VERSION))
    if not len(chosen):
        raise ConfigurationError("a kit needs at least one task: Kit(tasks=[module_or_function, ...])")
    return {found.name: found for found in chosen}


def _types_in(given: Tasks) -> list[TaskType]:
    if isinstance(given, Registry):
        return list(given)
    if isinstance(given, ModuleType):
        inside = {id(value) for value in vars(given).values()}
        registries = [default_registry, *(v for v in vars(given).values() if isinstance(v, Registry))]
        found = [t for registry in registries for t in registry if id(t.function) in inside]
        if not found:
            raise ConfigurationError(f"no task in {given.__name__}: decorate a function there with @perdure.task")
        return found
    known = [t for t in default_registry if t.function == given]
    if not known:
        own = Registry()
        task(registry=own)(given)
        known = list(own)
    return known
