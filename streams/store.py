"""Where a processor's rows are kept between transactions: RocksDB, or a dictionary for tests and simulation.

A store holds committed data only. `apply` writes rows and positions in one atomic batch, so what survives a crash is
always the state after some transaction; a lost tail is read again from the changelog.
"""

from __future__ import annotations

import shutil
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from rocksdict import AccessType, BlockBasedOptions, Cache, Checkpoint, Options, Rdict, WriteBatch

from perdure.schemas.errors import InfrastructureError

META = b"\xff"
"""Prefix of keys that are the store's own: never in a changelog, never seen by a scan."""


class Store(Protocol):
    """Bytes to bytes, ordered."""

    def get(self, key: bytes) -> bytes | None:
        """The value, or None."""

    def scan(self, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Keys that begin with `prefix` and are >= `prefix + start`, in order, with their values."""

    def apply(self, writes: Mapping[bytes, bytes | None]) -> None:
        """Write (None: delete) all at once."""

    def close(self) -> None:
        """Let go of files and locks."""


class MemoryStore:
    """A store in memory. `crash()` of a process is simply a new runner on the same store."""

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}
        self._order: list[bytes] = []

    def get(self, key: bytes) -> bytes | None:
        return self._values.get(key)

    def scan(self, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        at = bisect_left(self._order, prefix + start)
        while at < len(self._order) and (key := self._order[at]).startswith(prefix):
            yield key, self._values[key]
            at += 1

    def apply(self, writes: Mapping[bytes, bytes | None]) -> None:
        for key, value in writes.items():
            known = key in self._values
            if value is None:
                if known:
                    del self._values[key]
                    del self._order[bisect_left(self._order, key)]
                continue
            if not known:
                insort(self._order, key)
            self._values[key] = value

    def close(self) -> None:
        pass


class StoreDamaged(InfrastructureError):
    """A store's files are not what was written; it is marked, never opened again, and rebuilt from the log."""

    code = "store_damaged"


class StoreLocked(InfrastructureError):
    """A store is open elsewhere."""

    code = "store_locked"


class RocksStore:
    """A store in a RocksDB directory. One opener at a time; a second one is refused.

    The write-ahead log is on and not synced: a killed process loses nothing, a power cut a tail (RocksDB's no-hole
    guarantee), which the changelog brings back.
    """

    def __init__(self, path: Path) -> None:
        """Raises `StoreLocked`, `StoreDamaged` or another `InfrastructureError`."""
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = path
        if is_damaged(path):
            raise StoreDamaged(f"the store {path} was found damaged before")
        with self._sound("opened"):
            self._db = Rdict(str(path), options=_options(), access_type=AccessType.read_write())

    def get(self, key: bytes) -> bytes | None:
        try:
            value: bytes | None = self._db.get(key)
        except Exception as error:
            raise self._failed("read", error) from error
        return value

    def scan(self, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        with self._sound("read"):
            cursor = self._db.iter()
            cursor.seek(prefix + start)
            while cursor.valid():
                key = cursor.key()
                if not key.startswith(prefix):
                    return
                yield key, cursor.value()
                cursor.next()
            cursor.status()  # a block that cannot be read ends an iterator without a word: this raises it

    def apply(self, writes: Mapping[bytes, bytes | None]) -> None:
        batch = WriteBatch(raw_mode=True)
        for key, value in writes.items():
            if value is None:
                batch.delete(key)
            else:
                batch.put(key, value)
        with self._sound("written"):
            self._db.write(batch)

    def copy_to(self, path: Path) -> None:
        """Make a copy of the store as it is now, by links to its files; `path` must not exist. Takes milliseconds to
        write what is in memory. Raises `InfrastructureError`.
        """
        try:
            Checkpoint(self._db).create_checkpoint(str(path))
        except Exception as error:  # a target that is there already is an "invalid argument", and no damage
            raise InfrastructureError(f"the store {self.path} cannot be copied to {path}: {error}") from error

    def close(self) -> None:
        with self._sound("closed"):
            self._db.close()

    @contextmanager
    def _sound(self, doing: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # rocksdict raises bare Exception for everything
            raise self._failed(doing, error) from error

    def _failed(self, doing: str, error: Exception) -> InfrastructureError:
        text = f"the store {self.path} cannot be {doing}: {error}"
        if _is_locked(error):
            return StoreLocked(text)
        if any(words in str(error).lower() for words in _DAMAGE):
            with suppress(OSError):  # of a disk that takes no more writes; the same error comes with the next start
                (self.path / _DAMAGED).touch()
            return StoreDamaged(f"{text}. It is not used again: the next start rebuilds it from snapshot or changelog")
        return InfrastructureError(text)


def is_damaged(path: Path) -> bool:
    """Whether a store's directory was found damaged."""
    return (path / _DAMAGED).exists()


def destroy(path: Path) -> None:
    """Delete a store's directory. Raises `StoreLocked` while it is open anywhere."""
    try:
        Rdict.destroy(str(path), _options())
    except Exception as error:
        if _is_locked(error):
            raise StoreLocked(f"the store {path} is open: {error}") from error
        raise InfrastructureError(f"the store {path} cannot be deleted: {error}") from error
    shutil.rmtree(path, ignore_errors=True)


def _is_locked(error: Exception) -> bool:
    """In RocksDB's words: a path, and a damaged block, have a lock in them too."""
    text = str(error).lower()
    return "while lock file" in text or "lock hold by" in text


_DAMAGED = "damaged"
_DAMAGE = ("corruption", "invalid argument", "input/output error")
"""RocksDB's words for what another store on the same host may not have: bad content, and a bad sector."""


def _options() -> Options:
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_size(16 * 1024 * 1024)
    options.set_max_write_buffer_number(3)
    options.set_max_open_files(256)
    options.set_keep_log_file_num(2)
    options.set_max_log_file_size(1024 * 1024)
    # Most reads ask for what is not there, as a task that is being submitted: 1.8 instead of 18 us at 300,000 rows.
    table = BlockBasedOptions()
    table.set_bloom_filter(10, False)
    table.set_block_cache(_CACHE)
    options.set_block_based_table_factory(table)
    options.set_memtable_prefix_bloom_ratio(0.1)
    options.set_memtable_whole_key_filtering(True)
    return options


_CACHE = Cache(64 * 1024 * 1024)
"""Blocks of all stores of this process."""
