"""Where a processor's rows are kept between transactions: RocksDB, or a dictionary for tests and simulation.

A store holds committed data only. `apply` writes rows and positions in one atomic batch, so what survives a crash is
always the state after some transaction; a lost tail is read again from the changelog.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from rocksdict import AccessType, Options, Rdict, WriteBatch

from perdure.schemas.errors import ConfigurationError, InfrastructureError

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


class RocksStore:
    """A store in a RocksDB directory. One opener at a time; a second one is refused.

    The write-ahead log is on and not synced: a killed process loses nothing, a power cut a tail (RocksDB's no-hole
    guarantee), which the changelog brings back.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = path
        try:
            self._db = Rdict(str(path), options=_options(), access_type=AccessType.read_write())
        except Exception as error:  # rocksdict raises bare Exception for everything
            if "lock" in str(error).lower():
                raise ConfigurationError(f"the store {path} is open in another process: {error}") from error
            raise InfrastructureError(f"the store {path} cannot be opened: {error}") from error

    def get(self, key: bytes) -> bytes | None:
        value: bytes | None = self._db.get(key)
        return value

    def scan(self, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        cursor = self._db.iter()
        cursor.seek(prefix + start)
        while cursor.valid():
            key = cursor.key()
            if not key.startswith(prefix):
                return
            yield key, cursor.value()
            cursor.next()

    def apply(self, writes: Mapping[bytes, bytes | None]) -> None:
        batch = WriteBatch(raw_mode=True)
        for key, value in writes.items():
            if value is None:
                batch.delete(key)
            else:
                batch.put(key, value)
        self._db.write(batch)

    def close(self) -> None:
        self._db.close()


def _options() -> Options:
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_size(16 * 1024 * 1024)
    options.set_max_write_buffer_number(3)
    options.set_max_open_files(256)
    options.set_keep_log_file_num(2)
    options.set_max_log_file_size(1024 * 1024)
    return options
