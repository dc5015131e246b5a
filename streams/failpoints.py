"""Named points at which an engine process can be made to die or to stand still, for tests of recovery.

    PERDURE_FAILPOINTS="after-produce=kill:0.01,in-commit=stop"

`kill` is SIGKILL at the point, with the given probability (1 if none is given) each time it is passed; `stop` is
SIGSTOP, once in the life of the process. Decided when this module is imported; without the variable a point is a call
of a function that does nothing.
"""

from __future__ import annotations

import os
import random
import re
import signal
import threading
from collections.abc import Callable
from typing import NamedTuple

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
_ACTION = re.compile(r"([a-z-]+)=(kill|stop)(?::(0?\.\d+|[01]))?")
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
_COMMIT_S = 0.005
"""A commit on a broker nearby takes about as long."""


class Armed(NamedTuple):
    """What happens at a point, and with which probability."""

    action: str
    probability: float


def parse(text: str) -> dict[str, Armed]:
    """What is armed, by point. Raises `ConfigurationError` for what is no point or no action."""
    armed: dict[str, Armed] = {}
    for part in filter(None, text.split(",")):
        found = _ACTION.fullmatch(part.strip())
        if found is None or found[1] not in POINTS:
            raise ConfigurationError(
                f"{VARIABLE}: {part!r} is not POINT=kill, POINT=stop or either with :PROBABILITY; "
                f"the points are {', '.join(POINTS)}"
            )
        armed[found[1]] = Armed(found[2], float(found[3] or 1))
    return armed


_armed = parse(os.environ.get(VARIABLE, ""))


def _act(action: str) -> None:
    os.kill(os.getpid(), _SIGNALS[action])


def _due(point: str) -> str | None:
    """The action, if it is to be taken now."""
    armed = _armed.get(point)
    if armed is None or random.random() >= armed.probability:
        return None
    if armed.action == "stop":
        del _armed[point]
    return armed.action


def _passed(point: str) -> None:
    if (action := _due(point)) is not None:
        _act(action)


def _entered(point: str) -> None:
    if (action := _due(point)) is not None:
        threading.Timer(random.uniform(0.0, _COMMIT_S), _act, (action,)).start()


def _off(point: str) -> None:
    pass


passed: Callable[[str], None] = _passed if _armed else _off
"""The process is at a point."""
entered: Callable[[str], None] = _entered if _armed else _off
"""The process begins what is named: it dies, or stops, at some moment of the next milliseconds; the caller goes on."""
