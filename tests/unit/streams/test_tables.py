"""Keys: no text reaches into another's key, order is kept, and what goes in comes out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from perdure.schemas import ids
from perdure.streams import tables

NAMES = st.text("abc~\x00\x01\x02\xff/", max_size=6)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | NAMES
QUEUES = st.text("ab~.-", min_size=1, max_size=4)
NUMBERS = st.integers(0, 2**62)


@given(TEXT, TEXT)
def test_the_order_of_texts_is_kept(one: str, other: str) -> None:
    assert (tables.text(one) < tables.text(other)) == (one.encode() < other.encode())
    assert not tables.text(one).startswith(tables.text(other)) or one == other


@given(NUMBERS, NUMBERS)
def test_the_order_of_numbers_is_kept(one: int, other: int) -> None:
    assert (tables.number(one) < tables.number(other)) == (one < other)


@given(QUEUES, NAMES, QUEUES, NAMES)
def test_no_task_lies_in_the_scope_of_another(queue: str, local: str, queue2: str, local2: str) -> None:
    one, other = ids.join(queue, local), ids.join(queue2, local2)
    assert not tables.task(one).startswith(tables.task(other)) or one == other


@given(QUEUES, NAMES, st.binary(max_size=5))
def test_a_task_is_read_back_from_any_of_its_keys(queue: str, local: str, more: bytes) -> None:
    task_id = ids.join(queue, local)
    scope, found = tables.task_of(tables.task(task_id) + b"s" + more)
    assert (scope, found) == (tables.task(task_id), task_id)


@given(NUMBERS, NAMES, NAMES)
def test_a_timer_is_read_back_from_its_key(due: int, kind: str, task_id: str) -> None:
    suffix = tables.timer(due, kind, task_id)
    assert tables.timer_due(suffix) == due
    assert tables.timer_of(suffix) == (kind, task_id)


@given(NUMBERS, NUMBERS, NAMES)
def test_timers_are_ordered_by_time(one: int, other: int, task_id: str) -> None:
    assert (tables.timer(one, "z", task_id) < tables.timer(other, "a", task_id)) or one >= other


@given(st.integers(0, 9), NUMBERS, st.integers(0, 9), NUMBERS)
def test_places_are_ordered_by_priority_then_order(p: int, order: int, q: int, other: int) -> None:
    assert (tables.place(p, order) < tables.place(q, other)) == ((-p, order) < (-q, other))


@given(QUEUES, NAMES, st.sampled_from([b"s", b"c", b"r", b"a\x00", b"pl", b"p", b"bl", b"l"]))
def test_of_a_tasks_rows_only_its_latest_reports_are_of_the_session_class(
    queue: str, local: str, suffix: bytes
) -> None:
    key = tables.task(ids.join(queue, local)) + suffix
    assert tables.is_durable(key) == (suffix != tables.LIVE)


def test_the_classes_of_the_other_tables() -> None:
    durable = [tables.TIMERS, tables.START_TIMERS, tables.CONFIG, tables.COUNTERS, tables.CLOCK, tables.WINDOW, tables.outbox(1),
               tables.leases("s"), tables.ready("q", "t"), tables.held("q", "t"), tables.unbound("t")]  # fmt: skip
    session = [tables.SOFT_TIMERS, tables.SESSIONS, tables.MARKS, tables.POSITION, tables.waiters("q/t")]
    assert all(tables.is_durable(scope + b"x") for scope in durable)
    assert not any(tables.is_durable(scope + b"x") for scope in session)
    assert len({scope[:1] for scope in (*durable, *session, tables.task("q/t"))}) == len(durable) + len(session) + 1
