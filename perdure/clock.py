"""Time, as an attempt sees it."""

from __future__ import annotations

import os
import time
from typing import Protocol


class Clock(Protocol):
    """What tests replace by a clock of their own."""

    def wall_ms(self) -> int:
        """Milliseconds since 1970."""

    def monotonic_ms(self) -> float:
        """Milliseconds since some moment."""

    def cpu_seconds(self) -> float:
        """CPU time used so far by the process and those it waited for; 0 where attempts share one."""


class MachineClock:
    """The machine's own time. `shared`: several attempts run in this process, so its CPU time is nobody's."""

    def __init__(self, *, shared: bool = False) -> None:
        self._shared = shared

    def wall_ms(self) -> int:
        """Milliseconds since 1970."""
        return time.time_ns() // 1_000_000

    def monotonic_ms(self) -> float:
        """Milliseconds since some moment."""
        return time.monotonic_ns() / 1_000_000

    def cpu_seconds(self) -> float:
        """See `Clock`."""
        return 0.0 if self._shared else sum(os.times()[:4])
