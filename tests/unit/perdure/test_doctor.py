"""What the doctor says of the machine it runs on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perdure.doctor import of_this_machine
from perdure.findings import Finding
from perdure.schemas.signing import Keys
from perdure.settings import Settings


def found(tmp_path: Path, bootstrap: str = "127.0.0.1:9092", **more: Any) -> dict[str, Finding]:
    settings = Settings(bootstrap=bootstrap, data_dir=tmp_path, **more)
    return {f.check: f for f in of_this_machine(settings, None)}


@pytest.mark.parametrize(("mode", "state"), [(0o600, "ok"), (0o640, "wrong"), (0o604, "wrong")])
def test_keys_are_for_their_owner_only(mode: int, state: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    Keys.generate().save(path)
    path.chmod(mode)
    assert found(tmp_path, keys_file=path)["keys"].state == state


def test_without_keys_a_broker_must_be_of_this_machine_alone(tmp_path: Path) -> None:
    assert found(tmp_path)["keys"].state == "note"
    assert found(tmp_path, "broker.example:9092")["keys"].state == "wrong"
    assert found(tmp_path, keys_file=tmp_path / "none.json")["keys"].state == "wrong"


def test_the_blob_store_is_there_and_can_be_written(tmp_path: Path) -> None:
    assert found(tmp_path)["blob store"].state == "note"
    assert found(tmp_path, blobs=f"file://{tmp_path}")["blob store"].state == "ok"
    assert found(tmp_path, blobs=f"file://{tmp_path}/not-yet")["blob store"].state == "note"
    (tmp_path / "file").touch()
    assert found(tmp_path, blobs=f"file://{tmp_path}/file/below")["blob store"].state == "wrong"
    assert found(tmp_path, blobs="gopher://x")["blob store"].state == "wrong"
