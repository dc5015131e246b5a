"""Golden bytes: whatever a build once wrote is read by today's code as what it was.

The files are added by `python tools/write_histories.py` and never changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perdure.schemas import codec
from perdure.schemas.records import registered
from tools.write_histories import FOLDER, from_plain, missing, to_plain

FILES = sorted(FOLDER.glob("*.json"))
NOT_KNOWN = (
    "no schema that ships explains this file. If its schema was released, keep the schema in schemas/avro/old; "
    "if it changed again before any release, remove the file"
)


def content(file: Path) -> tuple[bytes, Any]:
    read = json.loads(file.read_text())
    return bytes.fromhex(read["hex"]), read["value"]


def test_every_schema_that_this_build_reads_has_golden_bytes() -> None:
    assert not [path.name for path in missing()], "run: python tools/write_histories.py"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_golden_bytes_are_read_as_what_they_were(file: Path) -> None:
    data, value = content(file)
    name, fingerprint, _ = file.name.rsplit(".", 2)
    assert data[2 : codec.HEADER].hex() == fingerprint
    assert fingerprint in codec.published_schemas(), NOT_KNOWN
    message = codec.decode(data)
    assert type(message) is registered()[name]
    assert message == from_plain(value)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_record_of_todays_schema_is_written_as_the_same_bytes(file: Path) -> None:
    """Replay compares events byte for byte (G5), so one record has one form."""
    data, _ = content(file)
    again = codec.encode(codec.decode(data))
    if again[: codec.HEADER] == data[: codec.HEADER]:
        assert again == data
    assert to_plain(codec.decode(again)) == to_plain(codec.decode(data))
