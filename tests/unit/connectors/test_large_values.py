"""The store of large values: what is kept apart, what is noticed, and what a sweep may delete."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from itertools import permutations

import pytest

from perdure.connectors.blobs import DirectoryBlobs, MemoryBlobs
from perdure.connectors.large_values import SLICES, LargeValues, Place
from perdure.schemas import limits, references, values
from perdure.schemas.errors import (
    ConfigurationError,
    DecodeError,
    InfrastructureError,
    NotSerializable,
    Unreachable,
    ValueLost,
    ValueTooLarge,
)

LARGE = "v" * limits.VALUE_MAX
TODAY = 20_000


class Store:
    """A store in memory with a day that the test sets."""

    def __init__(self) -> None:
        self.blobs = MemoryBlobs()
        self.today = TODAY
        self.large = self.home("home")

    def home(self, name: str) -> LargeValues:
        return LargeValues(lambda: (self.blobs, name), day=lambda: self.today)

    def put(self, task_id: str, value: object = LARGE) -> bytes:
        return self.large.carried(task_id, self.large.text(value, "input"))

    def sweep(self, known: Callable[[str], bool]) -> int:
        return sum(self.large.sweep(part, known) for part in range(SLICES))

    @property
    def names(self) -> list[str]:
        return [b.name for b in self.blobs.list("values")]


@pytest.fixture
def store() -> Store:
    return Store()


# There and back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, limits.VALUE_MAX - 2, limits.VALUE_MAX - 1, 1_000_000])
def test_a_value_comes_back_as_it_was_and_only_large_ones_are_kept(store: Store, length: int) -> None:
    value = {"größe": "☃", "x": "y" * (length - 22)} if length > 1000 else "y" * length
    text = values.dumps(value, field="input", limit=limits.LARGE_VALUE_MAX)
    carried = store.put("etl/1", value)
    assert store.large.fetched("etl/1", carried) == text
    assert references.is_reference(carried) == bool(store.names) == (len(text) > limits.VALUE_MAX)


def test_the_limit_is_to_the_byte(store: Store) -> None:
    assert not references.is_reference(store.put("etl/1", "x" * (limits.VALUE_MAX - 2)))
    assert references.is_reference(store.put("etl/1", "x" * (limits.VALUE_MAX - 1)))


def test_what_looks_like_a_reference_comes_back_as_the_value_that_it_is(store: Store) -> None:
    reference = store.put("etl/1")
    posing = reference.decode()
    carried = store.put("etl/1", posing)
    assert values.loads(store.large.fetched("etl/1", carried)) == posing


def test_a_reference_shows_how_the_value_begins(store: Store) -> None:
    assert references.parse(store.put("etl/1", "é" * 200_000)).preview == '"' + "é" * (limits.PREVIEW_MAX - 1)


def test_tasks_and_namespaces_do_not_see_each_others_values(store: Store) -> None:
    carried = store.put("etl/1")
    for reader, task_id in ((store.large, "etl/2"), (store.large, "ETL/1"), (store.home("other"), "etl/1")):
        with pytest.raises(ValueLost):
            reader.fetched(task_id, carried)


def test_above_the_limit_of_the_store_a_value_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LARGE_VALUE_MAX", 300_000)
    with pytest.raises(ValueTooLarge, match="input is 300,002 bytes of JSON; at most 300,000") as caught:
        store.large.text("x" * 300_000, "input")
    assert caught.value.field == "input"
    with pytest.raises(NotSerializable):
        store.large.text(object(), "input")


def test_without_a_store_the_error_names_the_setting() -> None:
    none = LargeValues.at(None)
    assert none.text("small", "input") == b'"small"'
    with pytest.raises(ValueTooLarge, match="PERDURE_BLOBS") as caught:
        none.text(LARGE, "input")
    assert caught.value.field == "input"
    with pytest.raises(ConfigurationError, match="PERDURE_BLOBS"):
        none.fetched("etl/1", Store().put("etl/1"))


def test_a_place_is_opened_when_it_is_first_needed() -> None:
    large = LargeValues.at(Place("nowhere://", "home"))
    assert large.text(LARGE, "input")
    with pytest.raises(ConfigurationError, match="no place for blobs"):
        large.carried("etl/1", large.text(LARGE, "input"))


# Damage ---------------------------------------------------------------------------------------------------------------


def test_a_value_that_is_gone_is_lost(store: Store) -> None:
    carried = store.put("etl/1")
    store.blobs.delete(store.names[0])
    with pytest.raises(ValueLost, match="of task etl/1 is lost"):
        store.large.fetched("etl/1", carried)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda d: b"",
    "shorter": lambda d: d[:-1],
    "longer": lambda d: d + b" ",
    "a bit flipped": lambda d: d[:-5] + bytes([d[-5] ^ 1]) + d[-4:],
    "without its first line": lambda d: d.partition(b"\n")[2],
    "another value of the same length": lambda d: d.replace(b"vv", b"ww"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_a_value_that_is_damaged_is_lost(store: Store, damage: Callable[[bytes], bytes]) -> None:
    carried = store.put("etl/1")
    (name,) = store.names
    store.blobs.put(name, damage(store.blobs.get(name)))
    with pytest.raises(ValueLost, match="damaged"):
        store.large.fetched("etl/1", carried)


def test_a_reference_that_is_none_leads_nowhere(store: Store) -> None:
    for carried in (b"@", b'@{"day":1,"preview":"","sha256":"../../etc/passwd","size":200000}'):
        with pytest.raises(DecodeError):
            store.large.fetched("etl/1", carried)


# Sweeping -------------------------------------------------------------------------------------------------------------


def test_a_sweep_deletes_what_belongs_to_no_task_and_nothing_else(store: Store) -> None:
    kept = store.put("etl/lives")
    store.put("etl/gone")
    store.put("etl/gone", LARGE + "2")
    store.put("etl/ü\n" + "x" * 500)
    store.today += 2
    assert store.sweep(lambda task_id: task_id == "etl/lives") == 3
    assert store.large.fetched("etl/lives", kept)
    assert len(store.names) == 1
    assert store.sweep(lambda task_id: task_id == "etl/lives") == 0


def test_two_tasks_with_the_same_value_may_go_in_any_order(store: Store) -> None:
    for order in permutations(["etl/1", "etl/2"]):
        living = {task_id: store.put(task_id) for task_id in order}
        store.today += 2
        while living:
            del living[next(iter(living))]
            store.sweep(living.__contains__)
            for task_id, carried in living.items():
                assert store.large.fetched(task_id, carried)
        assert store.names == []


def test_what_is_young_stays_although_no_record_refers_to_it_yet(store: Store) -> None:
    store.put("etl/1")
    for _ in range(limits.UNCLAIMED_DAYS + 1):
        assert store.sweep(lambda _: False) == 0
        store.today += 1
    assert store.sweep(lambda _: False) == 1


def test_a_value_that_is_written_again_while_it_is_swept_stays(store: Store) -> None:
    """The engine has said no, the sweep is about to delete, and now the same submit comes once more."""
    first = store.put("etl/1")
    store.today += 2
    again: list[bytes] = []

    def known(task_id: str) -> bool:
        again.append(store.put(task_id))
        return False

    assert store.sweep(known) == 1
    assert store.large.fetched("etl/1", again[0])
    with pytest.raises(ValueLost):
        store.large.fetched("etl/1", first)


def test_who_cannot_be_asked_has_not_said_no(store: Store) -> None:
    def silent(task_id: str) -> bool:
        raise Unreachable("no engine")

    store.put("etl/1")
    store.today += 2
    with pytest.raises(Unreachable):
        store.sweep(silent)
    assert len(store.names) == 1


def test_a_sweep_that_dies_half_way_is_finished_by_the_next(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = store.put("etl/lives")
    for n in range(3):
        store.put("etl/gone", f"{LARGE}{n}")
    store.today += 2
    delete = store.blobs.delete
    left = [1]

    def dying(name: str) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        delete(name)

    monkeypatch.setattr(store.blobs, "delete", dying)
    with pytest.raises(KeyboardInterrupt):
        store.sweep("etl/lives".__eq__)
    assert len(store.names) == 3
    monkeypatch.undo()
    assert store.sweep("etl/lives".__eq__) == 2
    assert store.large.fetched("etl/lives", kept)


def test_another_namespace_of_the_same_store_is_left_alone(store: Store) -> None:
    other = store.home("other")
    carried = other.carried("etl/1", other.text(LARGE, "input"))
    store.today += 2
    assert store.sweep(lambda _: False) == 0
    assert other.fetched("etl/1", carried)


def test_a_blob_that_does_not_say_whose_it_is_is_named_and_stays(store: Store) -> None:
    for task_id in ("etl/1", "etl/2"):
        store.put(task_id)
    broken, other = store.names
    store.blobs.put(broken, store.blobs.get(other))
    store.today += 2
    asked: list[str] = []
    with pytest.raises(InfrastructureError, match=broken.rpartition("/")[2]):
        for part in sorted({int(name.split("/")[2], 16) for name in (broken, other)}, reverse=True):
            store.large.sweep(part, lambda task_id: bool(asked.append(task_id)))
    assert broken in store.names


def test_files_of_others_are_passed_over(store: Store) -> None:
    for name in ("values/home/00/readme.txt", "values/home/00/ab.1.cd", f"values/home/00/{'0' * 64}.x.{'0' * 64}"):
        store.blobs.put(name, b"")
    store.today += 2
    assert store.sweep(lambda _: False) == 0
    assert len(store.names) == 3


def test_in_a_directory_a_task_leaves_nothing_behind(tmp_path: object) -> None:
    blobs = DirectoryBlobs(tmp_path)  # type: ignore[arg-type]
    day = [TODAY]
    large = LargeValues(lambda: (blobs, "home"), day=lambda: day[0])
    text = values.dumps(os.urandom(200_000).hex(), field="input", limit=limits.LARGE_VALUE_MAX)
    carried = large.carried("etl/1", text)
    assert large.fetched("etl/1", carried) == text
    day[0] += 2
    part = int(hashlib.sha256(b"etl/1").hexdigest()[:2], 16)
    assert large.sweep(part, lambda _: False) == 1
    assert blobs.list("values") == []
