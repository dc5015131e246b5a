"""Ids, routing keys, and the partition that each belongs to."""

from __future__ import annotations

import hashlib
import hmac
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure.schemas import ids, limits
from perdure.schemas.errors import InvalidRequest


@pytest.mark.parametrize(
    ("data", "signed_hash"),
    [  # Kafka's own vectors: org.apache.kafka.common.utils.UtilsTest#testMurmur2
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_murmur2_is_kafkas(data: bytes, signed_hash: int) -> None:
    assert ids.murmur2(data) == signed_hash % 2**32


@pytest.mark.parametrize(
    ("key", "partition"),
    [("21", 4), ("foobar", 6), ("abc", 3), ("a-little-bit-long-string", 0)],
)
def test_a_partition_is_what_kafkas_default_partitioner_says(key: str, partition: int) -> None:
    """toPositive(murmur2(key)) % partitions: the sign bit is cleared, not negated."""
    assert ids.partition_of(key, 8) == partition


@given(st.binary(max_size=40))
def test_murmur2_is_32_bits(data: bytes) -> None:
    assert 0 <= ids.murmur2(data) < 2**32


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz0123456789._~-", min_size=1, max_size=30), st.integers(1, 500))
def test_every_routing_key_has_a_partition(key: str, partitions: int) -> None:
    assert ids.is_routing_key(key)
    assert 0 <= ids.partition_of(key, partitions) < partitions


@pytest.mark.parametrize("name", ["etl", "etl~1", "a", "0", "my.queue_2", "-", "x" * limits.ROUTING_KEY_MAX])
def test_routing_keys(name: str) -> None:
    assert ids.is_routing_key(name)
    assert ids.check_queue(name) == name


@pytest.mark.parametrize(
    "name", ["", "Etl", "etl/1", "e t", "etl\n", "\x00", "ä", "٣", "e%2f", "x" * (limits.ROUTING_KEY_MAX + 1)]
)
def test_no_routing_keys(name: str) -> None:
    assert not ids.is_routing_key(name)
    with pytest.raises(InvalidRequest, match="no queue name") as caught:
        ids.check_queue(name, "queue")
    assert caught.value.field == "queue"


@pytest.mark.parametrize("local", ["1", "a/b/c", "ünï", "x" * limits.LOCAL_ID_MAX, "é" * 256, " ", "%2F", "\n", "🙂"])
def test_local_ids(local: str) -> None:
    assert ids.check_local_id(local) == local


@pytest.mark.parametrize("local", ["", "x" * (limits.LOCAL_ID_MAX + 1), "é" * 257, "a\x00b", "\ud800", "a\udfff"])
def test_no_local_ids(local: str) -> None:
    with pytest.raises(InvalidRequest, match="local id") as caught:
        ids.check_local_id(local, "task_id")
    assert caught.value.field == "task_id"


@given(st.text(min_size=1, max_size=20))
def test_a_task_id_is_split_at_its_first_slash(local: str) -> None:
    assert ids.split(ids.join("etl", local)) == ("etl", local)


def test_an_id_without_slash_has_no_routing_key() -> None:
    assert ids.split("0192f3") == ("", "0192f3")
    assert ids.split("etl/a/b") == ("etl", "a/b")


def test_new_ids_are_ordered_by_time_and_distinct() -> None:
    made = [ids.new_local_id() for _ in range(200)]
    assert len(set(made)) == 200
    times = [text[:13] for text in made]
    assert times == sorted(times)
    assert all(uuid.UUID(text).version == 7 for text in made)
    assert ids.new_id("cmd-").startswith("cmd-")


def test_an_id_derived_from_the_log_is_the_same_for_the_same_place_only() -> None:
    at = 1_790_000_000_123
    derived = ids.derived_local_id(at, 3, 77)
    assert derived == ids.derived_local_id(at, 3, 77)
    others = {ids.derived_local_id(at, 3, 77, 0), ids.derived_local_id(at, 3, 78), ids.derived_local_id(at, 7, 73)}
    assert len(others | {derived}) == 4
    parsed = uuid.UUID(derived)
    assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
    assert parsed.int >> 80 == at


def test_places_in_the_log_do_not_run_into_each_other() -> None:
    assert ids.derived_command_id(1, 12) == "log-1-12"
    assert ids.derived_command_id(1, 12, 3) == "log-1-12-3"
    assert ids.derived_local_id(0, 1, 12) != ids.derived_local_id(0, 11, 2)


def test_a_keyed_id_depends_on_queue_type_and_key() -> None:
    """Pinned: ids of tasks that were submitted with a key must never change between releases."""
    assert ids.keyed_local_id("etl", "process", "2026-11") == "216780c6-0949-5159-a017-1b9a24816347"
    made = {
        ids.keyed_local_id(*parts) for parts in [("a", "b", "c"), ("b", "a", "c"), ("a", "bc", ""), ("a", "b", "cc")]
    }
    assert len(made) == 4


def test_a_grant_token_is_an_hmac_over_what_it_grants() -> None:
    key = b"k" * 32
    token = ids.grant_token(key, "etl/ü", 5, "s1")
    text = (6).to_bytes(4, "big") + "etl/ü".encode() + (5).to_bytes(8, "big") + b"s1"
    assert token == hmac.new(key, text, hashlib.sha256).digest()
    others = [
        ids.grant_token(key, "etl/ü", 6, "s1"),
        ids.grant_token(key, "etl/u", 5, "s1"),
        ids.grant_token(key, "etl/ü", 5, "s2"),
        ids.grant_token(b"x" * 32, "etl/ü", 5, "s1"),
    ]
    assert token not in others
    assert len(set(others)) == 4


@pytest.mark.parametrize("epoch", [0, -1, 2**63 - 1, -(2**63)])
def test_every_epoch_that_a_record_can_carry_has_a_token_of_its_own(epoch: int) -> None:
    key = b"k" * 32
    assert len(ids.grant_token(key, "etl/1", epoch, "s")) == 32
    assert ids.grant_token(key, "etl/1", epoch, "s") != ids.grant_token(key, "etl/1", 1, "s")
