"""A whole deployment under one seed: engine processes, workers, clients and the log in memory, on one virtual clock.

Everything happens on one heap of moments; nothing waits or sleeps, and every draw comes from the seed, so a seed makes
the same life again. Each seed chooses for itself which faults it has and how many (swarm testing), how big the
deployment is, and how quick its network. A life has two phases: in the first, faults; then everything is healed, and
what was accepted has to end within `PATIENCE`. What has to hold is checked after every step of every engine process.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from perdure.schemas import codec, commands, events, ids, inbox, topics
from perdure.streams.local_engine import LocalEngine
from perdure.streams.log import Record
from tests.simulation import hostile
from tests.simulation.faults import FAULTS
from tests.simulation.host_log import HostLog, HostStore
from tests.simulation.invariants import Invariants, Seen
from tests.simulation.workers import PLANS, TYPES, Attempt, Plan, Worker
from tests.world import CLIENT, KEYS, MINUTE, SECOND, Crash, FaultyLog, World

ENDS: dict[str, tuple[type[Any], str, list[Any]]] = {
    "doomed": (events.AttemptFailed, "attempt", [1, 2, 3]),
    "fatal": (events.AttemptFailed, "attempt", [1]),
    "crashy": (events.TaskFailed, "why", ["crash_loop"]),
    "endless": (events.TaskTimedOut, "which", ["run"]),
    "stuck": (events.TaskTimedOut, "which", ["no_progress"]),
    "unserved": (events.TaskTimedOut, "which", ["queue"]),
}
"""Plan -> an event, what it says in all, each time it happens."""
PATIENCE = 10 * MINUTE
"""Virtual time within which everything has to end once there are no more faults."""
REPLAYED = 4
"""Of so many lives one is executed again from its log alone."""


class SimLog(FaultyLog):
    """The log, with what readers on the side need: reading on from where one was."""

    def since(self, topic: str, partition: int, position: int) -> tuple[list[Record], int]:
        """The committed records from a position on, and the position behind them."""
        return self._slice((topic, partition), position, 1_000_000, committed=True)

    def end(self, topic: str, partition: int) -> int:
        """Offset behind the last record."""
        return self._data[topic, partition].end


class Host:
    """One engine process, on a machine with a disk of its own."""

    def __init__(self, sim: Simulator, machine: int) -> None:
        self.sim, self.machine = sim, machine
        self.stalled_until = 0
        self._clear_at: dict[int, int] = {}
        stores = sim.disks[machine]
        for partition in range(sim.world.partitions):
            stores.setdefault(partition, HostStore(self)).points = self
        self.engine = LocalEngine(HostLog(sim.log, self), KEYS, sim.host_clock, dict(stores), sim.batch)

    @property
    def current(self) -> bool:
        return self.sim.host is self

    def step(self, partition: int) -> None:
        """Let it do one thing. Raises `Crash`."""
        self.engine.step_partition(partition, lambda: self.current)

    # Points ----------------------------------------------------------------------------------------------------------

    def at(self, point: str) -> str:
        sim = self.sim
        if point == "send" and sim.has("late appends"):
            return sim.draw.choice(("lost", "never acknowledged", *[""] * 10))
        if sim.healed or sim.draw.random() >= sim.rate:
            return ""
        fault = sim.draw.choice(("crash", "crash", "take over", "aborted", "unknown"))
        if fault == "crash" and sim.has("crash"):
            raise Crash
        if fault == "take over" and self.current and sim.has("take over"):
            sim.take_over()
            return ""
        return fault if sim.has("transactions") else ""

    def slice_of(self, most: int) -> int:
        return most if self.sim.healed else min(most, self.sim.draw.choice((1, 10, 100, 1_000)))

    def carry(self, append: Callable[[], None], partition: int) -> None:
        sim = self.sim
        delay = sim.delay() if sim.has("late appends") else 0
        clear_at = max(self._clear_at.get(partition, 0), sim.now + delay, sim.silent_until)
        self._clear_at[partition] = clear_at

        def arrive() -> None:
            append()
            sim.wake(partition, sim.lag())

        if clear_at == sim.now:
            arrive()
        else:
            sim.after(clear_at - sim.now, arrive)


class Simulator:
    """A deployment and its misfortunes. `run` lives it to its end; it raises `AssertionError` for what may not be."""

    def __init__(self, seed: int, **chosen: Any) -> None:
        """`chosen`: what the seed would draw otherwise: `faults`, `rate`, `tasks`, `partitions`."""
        self.seed = seed
        self.draw = draw = random.Random(seed)
        self.faults = chosen.get("faults", frozenset(f for f in FAULTS if draw.random() < 0.5))
        self.rate = chosen.get("rate", draw.choice((0.0, 0.002, 0.01, 0.05)))
        self.batch = draw.choice((1, 3, 100))
        self.slow = 0
        self.healed = self.down = False
        self.world = World(chosen.get("partitions", draw.choice((1, 1, 2, 2, 3))), types=TYPES, log=SimLog)
        self.log: SimLog = self.world.log  # type: ignore[assignment]
        self.queues = _queues(self.world.partitions)
        self.versions = {name: version for version, name in enumerate(TYPES)}
        self.host_skew = 0
        self.silent_until = 0
        self.numbers = itertools.count(1)
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._wakes: dict[int, int] = {}
        self.disks: list[dict[int, HostStore]] = [{}, {}]
        self.world.engine.close()
        self.host: Host | None = None
        self.held = Invariants(self.world)
        self.boot(0)
        self.plans: dict[str, Plan] = {}
        self.failures: dict[str, int] = defaultdict(int)
        self.grants: dict[str, int] = defaultdict(int)
        self.checkpoints: dict[str, set[int]] = defaultdict(set)
        """Task id -> versions in its store."""
        self.asked: dict[str, str] = {}
        """Command id -> task id of what was sent with a reply wanted."""
        self.workers = [Worker(self, f"w{n}") for n in range(draw.choice((1, 2, 2)))]
        for worker in self.workers:
            worker.start()
        for n in range(chosen.get("tasks", draw.randrange(1, 5))):
            self._plan(n)
        for fault in sorted(self.faults & FAULTS.keys()):
            self._bring(fault)

    # Time ------------------------------------------------------------------------------------------------------------

    @property
    def now(self) -> int:
        """True time, ms."""
        return self.world.now

    def host_clock(self) -> int:
        """What the engine process takes for the time."""
        return self.now + self.host_skew

    def after(self, ms: int, what: Callable[[], None]) -> None:
        """Do something `ms` from now."""
        heapq.heappush(self._heap, (self.now + max(0, ms), next(self.numbers), what))

    def run(self) -> None:
        """Faults for a while, then none, until everything has ended."""
        self.go_on(self.draw.choice((6, 12, 25)) * SECOND)
        self.heal()
        end = self.now + PATIENCE
        while still_open := self.open_tasks() + self.held.under_way():
            assert self.now < end, f"still open {PATIENCE} ms after the last fault: {still_open}"
            self.go_on(SECOND)
        self.held.check_end()
        self._check_ends()
        if self.seed % REPLAYED == 0:
            self.held.check_replay(self.draw)

    def go_on(self, ms: int) -> None:
        """Let everything happen for a while."""
        until = self.now + ms
        while self._heap and self._heap[0][0] <= until:
            moment, _, what = heapq.heappop(self._heap)
            self.world.now = max(self.now, moment)
            what()
        self.world.now = until

    # Engine processes ------------------------------------------------------------------------------------------------

    def boot(self, machine: int) -> None:
        """A new engine process on a machine; it takes the place of the one that runs. It may die while it starts."""
        try:
            self._enthrone(machine)
        except Crash:
            self._died()

    def _enthrone(self, machine: int) -> None:
        old, self.host = self.host, None
        if old is not None:
            old.engine.close()
        self.host = host = Host(self, machine)
        self.world.engine, self.world.stores = host.engine, host.engine.stores
        self.held.check_all()
        self.wake_all()

    def take_over(self) -> None:
        """Another machine takes the partitions while this one is in the middle of something; later it may wake up."""
        old = self.host
        if old is None:
            return
        self.boot(1 - old.machine)
        for _ in range(self.draw.randrange(3)):
            partition = self.draw.randrange(self.world.partitions)
            self.after(self.draw.randrange(30 * SECOND), lambda p=partition: self._haunt(old, p))  # type: ignore[misc]

    def _haunt(self, old: Host, partition: int) -> None:
        """A process that does not know yet that it was replaced goes on with what it does outside of transactions."""
        try:
            old.engine.duties[partition].perform(self.host_clock())
        except Crash:
            return

    def kill_engine(self, down: int) -> None:
        """SIGKILL between two steps."""
        if self.host is not None:
            self._died(down)

    def _died(self, down: int | None = None) -> None:
        machine = 0 if self.host is None else self.host.machine
        if self.host is not None:
            self.host.engine.close()
        self.host = None
        if self.draw.random() < 0.3:
            machine = 1 - machine
        lost = self.draw.choice((0, 0, 0, 1, 5, 1_000_000)) if self.has("disks") else 0
        if lost:
            self.disks[machine] = {p: s.without_last(lost) for p, s in self.disks[machine].items()}  # type: ignore[misc]
        wait = self.draw.choice((100, 500, 12 * SECOND)) if down is None else down
        self.after(wait, lambda: self.boot(machine) if self.host is None else None)

    def wake(self, partition: int, ms: int) -> None:
        """The engine looks at a partition in `ms`, if it does not do so before."""
        moment = self.now + ms
        if self._wakes.get(partition, moment + 1) > moment:
            self._wakes[partition] = moment
            self.after(ms, lambda: self._step(partition, moment))

    def wake_all(self) -> None:
        """The engine looks at everything."""
        for partition in range(self.world.partitions):
            self.wake(partition, 0)

    def _step(self, partition: int, moment: int) -> None:
        if self._wakes.get(partition) != moment:
            return
        del self._wakes[partition]
        host = self.host
        if host is None:
            return
        if (blocked := max(host.stalled_until, self.silent_until)) > self.now:
            self.wake(partition, blocked - self.now)
            return
        try:
            host.step(partition)
        except Crash:
            if host is self.host:
                self._died()
            return
        if host is self.host:
            self.held.check(partition)
            self._tell_workers(partition)
            self._wake_again(host, partition)

    def _wake_again(self, host: Host, partition: int) -> None:
        """When there is more to do: records, a tick, or something to send again."""
        if self.world.executed(partition) < self.log.end(topics.COMMANDS.name, partition):
            self.wake(partition, self.lag())
        elif self.world._has_duties(partition):
            self.wake(partition, max(10, host.engine.duties[partition].next_due(self.host_clock()) - self.host_clock()))
        elif (due := host.engine.engine(partition).next_tick()) is not None:
            self.wake(partition, max(10, due - self.host_clock()))

    def _tell_workers(self, partition: int) -> None:
        end = self.log.end(topics.INBOX.name, partition)
        for worker in self.workers:
            session = worker.sessions.get(partition)
            if session is not None and session.read < end:
                session.heard()

    # What is sent ----------------------------------------------------------------------------------------------------

    def has(self, fault: str) -> bool:
        """Whether this life has a kind of fault, and is not healed."""
        return fault in self.faults and not self.healed

    def delay(self) -> int:
        """How long the network takes, ms."""
        if self.healed or not self.slow:
            return self.draw.choice((1, 5, 20, 200))
        return self.draw.choice((100, 1_000, 5_000, self.slow))

    def lag(self) -> int:
        """How long a record waits to be read: one partition may be far behind another."""
        return self.draw.choice((0, 0, 5, 2_000)) if self.has("lag") else 0

    def append(self, data: bytes | None, partition: int) -> None:
        """Append to task-commands; while the broker is away, when it is back."""
        if self.now < self.silent_until:
            self.after(self.silent_until - self.now, lambda: self.append(data, partition))
            return
        self.world.append(data, partition)
        self.wake(partition, self.lag())
        if self.has("duplicates") and self.draw.random() < 0.1:
            self.after(self.draw.randrange(20 * SECOND), lambda: self.append(data, partition))

    def command(self, data: bytes, task_id: str) -> None:
        """Append a client's command, to its partition or to any other."""
        home = self.world.partition_of(task_id)
        self.append(data, self.draw.randrange(self.world.partitions) if self.has("astray") else home)

    def ask(self, kind: type[Any], task_id: str) -> None:
        """Send a control command or a query."""
        command_id = f"c{next(self.numbers)}"
        self.asked[command_id] = task_id
        self.command(codec.encode(kind(command_id=command_id, task_id=task_id, reply_to=CLIENT)), task_id)

    # Tasks -----------------------------------------------------------------------------------------------------------

    def _plan(self, n: int) -> None:
        name = self.draw.choice(list(PLANS))
        plan, queue = PLANS[name], self.draw.choice(list(self.queues))
        task_id = f"{queue}/{name}-{n}"
        self.plans[task_id] = plan
        start = self.draw.randrange(5 * SECOND)
        fields = {"queue": queue, "reply_to": CLIENT, "priority": self.draw.randrange(10)} | plan.fields
        if self.draw.random() < 0.3:
            fields["not_before"] = self.now + start + self.draw.choice((0, 3, 10)) * SECOND
        if self.draw.random() < 0.2:
            fields["policy_version"] = self.versions.get(plan.type, 0)
        command = commands.SubmitTask(command_id=f"submit {task_id}", task_id=task_id, type=plan.type, **fields)
        self.asked[command.command_id] = task_id
        self.after(start, lambda: self.command(codec.encode(command), task_id))
        for kind in plan.commands:
            start += self.draw.randrange(SECOND, 12 * SECOND)
            self.after(start, lambda one=kind: None if self.healed else self.ask(one, task_id))  # type: ignore[misc]

    def count_grant(self, task_id: str) -> int:
        """How many grants of the task have begun."""
        self.grants[task_id] += 1
        return self.grants[task_id]

    def executed(self, grant: inbox.RunAttempt, step_id: str) -> None:
        """G3: user code of a step runs; no earlier attempt's result of it may be recorded."""
        seen = self.held.tasks.get(grant.task_id, Seen())  # the engine may have died before its step was checked
        epoch = seen.steps.get(step_id, grant.epoch)
        assert epoch >= grant.epoch, f"G3: {grant.task_id} {step_id} ran again in epoch {grant.epoch}"

    # Misfortune ------------------------------------------------------------------------------------------------------

    def _bring(self, fault: str) -> None:
        """A kind of fault happens now and then."""
        bring, every = FAULTS[fault]

        def happen() -> None:
            if not self.healed:
                bring(self)
                self.after(1 + self.draw.randrange(2 * every), happen)

        if every:
            self.after(self.draw.randrange(2 * every), happen)

    def running(self) -> list[Attempt]:
        """What workers that live are working on."""
        return [attempt for worker in self.workers for attempt in worker.attempts()]

    def set_broker_clock(self, skew: int) -> None:
        """Heard of at once: what a leap and a silence hide together nobody can tell apart."""
        if skew == self.world.skew:
            return
        for late in (False, True):
            for partition in range(self.world.partitions):
                self.world.append(commands.DescribeTask(command_id="time", task_id="default/none"), partition)
                self.wake(partition, 0)
            if not late:
                self.world.skew = skew

    def heal(self) -> None:
        """No more faults: every process runs, clocks are right, the network is quick."""
        self.set_broker_clock(0)
        self.healed, self.host_skew, self.silent_until = True, 0, 0
        hostile.configure_all(self)
        if self.host is None:
            self.boot(self.draw.randrange(2))
        assert self.host is not None
        self.host.stalled_until = 0
        self.wake_all()
        for worker in self.workers:
            worker.start()

    def _check_ends(self) -> None:
        """Each task has ended as it had to, and no sound worker was told that it is not."""
        odd = [e for e in self.world.of_kind(events.ReportRejected) if e.why == "illegal"]
        assert not odd, f"sound reports were refused: {odd[:3]}"
        for task_id, plan in self.plans.items():
            name = task_id.partition("/")[2].partition("-")[0]
            steps = list(self.held.tasks[task_id].steps)
            if self.world.task(task_id).state == "COMPLETED":
                assert len(steps) == plan.steps, f"{task_id} has {steps}"
                assert steps == sorted(steps)
            if (kind := ENDS.get(name)) is not None:
                said = [getattr(e, kind[1]) for e in self.world.of_kind(kind[0], task_id)]
                assert said == kind[2], f"{task_id}: {kind[0].__name__} {said}"

    def open_tasks(self) -> list[str]:
        """Tasks that are not there yet where they have to end, and questions without an answer (I1); a person helps
        those that wait for one.
        """
        found = [
            f"{task_id} is {seen.state}"
            for task_id, seen in self.held.tasks.items()
            if task_id not in self.plans and seen.type in TYPES and seen.state in ("PENDING", "RUNNING")
        ]
        found += [f"{self.asked[c]} has not answered {c}" for c in sorted(self.asked.keys() - self.held.answered)]
        for task_id, plan in self.plans.items():
            state = self.world.task(task_id).state if self.world.known(task_id) else "unknown"
            if state in plan.ends_as:
                continue
            found.append(f"{task_id} is {state}")
            helps = {"PAUSED": commands.ResumeTask, "FAILED": commands.RetryTask}.get(state)
            if helps in plan.commands:
                self.ask(helps, task_id)  # type: ignore[arg-type]
        return found


def a_life(seed: int, **chosen: Any) -> World:
    """What a minute under faults of every kind leaves behind: tasks in all states, and everything sent executed."""
    life = Simulator(seed, **{"faults": frozenset(FAULTS), "rate": 0.002, "tasks": 12, "partitions": 2} | chosen)
    life.go_on(MINUTE)
    life.heal()
    life.go_on(SECOND)
    return life.world


def _queues(partitions: int) -> dict[str, int]:
    """Queue -> its partition; each partition has one."""
    found: dict[int, str] = {ids.partition_of("default", partitions): "default"}
    for n in itertools.count():
        if len(found) == partitions:
            break
        found.setdefault(ids.partition_of(f"q{n}", partitions), f"q{n}")
    return {queue: partition for partition, queue in found.items()}
