"""Workers of a simulated deployment, as the engine meets them, and the programs that their tasks run.

A worker is a process: it reads its inboxes, runs attempts step by step, hears nothing while its network is slow, and
dies without a word. It has one session for each partition that it serves.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from perdure.schemas import commands, inbox, reports, topics
from perdure.schemas.codec import replace
from perdure.schemas.signing import signed
from tests.world import KEYS, SECOND, begun, checkpoint, completed, crashed, failed, milestone, progress, step, stopped

if TYPE_CHECKING:
    from tests.simulation.simulator import Simulator

BEAT = 2 * SECOND


@dataclass(frozen=True)
class Plan:
    """What a task does, and how it has to end."""

    type: str
    steps: int
    ends_as: frozenset[str]
    step_ms: int = SECOND
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
    "timed": {"run_timeout": 20_000, "cancel_grace": 1_000},
    "watched": {"no_progress_timeout": 20_000, "cancel_grace": 1_000},
}  # fmt: skip
DONE, ANY = frozenset({"COMPLETED"}), frozenset({"COMPLETED", "FAILED", "TIMED_OUT", "CANCELLED"})
CONTROLS = (
    commands.PauseTask, commands.ResumeTask, commands.CancelTask, commands.RetryTask, commands.DiscardDeadLetter,
)  # fmt: skip
PLANS: dict[str, Plan] = {
    "plain": Plan("job", 5, DONE),
    "long": Plan("job", 12, DONE, step_ms=500),
    "flaky": Plan("job", 4, DONE, fails=2),
    "doomed": Plan("job", 2, frozenset({"FAILED"}), fails=1_000),
    "fatal": Plan("job", 2, frozenset({"FAILED"}), fails=1_000, error="app.Fatal"),
    "crashy": Plan("once", 2, frozenset({"FAILED"}), crashes=1_000),
    "unlucky": Plan("once", 6, DONE, crashes=2),
    "endless": Plan("timed", 1, frozenset({"TIMED_OUT"}), hangs=True),
    "stuck": Plan("watched", 1, frozenset({"TIMED_OUT"}), hangs=True),
    "unserved": Plan("nobody", 1, frozenset({"TIMED_OUT"}), fields={"queue_timeout": 20_000}),
    "cancelled": Plan("job", 8, frozenset({"CANCELLED", "COMPLETED"}), commands=(commands.CancelTask,)),
    "paused": Plan("job", 8, DONE, commands=(commands.PauseTask, commands.ResumeTask)),
    "redriven": Plan("once", 3, DONE, fails=1, commands=(commands.RetryTask,)),
    "shut": Plan("pausing", 6, DONE, commands=(commands.ResumeTask, commands.ResumeTask)),
    "wild": Plan("job", 6, ANY, fails=1, commands=CONTROLS),
    "wilder": Plan("timed", 4, ANY, fails=2, commands=(*CONTROLS, *CONTROLS)),
}
EXTRA = Plan("once", 2, ANY)
"""What tasks do that are no part of the simulator's plans."""


class Attempt:
    """One grant on its worker, working through its task's plan."""

    def __init__(self, session: Session, grant: inbox.RunAttempt) -> None:
        self.session, self.grant = session, grant
        self.sim = session.sim
        self.plan = self.sim.plans.get(grant.task_id, EXTRA)
        self.known: dict[str, bytes] = {}
        self.complete = grant.steps_total == 0
        self.next, self.seq, self.stop, self.over = 0, 0, "", False
        self.eager = self.sim.draw.random() < 0.2
        """Whether it goes on while its last report is not acknowledged, as concurrent steps do."""
        self.accepted = 0
        """The newest checkpoint that the engine has said to be recorded."""
        if grant.checkpoint is not None:
            self.accepted, self.next = grant.checkpoint.version, grant.checkpoint.positions["items"]
            assert self.accepted in self.sim.checkpoints[grant.task_id], f"{grant.task_id} resumes from what is deleted"

    def say(self, *said: Any, then: Callable[[], None] = lambda: None) -> None:
        """Report; `then` when the report is acknowledged. One that cannot be written costs the attempt."""
        numbered = []
        for report in said:
            self.seq += 1
            numbered.append(replace(report, seq=self.seq))
        if self.sim.has("lost report") and self.sim.draw.random() < 0.05:
            self.session.later(3 * SECOND, lambda: self.end(crashed(innocent=True)))
            return
        entry = reports.ReportEntry(
            task_id=self.grant.task_id, epoch=self.grant.epoch, token=self.grant.token, reports=numbered
        )
        self.session.send(reports.ReportBatch(session=self.grant.session, entries=[entry]), then)

    def end(self, report: Any) -> None:
        self.over = True
        self.session.attempts.pop((self.grant.task_id, self.grant.epoch), None)
        self.say(report)

    def begin(self) -> None:
        self.say(begun())
        if self.sim.count_grant(self.grant.task_id) <= self.plan.crashes:
            self.end(crashed())
        else:
            self.soon(self.plan.step_ms)

    def soon(self, ms: int) -> None:
        self.session.later(ms, self.go_on)

    def go_on(self) -> None:
        """The next step, or the end."""
        if self.over:
            return
        if self.stop:
            self.end(stopped(self.stop))
        elif not self.complete:
            self.soon(500)
        elif self.plan.hangs:
            self.soon(SECOND)
        elif self.next < self.plan.steps:
            self._step()
        else:
            fails = self.sim.failures[self.grant.task_id] < self.plan.fails
            self.sim.failures[self.grant.task_id] += fails
            self.end(failed(self.plan.error, "builtins.Exception") if fails else completed(self.plan.steps))

    def _step(self) -> None:
        step_id = f"items@{self.next:012}/work"
        said: list[Any] = []
        if step_id not in self.known:
            self.sim.executed(self.grant, step_id)
            said = [step(step_id, json.dumps(self.next).encode()), progress(self.next / self.plan.steps)]
        self.next += 1
        if self.next % 4 == 0:
            version = 1 + (self.grant.checkpoint.version if self.grant.checkpoint else 0) + self.next
            self._save(version)
            said += [checkpoint(version, items=self.next), milestone(f"at {self.next}")]
        if self.eager or not said:
            self.soon(self.plan.step_ms)
        if said:
            self.say(*said, then=(lambda: None) if self.eager else (lambda: self.soon(self.plan.step_ms)))

    def _save(self, version: int) -> None:
        """Put a checkpoint into the store, and delete what is said to be needed no more."""
        store = self.sim.checkpoints
        store[self.grant.task_id] = {v for v in store[self.grant.task_id] if v >= self.accepted} | {version}

    def take_page(self, page: inbox.StepPage) -> None:
        self.known |= {s.step_id: s.result for s in page.steps}
        self.complete = not page.more
        if page.more:
            self.say(reports.SendSteps(seq=0, after=page.steps[-1].step_id))


class Session:
    """A worker's session with one partition."""

    def __init__(self, worker: Worker, partition: int) -> None:
        self.worker, self.sim, self.partition = worker, worker.sim, partition
        self.id = f"s{next(self.sim.numbers):06}"
        self.attempts: dict[tuple[str, int], Attempt] = {}
        self.seen, self.polling = 0, False
        self.read = self.sim.log.end(topics.INBOX.name, partition)
        queues = [q for q, p in self.sim.queues.items() if p == partition]
        self.send(commands.WorkerStarted(
            session=self.id, worker_id=worker.name, types=dict(self.sim.versions), queues=queues, slots=2,
            labels={commands.HEARS_CHECKPOINTS: "yes"},
        ))  # fmt: skip
        self.beat()

    @property
    def alive(self) -> bool:
        return self.worker.sessions.get(self.partition) is self

    def later(self, ms: int, what: Callable[[], None]) -> None:
        """Do something after a time, if this session's process still lives."""
        self.sim.after(ms, lambda: what() if self.alive else None)

    def send(self, message: Any, then: Callable[[], None] = lambda: None) -> None:
        """Append to task-commands when the network lets it through; records of a worker keep their order."""
        data = signed(message, *KEYS.newest_worker())
        clear_at = max(self.worker.clear_at.get(self.partition, 0), self.sim.now + self.sim.delay())
        self.worker.clear_at[self.partition] = clear_at

        def arrive() -> None:
            self.sim.append(data, self.partition)
            self.later(self.sim.delay(), then)

        self.sim.after(clear_at - self.sim.now, arrive)

    def beat(self) -> None:
        self.send(commands.WorkerBeat(session=self.id, grants_seen=self.seen, free=2))
        self.later(BEAT, self.beat)

    def heard(self) -> None:
        """Something was written to the inbox."""
        if not self.polling:
            self.polling = True
            self.later(self.sim.delay(), self._poll)

    def _poll(self) -> None:
        self.polling = False
        records, self.read = self.sim.log.since(topics.INBOX.name, self.partition, self.read)
        for record in records:
            message = self.sim.world.decode(record)
            if message.session == self.id and self.alive:
                self._take(message)

    def _take(self, message: inbox.InboxRecord) -> None:
        if isinstance(message, inbox.EndSession):
            self.worker.ended(message.why)
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
            case inbox.CheckpointAccepted():
                attempt.accepted = max(attempt.accepted, message.version)
            case inbox.PauseAttempt():
                attempt.stop = "" if message.undo else "paused"
            case inbox.CancelAttempt():
                attempt.stop = message.reason.partition(":")[0]
            case inbox.RevokeAttempt():
                attempt.over = True
                del self.attempts[key]


class Worker:
    """A worker process that can die, hang, be slow, and come back."""

    def __init__(self, sim: Simulator, name: str) -> None:
        self.sim, self.name = sim, name
        self.sessions: dict[int, Session] = {}
        self.clear_at: dict[int, int] = {}
        """Partition -> when what this life has sent before will have arrived."""
        self.gone = False
        """Whether a newer process of this name has put it out for good."""

    def start(self) -> None:
        """A new life of the process."""
        if not self.sessions and not self.gone:
            self.clear_at = {}
            for partition in sorted(set(self.sim.queues.values())):
                self.sessions[partition] = Session(self, partition)

    def die(self) -> None:
        """SIGKILL: what was not sent is lost, what is on its way arrives."""
        self.sessions = {}

    def ended(self, why: str) -> None:
        """The engine says that a session is over."""
        self.die()
        self.gone = why == "superseded" and any(w.name == self.name and w.sessions for w in self.sim.workers)
        self.start()

    def attempts(self) -> list[Attempt]:
        return [a for session in self.sessions.values() for a in session.attempts.values()]

    def shut_down(self) -> None:
        """SIGTERM: hand everything back, then exit."""
        for session in self.sessions.values():
            session.send(commands.WorkerStopping(session=session.id))
        for attempt in self.attempts():
            attempt.stop = attempt.stop or "drained"
        lives = list(self.sessions.values())
        self.sim.after(10 * SECOND, lambda: self.die() if list(self.sessions.values()) == lives else None)
        self.sim.after(12 * SECOND, self.start)

    def hush(self, ms: int) -> None:
        """Nothing of it gets through for a while."""
        for partition in self.sessions:
            self.clear_at[partition] = max(self.clear_at.get(partition, 0), self.sim.now + ms)
