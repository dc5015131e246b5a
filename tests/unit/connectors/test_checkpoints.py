"""The local checkpoint store on its disk, and the format of a checkpoint."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from perdure.connectors.checkpoints import LocalCheckpoints, pack, unpack
from perdure.schemas.errors import InfrastructureError, NotFound


def test_only_the_owner_can_read(tmp_path: Path) -> None:
    store = LocalCheckpoints(tmp_path / "a" / "b")
    store.save("etl/1", 1, b"x")
    (folder,) = store.directory.iterdir()
    (file,) = folder.iterdir()
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (store.directory, folder, file)]
    assert modes == [0o700, 0o700, 0o600]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    store = LocalCheckpoints(tmp_path)
    saved = store.save("etl/1", 1, b"x" * 100)
    (file,) = next(tmp_path.iterdir()).iterdir()
    file.write_bytes(b"x" * 99 + b"y")
    with pytest.raises(InfrastructureError, match=f"{file}.*damaged.*roll the task back"):
        store.load(saved.uri, saved.sha256)
    file.unlink()
    with pytest.raises(NotFound, match=str(file)):
        store.load(saved.uri, saved.sha256)


@pytest.mark.parametrize(
    "uri",
    ["", "local:", "/etc/passwd", "local:../../etc/passwd", "local:" + "a" * 64 + "/../../x", "s3:" + "a" * 64 + "/1"],
)
def test_no_uri_leads_elsewhere(tmp_path: Path, uri: str) -> None:
    store = LocalCheckpoints(tmp_path)
    with pytest.raises(InfrastructureError, match="no checkpoint of the local store"):
        store.load(uri, "0" * 64)
    with pytest.raises(InfrastructureError, match="no checkpoint of the local store"):
        store.delete(uri)


def test_the_directory_may_move(tmp_path: Path) -> None:
    saved = LocalCheckpoints(tmp_path / "old").save("etl/1", 1, b"x")
    (tmp_path / "old").rename(tmp_path / "new")
    assert LocalCheckpoints(tmp_path / "new").load(saved.uri, saved.sha256) == b"x"


def test_a_save_is_synced_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that a power cut tests: bytes on disk, then the name, then the name on disk."""
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        done.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def noted_rename(old: str, new: Path) -> None:
        done.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    LocalCheckpoints(tmp_path).save("etl/1", 1, b"x")
    assert done == ["directory", "file", "rename", "directory"]


def test_a_save_that_fails_leaves_nothing_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalCheckpoints(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InfrastructureError, match=r"000000000001-.*No space left"):
        store.save("etl/1", 1, b"x")
    monkeypatch.undo()
    assert store.list("etl/1") == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_dead_attempts_left_half_written_goes_with_the_next_version(tmp_path: Path) -> None:
    store = LocalCheckpoints(tmp_path)
    store.save("etl/1", 1, b"x")
    folder = next(tmp_path.iterdir())
    (folder / ".draft-000000000001-abc").write_bytes(b"half")
    (folder / ".draft-000000000002-abc").write_bytes(b"perhaps still being written")
    store.save("etl/1", 2, b"y")
    assert [path.name for path in folder.glob(".draft*")] == [".draft-000000000002-abc"]
    assert [kept.version for kept in store.list("etl/1")] == [1, 2]


def test_format() -> None:
    text = b'{"state":{}}' * 1000
    data = pack(text)
    assert len(data) < len(text) / 10
    assert unpack(data) == text
    for bad in (b"", b"{}", b"PDRC\x02" + data[5:], data[:20]):
        with pytest.raises(InfrastructureError, match="checkpoint"):
            unpack(bad)
