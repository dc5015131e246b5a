"""Proof of origin, and the keys it is made with."""

from __future__ import annotations

import hashlib
import hmac
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.schemas.codec import decode, encode, replace
from perdure.schemas.commands import ApplyConfig, WorkerBeat, WorkerStopping
from perdure.schemas.errors import ConfigurationError, DecodeError
from perdure.schemas.signing import Keys, authentic, signed
from tests.unit.schemas.building import SIGNED, name_of, records

KEYS = {"w1": bytes(range(32)), "w2": bytes(range(32, 64))}
BEAT = WorkerBeat(session="s1", grants_seen=4, free=2)


def verified(data: bytes, keys: dict[str, bytes] = KEYS) -> bool:
    """What a reader finds: whether it is a record at all, and of a holder of the keys."""
    try:
        message = decode(data)
    except DecodeError:
        return False
    return hasattr(message, "hmac") and authentic(data, message, keys)


@pytest.mark.parametrize("cls", SIGNED, ids=name_of)
@settings(max_examples=10)
@given(data=st.data())
def test_a_signed_record_is_authentic_and_otherwise_as_it_was(cls: type, data: st.DataObject) -> None:
    message = data.draw(records(cls))
    again: Any = decode(signed(message, "w2", KEYS["w2"]))
    assert verified(signed(message, "w2", KEYS["w2"]))
    assert replace(again, key_id="", hmac=b"") == replace(message, key_id="", hmac=b"")
    assert again.key_id == "w2"


def test_the_signature_is_hmac_sha256_over_all_before_it() -> None:
    """Written down here, so that a signer in another language can be held to the same bytes."""
    data = signed(BEAT, "w1", KEYS["w1"])
    assert data[-33] == 64  # the Avro length of 32 bytes, zig-zag
    assert data[-32:] == hmac.new(KEYS["w1"], data[:-33], hashlib.sha256).digest()


def test_a_changed_byte_anywhere_ends_the_proof() -> None:
    data = signed(BEAT, "w1", KEYS["w1"])
    assert verified(data)
    for at in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            changed = data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
            assert not verified(changed), f"byte {at} ^ {flip:#x}"


@given(st.integers(0, 10**6), st.integers(0, 20), st.binary(max_size=20))
def test_a_changed_piece_anywhere_ends_the_proof(at: int, length: int, piece: bytes) -> None:
    data = signed(BEAT, "w1", KEYS["w1"])
    at %= len(data) + 1
    changed = data[:at] + piece + data[at + length :]
    assert verified(changed) == (changed == data)


def test_one_record_is_no_proof_of_another_kind() -> None:
    """The schema fingerprint is signed too."""
    beat = signed(WorkerStopping(session="s1", reason="x"), "w1", KEYS["w1"])
    other = encode(ApplyConfig(name="", version=0))[:10]
    assert not verified(other + beat[10:])


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (encode(BEAT), "not signed at all"),
        (encode(replace(BEAT, key_id="w1")), "a key id alone"),
        (encode(replace(BEAT, key_id="w1", hmac=bytes(32))), "zeros"),
        (signed(BEAT, "w1", KEYS["w2"]), "another key under this id"),
        (signed(BEAT, "w9", KEYS["w1"]), "an unknown key id"),
        (signed(BEAT, "", b""), "no key"),
        (encode(replace(BEAT, key_id="w1", hmac=decode(signed(BEAT, "w1", KEYS["w1"])).hmac[:16])), "half a digest"),
    ],
)
def test_without_the_key_there_is_no_proof(data: bytes, why: str) -> None:
    assert decode(data).session == "s1"
    assert not verified(data), why


def test_a_digest_written_with_a_longer_length_is_refused() -> None:
    """Avro readers take 64 also as two bytes; what is signed would then begin elsewhere."""
    data = signed(BEAT, "w1", KEYS["w1"])
    longer = data[:-33] + b"\xc0\x00" + data[-32:]
    assert decode(longer) == decode(data)
    assert not verified(longer)


# Keys ----------------------------------------------------------------------------------------------------------------


def test_keys_come_back_from_their_file(tmp_path: Path) -> None:
    keys = Keys.generate().rotated()
    keys.save(tmp_path / "deep" / "keys.json")
    assert Keys.load(tmp_path / "deep" / "keys.json") == keys
    assert list(Keys.load(tmp_path / "deep" / "keys.json").worker) == list(keys.worker)


@pytest.mark.parametrize("left_over", [None, 0o644], ids=["fresh", "over a left-over"])
def test_a_saved_file_is_for_its_owner_only(tmp_path: Path, left_over: int | None) -> None:
    path = tmp_path / "keys.json"
    if left_over:
        (tmp_path / "keys.json.new").write_text("half written")
        (tmp_path / "keys.json.new").chmod(left_over)
    Keys.generate().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["keys.json"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o666, 0o710, 0o601])
def test_a_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys.json"
    Keys.generate().save(path)
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        Keys.load(path)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="perdure keys new"):
        Keys.load(tmp_path / "keys.json")


SECRET = "ab" * 32


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "7",
        "{}",
        "no json",
        json.dumps({"worker": {"w1": SECRET}}),
        json.dumps({"worker": {}, "engine": {"e1": SECRET}}),
        json.dumps({"worker": {"w1": SECRET}, "engine": {}}),
        json.dumps({"worker": {"w1": "no hex"}, "engine": {"e1": SECRET}}),
        json.dumps({"worker": {"w1": 5}, "engine": {"e1": SECRET}}),
        json.dumps({"worker": [SECRET], "engine": {"e1": SECRET}}),
        json.dumps({"worker": {"w1": ""}, "engine": {"e1": SECRET}}),
        json.dumps({"worker": {"w1": SECRET}, "engine": {"e1": "ab"}}),
    ],
)
def test_what_is_no_key_file_is_refused_without_telling_its_content(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match=r"keys\.json") as caught:
        Keys.load(path)
    assert SECRET not in str(caught.value)


def test_the_newest_key_signs_and_all_verify() -> None:
    first = Keys.generate()
    second = first.rotated()
    old = signed(BEAT, *first.newest_worker())
    new = signed(BEAT, *second.newest_worker())
    assert verified(old, second.worker)
    assert verified(new, second.worker)
    assert not verified(new, first.worker)
    assert second.newest_engine()[0] != first.newest_engine()[0]
    assert not verified(signed(BEAT, *second.newest_engine()), second.worker)


def test_rotating_never_replaces_a_key_that_is_kept() -> None:
    keys = Keys.generate().rotated()
    kept = Keys(worker={"w2": keys.worker["w2"]}, engine={"e2": keys.engine["e2"]})
    assert kept.rotated().worker["w2"] == keys.worker["w2"]
    assert len(kept.rotated().worker) == 2
    assert kept.rotated().newest_worker()[0] != "w2"


def test_keys_do_not_show_themselves() -> None:
    keys = Keys.generate()
    shown = f"{keys!r} {keys}"
    for secret in (*keys.worker.values(), *keys.engine.values()):
        assert secret.hex() not in shown
        assert repr(secret) not in shown
