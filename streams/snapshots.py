"""Snapshots: copies of a partition's store outside of its host, from which another host starts.

A snapshot is a manifest that names the files of a RocksDB checkpoint by their SHA-256, and where in the log it stands.
Files lie beside the manifests under their digests, so what an older snapshot has is not uploaded again. The manifest is
written last, and what no manifest names is not used: a crash at any point leaves files to collect and nothing else.

    snapshots/<topic id of the changelog>/<partition>/manifests/<changelog offset, 20 digits>-<wall time, ms>.json
    snapshots/<topic id of the changelog>/<partition>/files/<sha256>
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from perdure.schemas.errors import InfrastructureError, NotFound
from perdure.streams import failpoints

FORMAT = 1
KEPT = 2
"""Manifests that are kept: the newest, and one to fall back on should it be damaged."""
GRACE_MS = 3_600_000
"""Age below which a file that no manifest names may belong to an upload under way."""
BYTES_MAX = 1 << 40
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class SnapshotRefused(InfrastructureError):
    """A snapshot cannot be used; the message names it and says why."""

    code = "snapshot_refused"


class Listed(Protocol):
    """What a store tells of a blob; see `connectors.blobs.Blob`."""

    @property
    def name(self) -> str: ...
    @property
    def modified(self) -> int: ...


class BlobStore(Protocol):
    """Where snapshots lie; see `connectors.blobs.Blobs`."""

    def put(self, name: str, data: bytes) -> None: ...
    def get(self, name: str) -> bytes: ...
    def list(self, prefix: str) -> Sequence[Listed]: ...
    def delete(self, name: str) -> None: ...


@dataclass(frozen=True)
class Place:
    """Which state a snapshot is of."""

    kind: str
    partition: int
    changelog_id: str
    """Topic id: a topic that was deleted and created again is another one."""

    @property
    def folder(self) -> str:
        """Where its blobs are."""
        return f"snapshots/{self.changelog_id}/{self.partition}"


@dataclass(frozen=True)
class File:
    """A file of a snapshot."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a snapshot holds, and where it stands."""

    format: int
    place: Place
    changelog_offset: int
    """The state is that of all changelog records before this one."""
    inputs: dict[str, int]
    """Input topic -> next offset, for people and for checks."""
    created_at: int
    """Wall time as of which it has all of the changelog, ms."""
    build: str
    files: list[File]

    @property
    def name(self) -> str:
        """Its blob; newer ones sort after older ones."""
        return f"{self.place.folder}/manifests/{self.changelog_offset:020d}-{self.created_at}.json"


class GivenUp(Exception):
    """Who wanted a snapshot does not want it any more: no error, and no reason to try another one."""


class Snapshots:
    """The snapshots in a blob store. Methods block; for any thread."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    # Taking ----------------------------------------------------------------------------------------------------------

    def upload(self, copy: Path, describe: Callable[[list[File]], Manifest]) -> Manifest:
        """Upload the files of a checkpoint directory that are not there yet, then the manifest that names them all.

        Raises `InfrastructureError`; the snapshots that were there before are as good as ever.
        """
        files: list[tuple[File, Path]] = []
        for path in sorted(copy.iterdir()):
            digest, size = _digest(path)
            files.append((File(path.name, size, digest), path))
        manifest = describe([file for file, _ in files])
        folder = manifest.place.folder
        there = {blob.name for blob in self._blobs.list(f"{folder}/files")}
        for file, path in files:
            if f"{folder}/files/{file.sha256}" not in there:
                self._blobs.put(f"{folder}/files/{file.sha256}", path.read_bytes())
        failpoints.passed("in-checkpoint")
        self._blobs.put(manifest.name, json.dumps(asdict(manifest), separators=(",", ":")).encode())
        return manifest

    def collect(self, place: Place, now: int) -> None:
        """Delete all manifests but the newest `KEPT`, then the files that none of those names and nobody is uploading.

        A manifest that cannot be read is not counted, and keeps nothing alive.
        """
        kept: list[Manifest] = []
        for name in self.names(place):
            try:
                manifest = self._read(name, place)
            except (SnapshotRefused, NotFound):
                continue
            if len(kept) < KEPT:
                kept.append(manifest)
            else:
                self._blobs.delete(name)
        named = {f"{place.folder}/files/{file.sha256}" for manifest in kept for file in manifest.files}
        for blob in self._blobs.list(f"{place.folder}/files"):
            if blob.name not in named and now - blob.modified > GRACE_MS:
                self._blobs.delete(blob.name)

    # Using -----------------------------------------------------------------------------------------------------------

    def names(self, place: Place) -> list[str]:
        """The snapshots of a state, newest first."""
        return sorted((blob.name for blob in self._blobs.list(f"{place.folder}/manifests")), reverse=True)

    def read(self, name: str, place: Place, *, first: int, end: int, oldest: int) -> Manifest:
        """A snapshot's manifest, if the changelog leads on from there: it still holds all records behind it, from
        `first` up to `end`, and no tombstone among them can be gone: it is younger than `oldest` (wall time, ms).

        Raises `SnapshotRefused`, or `NotFound` when it was collected meanwhile.
        """
        manifest = self._read(name, place)
        stands = f"{name} stands at {manifest.changelog_offset}"
        if manifest.created_at < oldest:
            age = (oldest - manifest.created_at) / 3_600_000
            raise SnapshotRefused(
                f"{name} is too old by {age:.1f} h: deletions made since may be gone from the changelog"
            )
        if manifest.changelog_offset < first:
            raise SnapshotRefused(f"{stands}, but the changelog begins at {first}: what lies between is lost")
        if manifest.changelog_offset > end:
            raise SnapshotRefused(f"{stands}, but the changelog ends at {end}: it was truncated, or is another one")
        return manifest

    def download(self, manifest: Manifest, into: Path, go_on: Callable[[], bool] = lambda: True) -> None:
        """Write the files of a snapshot into an empty directory, each checked.

        Raises `SnapshotRefused` for a file that is missing or not what the manifest says, and `GivenUp` when `go_on`,
        which is asked before each file, says no.
        """
        for file in manifest.files:
            if not go_on():
                raise GivenUp
            name = f"{manifest.place.folder}/files/{file.sha256}"
            try:
                data = self._blobs.get(name)
            except NotFound as error:
                raise SnapshotRefused(f"{manifest.name}: its file {file.name} is missing") from error
            if len(data) != file.size or hashlib.sha256(data).hexdigest() != file.sha256:
                raise SnapshotRefused(f"{manifest.name}: its file {file.name} is damaged: {len(data):,} bytes")
            path = into / file.name
            try:
                path.write_bytes(data)
            except OSError as error:
                raise InfrastructureError(f"{path} cannot be written: {error}") from error
            path.chmod(0o600)

    def _read(self, name: str, place: Place) -> Manifest:
        try:
            manifest = _parse(json.loads(self._blobs.get(name)))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SnapshotRefused(f"{name} is no manifest that this build reads: {error}") from error
        if manifest.place != place:
            raise SnapshotRefused(f"{name} is of another state: {manifest.place}")
        if manifest.name != name:
            raise SnapshotRefused(f"{name} was written as {manifest.name}: somebody has moved it")
        return manifest


def _parse(content: Mapping[str, Any]) -> Manifest:
    """Raises `ValueError`, `KeyError` or `TypeError`."""
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']!r}, and this build knows {FORMAT}")
    files = [File(**file) for file in content["files"]]
    manifest = Manifest(**{**content, "place": Place(**content["place"]), "files": files})
    for file in files:
        if not _FILE.fullmatch(file.name) or not _SHA256.fullmatch(file.sha256) or file.size < 0:
            raise ValueError(f"{file} is no file of a snapshot")
    if len({file.name for file in files}) != len(files) or sum(file.size for file in files) > BYTES_MAX:
        raise ValueError("two files of one name, or more than a snapshot ever holds")
    if not isinstance(manifest.changelog_offset, int) or not isinstance(manifest.created_at, int):
        raise ValueError("it says neither when nor where")
    return manifest


def _digest(path: Path) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size
