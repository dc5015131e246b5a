"""Named points at which an engine process can be made to die, for tests of recovery.

    PERDURE_FAILPOINTS="after-produce=kill:0.01,in-restore=kill"

`kill` is SIGKILL at the point, with the given probability (1 if none is given) each time it is passed. Decided when
this module is imported; without the variable a point is a call of a function that does nothing.
"""

from __future__ import annotations

import os
import random
import re
import signal
import threading
from collections.abc import Callable

from perdure.schemas.errors import ConfigurationError

VARIABLE = "PERDURE_FAILPOINTS"
POINTS = (
    "before-begin",
    "after-produce",
    "after-offsets",
    "in-commit",
    "after-commit-before-write",
    "in-restore",
    "in-checkpoint",
)
_ACTION = re.compile(r"([a-z-]+)=kill(?::(0?\.\d+|[01]))?")
_COMMIT_S = 0.005
"""A commit on a broker nearby takes about as long."""


def parse(text: str) -> dict[str, float]:
    """Point -> probability of death. Raises `ConfigurationError` for what is no point or no action."""
    armed: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        found = _ACTION.fullmatch(part.strip())
        if found is None or found[1] not in POINTS:
            raise ConfigurationError(
                f"{VARIABLE}: {part!r} is not POINT=kill or POINT=kill:PROBABILITY; the points are {', '.join(POINTS)}"
            )
        armed[found[1]] = float(found[2] or 1)
    return armed


_armed = parse(os.environ.get(VARIABLE, ""))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _is_due(point: str) -> bool:
    return random.random() < _armed.get(point, 0.0)


def _passed(point: str) -> None:
    if _is_due(point):
        _die()


def _entered(point: str) -> None:
    if _is_due(point):
        threading.Timer(random.uniform(0.0, _COMMIT_S), _die).start()


def _off(point: str) -> None:
    pass


passed: Callable[[str], None] = _passed if _armed else _off
"""The process is at a point."""
entered: Callable[[str], None] = _entered if _armed else _off
"""The process begins what is named: it dies at some moment of the next milliseconds, while the caller goes on."""
