"""How far the restoring of a partition has come: said while it lasts, and refused when it does not get on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_SAY_S = 5.0
_STUCK_S = 180.0
"""A transaction that is left open is ended by the broker after its own timeout: 60 s, where nobody asked for more."""
_log = logging.getLogger("perdure.restore")


class RestoreWatch:
    """Watches one restore, from `begin` to `target` (offsets of `where`)."""

    def __init__(self, where: str, begin: int, target: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._where, self._begin, self._target, self._clock = where, begin, target, clock
        self.position = begin
        """Everything below it that can be read has been read."""
        self._began = self._said = self._advanced = clock()

    def advanced(self, position: int) -> None:
        """Records up to this position have been read."""
        self.position = position
        self._advanced = now = self._clock()
        if now - self._said >= _SAY_S:
            self._said = now
            rate = (position - self._begin) / (now - self._began)
            left = self._target - position
            _log.info(
                f"{self._where}: restored {position - self._begin:,} of {self._target - self._begin:,} records, "
                f"{rate:,.0f} a second, about {left / rate:,.0f} s to go"
            )

    def is_stuck(self) -> bool:
        """Whether nothing has been read for 3 minutes."""
        return self._clock() - self._advanced >= _STUCK_S

    def excuse(self) -> None:
        """Nothing could be read, and the reason is known: the broker is away."""
        self._advanced = self._clock()

    def why_stuck(self, end: int) -> str:
        """For an error: what holds up a restore although the broker answers; `end`: where the topic ends now."""
        standing = (
            f"{self._where}: nothing could be read for {_STUCK_S:.0f} s at offset {self.position:,}, "
            f"{self._target - self.position:,} before the end of the restore, although the broker answers"
        )
        if end < self._target:
            return f"{standing}. The topic ends at {end:,} now, it was truncated meanwhile: start again"
        return (
            f"{standing}: a transaction of another program has been left open there. Find it with "
            f"`kafka-transactions.sh find-hanging` and end it with `kafka-transactions.sh abort`"
        )
