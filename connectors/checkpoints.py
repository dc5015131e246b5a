"""Where checkpoints are kept: bytes under a task and a version, verified by their SHA-256 when they are read.

A store knows nothing of what a checkpoint holds. `pack` and `unpack` are the format: a header with a version number,
then JSON text compressed with zstandard.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from pathlib import Path
from typing import NamedTuple, Protocol

import zstandard

from perdure.connectors import durable_files
from perdure.schemas.errors import InfrastructureError, NotFound

LOCAL = "local"
"""Name of the store that every worker has, and its default."""
HEADER = b"PDRC\x01"
KEPT = 3
"""Versions that `prune` leaves: the newest, and two to roll back to."""

_DRAFT = ".draft-"
_URI = re.compile(r"local:([0-9a-f]{64})/(\d{12}-[0-9a-f]{64})")


class Saved(NamedTuple):
    """A checkpoint that is in its store, whole and synced."""

    uri: str
    sha256: str
    size: int


class Kept(NamedTuple):
    """A checkpoint that a store holds."""

    version: int
    uri: str


class CheckpointStore(Protocol):
    """Keeps checkpoints. All methods block, may be called from any thread, and raise `InfrastructureError`."""

    def save(self, task_id: str, version: int, data: bytes) -> Saved:
        """Keep `data`; it survives a crash of the machine from here on. Saving the same bytes again is harmless, and
        other bytes under the same version (a stale attempt's) live beside them.
        """

    def load(self, uri: str, sha256: str) -> bytes:
        """The bytes saved under `uri`.

        Raises `Unreachable` where trying again may help, `NotFound`, or `InfrastructureError` for another digest.
        """

    def list(self, task_id: str) -> list[Kept]:
        """What the store holds of a task, oldest version first."""

    def delete(self, uri: str) -> None:
        """Remove one checkpoint; nothing happens if it is gone."""


def prune(store: CheckpointStore, task_id: str, recorded: int) -> None:
    """Delete what the recorded version `recorded` has made unnecessary: all but the `KEPT` newest up to it.

    Recorded is what the engine says is. A report that is in the log may come after the end of its grant; then the next
    one resumes from the version before it. Versions count without gaps, so these are the newest recorded ones;
    leftovers of stale attempts go with theirs.
    """
    for kept in store.list(task_id):
        if kept.version <= recorded - KEPT:
            store.delete(kept.uri)


def pack(*text: bytes) -> bytes:
    """JSON text, given in parts, as a store keeps it."""
    compressor = zstandard.ZstdCompressor(level=3).compressobj(size=sum(map(len, text)))
    return b"".join((HEADER, *map(compressor.compress, text), compressor.flush()))


def unpack(data: bytes) -> bytes:
    """The JSON text in a checkpoint. Raises `InfrastructureError` for bytes of another format."""
    if not data.startswith(HEADER):
        raise InfrastructureError(
            f"no checkpoint of a format this build reads: begins with {data[:5].hex() or 'nothing'}"
        )
    try:
        return zstandard.ZstdDecompressor().decompress(data[len(HEADER) :])
    except zstandard.ZstdError as error:
        raise InfrastructureError(f"a checkpoint cannot be decompressed: {error}") from error


def store_id(directory: Path) -> str:
    """The random id of a directory of checkpoints, made at the first call; hosts that read the same share it.

    Raises `InfrastructureError`.
    """
    path = directory / "store-id"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            fresh = directory / f"{_DRAFT}{uuid.uuid4()}"
            fresh.write_text(f"{uuid.uuid4()}\n")
            try:
                os.link(fresh, path)  # of several hosts that try, the first one wins
            except FileExistsError:
                pass
            finally:
                fresh.unlink()
        return path.read_text().strip()
    except OSError as error:
        raise InfrastructureError(f"the checkpoint directory {directory} is unusable: {error}") from error


class LocalCheckpoints:
    """A directory (0700), with a folder for each task and a file (0600) for each checkpoint.

    Folders are named by the SHA-256 of the task id, files by version and content, so no id can lead elsewhere and no
    stale attempt can overwrite what was recorded.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def save(self, task_id: str, version: int, data: bytes) -> Saved:
        """See `CheckpointStore`."""
        digest = hashlib.sha256(data).hexdigest()
        folder = self._folder(task_id)
        path = folder / f"{version:012d}-{digest}"
        try:
            if not folder.is_dir():
                self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                folder.mkdir(mode=0o700, exist_ok=True)
                durable_files.sync_directory(self.directory)
            _clear_drafts(folder, version)
            durable_files.write(path, data, f"{_DRAFT}{version:012d}-")
        except OSError as error:
            raise InfrastructureError(f"the checkpoint {path} cannot be written: {error}") from error
        return Saved(f"local:{folder.name}/{path.name}", digest, len(data))

    def load(self, uri: str, sha256: str) -> bytes:
        """See `CheckpointStore`."""
        path = self._path(uri)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise NotFound(f"the checkpoint {path} is missing; was it saved on another machine, or deleted?") from error
        except OSError as error:
            raise durable_files.kind_of(error)(f"the checkpoint {path} cannot be read: {error}") from error
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise InfrastructureError(
                f"the checkpoint {path} is damaged: its SHA-256 is {found}, recorded was {sha256}; "
                "restore the file or roll the task back to an older checkpoint"
            )
        return data

    def list(self, task_id: str) -> list[Kept]:
        """See `CheckpointStore`."""
        folder = self._folder(task_id)
        try:
            uris = sorted(f"local:{folder.name}/{name}" for name in os.listdir(folder))
        except FileNotFoundError:
            return []
        return [Kept(int(found[2][:12]), uri) for uri in uris if (found := _URI.fullmatch(uri))]

    def delete(self, uri: str) -> None:
        """See `CheckpointStore`."""
        path = self._path(uri)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise InfrastructureError(f"the checkpoint {path} cannot be deleted: {error}") from error

    def _folder(self, task_id: str) -> Path:
        return self.directory / hashlib.sha256(task_id.encode("utf-8", "surrogatepass")).hexdigest()

    def _path(self, uri: str) -> Path:
        found = _URI.fullmatch(uri)
        if found is None:
            raise InfrastructureError(f"{uri!r} is no checkpoint of the local store in {self.directory}")
        return self.directory / found[1] / found[2]


class MemoryCheckpoints:
    """Keeps checkpoints in this process, for tests of tasks."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[str, int, bytes]] = {}

    def save(self, task_id: str, version: int, data: bytes) -> Saved:
        """See `CheckpointStore`."""
        digest = hashlib.sha256(data).hexdigest()
        uri = f"memory:{hashlib.sha256(task_id.encode()).hexdigest()}/{version:012d}-{digest}"
        self._kept[uri] = (task_id, version, data)
        return Saved(uri, digest, len(data))

    def load(self, uri: str, sha256: str) -> bytes:
        """See `CheckpointStore`."""
        if uri not in self._kept:
            raise NotFound(f"the checkpoint {uri} is missing")
        data = self._kept[uri][2]
        if hashlib.sha256(data).hexdigest() != sha256:
            raise InfrastructureError(f"the checkpoint {uri} is damaged: its SHA-256 is not {sha256}")
        return data

    def list(self, task_id: str) -> list[Kept]:
        """See `CheckpointStore`."""
        return sorted(Kept(version, uri) for uri, (owner, version, _) in self._kept.items() if owner == task_id)

    def delete(self, uri: str) -> None:
        """See `CheckpointStore`."""
        self._kept.pop(uri, None)


def _clear_drafts(folder: Path, version: int) -> None:
    """Remove what attempts that died while writing an older version left behind."""
    for draft in folder.glob(f"{_DRAFT}*"):
        if int(draft.name[len(_DRAFT) :][:12]) < version:
            draft.unlink(missing_ok=True)
