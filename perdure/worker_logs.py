"""What tasks print and log, on its way to `task-logs`; and what the worker and its machine do, to `worker-metrics`.

Both are written by one thread with a producer of its own, behind a bounded line: when the broker is slow or away, log
lines are left out and counted, and tasks and reports are not held up.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from perdure.schemas import codec, ids, limits, topics
from perdure.schemas.inbox import RunAttempt
from perdure.schemas.public import LogLine, WorkerMetrics
from perdure.streams.log import Producer

LOG = logging.getLogger("perdure.worker")
LINES_PER_S = 1_000
LINES_BURST = 5_000
LINE_COST = METRICS_COST = 1_024
"""Bytes of a line that count as one line for the cap, so that it bounds bytes as well."""
WAITING_MAX = 16 * 1024 * 1024
"""Bytes of lines that may wait for the broker."""
METRICS_MS = 10_000
RUNNING_MAX = 1_000
"""Task ids that one metrics record lists."""
_LINE_END = re.compile(rb"\r\n|\n|\r")


class RateCap:
    """A bucket of tokens that fills up again with time. Times in ms."""

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_ms, self._burst = per_s / 1000, burst
        self._tokens, self._at = burst, 0

    def take(self, cost: float, now: int) -> bool:
        """Whether `cost` tokens were there, and are now taken."""
        self._tokens = min(self._burst, self._tokens + max(0, now - self._at) * self._per_ms)
        self._at = now
        if self._tokens < cost:
            return False
        self._tokens -= cost
        return True


class Lines:
    """Bytes of a pipe in, lines out: without their ends, cut to `limits.LINE_MAX` bytes."""

    def __init__(self) -> None:
        self._open = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes. A carriage return ends a line too: progress bars then show."""
        *lines, rest = _LINE_END.split(self._open + data)
        if data.endswith(b"\r"):  # its newline may still come
            lines, rest = lines[:-1], lines[-1] + b"\r"
        self._open = rest if rest.endswith(b"\r") else rest[: limits.LINE_MAX]
        return [line[: limits.LINE_MAX] for line in lines]

    def rest(self) -> list[bytes]:
        """The last line, if it has no end."""
        rest, self._open = self._open.rstrip(b"\r"), b""
        return [rest[: limits.LINE_MAX]] if rest else []


class AttemptLog:
    """The lines of one attempt: numbered, capped, with a count of those left out."""

    def __init__(self, offer: Callable[[int, LogLine], bool], grant: RunAttempt, partition: int) -> None:
        self._offer, self._partition = offer, partition
        self._grant = codec.replace(grant, input=None)
        self._cap = RateCap(LINES_PER_S, LINES_BURST)
        self._pipes: dict[str, Lines] = {}
        self._number = 0
        self._dropped = 0

    def write(self, stream: str, data: bytes, now: int) -> None:
        """Take bytes that were read from stdout or stderr at `now` (ms since 1970)."""
        for line in self._pipes.setdefault(stream, Lines()).feed(data):
            self.line(stream, "", line.decode("utf-8", "replace"), now, now)

    def line(self, stream: str, level: str, text: str, at: int, now: int) -> None:
        """Take a line of the time `at`."""
        self._number += 1
        if not self._cap.take(1 + len(text) // LINE_COST, now) or not self._send(stream, level, text, at):
            self._dropped += 1

    def close(self, now: int) -> None:
        """Take what has no line end, and say what was left out last."""
        for stream, lines in self._pipes.items():
            for line in lines.rest():
                self.line(stream, "", line.decode("utf-8", "replace"), now, now)
        if self._dropped:
            self._number += 1
            self._send("perdure", "", f"{self._dropped:,} lines were left out here by the rate cap", now)

    def _send(self, stream: str, level: str, text: str, at: int) -> bool:
        grant = self._grant
        line = LogLine(
            task_id=grant.task_id, epoch=grant.epoch, attempt=grant.attempt, worker_id=grant.worker_id,
            number=self._number, at=at, stream=stream, level=level, text=_cut(text), dropped=self._dropped,
        )  # fmt: skip
        taken = self._offer(self._partition, line)
        if taken:
            self._dropped = 0
        return taken


def _cut(text: str) -> str:
    if len(text) * 4 <= limits.LINE_MAX:
        return text
    return text.encode("utf-8", "replace")[: limits.LINE_MAX].decode("utf-8", "ignore")


@dataclass(frozen=True)
class Activity:
    """What the worker says of itself for its metrics."""

    session: str
    queues: list[str]
    slots: int
    running: list[str]
    state: str


class Machine:
    """Measures this process with all its descendants, and the machine."""

    def __init__(self, worker_id: str, disk: Path, checkpoint_store: str, partitions: int) -> None:
        self.worker_id, self._disk = worker_id, disk
        self._store = checkpoint_store
        self.partition = ids.partition_of(worker_id, partitions)
        self._cpu: dict[tuple[int, float], float] = {}
        self._at = 0

    def metrics(self, activity: Activity, at: int) -> WorkerMetrics:
        """The figures of now; CPU since the call before (0 in the first)."""
        cpu, rss = self._processes()
        used = sum(seconds - self._cpu.get(process, 0.0) for process, seconds in cpu.items()) if self._cpu else 0.0
        elapsed_s = (at - self._at) / 1000
        self._cpu, self._at = cpu, at
        return WorkerMetrics(
            worker_id=self.worker_id, session=activity.session, at=at, host=socket.gethostname(), pid=os.getpid(),
            queues=activity.queues, slots=activity.slots, running=activity.running[:RUNNING_MAX],
            cpu_percent=100 * used / elapsed_s if elapsed_s > 0 else 0.0, rss=rss, load=os.getloadavg()[0],
            memory_available=psutil.virtual_memory().available, disk_free=psutil.disk_usage(str(self._disk)).free,
            state=activity.state, checkpoint_store=self._store,
        )  # fmt: skip

    def _processes(self) -> tuple[dict[tuple[int, float], float], int]:
        me = psutil.Process()
        cpu: dict[tuple[int, float], float] = {}
        rss = 0
        for process in [me, *me.children(recursive=True)]:
            try:
                times, memory = process.cpu_times(), process.memory_info()
            except psutil.NoSuchProcess:
                continue
            cpu[process.pid, process.create_time()] = times.user + times.system
            rss += memory.rss
        return cpu, rss


class LogWriter(threading.Thread):
    """Appends log lines and metrics, in order, on a thread of its own."""

    def __init__(self, producer: Producer, machine: Machine, fail: Callable[[Exception], None]) -> None:
        super().__init__(name="perdure-logs", daemon=True)
        self._producer, self._machine, self._fail = producer, machine, fail
        self._waiting: deque[Callable[[], None]] = deque()
        self._bytes = 0
        """Of what waits here, or in the producer to be acknowledged: in an outage that is where it gathers."""
        self._closing = False
        self._changed = threading.Condition()

    def offer(self, partition: int, line: LogLine) -> bool:
        """Take a line to append; False when too much waits already. Does not block."""
        weight = len(line.text) + LINE_COST
        return self._put(weight, lambda: self._append(weight, topics.LOGS.name, partition, line.task_id, line))

    def measure(self, activity: Activity, at: int) -> None:
        """Measure and append metrics soon. Does not block."""
        self._put(METRICS_COST, lambda: self._append_metrics(activity, at))

    def run(self) -> None:
        try:
            while (append := self._next()) is not None:
                append()
        except Exception as error:  # noqa: BLE001 - raised again by the main thread
            self._fail(error)

    def close(self, timeout_s: float) -> None:
        """Append what waits, for at most `timeout_s`, and let go."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self.join(timeout_s)
        self._producer.close()

    def _put(self, weight: int, append: Callable[[], None]) -> bool:
        with self._changed:
            if self._bytes + weight > WAITING_MAX:
                return False
            self._bytes += weight
            self._waiting.append(append)
            self._changed.notify()
            return True

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            while not self._waiting:
                if self._closing:
                    return None
                self._changed.wait()
            return self._waiting.popleft()

    def _append(self, weight: int, topic: str, partition: int, key: str, record: LogLine | WorkerMetrics) -> None:
        self._producer.append(topic, partition, key.encode(), codec.encode(record), lambda *_: self._free(weight))

    def _free(self, weight: int) -> None:
        with self._changed:
            self._bytes -= weight

    def _append_metrics(self, activity: Activity, at: int) -> None:
        try:
            record = self._machine.metrics(activity, at)
        except (OSError, psutil.Error) as error:  # a figure is not worth a task
            LOG.warning("no metrics: %s", error)
            self._free(METRICS_COST)
            return
        worker_id, partition = self._machine.worker_id, self._machine.partition
        self._append(METRICS_COST, topics.METRICS.name, partition, worker_id, record)
