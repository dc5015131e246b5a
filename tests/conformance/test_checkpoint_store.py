"""What every checkpoint store does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from perdure.connectors.checkpoints import KEPT, CheckpointStore, LocalCheckpoints, MemoryCheckpoints, prune
from perdure.schemas.errors import InfrastructureError, NotFound

STORES: dict[str, Callable[[Path], CheckpointStore]] = {
    "local": lambda path: LocalCheckpoints(path / "checkpoints"),
    "memory": lambda path: MemoryCheckpoints(),
}
IDS = ["etl/1", "etl/../../etc/passwd", "etl/a b%2F\N{SNOWMAN}", "etl/" + "x" * 512, "etl/.", "etl/1/2", "ETL/1"]


@pytest.fixture(params=list(STORES))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    return STORES[request.param](tmp_path)


def test_what_is_saved_is_loaded(store: CheckpointStore) -> None:
    data = bytes(range(256)) * 1000
    saved = store.save("etl/1", 1, data)
    assert (saved.size, saved.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert store.load(saved.uri, saved.sha256) == data


def test_tasks_do_not_meet_whatever_their_ids_are(store: CheckpointStore) -> None:
    saved = {task_id: store.save(task_id, 1, task_id.encode()) for task_id in IDS}
    assert len({found.uri for found in saved.values()}) == len(IDS)
    for task_id, found in saved.items():
        assert store.load(found.uri, found.sha256) == task_id.encode()
        assert [kept.uri for kept in store.list(task_id)] == [found.uri]


def test_saving_the_same_again_is_harmless_and_a_stale_attempt_overwrites_nothing(store: CheckpointStore) -> None:
    first = store.save("etl/1", 3, b"recorded")
    assert store.save("etl/1", 3, b"recorded") == first
    stale = store.save("etl/1", 3, b"of a stale attempt")
    assert stale.uri != first.uri
    assert store.load(first.uri, first.sha256) == b"recorded"


def test_list_is_ordered_by_version(store: CheckpointStore) -> None:
    for version in (10, 2, 1, 100):
        store.save("etl/1", version, b"%d" % version)
    assert [kept.version for kept in store.list("etl/1")] == [1, 2, 10, 100]
    assert store.list("etl/unknown") == []


def test_delete(store: CheckpointStore) -> None:
    saved = store.save("etl/1", 1, b"x")
    store.delete(saved.uri)
    store.delete(saved.uri)
    assert store.list("etl/1") == []
    with pytest.raises(NotFound, match=saved.uri.partition("/")[2]):
        store.load(saved.uri, saved.sha256)


def test_another_digest_is_refused_by_name(store: CheckpointStore) -> None:
    saved = store.save("etl/1", 1, b"x")
    with pytest.raises(InfrastructureError, match=f"{saved.uri.partition('/')[2]}.*damaged"):
        store.load(saved.uri, "0" * 64)


def test_prune_leaves_the_newest_recorded_and_what_is_newer(store: CheckpointStore) -> None:
    for version in range(1, 9):
        store.save("etl/1", version, b"%d" % version)
    store.save("etl/1", 2, b"left by a stale attempt")
    store.save("etl/2", 1, b"another task")
    prune(store, "etl/1", recorded=7)
    assert [kept.version for kept in store.list("etl/1")] == [5, 6, 7, 8]
    assert len(store.list("etl/2")) == 1
    assert KEPT == 3
