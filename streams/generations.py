"""A partition's stores on this host: numbered directories, of which the newest sound one is used.

A store that is damaged, or that a former owner still holds, is neither repaired nor waited for: a fresh generation
takes its place, and recovery fills it.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from perdure.streams.store import RocksStore, StoreDamaged, StoreLocked, destroy, is_damaged

LOCK_WAIT_S = 3.0
"""How long a former owner on this host may take to let go of a store."""
_DRAFT = "draft-"
_SOURCE = "source"
LOG = logging.getLogger("perdure")


class Generations:
    """The generations below one directory. For one thread at a time; other processes may use the same directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def open(self) -> RocksStore | None:
        """The newest generation; None if there is none, or it is damaged or still held after `LOCK_WAIT_S`."""
        numbers = self._numbers()
        if not numbers or is_damaged(self._path(numbers[-1])):
            return None
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                return RocksStore(self._path(numbers[-1]))
            except StoreDamaged as error:
                LOG.warning("%s", error)
                return None
            except StoreLocked as error:
                if time.monotonic() > deadline:
                    LOG.warning("%s; a new one is made", error)
                    return None
                time.sleep(0.05)

    def begin(self) -> RocksStore:
        """An empty store of a new generation."""
        return RocksStore(self._next())

    def draft(self) -> Path:
        """An empty directory, for the files of a generation to come. Those of interrupted recoveries go."""
        for old in self.directory.glob(f"{_DRAFT}*"):
            shutil.rmtree(old, ignore_errors=True)
        made = self.directory / f"{_DRAFT}{time.monotonic_ns()}"
        made.mkdir(mode=0o700)
        return made

    def adopt(self, draft: Path, sources: Iterable[str] = ()) -> RocksStore:
        """The store in a draft, as a new generation. `sources`: the snapshot that it is made of, and those that were
        disproved before; see `disproved`.

        Raises `StoreDamaged` if RocksDB does not open it.
        """
        path = self._next()
        (draft / _SOURCE).write_text("\n".join(sources))
        draft.rename(path)
        return RocksStore(path)

    def disproved(self) -> set[str]:
        """Snapshots of which a store was made here that was found damaged: what they hold had been damaged before."""
        sources = [self._path(n) / _SOURCE for n in self._numbers() if is_damaged(self._path(n))]
        return {name for source in sources if source.exists() for name in source.read_text().split()}

    def tidy(self, current: RocksStore) -> None:
        """Delete the generations before the one in use, but for those that somebody still has open."""
        for number in self._numbers():
            path = self._path(number)
            if path != current.path:
                try:
                    destroy(path)
                except StoreLocked:
                    continue  # its owner is being replaced; a later start deletes it

    def _next(self) -> Path:
        return self._path((self._numbers() or [-1])[-1] + 1)

    def _numbers(self) -> list[int]:
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def _path(self, number: int) -> Path:
        return self.directory / str(number)
