"""User values as JSON text: canonical, whole on their way back, limited."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import json
import pathlib
import subprocess
import sys
import uuid
from collections import OrderedDict, namedtuple
from types import MappingProxyType
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure.schemas import limits
from perdure.schemas.errors import DecodeError, NotSerializable, ValueTooLarge
from perdure.schemas.values import TAG, dumps, dumps_large, loads


def again(value: Any) -> Any:
    return loads(dumps(value, field="input"))


def large_again(value: Any) -> Any:
    return loads(dumps_large(value, field="input", limit=limits.VALUE_MAX))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.just(TAG) | st.just("value"), inner, max_size=4)
    ),
    max_leaves=12,
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.binary()
    | st.datetimes()
    | st.datetimes(timezones=st.just(dt.UTC))
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.decimals(allow_nan=False)
    | st.uuids()
    | st.just(pathlib.Path("data/large.csv"))
)
hashables = st.recursive(
    scalars, lambda inner: st.frozensets(inner, max_size=3) | st.tuples(inner, inner), max_leaves=4
)
rich_values = st.recursive(
    scalars | st.frozensets(hashables, max_size=3) | st.sets(hashables, max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.just(TAG), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
def test_json_comes_back_unchanged_whatever_its_keys(value: Any) -> None:
    assert again(value) == value


@given(json_values | rich_values)
def test_large_values_come_back_the_same(value: Any) -> None:
    """From a writer of their own, which is quicker."""
    assert large_again(value) == again(value)


def test_a_large_value_has_one_text_whatever_its_order() -> None:
    """A checkpoint is skipped when nothing has changed."""
    one = {"b": 1, "a": {"d": [1, 2.5], "c": {3, 1, 2}}}
    other = {"a": {"c": {2, 1, 3}, "d": [1, 2.5]}, "b": 1}
    assert dumps_large(one, field="x", limit=1_000) == dumps_large(other, field="x", limit=1_000)


@pytest.mark.parametrize("value", [float("nan"), object(), {1: 2}, "\ud800"])
def test_what_is_no_json_is_no_large_value_either(value: Any) -> None:
    with pytest.raises(NotSerializable, match=r"^ctx\.state "):
        dumps_large(value, field="ctx.state", limit=1_000)


def test_a_large_value_has_a_limit() -> None:
    with pytest.raises(ValueTooLarge, match=r"ctx\.state is 1,001 bytes"):
        dumps_large("x" * 999, field="ctx.state", limit=1_000)


@given(rich_values)
def test_typed_values_come_back_as_what_they_were(value: Any) -> None:
    back = again(value)
    assert back == value
    assert type(back) is type(value) or isinstance(value, pathlib.PurePath)


@given(rich_values)
def test_the_text_is_canonical(value: Any) -> None:
    data = dumps(value, field="input")
    assert dumps(loads(data), field="input") == data
    canonical = json.dumps(json.loads(data), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert data.decode() == canonical


def test_the_text_itself_is_fixed() -> None:
    """Argument hashes and content digests stand on these bytes: they must never change."""
    value = {"b": [1, 1.5, None, True], "a": "ü\n", "d": dt.date(2026, 11, 1), "x": b"\x00\xff", "s": {"b", "a"}}
    assert dumps(value, field="input").decode() == (
        '{"a":"ü\\n","b":[1,1.5,null,true],"d":{"$perdure":"date","value":"2026-11-01"},'
        '"s":{"$perdure":"set","value":["a","b"]},"x":{"$perdure":"bytes","value":"AP8="}}'
    )


def test_order_of_insertion_does_not_matter() -> None:
    assert dumps({"a": 1, "b": 2}, field="x") == dumps({"b": 2, "a": 1}, field="x")
    assert dumps(OrderedDict(b=2, a=1), field="x") == dumps(MappingProxyType({"a": 1, "b": 2}), field="x")


def test_the_order_of_a_set_is_the_same_in_every_process() -> None:
    program = (
        "from perdure.schemas.values import dumps\n"
        "items = {frozenset({'a', 'b', 'c'}), frozenset({'d', 'e'}), 'x', 'y', b'z', ('a', 'b'), 1, None}\n"
        "print(dumps(items, field='x').decode())"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(texts) == 1


@pytest.mark.parametrize(
    "mine",
    [
        {TAG: "date", "value": "2026-11-01"},
        {TAG: "date", "value": "no date"},
        {TAG: "object", "value": [["a", 1]]},
        {TAG: "object", "value": 7},
        {TAG: "something else", "value": 1},
        {TAG: 5},
        {TAG: None, "value": None, "more": 1},
        {TAG: {TAG: {TAG: "set", "value": [1]}}},
        {"deep": [{TAG: "bytes", "value": "AA=="}]},
    ],
    ids=repr,
)
def test_a_users_own_object_with_the_reserved_key_comes_back_unchanged(mine: Any) -> None:
    assert again(mine) == mine


class Colour(enum.Enum):
    RED = "red"
    WHEN = dt.date(2026, 1, 2)


class Name(str, enum.Enum):  # noqa: UP042 - str() of its members is "Name.RED", of a StrEnum's "red"
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Flags(enum.Flag):
    A = 1
    B = 2


class Loud(str):
    def __str__(self) -> str:
        return "LOUD"


class Count(int):
    def __repr__(self) -> str:
        return "many"


class Share(float):
    def __repr__(self) -> str:
        return "most"


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    at: dt.date
    tags: frozenset[str] = frozenset()


class Model(pydantic.BaseModel):
    name: str
    when: dt.date
    inner: list[int] = []


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Colour.RED, "red"),
        (Colour.WHEN, dt.date(2026, 1, 2)),
        (Name.RED, "red"),
        (Level.HIGH, 3),
        (Flags.A, 1),
        ({Name.RED: 1}, {"red": 1}),
        ({Loud("quiet"): 1}, {"quiet": 1}),
        (Loud("quiet"), "quiet"),
        (Count(5), 5),
        (Share(0.5), 0.5),
        ((1, (2,)), [1, [2]]),
        (Pair(1, 2), [1, 2]),
        (Point(1, dt.date(2026, 1, 2)), {"x": 1, "at": dt.date(2026, 1, 2), "tags": frozenset()}),
        (Model(name="n", when=dt.date(2026, 1, 2)), {"name": "n", "when": "2026-01-02", "inner": []}),
        ([Model(name="n", when=dt.date(2026, 1, 2))], [{"name": "n", "when": "2026-01-02", "inner": []}]),
        (pathlib.PurePosixPath("a/b"), pathlib.Path("a/b")),
        (10**4000, 10**4000),
        (-0.0, 0.0),
        (5e-324, 5e-324),
        (1e308, 1e308),
        ("\x00\u2028\U0001f642", "\x00\u2028\U0001f642"),
        ({"": {"": []}}, {"": {"": []}}),
        (dt.datetime(2026, 3, 29, 2, 30, tzinfo=dt.timezone(dt.timedelta(hours=2))), None),
        (decimal.Decimal("1.100"), decimal.Decimal("1.100")),
        (decimal.Decimal("Infinity"), decimal.Decimal("Infinity")),
        (uuid.UUID(int=5), uuid.UUID(int=5)),
        (dt.timedelta(days=-1, microseconds=1), dt.timedelta(days=-1, microseconds=1)),
        ({(1, "a"), ((2,), frozenset())}, {(1, "a"), ((2,), frozenset())}),
    ],
    ids=lambda v: type(v).__name__,
)
def test_values_and_what_comes_back(value: Any, expected: Any) -> None:
    back = again(value)
    wanted = value if expected is None else expected
    assert back == wanted
    assert type(back) is type(wanted)


class Cyclic(dict[str, Any]):
    pass


@dataclasses.dataclass(repr=False)
class Unset:
    never: int = dataclasses.field(init=False)


class Broken:
    def model_dump(self, mode: str) -> Any:
        raise KeyError(mode)


CYCLE = Cyclic()
CYCLE["me"] = CYCLE


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        {"a": [float("-inf")]},
        object(),
        lambda: None,
        Point,
        1j,
        {1: "a"},
        {None: "a"},
        {(1, 2): "a"},
        {Colour.RED: 1},
        "\ud800",
        {"\udfff": 1},
        10**5000,
        CYCLE,
        {Point(1, dt.date(2026, 1, 2))},
        {(1, Point(1, dt.date(2026, 1, 2)))},
        iter([1]),
        bytearray(b"x"),
        memoryview(b"x"),
        ValueError("x"),
        Unset(),
        Broken(),
    ],
    ids=lambda v: type(v).__name__,
)
def test_what_json_cannot_carry_is_refused_by_the_fields_name(value: Any) -> None:
    with pytest.raises(NotSerializable, match=r"input\.rows") as caught:
        dumps(value, field="input.rows")
    assert caught.value.field == "input.rows"


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_depth_is_limited() -> None:
    assert again(nested(limits.DEPTH_MAX)) == nested(limits.DEPTH_MAX)
    with pytest.raises(NotSerializable, match="nested deeper than 64 levels"):
        dumps(nested(limits.DEPTH_MAX + 1), field="input")
    with pytest.raises(NotSerializable):
        dumps(nested(100_000), field="input")


def test_size_is_limited_in_bytes_of_utf_8() -> None:
    assert dumps("x" * 98, field="result", limit=100)
    assert dumps("é" * 49, field="result", limit=100)
    with pytest.raises(ValueTooLarge, match="result is 102 bytes of JSON; at most 100") as caught:
        dumps("é" * 50, field="result", limit=100)
    assert caught.value.field == "result"
    with pytest.raises(ValueTooLarge):
        dumps(b"x" * limits.VALUE_MAX, field="result")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"NaN",
        b'{"a": Infinity}',
        b"[-Infinity]",
        b"\xff\xfe\xfd",
        b'"\xff"',
        b"1 2",
        b"{'a': 1}",
        b"[" * 100_000,
        b"9" * 5_000,
        b'{"$perdure":"date","value":"yesterday"}',
        b'{"$perdure":"date","value":5}',
        b'{"$perdure":"datetime","value":null}',
        b'{"$perdure":"time","value":"25:00"}',
        b'{"$perdure":"timedelta","value":[1,2,3,4,5,6,7,8]}',
        b'{"$perdure":"timedelta","value":[999999999999,0,0]}',
        b'{"$perdure":"timedelta","value":"abc"}',
        b'{"$perdure":"bytes","value":"a"}',
        b'{"$perdure":"bytes","value":["a"]}',
        b'{"$perdure":"decimal","value":"a lot"}',
        b'{"$perdure":"decimal","value":{}}',
        b'{"$perdure":"uuid","value":"5"}',
        b'{"$perdure":"uuid","value":5}',
        b'{"$perdure":"path","value":5}',
        b'{"$perdure":"set","value":[{"a":1}]}',
        b'{"$perdure":"set","value":5}',
        b'{"$perdure":"frozenset","value":[[{}]]}',
        b'{"$perdure":"object","value":[1]}',
        b'{"$perdure":"object","value":[["a"]]}',
        b'{"$perdure":"object","value":[[[],1]]}',
    ],
    ids=lambda d: repr(d[:44]),
)
def test_text_that_dumps_never_wrote_is_a_decode_error(data: bytes) -> None:
    with pytest.raises(DecodeError, match="recorded value"):
        loads(data)


@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,$perduvalset019 ', max_size=40).map(str.encode))
def test_any_bytes_are_a_value_or_a_decode_error(data: bytes) -> None:
    try:
        value = loads(data)
    except DecodeError:
        return
    assert again(value) == value


@pytest.mark.parametrize(
    "data", [b'{"$perdure":["set"],"value":1}', b'{"$perdure":"new","value":1}', b'{"$perdure":"set"}']
)
def test_objects_of_other_programs_that_only_look_tagged_are_left_alone(data: bytes) -> None:
    assert loads(data) == json.loads(data)
