"""What every peer's tasks do: the same for all, and nothing but the standard library, for it runs in each peer's own
environment."""

from __future__ import annotations

import os
import time

SLOW_S = 0.2


def now() -> int:
    """The wall clock, ns; the same for all processes of a machine."""
    return time.time_ns()


def slow_step(number: int, witness: str) -> int:
    """A step of 0.2 s that leaves a line in the witness when it begins."""
    with open(witness, "a") as out:
        out.write(f"{now()} {os.getpid()} {number}\n")
    time.sleep(SLOW_S)
    return number
