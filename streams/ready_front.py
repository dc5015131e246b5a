"""The first places of a ready scope, held in memory: a grant takes the first one, however many wait behind.

What is held follows the rows and never says anything they do not. It is short, so a partition with a million waiting
tasks neither reads them all before its first grant nor keeps them in memory.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from itertools import islice

PLACES = 1_000
"""Places read from the store at once. When twice as many are held, the later half is left to the store again."""


class ReadyFront:
    """Every place of one scope up to `end`, or (None) all there are."""

    def __init__(self, rest: Iterable[tuple[bytes, str]]) -> None:
        """`rest`: (place, task id) in order, from where the front begins."""
        self._tasks = dict(islice(rest, PLACES))
        self._places = list(self._tasks)
        self.end = self._places[-1] if len(self._places) == PLACES else None

    def first(self) -> tuple[bytes, str] | None:
        """(place, task id), or None if nothing is held."""
        return (self._places[0], self._tasks[self._places[0]]) if self._places else None

    def add(self, place: bytes, task_id: str) -> None:
        """The row of a place has been set."""
        if self.end is not None and place > self.end:
            return
        if place not in self._tasks:
            insort(self._places, place)
        self._tasks[place] = task_id
        if len(self._places) >= 2 * PLACES:
            for later in self._places[PLACES:]:
                del self._tasks[later]
            del self._places[PLACES:]
            self.end = self._places[-1]

    def remove(self, place: bytes) -> None:
        """The row of a place is gone."""
        if self._tasks.pop(place, None) is not None:
            del self._places[bisect_left(self._places, place)]
