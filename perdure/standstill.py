"""Which partitions a group reads no further in, though there is something for it to read.

How far a group is behind says nothing of a small backlog that nobody works on. A position that does not move says
nothing either: behind it there may be marks of transactions alone. So who stands still for long is read after.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from perdure.streams.log import STILL_S, Log, TopicPartition

_READ_AT_ONCE = 1_000
_LOOK_S = 3.0


@dataclass
class _Seen:
    """What is known of a partition."""

    position: int
    end: int
    read_to: int
    """Offset before which there is nothing that the group has not read."""
    since: float
    """When the group had read everything last, or has moved last."""


class Standstill:
    """Follows one group from measurement to measurement. Not thread-safe."""

    def __init__(self, log: Log, *, committed: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        """`committed`: whether the group reads committed records alone. `clock`: seconds."""
        self._log, self._committed, self._clock = log, committed, clock
        self._seen: dict[TopicPartition, _Seen] = {}
        self._undecided: set[TopicPartition] = set()
        """Those that were not read to their ends in time when they were looked at last."""

    def found(self, measured: Mapping[TopicPartition, tuple[int, int, int]]) -> list[str]:
        """The partitions where it has stood still for 90 s with something to read, in words, and those that have lost
        their ends.

        `measured`: partition -> (the group's position, the log's first offset, its end with what is not committed).
        Reads those in doubt, for 3 s at the most: what cannot be read twice in a row, as behind a transaction that
        hangs, the group cannot read either. Raises `InfrastructureError`.
        """
        now = self._clock()
        for where, (position, first, end) in measured.items():
            seen = self._seen.get(where)
            if seen is None or seen.position != position:
                seen = self._seen[where] = _Seen(position, end, position, now)
            elif seen.end <= seen.read_to:
                seen.since = now
            seen.end, seen.read_to = end, max(first, seen.read_to)
        late = {w: s for w, s in self._seen.items() if s.end > s.read_to and now - s.since >= STILL_S}
        unread = self._unread(late)
        for where, seen in late.items():
            if where not in unread | self._undecided:
                seen.read_to = seen.end
        still = [(where, late[where]) for where in sorted(unread)]
        gone = [(where, seen) for where, seen in sorted(self._seen.items()) if seen.position > seen.end]
        return [f"{t}/{p} stands still at {seen.position:,} of {seen.end:,}" for (t, p), seen in still] + [
            f"{t}/{p} ends at {seen.end:,}, before {seen.position:,}, where the group stands" for (t, p), seen in gone
        ]

    def _unread(self, late: Mapping[TopicPartition, _Seen]) -> set[TopicPartition]:
        """Those that hold a record which the group has not read."""
        left, unread = dict(late), set[TopicPartition]()
        if not late:
            self._undecided = unread
            return unread
        deadline = time.monotonic() + _LOOK_S
        reader = self._log.reader(committed=self._committed)
        try:
            reader.assign({where: seen.read_to for where, seen in late.items()})
            while left and time.monotonic() < deadline:
                for record in reader.read(_READ_AT_ONCE, 0.2):
                    unread.add((record.topic, record.partition))
                left = {w: s for w, s in left.items() if w not in unread and not reader.caught_up(*w, s.end)}
        finally:
            reader.close()
        undecided, self._undecided = self._undecided, set(left)
        return unread | (undecided & self._undecided)
