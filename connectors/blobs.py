"""Blobs: bytes under names, in a directory or an object store; for snapshots, and for values too large for a record.

A name is a path of parts that hold letters, digits and `._=-` and do not begin with a dot: nothing leads elsewhere.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple, Protocol

from perdure.connectors import durable_files
from perdure.schemas.errors import ConfigurationError, InfrastructureError, NotFound

_PART = r"[A-Za-z0-9_=-][A-Za-z0-9._=-]*"
_NAME = re.compile(rf"{_PART}(/{_PART})*")


class Blob(NamedTuple):
    """What a listing tells of a blob."""

    name: str
    size: int
    """Bytes."""
    modified: int
    """Wall time of the store, ms."""


class Blobs(Protocol):
    """A store of blobs. All methods block, may be called from any thread, and raise `InfrastructureError`."""

    def put(self, name: str, data: bytes) -> None:
        """Keep `data`, replacing what is there; whole or not at all, and durable from here on."""

    def get(self, name: str) -> bytes:
        """The bytes under a name. Raises `NotFound`."""

    def list(self, prefix: str) -> list[Blob]:
        """All blobs below a folder, sorted by name."""

    def delete(self, name: str) -> None:
        """Remove a blob; nothing happens if it is gone."""


def open_blobs(url: str) -> Blobs:
    """The store at a URL: `file:///path` or a path. Raises `ConfigurationError` for any other."""
    scheme, colon, rest = url.partition("://")
    if not colon:
        return DirectoryBlobs(Path(url))
    if scheme == "file" and rest.startswith("/"):
        return DirectoryBlobs(Path(rest))
    raise ConfigurationError(f"{url!r} is no place for blobs: give a directory or file:///path")


def checked(name: str) -> str:
    """`name`, if blobs may be called so. Raises `InfrastructureError`."""
    if len(name) > 512 or not _NAME.fullmatch(name):
        raise InfrastructureError(f"{name[:600]!r} is no name of a blob")
    return name


class DirectoryBlobs:
    """A directory (0700) with a file (0600) for each blob."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def put(self, name: str, data: bytes) -> None:
        """See `Blobs`."""
        path = self.directory / checked(name)
        try:
            self._make(path.parent)
            durable_files.write(path, data)
        except OSError as error:
            raise InfrastructureError(f"the blob {path} cannot be written: {error}") from error

    def get(self, name: str) -> bytes:
        """See `Blobs`."""
        path = self.directory / checked(name)
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            raise NotFound(f"the blob {path} is missing; is the store shared by all hosts?") from error
        except OSError as error:
            raise InfrastructureError(f"the blob {path} cannot be read: {error}") from error

    def list(self, prefix: str) -> list[Blob]:
        """See `Blobs`."""
        found = []
        for path in sorted((self.directory / checked(prefix)).rglob("*")):
            name = path.relative_to(self.directory).as_posix()
            try:
                about = path.lstat()
            except FileNotFoundError:
                continue  # deleted meanwhile
            if path.is_file() and not path.is_symlink() and _NAME.fullmatch(name):
                found.append(Blob(name, about.st_size, about.st_mtime_ns // 1_000_000))
        return found

    def delete(self, name: str) -> None:
        """See `Blobs`."""
        path = self.directory / checked(name)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise InfrastructureError(f"the blob {path} cannot be deleted: {error}") from error

    def _make(self, folder: Path) -> None:
        if folder.is_dir():
            return
        if folder != self.directory:
            self._make(folder.parent)
            folder.mkdir(mode=0o700, exist_ok=True)
            durable_files.sync_directory(folder.parent)
        else:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
