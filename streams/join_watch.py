"""How long a member waits to be taken in by its group: said when it takes longer than any rebalance should."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_SAY_S = 20.0
"""Two sessions: by then the others have given up what they had, or were put out."""
LOG = logging.getLogger("perdure")


class JoinWatch:
    """Watches one member of a group, from its beginning on."""

    def __init__(self, group: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._group, self._clock = group, clock
        self._since: float | None = clock()
        self._said = clock()

    def outside(self) -> None:
        """The member belongs to no generation of its group."""
        if self._since is None:
            self._since = self._said = self._clock()

    def inside(self) -> None:
        """The group has dealt out its partitions; this member may have got none."""
        self._since = None

    def look(self) -> bool:
        """Say so, now and then, while the group does not answer; True if so: a new member may fare better."""
        now = self._clock()
        if self._since is not None and now - self._said >= _SAY_S:
            self._said = now
            LOG.warning(
                f"{self._group}: the group has not taken this member in for {now - self._since:.0f} s, so nothing is "
                f"executed here. Either no broker answers, or the group's coordinator does not: if its log says "
                f"`Failed to load metadata from __consumer_offsets`, or that a coordinator's state machine is `out of "
                f"sync`, restart that broker"
            )
            return True
        return False
