"""What users see: latencies, steps and tasks per second, and how soon work goes on after a kill. On a dev stack."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from benchmarks.measure import Row, percentile, repeat, until
from perdure.client import Client
from perdure.handle import Handle
from perdure.schemas import codec, commands, events, ids, topics
from perdure.settings import DevStack
from perdure.streams.kafka_log import KafkaLog

_QUEUE = "bench"


class WorkBench:
    """The rows that need workers."""

    def __init__(self, stack: DevStack, folder: Path) -> None:
        self._stack, self._folder = stack, folder
        self.log = KafkaLog(stack.bootstrap)
        self._client = Client(self.log)
        self._producer = self.log.producer()

    def rows(self, runs: int) -> list[Row]:
        """All of them."""
        self._starts(20)
        starts = [self._starts(100) for _ in range(runs)]
        kills: list[tuple[str, str, Callable[[int], None]]] = [
            ("SIGKILL of the task's process to its next step", "<= 0.3", lambda pid: os.kill(pid, signal.SIGKILL)),
            ("SIGKILL of the worker, restarted, to the next step", "<= 1", lambda _: self._kill_part("worker")),
            ("SIGKILL of the engine, restarted, to the next transition", "<= 3", lambda _: self._kill_part("engine")),
        ]
        return [
            Row("submit to first line, p50", "ms", "<= 15", [percentile(s, 0.5) for s in starts]),
            Row("submit to first line, p99", "ms", "<= 60", [percentile(s, 0.99) for s in starts]),
            Row("sequential steps in one task", "/s", ">= 1,500", repeat(runs, lambda: self._steps(3_000))),
            Row("tiny async tasks end to end", "/s", ">= 2,000", repeat(runs, lambda: self._tiny(4_000))),
            *(Row(name, "s", wanted, repeat(runs, lambda h=hit, n=name: self._kill(h, engine="engine" in n)))  # type: ignore[misc]
              for name, wanted, hit in kills),
        ]  # fmt: skip

    def close(self) -> None:
        """Let go of the log."""
        self._producer.close()
        self._client.close()

    def _starts(self, count: int) -> list[float]:
        times = []
        for _ in range(count):
            began = time.time_ns()
            handle = self._client.submit("first_line")
            times.append((handle.result(timeout=60) - began) / 1e6)
        return times

    def _steps(self, count: int) -> float:
        return float(self._client.submit("steps", {"count": count}).result(timeout=120))

    def _tiny(self, count: int) -> float:
        """Tasks per second from the first submit to the last TaskCompleted that a committed reader sees."""
        reader = self.log.reader()
        where = (topics.EVENTS.name, ids.partition_of(_QUEUE, self.log.partitions))
        reader.assign({where: reader.bounds(*where)[1]})
        header = codec.header_of(events.TaskCompleted)
        began = time.perf_counter()
        for _ in range(count):
            task_id = ids.join(_QUEUE, ids.new_local_id())
            submit = commands.SubmitTask(command_id=ids.new_id(), task_id=task_id, type="tiny", queue=_QUEUE)
            self._producer.append(topics.COMMANDS.name, where[1], None, codec.encode(submit))
        done = 0
        while done < count:
            done += sum((r.value or b"").startswith(header) for r in reader.read(5_000, 30.0))
        took = time.perf_counter() - began
        reader.close()
        return count / took

    def _kill(self, hit: Callable[[int], None], *, engine: bool) -> float:
        """Seconds from a kill in the middle of a step to what shows that work goes on."""
        witness = self._folder / f"witness-{ids.new_local_id()}"
        witness.touch()
        handle = self._client.submit("slow_steps", {"count": 100_000, "witness": str(witness)})
        until(lambda: len(witness.read_bytes().splitlines()) >= 10, "the tenth step")
        before = len(witness.read_bytes().splitlines())
        pid = int(witness.read_text().splitlines()[-1].split()[1])
        began = time.time_ns()
        hit(pid)
        if engine:
            took = self._engine_back(handle, began)
        else:
            until(
                lambda: len(witness.read_bytes().splitlines()) > before + 1 and self._other(witness, pid),
                "a step after the kill",
            )
            again = next(line for line in witness.read_text().splitlines() if int(line.split()[1]) != pid)
            took = (int(again.split()[0]) - began) / 1e9
        handle.cancel("measured")
        handle.wait(timeout=60)
        return took

    def _other(self, witness: Path, pid: int) -> bool:
        return int(witness.read_text().splitlines()[-1].split()[1]) != pid

    def _engine_back(self, handle: Handle, began: int) -> float:
        reader = self.log.reader()
        where = (topics.EVENTS.name, ids.partition_of(_QUEUE, self.log.partitions))
        reader.assign({where: reader.bounds(*where)[1]})
        until(
            lambda: any(r.key == handle.id.encode() for r in reader.read(100, 0.5)),
            "a transition after the kill",
            pause_s=0,
        )
        reader.close()
        return (time.time_ns() - began) / 1e9

    def _kill_part(self, name: str) -> None:
        for child in psutil.Process(self._stack.pid).children():
            if name in child.cmdline()[2:5]:
                child.kill()
                return
        raise LookupError(f"no {name} process under the dev stack")
