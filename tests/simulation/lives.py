"""A simulated deployment: workers that run programs, a slow network, and faults drawn from a seed.

Everything happens on one heap of moments; nothing here waits or sleeps. A worker is a process as the engine meets it:
it reads its inbox, runs attempts step by step, hears nothing while its network is slow, and dies without a word.
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from perdure.schemas import codec, commands, events, inbox, reports, topics
from perdure.schemas.codec import replace
from perdure.schemas.signing import signed
from tests.simulation.invariants import Invariants
from tests.world import (
    HOUR,
    KEYS,
    MINUTE,
    SECOND,
    World,
    begun,
    checkpoint,
    completed,
    crashed,
    failed,
    progress,
    step,
    stopped,
)


@dataclass(frozen=True)
class Plan:
    """What a task does, and how it has to end."""

    type: str
    steps: int
    ends_as: frozenset[str]
    step_ms: int = 2 * SECOND
    fails: int = 0
    """Attempts of the task that fail before one does not."""
    error: str = "app.Flaky"
    crashes: int = 0
    """Grants under which the child dies before its first step."""
    hangs: bool = False
    """Whether it never ends by itself."""
    commands: tuple[type[Any], ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)


RETRY = {"max_attempts": 3, "delay": 4_000, "max_delay": 8_000, "never_on": ["Fatal"]}
TYPES: dict[str, dict[str, Any]] = {
    "job": {"retry": RETRY}, "once": {}, "pausing": {"retry": RETRY, "on_shutdown": "pause"},
    "timed": {"run_timeout": 30_000, "cancel_grace": 1_000},
    "watched": {"no_progress_timeout": 30_000, "cancel_grace": 1_000},
}  # fmt: skip
DONE = frozenset({"COMPLETED"})
PLANS: dict[str, Plan] = {
    "plain": Plan("job", 5, DONE),
    "long": Plan("job", 30, DONE, step_ms=1_500),
    "flaky": Plan("job", 4, DONE, fails=2),
    "doomed": Plan("job", 2, frozenset({"FAILED"}), fails=1_000),
    "fatal": Plan("job", 2, frozenset({"FAILED"}), fails=1_000, error="app.Fatal"),
    "crashy": Plan("once", 2, frozenset({"FAILED"}), crashes=1_000),
    "unlucky": Plan("once", 6, DONE, crashes=3),
    "endless": Plan("timed", 1, frozenset({"TIMED_OUT"}), hangs=True),
    "stuck": Plan("watched", 1, frozenset({"TIMED_OUT"}), hangs=True),
    "unserved": Plan("nobody", 1, frozenset({"TIMED_OUT"}), fields={"queue_timeout": 20_000, "queue": "default"}),
    "cancelled": Plan("job", 10, frozenset({"CANCELLED", "COMPLETED"}), commands=(commands.CancelTask,)),
    "paused": Plan("job", 10, DONE, commands=(commands.PauseTask, commands.ResumeTask)),
    "redriven": Plan("once", 3, DONE, fails=1, commands=(commands.RetryTask,)),
    "shut": Plan("pausing", 8, DONE, commands=(commands.ResumeTask, commands.ResumeTask)),
}


class Attempt:
    """One grant on its worker, working through its task's plan."""

    def __init__(self, worker: Worker, grant: inbox.RunAttempt) -> None:
        self.worker, self.grant = worker, grant
        self.plan = worker.lives.plans[grant.task_id]
        self.known: dict[str, bytes] = {}
        self.complete = grant.steps_total == 0
        self.next, self.seq, self.stop, self.over = 0, 0, "", False
        if grant.checkpoint is not None:
            self.next = grant.checkpoint.positions["items"]

    def say(self, *said: Any) -> None:
        """Report."""
        numbered = []
        for report in said:
            self.seq += 1
            numbered.append(replace(report, seq=self.seq))
        entry = reports.ReportEntry(
            task_id=self.grant.task_id, epoch=self.grant.epoch, token=self.grant.token, reports=numbered
        )
        self.worker.send(reports.ReportBatch(session=self.grant.session, entries=[entry]))

    def end(self, report: Any) -> None:
        self.over = True
        self.worker.attempts.pop((self.grant.task_id, self.grant.epoch), None)
        self.say(report)

    def begin(self) -> None:
        lives, grant = self.worker.lives, self.grant
        self.say(begun())
        if lives.count_grant(grant.task_id) <= self.plan.crashes:
            self.end(crashed())
        else:
            self.worker.later(self.plan.step_ms, self.go_on)

    def go_on(self) -> None:
        """The next step, or the end."""
        if self.over:
            return
        if self.stop:
            self.end(stopped(self.stop))
        elif not self.complete:
            self.worker.later(200, self.go_on)
        elif self.plan.hangs:
            self.worker.later(SECOND, self.go_on)
        elif self.next < self.plan.steps:
            self._step()
            self.worker.later(self.plan.step_ms, self.go_on)
        else:
            fails = self.worker.lives.failures[self.grant.task_id] < self.plan.fails
            self.end(failed(self.plan.error, "builtins.Exception") if fails else completed(self.plan.steps))
            self.worker.lives.failures[self.grant.task_id] += fails

    def _step(self) -> None:
        step_id = f"items@{self.next:012}/work"
        if step_id not in self.known:
            self.worker.lives.executed(self.grant, step_id)
            result = json.dumps(self.next).encode()
            self.say(step(step_id, result), progress(self.next / self.plan.steps))
        self.next += 1
        if self.next % 4 == 0:
            version = 1 + (self.grant.checkpoint.version if self.grant.checkpoint else 0) + self.next
            self.say(checkpoint(version, items=self.next))

    def take_page(self, page: inbox.StepPage) -> None:
        self.known |= {s.step_id: s.result for s in page.steps}
        self.complete = not page.more
        if page.more:
            self.say(reports.SendSteps(seq=0, after=page.steps[-1].step_id))


class Worker:
    """A worker process that can die, be slow, and come back."""

    def __init__(self, lives: Lives, name: str) -> None:
        self.lives, self.name = lives, name
        self.alive = False
        self.attempts: dict[tuple[str, int], Attempt] = {}
        self.session, self.life, self.seen, self.read, self.clear_at = "", 0, 0, 0, 0

    def start(self) -> None:
        """A new life of the process."""
        if self.alive:
            return
        self.alive, self.life = True, self.life + 1
        self.attempts, self.seen = {}, 0
        self.session = f"s{next(self.lives.numbers):05}"
        self.read = len(self.lives.world.log.records(topics.INBOX.name, self.lives.where))
        self.announce()
        self.beat()
        self.poll()

    def announce(self) -> None:
        self.send(commands.WorkerStarted(
            session=self.session, worker_id=self.name, types=dict.fromkeys(TYPES, 0), queues=["default"], slots=2,
        ))  # fmt: skip

    def die(self) -> None:
        """SIGKILL: what was not sent is lost, what is on its way arrives."""
        self.alive = False
        self.attempts = {}

    def later(self, ms: int, what: Callable[[], None]) -> None:
        """Do something after a time, if this life still lasts."""
        life = self.life
        self.lives.at(ms, lambda: what() if self.alive and self.life == life else None)

    def send(self, message: Any) -> None:
        """Append to task-commands when the network lets it through; records of a worker keep their order."""
        data = signed(message, *KEYS.newest_worker())
        delay = self.lives.delay()
        self.clear_at = max(self.clear_at, self.lives.world.now + delay)
        self.lives.at(self.clear_at - self.lives.world.now, lambda: self.lives.append(data))

    def beat(self) -> None:
        self.send(commands.WorkerBeat(session=self.session, grants_seen=self.seen, free=2))
        self.later(2 * SECOND, self.beat)

    def poll(self) -> None:
        """Read the inbox."""
        records = self.lives.world.log.records(topics.INBOX.name, self.lives.where)
        for record in records[self.read :]:
            message = self.lives.world.decode(record)
            if message.session == self.session:
                self._take(message)
        self.read = len(records)
        self.later(self.lives.draw.choice((50, 100, 500)), self.poll)

    def _take(self, message: inbox.InboxRecord) -> None:
        if isinstance(message, inbox.EndSession):
            self.die()
            self.start()
            return
        key = (message.task_id, message.epoch)
        attempt = self.attempts.get(key)
        match message:
            case inbox.RunAttempt():
                self.seen = max(self.seen, message.grant)
                self.attempts[key] = attempt = Attempt(self, message)
                attempt.begin()
            case _ if attempt is None:
                return
            case inbox.StepPage():
                attempt.take_page(message)
            case inbox.PauseAttempt():
                attempt.stop = "" if message.undo else "paused"
            case inbox.CancelAttempt():
                attempt.stop = message.reason.partition(":")[0]
            case inbox.RevokeAttempt():
                attempt.over = True
                del self.attempts[key]

    def shut_down(self) -> None:
        """SIGTERM: hand everything back, then exit."""
        if not self.alive:
            return
        self.send(commands.WorkerStopping(session=self.session))
        for attempt in self.attempts.values():
            attempt.stop = attempt.stop or "drained"
        self.later(20 * SECOND, self.die)
        self.lives.at(25 * SECOND, self.start)


class Lives:
    """The whole deployment under one seed."""

    def __init__(self, seed: int, tasks: int = 14, workers: int = 3, minutes: int = 4) -> None:
        self.draw = random.Random(seed)
        self.world = World(2, types=TYPES)
        self.where = self.world.partition_of("default/")
        self.held = Invariants(self.world)
        self.numbers = itertools.count(1)
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._down_until = 0
        self.over = False
        self.slow = False
        self.healed_at = self.world.now + minutes * MINUTE
        self.plans: dict[str, Plan] = {}
        self.failures: dict[str, int] = defaultdict(int)
        self._grants: dict[str, int] = defaultdict(int)
        self.sent: list[tuple[int, bytes]] = []
        self.workers = [Worker(self, f"w{n}") for n in range(workers)]
        for worker in self.workers:
            worker.start()
        names = list(PLANS)
        for n in range(tasks):
            name = names[n % len(names)] if n < len(names) else self.draw.choice(names)
            self._plan(f"default/{name}-{n}", PLANS[name])
        self.at(self.draw.randrange(5 * SECOND), self._misfortune)

    # Time ------------------------------------------------------------------------------------------------------------

    def at(self, ms: int, what: Callable[[], None]) -> None:
        """Do something `ms` from now."""
        heapq.heappush(self._heap, (self.world.now + max(0, ms), next(self.numbers), what))

    def run(self, until: int) -> None:
        """Let everything happen until a moment."""
        count = 0
        while self._heap and self._heap[0][0] <= until:
            moment, _, what = heapq.heappop(self._heap)
            self._pass(moment)
            what()
            count += 1
            if count % 20 == 0:
                self._pass(self.world.now)
                self.held.check_all()
        self._pass(until)
        self.held.check_all()

    def _pass(self, moment: int) -> None:
        """Time passes; the engine runs unless it is down."""
        if moment < self._down_until:
            self.world.now = moment
            return
        if self.world.now < self._down_until:
            self.world.now = self._down_until
            self.world.restart(self.draw.choice(["kept", "kept", "empty", 2]))
        self.world.advance(moment - self.world.now)

    # Tasks -----------------------------------------------------------------------------------------------------------

    def _plan(self, task_id: str, plan: Plan) -> None:
        self.plans[task_id] = plan
        start = self.draw.randrange(60 * SECOND)
        fields = {"queue": "default"} | plan.fields
        if self.draw.random() < 0.3:
            fields["not_before"] = self.world.now + start + 10 * SECOND
        command = commands.SubmitTask(command_id=f"submit {task_id}", task_id=task_id, type=plan.type, **fields)
        self.at(start, lambda: self.append(codec.encode(command)))
        for n, kind in enumerate(plan.commands):
            one = kind(command_id=f"{n} {task_id}", task_id=task_id)
            start += self.draw.randrange(2 * SECOND, 50 * SECOND)
            self.at(start, lambda one=one: self.append(codec.encode(one)))  # type: ignore[misc]

    def count_grant(self, task_id: str) -> int:
        """How many grants of the task have begun."""
        self._grants[task_id] += 1
        return self._grants[task_id]

    def executed(self, grant: inbox.RunAttempt, step_id: str) -> None:
        """G3: user code of a step runs; no earlier attempt's result of it may be recorded."""
        for e in self.world.of_kind(events.StepCompleted, grant.task_id):
            assert e.step_id != step_id or e.epoch >= grant.epoch, f"G3: {grant.task_id} {step_id} ran again"

    # Misfortune ------------------------------------------------------------------------------------------------------

    def delay(self) -> int:
        """How long the network takes."""
        if self.slow:
            return self.draw.choice((100, 1_000, 5_000, 15_000))
        return self.draw.choice((1, 5, 20, 200))

    def append(self, data: bytes) -> None:
        """Append to the home partition, now and then to the wrong one, now and then twice."""
        where = self.where
        if data[:1] == b"{" or isinstance(codec.decode(data), commands.Control | commands.SubmitTask):
            where = self.draw.choice((self.where, self.where, 1 - self.where))
        self.world.append(data, where)
        self.sent.append((where, data))
        if self.draw.random() < 0.05 and not self.over:
            self.at(self.draw.randrange(20 * SECOND), lambda: self._again(where, data))

    def _again(self, where: int, data: bytes) -> None:
        self.world.append(data, where)

    def _misfortune(self) -> None:
        if self.over:
            return
        worker = self.draw.choice(self.workers)
        match self.draw.choice(
            ("kill", "kill", "restart", "shut", "engine", "engine down", "fault", "slow", "clock", "hush")
        ):
            case "kill":
                worker.die()
                self.at(self.draw.choice((100, 5 * SECOND, 40 * SECOND, HOUR)), worker.start)
            case "restart":
                worker.die()
                worker.start()
            case "shut":
                worker.shut_down()
            case "engine":
                self.world.restart(self.draw.choice(["kept", "empty", 1, 5]))
            case "engine down":
                self._down_until = self.world.now + self.draw.choice((SECOND, 10 * SECOND, 40 * SECOND))
            case "fault":
                faults = ("aborted", "crash before commit", "crash after commit", "unknown, lost", "unknown, committed")
                self.world.fault(self.draw.choice(faults))
            case "slow":
                self.slow = not self.slow
            case "clock":
                self._set_broker_clock(self.draw.choice((0, 0, HOUR, -HOUR, 700, -700)))
            case "hush":
                worker.clear_at = self.world.now + 13 * SECOND
        self.at(self.draw.randrange(12 * SECOND), self._misfortune)

    def _set_broker_clock(self, skew: int) -> None:
        """Heard of at once: what a leap and a silence hide together nobody can tell apart."""
        for _ in range(2):
            for partition in range(self.world.partitions):
                self.world.append(commands.DescribeTask(command_id="time", task_id="default/none"), partition)
            self.world.skew = skew

    def heal(self) -> None:
        """No more faults: every worker runs, clocks are right, the network is quick."""
        self.over, self.slow = True, False
        self._set_broker_clock(0)
        self.world.log.fault = ""
        if self._down_until > self.world.now:
            self._down_until = self.world.now
            self.world.restart()
        for worker in self.workers:
            worker.start()

    def open_tasks(self) -> list[str]:
        """Tasks that are not there yet where they have to end; a person helps those that wait for one."""
        found = []
        for task_id, plan in self.plans.items():
            state = self.world.task(task_id).state if self.world.known(task_id) else "unknown"
            if state in plan.ends_as:
                continue
            found.append(f"{task_id} is {state}")
            helps = {"PAUSED": commands.ResumeTask, "FAILED": commands.RetryTask}.get(state)
            if helps is not None and helps in plan.commands:
                self.append(codec.encode(helps(command_id=f"help-{next(self.numbers)}", task_id=task_id)))
        return found
