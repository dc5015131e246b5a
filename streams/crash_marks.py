"""Which record was being executed when the process died: a few mapped bytes, written around just that work.

A mapped file keeps what a killed process wrote last, without a system call per record. A record that was being
executed at three deaths in a row is taken for the cause; kills from outside hit the marked moment by chance only.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from perdure.schemas import limits

_NONE = -1
_LAYOUT = struct.Struct("<qqq")
"""Mark of the record being executed (-1: none), the suspected one, its deaths."""


class CrashMarks:
    """The marks of one partition. A mark is a number that no other record of the partition has, whatever its topic."""

    def __init__(self, path: Path) -> None:
        if not path.exists() or path.stat().st_size != _LAYOUT.size:
            path.write_bytes(_LAYOUT.pack(_NONE, _NONE, 0))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _LAYOUT.size)
        running, suspect, deaths = _LAYOUT.unpack_from(self._map)
        if running != _NONE:
            suspect, deaths = running, deaths + 1 if running == suspect else 1
            _LAYOUT.pack_into(self._map, 0, _NONE, suspect, deaths)
        self._suspect: int = suspect
        self._deaths: int = deaths

    def is_killer(self, mark: int) -> bool:
        """Whether executing this record has ended the process too often."""
        return mark == self._suspect and self._deaths >= limits.KILLER_DEATHS

    def enter(self, mark: int) -> None:
        """Executing begins."""
        struct.pack_into("<q", self._map, 0, mark)

    def leave(self) -> None:
        """Executing has ended."""
        struct.pack_into("<q", self._map, 0, _NONE)

    def close(self) -> None:
        """Let go of the file."""
        self._map.close()
