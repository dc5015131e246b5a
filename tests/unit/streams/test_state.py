"""Rows over a store: what is put is read, undone and rolled back as a whole, also against a plain dictionary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.schemas import codec
from perdure.schemas.rows import Config, Counter, Mark, Ready, Session, Timer
from perdure.streams import ready_front, tables
from perdure.streams.state import State
from perdure.streams.store import MemoryStore

SCOPES = [tables.MARKS, tables.task("q/t"), tables.task("q/t2"), tables.ready("q", "t")]
SUFFIXES = [b"", b"a", b"ab", b"b", b"\x00", b"pa", b"pb", b"\xff"]
CHANGES = st.one_of(
    st.tuples(st.just("put"), st.sampled_from(SCOPES), st.sampled_from(SUFFIXES), st.integers(0, 3)),
    st.tuples(st.just("new"), st.sampled_from(SCOPES), st.sampled_from(SUFFIXES), st.integers(0, 3)),
    st.tuples(st.just("delete"), st.sampled_from(SCOPES), st.sampled_from(SUFFIXES)),
    st.sampled_from([("mark",), ("undo",), ("commit",), ("rollback",), ("reopen",)]),
)


def row(scope: bytes, suffix: bytes, value: int) -> Any:
    """A place in the ready queue is always the same task's."""
    return Ready(task_id=f"q/{suffix!r}") if scope[:1] == b"q" else Mark(value=value)


def contents(state: State) -> dict[tuple[bytes, bytes], Any]:
    found = {(scope, suffix): r for scope in SCOPES for suffix, r in state.scan(scope)}
    for (scope, suffix), r in found.items():
        assert state.get(scope, suffix) == r
    for scope in SCOPES:
        assert [k for k, _ in state.scan(scope)] == sorted(k for k, _ in state.scan(scope))
        assert [k for k, _ in state.scan(scope, start=b"b")] == [k for k, _ in state.scan(scope) if k >= b"b"]
        assert [k for k, _ in state.scan(scope, prefix=b"p")] == [k for k, _ in state.scan(scope) if k[:1] == b"p"]
    return found


@given(st.lists(CHANGES, max_size=40), st.sampled_from([1, 2, 1_000]))
@settings(max_examples=200)
def test_state_is_a_dictionary_with_marks_and_commits(changes: list[Any], places: int) -> None:
    with patch.object(ready_front, "PLACES", places):
        _check_changes(changes)


def _check_changes(changes: list[Any]) -> None:
    store = MemoryStore()
    state = State(store, 0, 1)
    now: dict[tuple[bytes, bytes], Any] = {}
    marked, committed = dict(now), dict(now)
    for change in changes:
        match change:
            case "put", scope, suffix, value:
                state.put(scope, suffix, row(scope, suffix, value))
                now[scope, suffix] = row(scope, suffix, value)
            case "new", scope, suffix, value if (scope, suffix) not in now:
                state.put_new(scope, suffix, row(scope, suffix, value))
                now[scope, suffix] = row(scope, suffix, value)
            case "delete", scope, suffix:
                state.put(scope, suffix, None)
                now.pop((scope, suffix), None)
            case ("mark",):
                state.mark()
                marked = dict(now)
            case ("undo",):
                state.undo()
                now = dict(marked)
            case ("commit",):
                store.apply(state.writes())
                state.committed()
                marked, committed = dict(now), dict(now)
            case ("rollback",):
                state.rolled_back()
                now, marked = dict(committed), dict(committed)
            case ("reopen",):
                state = State(store, 0, 1)
                now, marked = dict(committed), dict(committed)
        assert contents(state) == now
        ready = [suffix for scope, suffix in now if scope == SCOPES[3]]
        head = state.first_ready(SCOPES[3])
        assert (head and head[0]) == min(ready, default=None)
        assert (head and head[1]) == (now[SCOPES[3], min(ready)].task_id if ready else None)


def test_what_is_held_of_a_ready_queue_does_not_grow_with_it() -> None:
    store = CountingStore()
    state = State(store, 0, 1)
    scope = tables.ready("q", "t")
    for n in range(5_000):
        state.put(scope, tables.place(5, n), Ready(task_id=f"q/{n}"))
    store.apply(state.writes())
    state.committed()
    store.read = 0
    for n in range(5_000):
        assert state.first_ready(scope) == (tables.place(5, n), f"q/{n}")
        assert store.read <= n + ready_front.PLACES
        state.put(scope, tables.place(5, n), None)
        state.put(scope, tables.place(4, n), Ready(task_id=f"q/later-{n}"))
    assert state.first_ready(scope) == (tables.place(4, 0), "q/later-0")


def test_a_row_that_comes_and_goes_in_one_transaction_is_never_written() -> None:
    state = State(MemoryStore(), 0, 1)
    scope = tables.ready("q", "t")
    state.put_new(scope, b"a", Ready(task_id="q/a"))
    state.put(scope, b"a", None)
    assert state.writes() == {}
    state.mark()
    state.put_new(scope, b"b", Ready(task_id="q/b"))
    state.put(scope, b"b", None)
    state.undo()
    assert (state.writes(), state.first_ready(scope)) == ({}, None)


def test_of_a_task_that_is_unknown_the_store_is_asked_once() -> None:
    store = CountingStore()
    state = State(store, 0, 1)
    store.asked = 0
    scope = tables.task("q/t")
    assert state.task("q/t") is None
    assert [state.get(scope, suffix) for suffix in (tables.SPEC, tables.LIVE, tables.answer("c"))] == [None] * 3
    assert store.asked == 1


def test_timers_that_are_gone_are_not_looked_through_again() -> None:
    store = CountingStore()
    state = State(store, 0, 1)
    for due in (1, 2, 3):
        state.put(tables.TIMERS, tables.timer(due, "run", "t"), Timer(task_id="t", kind="run"))
    store.apply(state.writes())
    state.committed()
    state.put(tables.TIMERS, tables.timer(1, "run", "t"), None)
    state.look_for_timers()
    store.starts.clear()
    state.look_for_timers()
    assert (state.next_timer, store.starts) == (2, [tables.number(2)] * 2)  # none of them in wall time


class CountingStore(MemoryStore):
    """Says how much is read of it."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.asked = 0
        self.starts: list[bytes] = []

    def get(self, key: bytes) -> bytes | None:
        self.asked += 1
        return super().get(key)

    def scan(self, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        self.starts.append(start)
        for found in super().scan(prefix, start):
            self.read += 1
            yield found


def test_what_is_derived_from_rows_follows_undo_and_rollback() -> None:
    store = MemoryStore()
    state = State(store, 0, 1)
    session = Session(session="s", worker_id="w", types={}, queues=[], slots=1)
    state.put(tables.SESSIONS, b"s", session)
    state.put(tables.TIMERS, tables.timer(5, "run", "t"), Timer(task_id="t", kind="run"))
    state.mark()
    state.put(tables.SESSIONS, b"s", None)
    state.put(tables.TIMERS, tables.timer(3, "run", "t"), Timer(task_id="t", kind="run"))
    assert (state.sessions, state.next_timer) == ({}, 3)
    state.undo()
    state.look_for_timers()
    assert (state.sessions, state.next_timer) == ({"s": session}, 5)
    state.rolled_back()
    assert (state.sessions, state.next_timer) == ({}, None)


def test_writes_are_the_changes_since_the_last_commit() -> None:
    store = MemoryStore()
    state = State(store, 0, 1)
    state.put(tables.COUNTERS, b"a", Counter(value=1))
    assert state.writes() == {tables.COUNTERS + b"a": codec.encode(Counter(value=1))}
    store.apply(state.writes())
    state.committed()
    assert state.writes() == {}
    state.put(tables.COUNTERS, b"a", None)
    assert state.writes() == {tables.COUNTERS + b"a": None}


def test_routing_keys_and_types_come_from_the_applied_configuration() -> None:
    state = State(MemoryStore(), 0, 1)
    assert state.routing_keys() == {"default"}
    state.put(tables.CONFIG, b"queue/etl", Config(version=1, content=b'{"routing_keys":["etl","etl~1"]}'))
    state.put(tables.CONFIG, b"type/a", Config(version=2, content=b'{"queue":"typed"}'))
    assert state.routing_keys() == {"default", "etl", "etl~1", "typed"}
    assert state.config("type/a") == (2, {"queue": "typed"}, b'{"queue":"typed"}')
    state.put(tables.CONFIG, b"type/a", Config(version=3, content=None))
    assert state.config("type/a") is None
    assert state.routing_keys() == {"default", "etl", "etl~1"}
