"""How a class states its Avro record, and that the shipped schema files are what the classes state."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Annotated as A
from typing import Any

import fastavro
import pytest

from perdure.schemas.common import Cause, Retry
from perdure.schemas.records import Json, avro_schema, field_types, record, registered
from tests.unit.schemas.building import ALL, name_of

ROOT = Path(__file__).parents[3]


@record("tests")
class Part:
    """Used twice by Whole."""

    number: A[int, "A number."] = 7


@record("tests")
class Whole:
    """Has a field of every kind."""

    text: A[str, "Text."]
    value: A[Json, "Any value, JSON."] = b"null"
    maybe: A[Json | None, "A value or nothing."] = None
    names: A[list[str] | None, "Names or nothing."] = None
    counts: A[dict[str, int], "Counts by name."] = dataclasses.field(default_factory=dict)
    part: A[Part | None, "A part."] = None
    parts: A[list[Part], "More parts."] = dataclasses.field(default_factory=list)


def test_every_kind_of_field_has_its_avro_type() -> None:
    part = {
        "type": "record",
        "name": "Part",
        "namespace": "perdure.tests",
        "doc": "Used twice by Whole.",
        "fields": [{"name": "number", "type": "long", "doc": "A number.", "default": 7}],
    }
    json = {"type": "bytes", "perdure": "json"}
    assert avro_schema(Whole) == {
        "type": "record",
        "name": "Whole",
        "namespace": "perdure.tests",
        "doc": "Has a field of every kind.",
        "fields": [
            {"name": "text", "type": "string", "doc": "Text."},
            {"name": "value", "type": json, "doc": "Any value, JSON.", "default": "null"},
            {"name": "maybe", "type": ["null", json], "doc": "A value or nothing.", "default": None},
            {
                "name": "names",
                "type": ["null", {"type": "array", "items": "string"}],
                "doc": "Names or nothing.",
                "default": None,
            },
            {"name": "counts", "type": {"type": "map", "values": "long"}, "doc": "Counts by name.", "default": {}},
            {"name": "part", "type": ["null", part], "doc": "A part.", "default": None},
            {
                "name": "parts",
                "type": {"type": "array", "items": "perdure.tests.Part"},
                "doc": "More parts.",
                "default": [],
            },
        ],
    }


def test_user_values_are_marked_as_json() -> None:
    """Other programs learn from the schema which bytes they may parse."""
    parsed: Any = fastavro.parse_schema(avro_schema(Whole))
    value = next(f for f in parsed["fields"] if f["name"] == "value")
    assert value["type"]["perdure"] == "json"


def test_a_record_cannot_be_changed() -> None:
    retry = Retry()
    with pytest.raises(dataclasses.FrozenInstanceError):
        retry.max_attempts = 5  # type: ignore[misc]


def test_a_record_is_made_of_its_fields_by_name() -> None:
    with pytest.raises(TypeError, match=r"^Whole lacks text$"):
        Whole()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^Retry has no colour$"):
        Retry(colour="red")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^Cause lacks offset, partition and has no part$"):
        Cause(part=1)  # type: ignore[call-arg]
    with pytest.raises(dataclasses.FrozenInstanceError):
        del Retry().delay


def test_records_are_equal_by_class_and_fields() -> None:
    cause = Cause(partition=1, offset=2)
    assert cause == Cause(offset=2, partition=1, index=None)
    assert hash(cause) == hash(Cause(offset=2, partition=1))
    assert cause != Cause(partition=1, offset=3)
    assert cause != Retry()
    assert repr(cause) == "Cause(partition=1, offset=2, index=None, command_id=None)"


def test_each_record_has_a_default_of_its_own() -> None:
    @record("tests")
    class Holder:
        """Has a list."""

        items: A[list[str], "Some."] = dataclasses.field(default_factory=list)

    assert Holder().items == Holder().items == []
    assert Holder().items is not Holder().items
    assert Holder(items=["x"]).items == ["x"]


def test_a_field_needs_a_type_that_avro_has_and_exactly_one_text() -> None:
    @record("tests")
    class Untold:
        """Has a field without text."""

        name: str

    @record("tests")
    class Told:
        """Has a field with two texts."""

        name: A[str, "One.", "Two."]

    with pytest.raises(TypeError, match="needs Annotated"):
        avro_schema(Untold)
    with pytest.raises(TypeError, match="exactly one text"):
        avro_schema(Told)


def test_names_are_group_and_class() -> None:
    assert registered()["perdure.common.Retry"] is Retry
    for cls in ALL:
        assert name_of(cls) == f"perdure.{cls.avro_group}.{cls.__name__}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("cls", ALL, ids=name_of)
def test_defaults_fit_their_fields(cls: type) -> None:
    """fastavro refuses a default of another type; null defaults have null as the first arm, as Avro demands."""
    fastavro.parse_schema(avro_schema(cls))
    for field in avro_schema(cls)["fields"]:
        if "default" in field and isinstance(field["type"], list):
            assert (field["default"] is None) == (field["type"][0] == "null"), field["name"]


@pytest.mark.parametrize("cls", ALL, ids=name_of)
def test_fields_may_be_added_at_the_end_of_a_signed_record_only_before_its_signature(cls: type) -> None:
    names = list(field_types(cls))
    if "hmac" in names:
        assert names[-2:] == ["key_id", "hmac"]


def test_schema_files_are_what_the_classes_state() -> None:
    tool = [sys.executable, str(ROOT / "tools" / "write_schemas.py"), "--check"]
    done = subprocess.run(tool, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr + "run: python tools/write_schemas.py"
