"""What every store of blobs does, and what a directory must not be led to do."""

from __future__ import annotations

import os
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
from moto.server import ThreadedMotoServer
from obstore.store import MemoryStore

from perdure.connectors import durable_files
from perdure.connectors.blobs import Blobs, DirectoryBlobs, MemoryBlobs, open_blobs
from perdure.connectors.object_blobs import ObjectBlobs
from perdure.schemas.errors import ConfigurationError, InfrastructureError, NotFound, Unreachable

BAD_NAMES = [
    "", "/", "/etc/passwd", "..", "../x", "a/../b", "a/..", "a//b", "a/", ".hidden", "a/.draft-1", "a\\b", "a\x00b", "a b",
    "é", "a\n", "~", "C:x", "x" * 513,
]  # fmt: skip


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A server that speaks S3, with one bucket; the environment names it. Its URL."""
    quiet = pytest.MonkeyPatch()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
    }.items():  # fmt: skip
        quiet.setenv(name, value)
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT")).close()
    yield "s3://bucket"
    server.stop()
    quiet.undo()


STORES: dict[str, Callable[[pytest.FixtureRequest, Path], Blobs]] = {
    "directory": lambda request, path: open_blobs(str(path / "not" / "made")),
    "memory": lambda request, path: MemoryBlobs(),
    "obstore": lambda request, path: ObjectBlobs(MemoryStore(), "memory://"),
    "s3": lambda request, path: open_blobs(f"{request.getfixturevalue('s3')}/{path.name}/deeper"),
}


@pytest.fixture(params=list(STORES))
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    return STORES[request.param](request, tmp_path)


def test_what_is_put_is_got(blobs: Blobs) -> None:
    data = bytes(range(256)) * 1000
    blobs.put("a/b/c.1=x", data)
    assert blobs.get("a/b/c.1=x") == data
    assert type(blobs.get("a/b/c.1=x")) is bytes
    assert blobs.head("a/b/c.1=x", 3) == b"\x00\x01\x02"
    assert blobs.head("a/b/c.1=x", 1 << 20) == data


def test_an_empty_blob_is_one(blobs: Blobs) -> None:
    blobs.put("a/empty", b"")
    assert blobs.get("a/empty") == b""


def test_ten_megabytes_are_one_blob(blobs: Blobs) -> None:
    data = os.urandom(1 << 20) * 10
    blobs.put("a/large", data)
    assert blobs.get("a/large") == data


def test_a_second_put_replaces_the_first(blobs: Blobs) -> None:
    blobs.put("a/x", b"first")
    blobs.put("a/x", b"2")
    assert blobs.get("a/x") == b"2"
    assert [(b.name, b.size) for b in blobs.list("a")] == [("a/x", 1)]


def test_a_listing_holds_what_lies_below_the_folder_and_nothing_else(blobs: Blobs) -> None:
    for name in ("a/z", "a/b/c", "a/b/d", "ab/c", "a.b/c", "b"):
        blobs.put(name, name.encode())
    assert [b.name for b in blobs.list("a")] == ["a/b/c", "a/b/d", "a/z"]
    assert [b.name for b in blobs.list("a/b")] == ["a/b/c", "a/b/d"]
    assert blobs.list("none") == []
    assert all(b.size == len(b.name) and b.modified > 1_600_000_000_000 for b in blobs.list("a"))


def test_what_is_missing_is_not_found(blobs: Blobs) -> None:
    blobs.put("a/x", b"x")
    with pytest.raises(NotFound, match="missing"):
        blobs.get("a/none")
    with pytest.raises(NotFound, match="missing"):
        blobs.head("a/none", 10)


def test_deleting_is_for_good_and_may_be_repeated(blobs: Blobs) -> None:
    blobs.put("a/x", b"x")
    blobs.delete("a/x")
    blobs.delete("a/x")
    blobs.delete("never/there")
    with pytest.raises(NotFound):
        blobs.get("a/x")
    assert blobs.list("a") == []


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize(
    "verb", [lambda b, n: b.put(n, b""), lambda b, n: b.get(n), lambda b, n: b.head(n, 1), lambda b, n: b.list(n), lambda b, n: b.delete(n)],
    ids=["put", "get", "head", "list", "delete"],
)  # fmt: skip
def test_a_name_that_leads_elsewhere_is_refused(verb: Callable[[Blobs, str], Any], name: str, tmp_path: Path) -> None:
    for blobs in (DirectoryBlobs(tmp_path / "d"), MemoryBlobs(), ObjectBlobs(MemoryStore(), "memory://")):
        with pytest.raises(InfrastructureError, match="no name of a blob"):
            verb(blobs, name)
    assert list(tmp_path.iterdir()) == []


# Directories ----------------------------------------------------------------------------------------------------------


def test_a_link_in_place_of_a_blob_is_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    blobs = DirectoryBlobs(tmp_path / "store")
    blobs.put("a/x", b"x")
    (tmp_path / "store/a/link").symlink_to(secret)
    (tmp_path / "store/a/folder").symlink_to(tmp_path)
    with pytest.raises(ConfigurationError):
        blobs.get("a/link")
    assert [b.name for b in blobs.list("a")] == ["a/x"]
    blobs.put("a/link", b"ours")
    assert (secret.read_bytes(), blobs.get("a/link")) == (b"secret", b"ours")
    blobs.delete("a/link")
    assert secret.exists()


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    DirectoryBlobs(tmp_path / "store").put("a/x", b"x")
    modes = [(tmp_path / "store" / n).stat().st_mode & 0o777 for n in ("", "a", "a/x")]
    assert modes == [0o700, 0o700, 0o600]


def test_what_a_crash_left_unfinished_is_no_blob(tmp_path: Path) -> None:
    blobs = DirectoryBlobs(tmp_path)
    blobs.put("a/x", b"x")
    young, old = tmp_path / "a/.draft-1", tmp_path / "a/.draft-2"
    for draft in (young, old):
        draft.write_bytes(b"half")
    long_ago = time.time() - 25 * 3600
    os.utime(old, (long_ago, long_ago))
    assert [b.name for b in blobs.list("a")] == ["a/x"]
    assert young.exists(), "somebody may be writing it"
    assert not old.exists()


def test_something_else_in_a_blobs_place_is_for_a_person_to_see_to(tmp_path: Path) -> None:
    blobs = DirectoryBlobs(tmp_path)
    blobs.put("a/x", b"x")
    with pytest.raises(ConfigurationError):
        blobs.get("a")
    with pytest.raises(ConfigurationError):
        blobs.put("a/x/y", b"y")


def test_a_directory_that_is_not_there_has_lost_nothing(tmp_path: Path) -> None:
    """It may not be mounted yet: whoever waits for what lies in it goes on waiting."""
    blobs = DirectoryBlobs(tmp_path / "share" / "blobs")
    for ask in (lambda: blobs.get("a/x"), lambda: blobs.head("a/x", 1)):
        with pytest.raises(Unreachable, match="is it mounted"):
            ask()


# Addresses and outages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["http://host/x", "file://host/x", "s4://bucket", "memory://"])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="no place for blobs"):
        open_blobs(url)


def test_a_file_url_is_a_directory(tmp_path: Path) -> None:
    open_blobs(tmp_path.as_uri()).put("a/x", b"x")
    assert (tmp_path / "a/x").read_bytes() == b"x"


def test_a_bucket_that_is_not_there_is_no_missing_blob(s3: str) -> None:
    blobs = open_blobs("s3://no-such-bucket/x")
    for verb in (lambda: blobs.put("a", b""), lambda: blobs.get("a"), lambda: blobs.list("a")):
        with pytest.raises(ConfigurationError, match="does not exist"):
            verb()


def test_a_store_that_does_not_answer_is_unreachable(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("perdure.connectors.object_blobs._RETRY", {"max_retries": 0})
    with pytest.raises(Unreachable, match="s3://bucket/a/x"):
        open_blobs("s3://bucket").get("a/x")


def test_an_upload_that_the_store_has_given_up_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """404 is what S3 answers for the end of an upload in parts that it has ended already, or aborted."""

    def given_up(*_: object) -> None:
        raise FileNotFoundError("NoSuchUpload: The specified upload does not exist")

    monkeypatch.setattr(obstore, "put", given_up)
    with pytest.raises(Unreachable, match="NoSuchUpload"):
        ObjectBlobs(MemoryStore(), "memory://").put("a/x", b"x")
    monkeypatch.setattr(durable_files, "write", given_up)
    with pytest.raises(Unreachable, match="cannot be written"):
        DirectoryBlobs(tmp_path).put("a/x", b"x")
