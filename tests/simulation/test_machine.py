"""The whole engine under anything that may happen to it, in any order: Hypothesis draws, the invariants hold.

Deterministic in CI. By hand, with more examples: PERDURE_EXAMPLES=5000 pytest tests/simulation/test_machine.py
"""

from __future__ import annotations

import json
import os
import random
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from perdure.schemas import commands, ids, inbox
from perdure.schemas.codec import encode, replace
from perdure.schemas.signing import signed
from tests.auditing import assert_sound
from tests.simulation.invariants import Invariants
from tests.world import (
    CLIENT,
    HOUR,
    KEYS,
    MINUTE,
    SECOND,
    ScriptedWorker,
    World,
    begun,
    checkpoint,
    completed,
    crashed,
    declined,
    failed,
    failed_step,
    milestone,
    progress,
    step,
    stopped,
)

EXAMPLES = int(os.environ.get("PERDURE_EXAMPLES", "100"))
TYPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "retried": {"retry": {"max_attempts": 3, "delay": 30_000, "max_delay": 60_000}, "on_shutdown": "pause"},
    "timed": {"run_timeout": MINUTE, "queue_timeout": 2 * MINUTE, "total_timeout": HOUR, "no_progress_timeout": 20_000,
              "retry": {"max_attempts": 2, "delay": 5_000}},
}  # fmt: skip
QUEUES = ["default", next(n for i in range(50) if ids.partition_of(n := f"q{i}", 2) != ids.partition_of("default", 2))]
LOCALS = [f"t{n}" for n in range(6)]
STEPS = ["a", "b", "files@000000000000/x", "files@000000000001/x", "files@000000000002/x"]

task_ids = st.one_of(
    st.builds("{}/{}".format, st.sampled_from(QUEUES), st.sampled_from(LOCALS)), st.sampled_from(LOCALS)
)
types = st.sampled_from([*TYPES, "plain", "retried", "unknown"])
partitions = st.integers(0, 1)
now_or_later = st.booleans()
controls = st.sampled_from(
    [commands.PauseTask, commands.ResumeTask, commands.CancelTask, commands.RetryTask, commands.DiscardDeadLetter]
)
most_times = st.sampled_from([True, True, True, False])
work = st.one_of(
    st.sampled_from(STEPS).map(step),
    st.sampled_from(STEPS).map(step),
    st.sampled_from(STEPS).map(failed_step),
    st.sampled_from(["a", "b"]).map(lambda name: replace(step(name, None), begun=True)),
    st.sampled_from([begun(), milestone("m"), milestone("n"), progress(0.3), progress(1.0)]),
    st.integers(1, 4).map(lambda n: checkpoint(n, files=n - 1)),
)
ends = st.one_of(
    st.just(completed(1)),
    st.sampled_from([failed(), failed(), failed("app.Fatal", final=True), declined()]),
    st.sampled_from([crashed(), crashed(), crashed(innocent=True)]),
    st.sampled_from(["paused", "cancelled", "timed_out", "drained", "revoked"]).map(stopped),
)


class EngineMachine(RuleBasedStateMachine):
    """Two partitions, clients, three worker ids in each, hosts that crash, and a broker whose clock leaps."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(2, types=TYPES)
        self.held = Invariants(self.world)
        self.sessions = 0
        self.versions = dict.fromkeys(TYPES, 0)

    def _after(self, now: bool) -> None:
        if now:
            self.world.pump()

    # Clients ---------------------------------------------------------------------------------------------------------

    @rule(
        queue=st.sampled_from(QUEUES), local=st.sampled_from(LOCALS), task_type=types, n=st.integers(0, 2),
        delay=st.sampled_from([None, 0, 3 * SECOND, MINUTE]), ahead=st.sampled_from([None, 0, 3]),
        partition=partitions, now=now_or_later,
    )  # fmt: skip
    def submit(
        self,
        queue: str,
        local: str,
        task_type: str,
        n: int,
        delay: int | None,
        ahead: int | None,
        partition: int,
        now: bool,
    ) -> None:
        not_before = None if delay is None else self.world.now + delay
        version = None if ahead is None else self.versions.get(task_type, 0) + ahead
        command = commands.SubmitTask(
            command_id=self.world.new_id(f"submit-{local}-{n}-"), task_id=f"{queue}/{local}", type=task_type, queue=queue,
            reply_to=CLIENT, not_before=not_before, policy_version=version, priority=n,
        )  # fmt: skip
        self.world.append(encode(command), partition)
        self._after(now)

    @rule(task_type=types, key=st.sampled_from([None, "k1", "k2"]), value=st.integers(0, 1), partition=partitions,
          queue=st.sampled_from([None, *QUEUES]), task_id=st.one_of(st.none(), task_ids), now=now_or_later)  # fmt: skip
    def submit_json(
        self,
        task_type: str,
        key: str | None,
        value: int,
        partition: int,
        queue: str | None,
        task_id: str | None,
        now: bool,
    ) -> None:
        content = {"command": "SubmitTask", "type": task_type, "input": value, "key": key, "queue": queue,
                   "task_id": task_id, "reply_to": CLIENT}  # fmt: skip
        self.world.append(json.dumps({k: v for k, v in content.items() if v is not None}).encode(), partition)
        self._after(now)

    @rule(kinds=st.lists(st.tuples(types, st.sampled_from(LOCALS)), min_size=1, max_size=4), partition=partitions)
    def submit_batch(self, kinds: list[tuple[str, str]], partition: int) -> None:
        tasks = [
            commands.SubmitTask(command_id=self.world.new_id("b-"), task_id=f"{QUEUES[n % 2]}/{local}", type=kind,
                                queue=QUEUES[n % 2])
            for n, (kind, local) in enumerate(kinds)
        ]  # fmt: skip
        batch = commands.SubmitBatch(command_id=self.world.new_id("batch-"), tasks=tasks, reply_to=CLIENT)
        self.world.append(batch, partition)

    @rule(kind=controls, task_id=task_ids, n=st.one_of(st.none(), st.integers(0, 2)), partition=partitions,
          now=now_or_later)  # fmt: skip
    def control(self, kind: type[Any], task_id: str, n: int | None, partition: int, now: bool) -> None:
        command_id = self.world.new_id("do-") if n is None else f"{kind.__name__}-{task_id}-{n}"
        self.world.append(kind(command_id=command_id, task_id=task_id, reply_to=CLIENT), partition)
        self._after(now)

    @rule(kind=controls, which=st.integers(0, 20), n=st.one_of(st.none(), st.integers(0, 2)), now=now_or_later)
    def control_known(self, kind: type[Any], which: int, n: int | None, now: bool) -> None:
        """For a task that is there, running ones first."""
        tasks = sorted(self.held.tasks, key=lambda t: (self.held.tasks[t].state != "RUNNING", t))
        if tasks:
            task_id = tasks[which % len(tasks)]
            self.control(kind=kind, task_id=task_id, n=n, partition=self.world.partition_of(task_id), now=now)

    @rule(task_id=task_ids, partition=partitions, kind=st.sampled_from(["describe", "await", "find"]))
    def query(self, task_id: str, partition: int, kind: str) -> None:
        base = {"command_id": self.world.new_id("q-"), "reply_to": CLIENT}
        match kind:
            case "describe":
                self.world.send(commands.DescribeTask(**base, task_id=task_id), partition)
            case "await":
                self.world.send(commands.AwaitTask(**base, task_id=task_id, timeout=5_000), partition)
            case _:
                self.world.send(commands.FindTasks(**base, prefix="default/t"), partition)

    # Workers ---------------------------------------------------------------------------------------------------------

    @rule(
        name=st.sampled_from(["w1", "w2"]), queue=st.sampled_from(QUEUES), slots=st.integers(1, 3), beating=most_times
    )
    def start_worker(self, name: str, queue: str, slots: int, beating: bool) -> None:
        """A worker process, or its next life."""
        self.sessions += 1
        worker_id = f"{name}-{queue}"
        for older in self.world.workers:
            older.beating = older.beating and older.worker_id != worker_id
        ScriptedWorker(
            self.world, worker_id, types=self.versions, queues=(queue,), slots=slots, session=f"s{self.sessions:04}",
            beating=beating,
        ).start()  # fmt: skip

    @rule(which=st.integers(0, 5), seen=st.sampled_from([None, 0, 1]), free=st.integers(0, 2), now=now_or_later)
    def beat(self, which: int, seen: int | None, free: int, now: bool) -> None:
        worker = self._worker(which)
        grants = len(worker.grants()) if seen is None else seen
        message = commands.WorkerBeat(session=worker.session, grants_seen=grants, free=free)
        self.world.append(signed(message, *KEYS.newest_worker()), worker.partition)
        self._after(now)

    @rule(which=st.integers(0, 5))
    def silence_worker(self, which: int) -> None:
        worker = self._worker(which)
        worker.beating = False

    @rule(which=st.integers(0, 5))
    def stop_worker(self, which: int) -> None:
        self._worker(which).stop()

    @rule(which=st.integers(0, 5), said=st.lists(work, min_size=1, max_size=4), now=now_or_later)
    def work_on(self, which: int, said: list[Any], now: bool) -> None:
        self._report(which, [begun(), *said], now)

    @rule(which=st.integers(0, 5), said=st.lists(work, min_size=1, max_size=4), now=now_or_later)
    def work_on_more(self, which: int, said: list[Any], now: bool) -> None:
        self._report(which, said, now)

    @rule(which=st.integers(0, 5), said=ends, now=now_or_later)
    def end_attempt(self, which: int, said: Any, now: bool) -> None:
        self._report(which, [said], now)

    @rule(which=st.integers(0, 5), said=ends, more=work, now=now_or_later)
    def end_attempt_and_go_on(self, which: int, said: Any, more: Any, now: bool) -> None:
        self._report(which, [more, said, more], now)

    @rule(which=st.integers(0, 5), back=st.integers(0, 5), said=st.one_of(work, ends), now=now_or_later)
    def report_on_any_grant(self, which: int, back: int, said: Any, now: bool) -> None:
        """Of a session that may be over, for an epoch that may be over."""
        worker = self._worker(which)
        grants = worker.grants()
        if grants:
            self.world.append(worker.batch(grants[max(0, len(grants) - 1 - back)], said), worker.partition)
            self._after(now)

    @rule(
        which=st.integers(0, 5),
        said=st.one_of(work, ends),
        how=st.sampled_from(["token", "epoch", "session", "key", "gap"]),
    )
    def false_report(self, which: int, said: Any, how: str) -> None:
        found = self._running(which)
        if found is None:
            return
        worker, grant = found
        forged: dict[str, Any] = {
            "token": {"token": b"x" * 32}, "epoch": {"epoch": grant.epoch + 1}, "session": {"session": "s9999"},
            "key": {"key": ("w1", b"x" * 32)},
        }.get(how, {})  # fmt: skip
        known = dict(worker._numbers)
        worker.report(grant, replace(said, seq=1_000 if how == "gap" else 0), **forged)
        worker._numbers = known

    def _worker(self, which: int) -> ScriptedWorker:
        """The newest ones first."""
        workers = self.world.workers
        return workers[-1 - which % len(workers)]

    def _running(self, which: int) -> tuple[ScriptedWorker, inbox.RunAttempt] | None:
        """A grant that holds, as far as what is committed says."""
        found = [
            (worker, grant)
            for worker in self.world.workers
            for grant in worker.grants()
            if self.world.known(grant.task_id)
            and (t := self.world.task(grant.task_id)).session == worker.session
            and t.epoch == grant.epoch
        ]
        return found[which % len(found)] if found else None

    def _report(self, which: int, said: list[Any], now: bool) -> None:
        found = self._running(which)
        if found is not None:
            worker, grant = found
            self.world.append(worker.batch(grant, *said), worker.partition)
            self._after(now)

    # The world -------------------------------------------------------------------------------------------------------

    @rule(partition=partitions, back=st.integers(0, 60))
    def send_again(self, partition: int, back: int) -> None:
        """Any record that was sent before, once more."""
        records = self.world.log.records("task-commands", partition)
        self.world.send(records[max(0, len(records) - 1 - back)].value, partition)

    @rule(partition=partitions, due=st.sampled_from([0, -HOUR, HOUR]), off=st.sampled_from([0, 0, 20_000, 40_000]))
    def foreign_tick(self, partition: int, due: int, off: int) -> None:
        """At the true time, or at one that disagrees with the broker's; a lie that agrees would be believed."""
        if self.world.skew == 0 or off:
            self.world.tick(partition, due=self.world.now + due, host_clock=self.world.now - off)

    @rule(ms=st.sampled_from([50, SECOND, 2 * SECOND, 6 * SECOND, 11 * SECOND, 31 * SECOND, 2 * MINUTE]))
    def wait(self, ms: int) -> None:
        self.world.advance(ms)

    @rule(ms=st.sampled_from([SECOND, SECOND, 4 * SECOND, 13 * SECOND, 10 * MINUTE, 3 * HOUR, 8 * 24 * HOUR]))
    def silence(self, ms: int) -> None:
        """Time passes while nobody runs."""
        self.world.now += ms

    @rule(skew=st.sampled_from([0, 0, 0, HOUR, -HOUR, 400]))
    def set_broker_clock(self, skew: int) -> None:
        """Heard of at once: what a leap and a silence hide together nobody can tell apart."""
        self._note_time()
        self.world.skew = skew
        self._note_time()

    def _note_time(self) -> None:
        for partition in range(2):
            self.world.append(commands.DescribeTask(command_id="time", task_id="default/none"), partition)

    @rule(
        kind=st.sampled_from(
            ["aborted", "crash before commit", "crash after commit", "unknown, lost", "unknown, committed"]
        )
    )
    def fault(self, kind: str) -> None:
        self.world.fault(kind)

    @rule(stores=st.sampled_from(["kept", "empty", 1, 3]), batch=st.sampled_from([1, 3, 100]))
    def restart(self, stores: str | int, batch: int) -> None:
        self.world._batch = batch
        self.world.restart(stores)

    @rule(name=st.sampled_from([*TYPES, "unknown"]), other=st.booleans(), now=now_or_later)
    def configure_type(self, name: str, other: bool, now: bool) -> None:
        policy = TYPES.get(name, {}) | ({"cancel_grace": 5} if other else {})
        self.versions[name] = self.world.configure_type(name, policy)
        self._after(now)

    @rule(delete=st.booleans())
    def configure_queue(self, delete: bool) -> None:
        self.world.configure(f"queue/{QUEUES[1]}", {} if not delete else {"routing_keys": [QUEUES[1]]})

    @rule(data=st.sampled_from([None, b"", b"noise", b"{}", b"{", encode(inbox.EndSession(worker_id="", session="", why=""))]),
          partition=partitions)  # fmt: skip
    def poison(self, data: bytes | None, partition: int) -> None:
        before = len(self.world.quarantined())
        self.world.send(data, partition)
        assert len(self.world.quarantined()) == before + 1

    # What holds ------------------------------------------------------------------------------------------------------

    @initialize(beating=st.booleans())
    def begin(self, beating: bool) -> None:
        for queue in QUEUES:
            self.start_worker(name="w1", queue=queue, slots=2, beating=beating)
        self.held.check_all()

    @invariant()
    def everything_holds(self) -> None:
        self.held.check_all()

    def teardown(self) -> None:
        self.world.skew = 0
        self.world.log.fault = ""
        self.world.pump()
        self.world.advance(2 * MINUTE)
        self.held.check_all()
        for partition in range(2):
            late = self.world.of_engine(partition).next_tick()
            assert late is None or late > self.world.now - SECOND, "nothing is overdue once clocks agree"
        self.held.check_replay(random.Random(1))
        assert_sound(self.world.log)


EngineMachine.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=50, deadline=None)
TestEngine = EngineMachine.TestCase
