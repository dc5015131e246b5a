"""Whether new tasks are let in: not while what was let in before is far from being worked through.

The HTTP API asks before each submit, a client on Kafka once it has made many. A command that is in the log is accepted,
whoever wrote it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from perdure.schemas import topics
from perdure.schemas.errors import Busy, Unreachable
from perdure.streams.log import Log

BUSY_LAG = 100_000
"""Records behind which nothing new is let in: some ten seconds of work for one partition's engine."""
RETRY_AFTER_S = 5
"""When to ask again: lags are measured as often."""
FREE_SUBMITS = 10_000
"""So many submits a client makes before it looks how far the engine is: to look takes longer than a submit."""
_COUNTED = frozenset({topics.COMMANDS.name, topics.EVENTS.name, topics.PROGRESS.name})
"""What a submit adds to. Logs and metrics, however many, turn nobody away."""


def admit(lags: Mapping[str, Mapping[str, int]]) -> None:
    """Let a submit in. `lags`: reader -> topic -> records still to be read. Raises `Busy`."""
    for reader, behind in lags.items():
        for topic in _COUNTED & behind.keys():
            if behind[topic] > BUSY_LAG:
                raise Busy(
                    f"{reader} is {behind[topic]:,} records behind in {topic}: submit again in {RETRY_AFTER_S} s",
                    retry_after=RETRY_AFTER_S,
                )


class Admission:
    """Admission for a client that has no one to ask but the log: it looks at the engine's lag itself; thread-safe."""

    def __init__(self, log: Log, monotonic: Callable[[], float]) -> None:
        self._log, self._monotonic = log, monotonic
        self._lock = threading.Lock()
        self._submits = 0
        self._looked_at = float("-inf")
        self._lag = 0

    def admit_submit(self) -> None:
        """Let a submit in. Of every 10,000 one blocks for the look, some 100 ms, but none within 5 s of the last.

        Raises `Busy`. A log that does not tell turns nobody away: the append itself shows whether it works.
        """
        with self._lock:
            self._submits += 1
            waits = self._lag > BUSY_LAG
            if (waits or self._submits >= FREE_SUBMITS) and self._monotonic() - self._looked_at >= RETRY_AFTER_S:
                self._lag, self._submits = self._measured(), 0
                self._looked_at = self._monotonic()
            admit({topics.ENGINE_GROUP: {topics.COMMANDS.name: self._lag}})

    def _measured(self) -> int:
        """Commands that no engine has executed yet."""
        wheres = [(topics.COMMANDS.name, p) for p in range(self._log.partitions)]
        reader = self._log.reader()
        try:
            done = self._log.committed(topics.ENGINE_GROUP, wheres)
            bounds = {where: reader.bounds(*where) for where in wheres}
        except Unreachable:
            return 0
        finally:
            reader.close()
        return sum(max(0, end - max(first, done[where] or 0)) for where, (first, end) in bounds.items())
