"""Bytes of records: whole round trips, other Avro programs, older schemas, hostile bytes."""

from __future__ import annotations

import io
import json
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import fastavro
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.schemas import codec, limits
from perdure.schemas.codec import UnknownSchema, bounded, decode, decode_as, encode
from perdure.schemas.commands import PauseTask, RetryTask, SubmitBatch, SubmitTask, Tick, WorkerStarted
from perdure.schemas.errors import DecodeError, ValueTooLarge
from perdure.schemas.records import avro_schema, record, registered
from perdure.schemas.reports import ReportBatch, ReportEntry, ReportProgress
from tests.unit.schemas.building import ALL, LONG_MAX, LONG_MIN, long, name_of, records, text

AVRO = Path(__file__).parents[3] / "schemas" / "avro"
EVERY_CLASS = pytest.mark.parametrize("cls", ALL, ids=name_of)


# Round trips ---------------------------------------------------------------------------------------------------------


@EVERY_CLASS
@settings(max_examples=12)
@given(data=st.data())
def test_a_record_comes_back_as_it_was(cls: type, data: st.DataObject) -> None:
    message = data.draw(records(cls))
    encoded = encode(message)
    assert decode(encoded) == message
    assert type(decode(encoded)) is cls
    assert encode(decode(encoded)) == encoded


def test_every_arm_of_a_union_comes_back_as_its_own_class() -> None:
    arms = [cls for cls in ALL if name_of(cls).startswith("perdure.reports.") and cls not in (ReportBatch, ReportEntry)]
    drawn: list[type] = []

    @settings(max_examples=60)
    @given(st.tuples(*map(records, arms)))
    def each(reports: tuple[Any, ...]) -> None:
        entry = ReportEntry(task_id="etl/1", epoch=1, token=b"t", reports=list(reports))
        again = decode(encode(ReportBatch(session="s", entries=[entry])))
        assert again.entries[0].reports == list(reports)
        drawn.extend(type(report) for report in again.entries[0].reports)

    each()
    assert set(drawn) == set(arms)


def test_decode_as_takes_only_its_class() -> None:
    tick = Tick(due=1, host_clock=2)
    assert decode_as(Tick, encode(tick)) == tick
    with pytest.raises(DecodeError, match="expected PauseTask, found Tick"):
        decode_as(PauseTask, encode(tick))


def test_replace_changes_the_copy_alone() -> None:
    tick = Tick(due=1, host_clock=2)
    assert codec.replace(tick, due=5) == Tick(due=5, host_clock=2)
    assert tick.due == 1


def test_bounded_names_what_is_too_large() -> None:
    assert bounded(b"abc", 3, "input") == b"abc"
    with pytest.raises(ValueTooLarge, match="input is 4 bytes; at most 3") as caught:
        bounded(b"abcd", 3, "input")
    assert caught.value.field == "input"


@record("tests")
class Stranger:
    """A class that the codec was never told of."""


@pytest.mark.parametrize(
    "message",
    [
        Tick(due=LONG_MAX + 1, host_clock=0),  # does not fit 64 bits
        Tick(due=LONG_MIN - 1, host_clock=0),
        Tick(due=None, host_clock=0),  # type: ignore[arg-type]
        Tick(due="soon", host_clock=0),  # type: ignore[arg-type]
        PauseTask(command_id="\ud800", task_id="etl/1"),  # no UTF-8
        PauseTask(command_id=7, task_id="etl/1"),  # type: ignore[arg-type]
        PauseTask(command_id="c", task_id="etl/1", reply_to=7),  # type: ignore[arg-type]
        RetryTask(command_id="c", task_id="etl/1", input="null"),  # type: ignore[arg-type]
        SubmitTask(command_id="c", type="t", labels={1: 2}),  # type: ignore[dict-item]
        SubmitTask(command_id="c", type="t", retry="often"),  # type: ignore[arg-type]
        ReportEntry(task_id="etl/1", epoch=1, token=b"", reports=[Tick(due=1, host_clock=1)]),  # type: ignore[list-item]
        ReportProgress(seq=1, fraction="half"),  # type: ignore[arg-type]
        Stranger(),
        object(),
        b"bytes",
        None,
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_does_not_fit_its_schema_is_not_encoded(message: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        encode(message)


# Other Avro programs -------------------------------------------------------------------------------------------------


def crc_64_avro(data: bytes) -> int:
    """The fingerprint, written down from the Avro specification ("Schema Fingerprints")."""
    empty = 0xC15D213AA4D7A795
    table = []
    for i in range(256):
        value = i
        for _ in range(8):
            value = value >> 1 ^ (empty if value & 1 else 0)
        table.append(value)
    crc = empty
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc


def test_the_fingerprint_is_the_one_of_the_specification() -> None:
    assert crc_64_avro(b'"int"') == 0x7275D51A3F395C8F  # from Avro's own test vectors
    schema = avro_schema(Tick)
    canonical = fastavro.schema.to_parsing_canonical_form(schema)
    assert codec.schema_fingerprint(schema) == crc_64_avro(canonical.encode()).to_bytes(8, "little")


def shipped() -> list[Path]:
    return sorted(AVRO.glob("*/*.avsc"))


@settings(max_examples=3)
@given(data=st.data())
@pytest.mark.parametrize(
    "file", [f for f in shipped() if f.parent.name != "old"], ids=lambda f: f"{f.parent.name}.{f.stem}"
)
def test_a_program_that_has_only_the_schema_file_reads_and_writes_the_record(file: Path, data: st.DataObject) -> None:
    schema = json.loads(file.read_text())
    cls = registered()[f"{schema['namespace']}.{schema['name']}"]
    message = data.draw(records(cls))
    encoded = encode(message)

    canonical = fastavro.schema.to_parsing_canonical_form(schema)
    header = b"\xc3\x01" + crc_64_avro(canonical.encode()).to_bytes(8, "little")
    assert encoded[:10] == header
    body = io.BytesIO(encoded[10:])
    parsed = fastavro.parse_schema(schema)
    datum = fastavro.schemaless_reader(body, parsed, None, return_record_name=True)
    assert body.read() == b""

    out = io.BytesIO()
    fastavro.schemaless_writer(out, parsed, datum)
    assert header + out.getvalue() == encoded


def test_blocks_with_their_size_in_bytes_are_read() -> None:
    """Avro lets a writer give a block's size, so that readers can skip it; some writers always do."""
    header = encode(PauseTask(command_id="", task_id=""))[:10]
    assert decode(header + text("c") + text("etl/1") + text("me") + long(0)).issued_by == "me"
    started = WorkerStarted(session="s", worker_id="w", types={"a": 1, "b": 2}, queues=["x", "y"], slots=1)
    types = text("a") + long(1) + text("b") + long(2)
    queues = text("x") + text("y")
    plain = encode(started)
    sized = plain.replace(long(2) + types, long(-2) + long(len(types)) + types)
    sized = sized.replace(long(2) + queues, long(-1) + long(2) + text("x") + long(-1) + long(2) + text("y"))
    assert sized != plain
    assert decode(sized) == started


# Older schemas -------------------------------------------------------------------------------------------------------


def test_no_two_schemas_share_a_fingerprint() -> None:
    schemas = {json.dumps(avro_schema(cls)) for cls in ALL} | {json.dumps(json.loads(f.read_text())) for f in shipped()}
    assert len({codec.schema_fingerprint(json.loads(schema)) for schema in schemas}) == len(schemas)


def test_published_schemas_are_all_that_ship() -> None:
    published = codec.published_schemas()
    for schema in [avro_schema(cls) for cls in ALL] + [json.loads(file.read_text()) for file in shipped()]:
        assert published[codec.schema_fingerprint(schema).hex()] == schema


def test_what_config_has_is_not_published_again() -> None:
    everything = codec.unpublished_schemas(())
    assert everything == {codec.schema_name(f): schema for f, schema in codec.published_schemas().items()}
    names = sorted(everything)
    assert codec.unpublished_schemas(names) == {}
    assert codec.unpublished_schemas(names[::2]).keys() == set(names[1::2])


def before_defaulted_fields(schema: Any) -> Any:
    """The schema as it was before the fields that have defaults were added, each record defined at its first use."""
    definitions: dict[str, Any] = {}
    seen: set[str] = set()

    def note(node: Any) -> None:
        for inner in node if isinstance(node, list) else node.values() if isinstance(node, dict) else []:
            note(inner)
        if isinstance(node, dict) and node.get("type") == "record":
            definitions[f"{node['namespace']}.{node['name']}"] = node

    def walk(node: Any) -> Any:
        if isinstance(node, list):
            return [walk(arm) for arm in node]
        if isinstance(node, str):
            return walk(definitions[node]) if node in definitions and node not in seen else node
        if node["type"] != "record":
            return {key: walk(inner) if key in ("items", "values") else inner for key, inner in node.items()}
        name = f"{node['namespace']}.{node['name']}"
        if name in seen:
            return name
        seen.add(name)
        kept = [f for f in node["fields"] if "default" not in f]
        return node | {"fields": [f | {"type": walk(f["type"])} for f in kept]}

    note(schema)
    return walk(schema)


@EVERY_CLASS
@settings(max_examples=5)
@given(data=st.data())
def test_a_record_of_an_older_schema_gets_the_defaults_of_fields_it_lacks(cls: type, data: st.DataObject) -> None:
    older = before_defaulted_fields(avro_schema(cls))
    codec.read_also(older)
    message = data.draw(records(cls))
    header = b"\xc3\x01" + codec.schema_fingerprint(older)

    again = decode(header + as_written(older, message))

    assert type(again) is cls
    assert again == with_defaults(message)


def as_written(schema: Any, message: Any) -> bytes:
    """The body that a program with this schema writes for the record."""
    current = fastavro.parse_schema(avro_schema(type(message)))
    datum = fastavro.schemaless_reader(io.BytesIO(encode(message)[10:]), current, None, return_record_name=True)
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(schema), datum)
    return out.getvalue()


def with_defaults(value: Any) -> Any:
    """What is left of a record when its writer did not know the fields that have defaults."""
    if isinstance(value, list):
        return [with_defaults(item) for item in value]
    if type(value) not in ALL:
        return value
    kept = [f["name"] for f in avro_schema(type(value))["fields"] if "default" not in f]
    return type(value)(**{name: with_defaults(getattr(value, name)) for name in kept})


def test_defaults_are_of_the_right_type_and_each_records_own() -> None:
    older = before_defaulted_fields(avro_schema(SubmitTask))
    codec.read_also(older)
    data = b"\xc3\x01" + codec.schema_fingerprint(older) + text("c") + text("t")
    one, two = decode(data), decode(data)
    assert one == SubmitTask(command_id="c", type="t")
    assert one.input == b"null"
    one.labels["mark"] = "one"
    assert two.labels == {}
    assert decode(data).labels == {}


def test_a_field_that_the_class_has_no_more_is_dropped() -> None:
    schema = avro_schema(Tick)
    older = schema | {"fields": [*schema["fields"], {"name": "gone", "type": "string", "doc": "Was here."}]}
    codec.read_also(older)
    assert decode(b"\xc3\x01" + codec.schema_fingerprint(older) + long(1) + long(2) + long(3) + text("x")) == Tick(
        due=1, host_clock=2, executed=3
    )


def test_a_union_that_has_got_another_arm_since_is_read() -> None:
    older = avro_schema(ReportEntry)
    reports = next(f for f in older["fields"] if f["name"] == "reports")
    dropped = reports["type"]["items"].pop()
    assert dropped["name"] == "SendSteps"
    codec.read_also(older)
    entry = ReportEntry(task_id="etl/1", epoch=1, token=b"t", reports=[ReportProgress(seq=1, fraction=0.5)])
    assert decode(b"\xc3\x01" + codec.schema_fingerprint(older) + encode(entry)[10:]) == entry


def test_an_older_schema_that_lacks_a_field_without_default_makes_no_record() -> None:
    schema = avro_schema(Tick)
    older = schema | {"fields": schema["fields"][:1]}
    codec.read_also(older)
    with pytest.raises(DecodeError, match="bad Tick"):
        decode(b"\xc3\x01" + codec.schema_fingerprint(older) + long(1))


def test_a_schema_of_no_known_class_is_not_taken_as_an_older_one() -> None:
    with pytest.raises(ValueError, match=r"no record class is named perdure\.events\.Nothing"):
        codec.read_also({"type": "record", "namespace": "perdure.events", "name": "Nothing", "fields": []})


# Shape of the schemas ------------------------------------------------------------------------------------------------


def nodes(schema: Any, inside: tuple[str, ...] = ()) -> Any:
    """(schema, names of the records around it) for the schema and all in it, names resolved to definitions."""
    definitions: dict[str, Any] = {}

    def walk(node: Any, around: tuple[str, ...]) -> Any:
        if isinstance(node, list):
            for arm in node:
                yield from walk(arm, around)
            return
        if isinstance(node, str) and node in definitions:
            node = definitions[node]
        yield node, around
        if not isinstance(node, dict):
            return
        if node["type"] == "record":
            name = f"{node['namespace']}.{node['name']}"
            definitions[name] = node
            if name not in around:
                for inner in node["fields"]:
                    yield from walk(inner["type"], (*around, name))
        else:
            for key in ("items", "values"):
                if key in node:
                    yield from walk(node[key], around)

    return walk(schema, inside)


@EVERY_CLASS
def test_no_schema_is_recursive(cls: type) -> None:
    for node, around in nodes(avro_schema(cls)):
        if isinstance(node, dict) and node["type"] == "record":
            assert f"{node['namespace']}.{node['name']}" not in around


def smallest(node: Any) -> int:
    """The fewest bytes that a value of this schema takes."""
    if isinstance(node, list):
        return 1 + min(smallest(arm) for arm in node)
    if isinstance(node, dict) and node["type"] == "record":
        return sum(smallest(f["type"]) for f in node["fields"])
    return 0 if node == "null" else 1


@EVERY_CLASS
def test_no_item_takes_zero_bytes(cls: type) -> None:
    """So a claimed number of items can never be larger than the record."""
    for node, _ in nodes(avro_schema(cls)):
        if isinstance(node, dict) and node["type"] == "array":
            assert smallest(node["items"]) >= 1


@EVERY_CLASS
def test_every_record_and_field_says_what_it_means(cls: type) -> None:
    for node, _ in nodes(avro_schema(cls)):
        if isinstance(node, dict) and node["type"] == "record":
            assert len(node["doc"]) > 10, node["name"]
            assert "\n" not in node["doc"]
            for field in node["fields"]:
                assert field["doc"].endswith("."), f"{node['name']}.{field['name']}: {field['doc']!r}"


def test_what_begins_with_a_brace_is_never_avro() -> None:
    """Readers tell JSON commands by their first byte."""
    assert not codec.MARKER.startswith(b"{")


# Hostile bytes -------------------------------------------------------------------------------------------------------


def is_refused_or_decoded(data: bytes) -> None:
    """Whatever the bytes are, `decode` answers with a record or with DecodeError: anything else fails the test."""
    with suppress(DecodeError):
        assert type(decode(data)) in ALL


@given(st.binary(max_size=200))
def test_bytes_without_header_are_refused(data: bytes) -> None:
    if data[:2] != codec.MARKER:
        with pytest.raises(DecodeError, match="no single-object Avro record"):
            decode(data)
    is_refused_or_decoded(data)


KNOWN = set(codec.published_schemas())


@given(st.binary(min_size=8, max_size=40))
def test_an_unknown_fingerprint_is_named(rest: bytes) -> None:
    if rest[:8].hex() not in KNOWN:
        with pytest.raises(UnknownSchema, match=rest[:8].hex()):
            decode(codec.MARKER + rest)


@EVERY_CLASS
@settings(max_examples=20)
@given(data=st.data())
def test_random_bytes_behind_a_header_raise_nothing_but_decode_errors(cls: type, data: st.DataObject) -> None:
    header = codec.MARKER + codec.schema_fingerprint(avro_schema(cls))
    is_refused_or_decoded(header + data.draw(st.binary(max_size=120)))


@EVERY_CLASS
@settings(max_examples=12)
@given(data=st.data())
def test_a_damaged_record_raises_nothing_but_decode_errors(cls: type, data: st.DataObject) -> None:
    whole = encode(data.draw(records(cls)))
    at = data.draw(st.integers(10, len(whole)))
    until = data.draw(st.integers(at, min(len(whole), at + 4)))
    is_refused_or_decoded(whole[:at] + data.draw(st.binary(max_size=12)) + whole[until:])


@EVERY_CLASS
@settings(max_examples=10)
@given(data=st.data())
def test_a_record_cut_short_or_followed_by_more_is_refused(cls: type, data: st.DataObject) -> None:
    whole = encode(data.draw(records(cls)))
    with pytest.raises(DecodeError):
        decode(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(DecodeError, match="behind its end"):
        decode(whole + data.draw(st.binary(min_size=1, max_size=3)))


PAUSE = encode(PauseTask(command_id="", task_id=""))[:10]
STARTED = encode(WorkerStarted(session="", worker_id="", types={}, queues=[], slots=0))[:10]
BATCH = encode(ReportBatch(session="", entries=[]))[:10]
RETRY = encode(RetryTask(command_id="", task_id=""))[:10]
STEP = BATCH + text("s") + long(1) + text("etl/1") + long(1) + text("t")
FILL = b"\x00" * (limits.RECORD_MAX - 200)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(PAUSE + long(2**62) + b"abc", id="text longer than any memory"),
        pytest.param(PAUSE + long(2**30) + b"abc", id="text longer than the record"),
        pytest.param(PAUSE + long(-1) + b"abc", id="text of negative length"),
        pytest.param(PAUSE + long(-3) + b"abc", id="text of negative length that fits"),
        pytest.param(PAUSE + long(LONG_MIN) + b"abc", id="text of the smallest length"),
        pytest.param(PAUSE + long(2) + b"\xff\xfe", id="text that is no UTF-8"),
        pytest.param(PAUSE + text("c") + long(3) + b"\xed\xa0\x80", id="text with half a surrogate pair"),
        pytest.param(RETRY + text("c") + text("t") + text("") + long(0) + long(1) + long(2**62), id="endless bytes"),
        pytest.param(
            RETRY + text("c") + text("t") + text("") + long(0) + long(1) + long(-5) + b"null", id="negative bytes"
        ),
        pytest.param(PAUSE + text("c") + text("t") + text("") + long(2), id="union arm that is not there"),
        pytest.param(PAUSE + text("c") + text("t") + text("") + long(2**62), id="union arm far outside"),
        pytest.param(PAUSE + text("c") + text("t") + text("") + long(-3), id="negative union arm"),
        pytest.param(PAUSE + b"\x80" * 5, id="number without end"),
        pytest.param(PAUSE + b"\xff" * 600_000, id="number of megabytes"),
        pytest.param(STARTED + text("s") + text("w") + long(2**40) + FILL, id="map of 2^40 entries"),
        pytest.param(STARTED + text("s") + text("w") + long(-(2**40)) + long(1) + FILL, id="map of -2^40 entries"),
        pytest.param(STARTED + text("s") + text("w") + long(0) + long(2**40) + FILL, id="array of 2^40 items"),
        pytest.param(STARTED + text("s") + text("w") + long(0) + long(-(2**40)) + long(7) + FILL, id="array of -2^40"),
        pytest.param(
            STARTED + text("s") + text("w") + long(0) + (long(LONG_MIN) + long(0)) * 80_000, id="empty blocks"
        ),
        pytest.param(STARTED + text("s") + text("w") + long(0) + (long(1) + text("")) * 400_000, id="tiny blocks"),
        pytest.param(BATCH + text("s") + long(2**40) + FILL, id="array of 2^40 records"),
        pytest.param(STEP + long(2**40) + FILL, id="array of 2^40 unions"),
        pytest.param(STEP + long(1) + long(11), id="no such report"),
        pytest.param(STEP + long(1) + long(-12), id="no such report from the end"),
    ],
)
def test_hostile_bytes_are_refused_in_bounded_time_and_memory(data: bytes) -> None:
    tracemalloc.start()
    begun = time.process_time()
    try:
        with pytest.raises(DecodeError):
            decode(data)
        spent, (_, peak) = time.process_time() - begun, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert spent < 30  # CPU time with tracemalloc on: a second or two; unbounded work would take hours
    assert peak < 400 * 1024 * 1024


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(BATCH + text("s") + long(130_000) + b"\x00" * 4 * 130_000 + b"\x00" * 3, id="empty entries"),
        pytest.param(STEP + long(170_000) + b"\x00" * 3 * 170_000 + b"\x00" * 4, id="empty reports"),
        pytest.param(
            encode(SubmitBatch(command_id="", tasks=[]))[:10]
            + b"\x00" * 4
            + long(18_000)
            + b"\x00" * 29 * 18_000
            + b"\x00",
            id="empty submits",
        ),
    ],
)
def test_the_most_that_a_record_can_hold_is_decoded_in_bounded_memory(data: bytes) -> None:
    """Records of the largest size, made of the smallest parts: the most memory that one record can ask for."""
    assert len(data) <= limits.RECORD_MAX + 1024
    tracemalloc.start()
    try:
        decode(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 400 * 1024 * 1024
