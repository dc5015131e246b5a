"""How long partitions stand still when engine hosts come, go and die. On the dev stack's broker, in its own namespace.

Hosts are engine processes with state directories of their own. A partition is asked all the time: every 20 ms a query
is appended to it, which its engine answers in a transaction; what is measured is the longest gap between two answers
that are visible to a committed reader.
"""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from pathlib import Path

from benchmarks.hosts import Hosts
from benchmarks.measure import Row, until
from perdure.schemas import codec, commands, ids, topics
from perdure.streams.kafka_log import KafkaLog

_PARTITIONS = 4
_ASK_S = 0.02
_SETTLED_S = 3.0
_READY = "is up to date"


class FailoverBench:
    """The rows of DESIGN section 9 about engine hosts."""

    def __init__(self, bootstrap: str, folder: Path) -> None:
        self._hosts = Hosts(bootstrap, folder / "failover", _PARTITIONS)
        self._log = self._hosts.log
        self._started = 0

    def rows(self, runs: int) -> list[Row]:
        """All of them: a host joins, and is lost again, `runs` times."""
        first = self._host()
        joins: list[float] = []
        losses: list[float] = []
        for _ in range(runs):
            gaps, known = _Gaps(self._log), len(self._ready(first))
            second = self._host()
            self._await_ready(first, known + _PARTITIONS // 2)
            time.sleep(_SETTLED_S)
            joins.append(max(gaps.longest(partition) for partition in self._ready(first)[known:]))
            began, known = gaps.now(), len(self._ready(first))
            self._hosts.kill(second)
            self._await_ready(first, known + _PARTITIONS)
            time.sleep(_SETTLED_S)
            losses.append(max(gaps.longest(partition, since=began) for partition in range(_PARTITIONS)))
            gaps.close()
        return [
            Row("an engine host joins: unmoved partitions stand still", "s", "<= 2", joins),
            Row("an engine host is lost: its partitions stand still", "s", "<= 15", losses),
        ]

    def close(self) -> None:
        """End the hosts."""
        self._hosts.close()

    def _host(self) -> str:
        """Another engine host, with its share of the partitions up to date."""
        self._started += 1
        name = f"host-{self._started}"
        self._hosts.start(name, "engine")
        self._await_ready(name, 1)
        return name

    def _ready(self, host: str) -> list[int]:
        """Partitions that a host has got up to date, in order."""
        return [int(line.split()[-5]) for line in self._hosts.said(host).splitlines() if line.endswith(_READY)]

    def _await_ready(self, host: str, count: int) -> None:
        self._hosts.await_words(host, _READY, count)


class _Gaps:
    """Asks every partition all the time, and notes when it answers."""

    def __init__(self, log: KafkaLog) -> None:
        self._log = log
        self._answers: dict[int, list[float]] = {p: [] for p in range(log.partitions)}
        self._producer, self._reader = log.producer(), log.reader()
        where = [(topics.REPLIES.name, p) for p in self._answers]
        self._reader.assign({w: self._reader.bounds(*w)[1] for w in where})
        self._open = True
        self._threads = [threading.Thread(target=self._ask), threading.Thread(target=self._listen)]
        for thread in self._threads:
            thread.start()
        until(lambda: all(self._answers.values()), "answers of all partitions", pause_s=0.02)

    def now(self) -> float:
        """The clock of the answers, s."""
        return time.monotonic()

    def longest(self, partition: int, since: float = 0.0) -> float:
        """The longest time without an answer, s; it began after `since`, or was under way then."""
        times = self._answers[partition]
        gaps = [b - max(a, since) for a, b in pairwise(times) if b > since]
        return max(gaps)

    def close(self) -> None:
        """Stop asking."""
        self._open = False
        for thread in self._threads:
            thread.join()
        self._producer.close()
        self._reader.close()

    def _ask(self) -> None:
        while self._open:
            for partition in self._answers:
                ask = commands.FindTasks(command_id=ids.new_id(), prefix="no-such-task", reply_to="gaps")
                self._producer.append(topics.COMMANDS.name, partition, None, codec.encode(ask))
            time.sleep(_ASK_S)

    def _listen(self) -> None:
        while self._open:
            for record in self._reader.read(1_000, 0.2):
                self._answers[record.partition].append(self.now())
