"""Commands for every partition while something is wrong, and the proof that each was executed once, in order."""

from __future__ import annotations

import itertools
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from perdure.schemas import ids, topics
from tests.integration.stack import DEADLINE_S, Process, Stack, until

_PAUSE_S = 0.1
_LIFE = ["TaskSubmitted", "TaskQueued", "TaskPaused", "TaskCancelled"]
"""What each task of the traffic goes through: nobody runs it."""


class Traffic:
    """On each partition, task after task is submitted, paused and cancelled: by JSON, as any producer may."""

    def __init__(self, stack: Stack, needed: tuple[Process, ...]) -> None:
        self._stack, self._needed = stack, needed
        partitions = range(stack.log.partitions)
        keys = (f"q{n}" for n in itertools.count())
        self._keys: dict[int, str] = {}
        while len(self._keys) < len(partitions):
            key = next(keys)
            self._keys.setdefault(ids.partition_of(key, len(partitions)), key)
        self._name = ids.new_local_id()
        self.sent = 0
        self._histories: dict[str, list[str]] = defaultdict(list)
        self._read = 0
        self._producer = stack.log.producer()  # idempotent: a broker that goes away neither repeats nor reorders
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def flows(self, *partitions: int, timeout_s: float = 120.0) -> None:
        """Wait until tasks that are sent from now on are through, on these partitions; on all, if none is named."""
        begun = self.sent + 1
        awaited = [self._task(p, begun) for p in partitions or self._keys]

        def through() -> bool:
            for process in self._needed:
                assert process.runs(), f"it ended: {process.text()[-2_000:]}"
            return self._through(*awaited)

        until(f"{awaited} cancelled", through, timeout_s)

    def stop(self) -> None:
        """Every task that was sent has had its whole life, once, and nothing else has happened."""
        self._stopping.set()
        self._thread.join()
        assert self._producer.flush(DEADLINE_S)
        expected = {self._task(p, n) for p in self._keys for n in range(1, self.sent + 1)}
        last = [self._task(p, self.sent) for p in self._keys]
        until("the last task", lambda: self._through(*last))
        self._look(whole=True)
        assert {t: k for t, k in self._histories.items() if k != _LIFE} == {}
        assert self._histories.keys() == expected
        assert self._stack.messages(topics.QUARANTINE.name) == []
        assert self._stack.messages(topics.EVENTS.name, "CommandRejected", "ReportRejected") == []

    def close(self) -> None:
        """Send nothing more."""
        self._stopping.set()
        self._thread.join()
        self._producer.close()

    def _look(self, *, whole: bool = False) -> None:
        """Take in new events; those of a task have numbers without gap or repetition."""
        tail = self._stack.tail(topics.EVENTS.name)
        seen = tail.whole() if whole else tail.look()
        for message in (s.message for s in seen[self._read :]):
            task_id = getattr(message, "task_id", None) or ""
            if self._name in task_id:
                history = self._histories[task_id]
                history.append(type(message).__name__)
                assert message.seq == len(history), f"{task_id} has torn or repeated events: {history}"
        self._read = len(seen)

    def _through(self, *tasks: str) -> bool:
        self._look()
        return all(self._histories[task] == _LIFE for task in tasks)

    def _task(self, partition: int, number: int) -> str:
        return f"{self._keys[partition]}/{self._name}/{number}"

    def _run(self) -> None:
        while not self._stopping.wait(_PAUSE_S):
            number = self.sent + 1
            for partition in self._keys:
                task = self._task(partition, number)
                commands = (
                    {"command": "SubmitTask", "type": "traffic"},
                    {"command": "PauseTask"},
                    {"command": "CancelTask"},
                )
                for command in commands:
                    value = json.dumps(command | {"task_id": task}).encode()
                    self._producer.append(topics.COMMANDS.name, partition, None, value)
            self.sent = number


@contextmanager
def traffic_on(stack: Stack, *needed: Process) -> Iterator[Traffic]:
    """Traffic that ends with the test, however it ends; `stop` is the test's to call. `needed` must not end."""
    traffic = Traffic(stack, needed)
    try:
        yield traffic
    finally:
        traffic.close()
