"""Whether new tasks are let in: not while what was let in before is far from being worked through.

Only who comes by the HTTP API can be turned away here. A command that is in the log is accepted, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping

from perdure.schemas import topics
from perdure.schemas.errors import Busy

BUSY_LAG = 100_000
"""Records behind which nothing new is let in: some ten seconds of work for one partition's engine."""
RETRY_AFTER_S = 5
"""When to ask again: lags are measured as often."""
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
