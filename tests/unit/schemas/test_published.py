"""Schemas that somebody has published: those of other builds are read, and nothing else is believed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
from fastavro import parse_schema, schemaless_writer

from perdure.schemas import codec
from perdure.schemas.codec import UnknownSchema
from perdure.schemas.public import LogLine
from perdure.schemas.published import check_published
from perdure.schemas.records import avro_schema, registered


def nothing(name: str) -> dict[str, Any]:
    """A record whose values take no bytes."""
    return {"type": "record", "name": name, "namespace": "perdure.x", "fields": []}


def twice(name: str, inner: Any) -> dict[str, Any]:
    """A record that holds another one two times."""
    told = {"type": "record", "name": name, "namespace": "perdure.x"}
    again = f"perdure.x.{inner['name']}" if isinstance(inner, dict) else inner
    return told | {"fields": [{"name": "a", "type": inner}, {"name": "b", "type": again}]}


DOUBLING: Any = "null"
for _n in range(15):
    DOUBLING = twice(f"R{_n}", DOUBLING)
DEEP: Any = "null"
for _ in range(3_000):
    DEEP = {"type": "array", "items": DEEP}


def added(kind: Any, to: dict[str, Any] | None = None) -> dict[str, Any]:
    """`LogLine` with one more field."""
    schema = copy.deepcopy(to or avro_schema(LogLine))
    schema["fields"].append({"name": "more", "type": kind, "doc": "More."})
    return schema


def changed(name: str, kind: Any) -> dict[str, Any]:
    """`LogLine` with a field of another type."""
    schema = copy.deepcopy(avro_schema(LogLine))
    next(f for f in schema["fields"] if f["name"] == name)["type"] = kind
    return schema


def record_with(schema: dict[str, Any], body: bytes) -> bytes:
    return codec.MARKER + codec.schema_fingerprint(schema) + body


def decoded(data: bytes, publish: Callable[[str], Any]) -> Any:
    unlearn = codec.learn_from(publish)
    try:
        return codec.decode(data)
    finally:
        unlearn()
        codec._BY_HEADER.pop(data[: codec.HEADER], None)


@pytest.mark.parametrize("cls", registered().values(), ids=lambda cls: cls.__name__)
def test_the_schema_of_each_class_is_one_that_may_be_published(cls: type) -> None:
    check_published(avro_schema(cls), avro_schema(cls))


@pytest.mark.parametrize("schema", codec._older_versions(), ids=lambda s: s["name"])
def test_so_is_that_of_each_older_build(schema: dict[str, Any]) -> None:
    check_published(schema, avro_schema(registered()[f"{schema['namespace']}.{schema['name']}"]))


def test_what_a_newer_build_has_added_is_passed_over() -> None:
    schema = added({"type": "array", "items": "string"})
    line = LogLine(task_id="t", epoch=1, attempt=1, worker_id="w", number=1, at=5, stream="log", text="hello")
    body = io.BytesIO()
    schemaless_writer(body, parse_schema(schema), {**line.__dict__, "more": ["a", "b"]})
    assert decoded(record_with(schema, body.getvalue()), lambda _: schema) == line


@pytest.mark.parametrize(
    "schema",
    [
        added({"type": "array", "items": "null"}),
        added("null"),
        added({"type": "map", "values": {"type": "fixed", "name": "F", "namespace": "perdure.x", "size": 0}}),
        added({"type": "array", "items": nothing("A")}),
        added({"type": "array", "items": {"type": "array", "items": "null"}}),
        added(["null", "perdure.public.LogLine"]),
        added(DEEP),
        added(DOUBLING),
        added({"type": "array", "items": DOUBLING}),
        added({"type": "fixed", "name": "fixed", "namespace": "", "size": 8}),
        added({"type": "fixed", "name": "F", "namespace": "perdure.x", "size": -1}),
        added("a") | {"__fastavro_parsed": True, "__named_schemas": {"a": "a"}},
        changed("text", "bytes") | {"type": "error"},
        changed("text", "bytes"),
        added("string", changed("at", {"type": "long", "logicalType": "timestamp-millis"})),
        changed("epoch", ["null", "long"]),
        changed("worker_id", {"type": "array", "items": "string"}),
        added(["null", "string"]) | {"namespace": "perdure.public", "aliases": ["x"]},
    ],
    ids=[
        "nulls", "a null", "map of nothings", "empty records", "nested", "recursive", "deep", "doubling", "doubling items",
        "a type's name", "less than nothing", "parsed already", "error", "bytes", "logical", "union", "list", "aliases",
    ],
)  # fmt: skip
def test_what_claims_more_than_it_holds_or_means_something_else_is_not_believed(schema: dict[str, Any]) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        check_published(schema, avro_schema(LogLine))


def test_records_of_a_schema_that_is_not_believed_are_unknown() -> None:
    """The body says a list of 2^40 items, where there is none."""
    schema = added({"type": "array", "items": "null"})
    line = LogLine(task_id="t", epoch=1, attempt=1, worker_id="w", number=1, at=5, stream="log", text="hello")
    data = record_with(schema, codec.encode(line)[codec.HEADER :] + b"\x80\x80\x80\x80\x80\x80\x01")
    for _ in range(2):
        with pytest.raises(UnknownSchema):
            decoded(data, lambda _: schema)


@pytest.mark.parametrize(
    "published",
    [{}, {"type": "record"}, {"namespace": "perdure.public", "name": "LogLine"}, {"type": 5, "name": [], "fields": {}}],
    ids=str,
)
def test_what_is_no_schema_is_unknown(published: Any) -> None:
    with pytest.raises(UnknownSchema):
        decoded(codec.MARKER + b"12345678" + b"body", lambda _: published)
