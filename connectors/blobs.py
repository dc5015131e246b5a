"""Blobs: bytes under names, in a directory or an object store; for snapshots, and for values too large for a record.

A name is a path of parts that hold letters, digits and `._=-` and do not begin with a dot: nothing leads elsewhere.
Two names that differ in case alone are one where a directory's file system takes them so; we use none such.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from perdure.connectors import durable_files
from perdure.schemas.errors import ConfigurationError, InfrastructureError, NotFound, Unreachable

_PART = r"[A-Za-z0-9_=-][A-Za-z0-9._=-]*"
_DRAFT_S = 24 * 3600
_NAME = re.compile(rf"{_PART}(/{_PART})*")


class Blob(NamedTuple):
    """What a listing tells of a blob."""

    name: str
    size: int
    """Bytes."""
    modified: int
    """Wall time of the store, ms."""


class Blobs(Protocol):
    """A store of blobs. All methods block and may be called from any thread.

    They raise `Unreachable` where trying again may help, `ConfigurationError` where a person has to change something
    (no access, no such bucket), and another `InfrastructureError` for an illegal name.
    """

    def put(self, name: str, data: bytes) -> None:
        """Keep `data`, replacing what is there; whole or not at all, and durable from here on."""

    def get(self, name: str) -> bytes:
        """The bytes under a name. Raises `NotFound`."""

    def head(self, name: str, size: int) -> bytes:
        """The first `size` bytes (> 0) under a name, fewer where there are fewer. Raises `NotFound`."""

    def list(self, prefix: str) -> list[Blob]:
        """All blobs below a folder, sorted by name."""

    def delete(self, name: str) -> None:
        """Remove a blob; nothing happens if it is gone."""


def open_blobs(url: str) -> Blobs:
    """The store at a URL: a path, `file:///path`, `s3://bucket/prefix` or `gs://bucket/prefix`.

    Object stores need the extra `s3` or `gcs`, and take keys, region and endpoint from the environment, as obstore
    does (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`, ...). Raises `ConfigurationError`.
    """
    scheme, colon, rest = url.partition("://")
    if not colon:
        return DirectoryBlobs(Path(url))
    if scheme == "file" and rest.startswith("/"):
        return DirectoryBlobs(Path(rest))
    if scheme in ("s3", "gs"):
        try:
            from perdure.connectors.object_blobs import open_bucket
        except ImportError as error:
            extra = {"s3": "s3", "gs": "gcs"}[scheme]
            raise ConfigurationError(f"{url!r} needs an extra: pip install 'perdure[{extra}]'") from error
        return open_bucket(url)
    raise ConfigurationError(
        f"{url!r} is no place for blobs: give a directory, file:///path, s3://bucket/prefix or gs://bucket/prefix"
    )


def checked(name: str) -> str:
    """`name`, if blobs may be called so. Raises `InfrastructureError`."""
    if len(name) > 512 or not _NAME.fullmatch(name):
        raise InfrastructureError(f"{name[:600]!r} is no name of a blob")
    return name


class DirectoryBlobs:
    """A directory (0700) with a file (0600) for each blob. Only regular files that are reached by no link count."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def put(self, name: str, data: bytes) -> None:
        """See `Blobs`."""
        path = self.directory / checked(name)
        try:
            with _told(f"the blob {path} cannot be written"):
                self._make(path.parent)
                durable_files.write(path, data)
        except NotFound as error:  # its folder, or what it was written to at first, was taken away meanwhile
            raise Unreachable(str(error)) from error

    def get(self, name: str) -> bytes:
        """See `Blobs`."""
        return self._read(name, -1)

    def head(self, name: str, size: int) -> bytes:
        """See `Blobs`."""
        return self._read(name, size)

    def list(self, prefix: str) -> list[Blob]:
        """See `Blobs`."""
        top = self.directory / checked(prefix)
        with _told(f"the blobs below {top} cannot be listed"):
            return sorted(self._below(top))

    def delete(self, name: str) -> None:
        """See `Blobs`."""
        path = self.directory / checked(name)
        with _told(f"the blob {path} cannot be deleted"):
            path.unlink(missing_ok=True)

    def _read(self, name: str, size: int) -> bytes:
        path = self.directory / checked(name)
        try:
            with _told(f"the blob {path} cannot be read"), open(path, "rb", opener=_no_link) as file:
                return file.read(size)
        except NotFound as error:
            if self.directory.is_dir():
                raise
            raise Unreachable(f"{error}: {self.directory} itself is not there; is it mounted?") from error

    def _below(self, folder: Path) -> Iterator[Blob]:
        """All but what a crash has left unfinished, which goes a day later, and what is deleted meanwhile."""
        try:
            entries = list(os.scandir(folder))
        except FileNotFoundError:
            return
        for entry in entries:
            path = folder / entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from self._below(path)
            elif entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):
                    about = entry.stat(follow_symlinks=False)
                    if entry.name.startswith("."):
                        if entry.name.startswith(durable_files.DRAFT) and time.time() - about.st_mtime > _DRAFT_S:
                            with suppress(OSError):  # it may be somebody else's to delete
                                path.unlink()
                        continue
                    name = path.relative_to(self.directory).as_posix()
                    yield Blob(name, about.st_size, about.st_mtime_ns // 1_000_000)

    def _make(self, folder: Path) -> None:
        if folder.is_dir():
            return
        if folder != self.directory:
            self._make(folder.parent)
            folder.mkdir(mode=0o700, exist_ok=True)
            durable_files.sync_directory(folder.parent)
        else:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """An `OSError` as the error that says what it means."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"{what}: it is missing; is the store shared by all hosts?") from error
    except OSError as error:
        raise durable_files.kind_of(error)(f"{what}: {error.strerror or error}") from error


class MemoryBlobs:
    """Keeps blobs in this process, for tests of tasks."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[bytes, int]] = {}

    def put(self, name: str, data: bytes) -> None:
        """See `Blobs`."""
        self._kept[checked(name)] = data, time.time_ns() // 1_000_000

    def get(self, name: str) -> bytes:
        """See `Blobs`."""
        if checked(name) not in self._kept:
            raise NotFound(f"the blob {name} is missing")
        return self._kept[name][0]

    def head(self, name: str, size: int) -> bytes:
        """See `Blobs`."""
        return self.get(name)[:size]

    def list(self, prefix: str) -> list[Blob]:
        """See `Blobs`."""
        folder = checked(prefix) + "/"
        kept = sorted(self._kept.items())
        return [Blob(name, len(data), at) for name, (data, at) in kept if name.startswith(folder)]

    def delete(self, name: str) -> None:
        """See `Blobs`."""
        self._kept.pop(checked(name), None)
