"""The work that goes on under every fault: tasks with steps and tracks, and hands that pause, resume, cancel and retry.

What is asked for is written down here, to be compared with what has become of it.
"""

from __future__ import annotations

import json
import random
import threading
import time
from dataclasses import dataclass
from typing import Any

from confluent_kafka import Producer

from perdure.schemas import ids, topics
from perdure.schemas.errors import InfrastructureError
from tests.chaos.watch import Life, Observer
from tests.integration.stack import Stack

_PACE_S = 0.05
_PROBE_S = 0.05
ATTEMPTS = 3
"""Of a task, until somebody sends it back."""


@dataclass
class Wanted:
    """A task that was asked for."""

    count: int
    seconds: float
    stumbles: int
    """Attempts that fail; as many as it has attempts: it is sent back with none."""
    origin: int
    """The partition that all its commands are written to: between partitions they have no order."""
    cancelled: bool = False
    resume_at: float | None = None
    redriven: bool = False


class Load(threading.Thread):
    """Keeps some tasks alive, sends probes, and meddles."""

    def __init__(self, stack: Stack, observer: Observer, queues: list[str], seed: str, alive: int) -> None:
        super().__init__(name="load", daemon=True)
        self._stack, self._observer, self._queues, self._alive = stack, observer, queues, alive
        self._draw = random.Random(seed)
        self._stopping, self._closed = threading.Event(), threading.Event()
        self._producer = Producer({
            "bootstrap.servers": stack.bootstrap, "enable.idempotence": True, "acks": "all", "linger.ms": 0,
            "message.timeout.ms": 86_400_000, "reconnect.backoff.max.ms": 500, "log_level": 0,
            "enable.metrics.push": False, "error_cb": lambda _: None,
        })  # fmt: skip
        self._client = threading.Thread(target=self._submit_by_client, name="client", daemon=True)
        self._by_client: list[tuple[str, str, Wanted]] = []
        self._prober = threading.Thread(target=self._probe, name="probes", daemon=True)
        self._count = 0
        self._open: dict[str, Wanted] = {}
        self.wanted: dict[str, Wanted] = {}
        self.spared: set[str] = set()
        """Tasks that a fault is measured by: nobody meddles with them."""
        self.failure: BaseException | None = None
        for queue in queues:
            self.command("SubmitTask", f"{queue}/probe", stack.home(queue), type="nobody")

    def command(self, command: str, task: str, partition: int, command_id: str | None = None, **fields: Any) -> None:
        """A JSON command; returns at once."""
        value = {"command": command, "command_id": command_id or ids.new_id("chaos-"), "task_id": task, **fields}
        self.append(json.dumps(value).encode(), partition)

    def append(self, value: bytes | None, partition: int, placed: Any = None) -> None:
        """A record on task-commands; returns at once. `placed` is told partition and offset."""

        def delivered(error: Any, message: Any) -> None:
            if error is not None:
                self.failure = AssertionError(f"not appended: {error}")
            elif placed is not None:
                placed(message.partition(), message.offset())

        self._producer.produce(
            topics.COMMANDS.on(self._stack.prefix), value, partition=partition, on_delivery=delivered
        )
        self._producer.poll(0)

    def flush(self, timeout_s: float = 60.0) -> None:
        """Wait until everything that was sent is in the log."""
        assert self._producer.flush(timeout_s) == 0, "commands that the log does not take"

    def run(self) -> None:
        self._prober.start()
        self._client.start()
        try:
            while not self._stopping.wait(_PACE_S):
                self._turn()
        except BaseException as error:  # noqa: BLE001 - the campaign raises it
            self.failure = error

    def stop(self) -> None:
        """Ask for nothing more, and take back every pause; what has been asked for goes on."""
        self._stopping.set()
        self.join()
        self._closed.set()
        self._client.join()
        self._prober.join()
        for task, wanted in self._open.items():
            if wanted.resume_at is not None:
                self._resume(task, wanted)
        for queue in self._queues:
            self.command("CancelTask", f"{queue}/probe", self._stack.home(queue), reason="the end")
        self.flush()

    def settle(self) -> bool:
        """Whether every task has ended; those that failed as they should are sent back meanwhile."""
        self._alive = 0
        self._turn(meddles=False)
        return not self._open

    # Inside ----------------------------------------------------------------------------------------------------------

    def _life(self, task: str) -> Life:
        return self._observer.lives.get(task) or Life()

    def _turn(self, meddles: bool = True) -> None:
        now = time.monotonic()
        for task, wanted in list(self._open.items()):
            end = self._life(task).end
            if end == "TaskFailed" and wanted.stumbles >= ATTEMPTS:
                if not wanted.redriven:
                    wanted.redriven = True
                    self.command("RetryTask", task, wanted.origin, input=self._input(wanted, stumbles=0))
            elif end is not None:
                del self._open[task]
            elif wanted.resume_at is not None and now >= wanted.resume_at:
                self._resume(task, wanted)
        if len(self._open) < self._alive:
            self._submit()
        if meddles and self._draw.random() < 0.05:
            self._meddle(now)

    def _meddle(self, now: float) -> None:
        free = [t for t, wanted in list(self._open.items()) if t not in self.spared and wanted.resume_at is None]
        if not free:
            return
        task = self._draw.choice(free)
        wanted = self.wanted[task]
        if self._draw.random() < 0.8:
            wanted.resume_at = now + self._draw.uniform(0.2, 1.5)
            self.command("PauseTask", task, wanted.origin)
        else:
            wanted.cancelled = True
            self.command("CancelTask", task, wanted.origin, reason="by chance")

    def _resume(self, task: str, wanted: Wanted) -> None:
        wanted.resume_at = None
        self.command("ResumeTask", task, wanted.origin)

    def _submit(self) -> None:
        queue, kind = self._draw.choice(self._queues), self._draw.choice(("walk", "walk", "drift"))
        wanted = Wanted(
            count=self._draw.randrange(20, 60), seconds=self._draw.uniform(0.03, 0.15),
            stumbles=self._draw.choice((0, 0, 0, 0, 1, 2, 3)), origin=self._draw.randrange(len(self._queues)),
        )  # fmt: skip
        self._count += 1
        task = f"{queue}/{kind}-{self._count}"
        if self._draw.random() < 0.3 and not self._by_client:
            self._by_client.append((task, kind, wanted))
            return
        self._take(task, wanted)
        self.command(
            "SubmitTask", task, wanted.origin, type=kind, queue=queue, input=self._input(wanted, wanted.stumbles)
        )

    def _input(self, wanted: Wanted, stumbles: int) -> dict[str, Any]:
        return {
            "witness": str(self._stack.witness), "count": wanted.count, "seconds": wanted.seconds, "stumbles": stumbles
        }  # fmt: skip

    def _submit_by_client(self) -> None:
        """As a program would: again under the same id until it has been accepted."""
        try:
            while self._by_client or not self._closed.wait(_PACE_S):
                if self._by_client:
                    self._try_by_client(*self._by_client[0])
        except BaseException as error:  # noqa: BLE001 - the campaign raises it
            self.failure = error

    def _try_by_client(self, task: str, kind: str, wanted: Wanted) -> None:
        queue, _, name = task.partition("/")
        wanted.origin = self._stack.home(queue)
        try:
            self._stack.client.submit(kind, self._input(wanted, wanted.stumbles), queue=queue, id=name)
        except InfrastructureError:
            return
        self._take(task, wanted)
        self._by_client.pop()

    def _take(self, task: str, wanted: Wanted) -> None:
        self.wanted[task] = wanted
        self._open[task] = wanted

    def _probe(self) -> None:
        """Pause and resume, over and over: each is a transition."""
        while not self._stopping.wait(_PROBE_S):
            for queue in self._queues:
                partition = self._stack.home(queue)
                number = self._observer.probes.sent(partition)
                command = ("PauseTask", "ResumeTask")[number % 2]
                self.command(command, f"{queue}/probe", partition, f"probe/{partition}/{number}")


def queues_of(partitions: int) -> list[str]:
    """A queue in each partition."""
    found: dict[int, str] = {}
    number = 0
    while len(found) < partitions:
        found.setdefault(ids.partition_of(f"q{number}", partitions), f"q{number}")
        number += 1
    return [found[p] for p in range(partitions)]
