"""Step identities and tracks: where in a task the code is, in names that are the same in every attempt.

A step at the root is `/read-schema`; in item 12 of the track `files` it is `files@000000000012/review`; nested tracks
repeat that. A key follows in brackets, an occurrence from the second on behind `#`. Item numbers have 12 digits, so in
the order of ids all steps of the items before n of a track t lie between `t@` and `t@<n>`: that is how the engine finds
what a checkpoint has made unnecessary.

The order in which concurrent sections (threads, asyncio tasks) reach a name is not the same in every attempt. So a
repeat is numbered only within one section, after the use before it has ended; anything else is `DuplicateStep`.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import re
import threading
from collections.abc import AsyncIterable, AsyncIterator, Collection, Iterable, Iterator, Sequence, Sized
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Protocol
from urllib.parse import quote
from weakref import WeakKeyDictionary

from perdure.exchange import Exchange, Flow
from perdure.schemas import limits
from perdure.schemas.errors import DuplicateStep, StepError

_SPECIAL = re.compile(r"[/@\[\]#%\x00-\x1f\x7f-\x9f]")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
UNITS_MAX = (1 << 63) - 1
"""What a record can count."""


def quoted(name: str) -> str:
    """A user's name as part of an identity: `/ @ [ ] # %` and control characters are percent-encoded.

    Raises `StepError` for what is no name.
    """
    if not isinstance(name, str) or not name:
        raise StepError(f"{name!r} is no name for a step or track; give a text")
    return _quoted(name)


@lru_cache(maxsize=4096)
def _quoted(name: str) -> str:
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise StepError(f"the name {name!r} is no valid text: {error}") from error
    if size > limits.TEXT_MAX:
        raise StepError(f"the name {name[:40]!r}... is {size:,} bytes long; at most {limits.TEXT_MAX:,} are taken")
    return _SPECIAL.sub(lambda found: quote(found[0], safe=""), name)


def _key_text(key: object) -> str:
    """A step's key as text. Raises `StepError` for what has another text in every process."""
    text = str(key)
    if not isinstance(key, str) and (_ADDRESS.search(text) or isinstance(key, (set, frozenset))):
        raise StepError(f"the key {text:.80} is another in every attempt; give a text, number, date or the like")
    return text


def has_room(positions: Collection[str], path: str) -> bool:
    """Whether a checkpoint takes the position of one more track beside these; of one that it has in any case."""
    if path in positions:
        return True
    size = sum(len(known.encode()) + 9 for known in (*positions, path))
    return len(positions) < limits.POSITIONS_MAX and size <= limits.POSITIONS_BYTES - limits.TEXT_MAX


class Scope:
    """The root of a task or one item of a track: what its steps and tracks are numbered within."""

    __slots__ = ("_counts", "_open", "_sections", "outer", "path")

    def __init__(self, path: str = "", outer: Scope | None = None) -> None:
        self.path = path
        self.outer = outer
        self._counts: dict[str, int] = {}
        self._sections: dict[str, int] = {}
        self._open: set[str] = set()

    def step(self, name: str, key: object, section: int) -> tuple[str, str]:
        """(identity without occurrence, identity) of a step that begins now and lasts until `ended`.

        Raises `DuplicateStep` or `StepError`.
        """
        base = f"{self.path}/{quoted(name)}" if key is None else f"{self.path}/{quoted(name)}[{quoted(_key_text(key))}]"
        step_id = self._numbered(base, base, section)
        if len(step_id) * 4 > limits.STEP_ID_MAX and len(step_id.encode()) > limits.STEP_ID_MAX:
            raise StepError(f"the step {step_id[:80]!r}... has an identity of more than {limits.STEP_ID_MAX:,} bytes; "
                            "use shorter names and keys")  # fmt: skip
        self._open.add(base)
        return base, step_id

    def ended(self, base: str) -> None:
        """The open step of that identity has ended, in whatever way."""
        self._open.discard(base)

    def track(self, name: str, section: int) -> str:
        """The path of a track that begins now. Raises `DuplicateStep` or `StepError`."""
        path = f"{self.path}/{quoted(name)}" if self.path else quoted(name)
        return self._numbered(path + "@", path, section)

    def within(self, other: Scope) -> bool:
        """Whether this scope is the other one or lies in it."""
        return self is other or (self.outer is not None and self.outer.within(other))

    def repeats(self) -> dict[str, int]:
        """Name in this scope -> uses, of those used more than once."""
        return {name: count for name, count in self._counts.items() if count > 1}

    def _numbered(self, name: str, base: str, section: int) -> str:
        count = self._counts.get(name, 0) + 1
        if count > 1 and (name in self._open or self._sections.get(name, 0) != section):
            raise DuplicateStep(f"{base} is used by two concurrent sections, so which is which depends on chance; "
                                "tell them apart with key=")  # fmt: skip
        self._counts[name] = count
        if section:
            self._sections[name] = section
        return base if count == 1 else f"{base}#{count}"


_here: ContextVar[Scope] = ContextVar("perdure_scope")
"""Where this context is; unset: where the task's own section is."""


class Sections:
    """The threads and asyncio tasks that an attempt's user code runs in, and the scope each is in."""

    def __init__(self, *, is_async: bool) -> None:
        self._is_async = is_async
        self._own: object = None
        self._numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._next = itertools.count(1)
        self.trunk = Scope()
        """Where the task's own section is."""

    def begin(self) -> None:
        """The present section runs the task function."""
        self._own = self._present()
        _here.set(self.trunk)

    def number(self) -> int:
        """The present section: 0 is the one that runs the task function."""
        present = self._present()
        if present is self._own:
            return 0
        found = self._numbers.get(present)
        return self._numbers.setdefault(present, next(self._next)) if found is None else found

    @property
    def scope(self) -> Scope:
        """The innermost track item that is open in the present section, or the root."""
        return _here.get(self.trunk)

    def move(self, scope: Scope) -> None:
        """The present section goes on in `scope`."""
        _here.set(scope)
        if self.number() == 0:
            self.trunk = scope

    def open_scopes(self) -> Iterator[Scope]:
        """The scopes that the task's own section is in, innermost first."""
        scope: Scope | None = self.trunk
        while scope is not None:
            yield scope
            scope = scope.outer

    def _present(self) -> object:
        if self._is_async:
            try:
                return asyncio.current_task() or threading.current_thread()
            except RuntimeError:  # a thread that the task started
                return threading.current_thread()
        return threading.current_thread()


class Place(Protocol):
    """The part of an attempt that a track stands on."""

    sections: Sections

    def open_track(self, name: str) -> tuple[str, int]:
        """(path, items done) of a track that begins here."""

    def at_item(self, path: str, done: int) -> Flow[None]:
        """Stand between two items of a track: a boundary."""

    def leave_track(self, path: str) -> None:
        """A track was left in the middle of an item."""

    def report_units(self, done: int, total: int | None) -> None:
        """Say how far the outermost track is."""

    @property
    def exchange(self) -> Exchange:
        """What carries flows through."""


class _Track:
    """What sync and async tracks have in common: their place, their position and the scope of the open item."""

    _item: Scope | None = None

    def __init__(self, place: Place, iterable: Any, total: int | None, name: str) -> None:
        if isinstance(iterable, (set, frozenset)):
            raise StepError("a set has another order in every process, so a track over it cannot resume; sort it first")
        self._place, self._sections = place, place.sections
        self._outer, self._section = self._sections.scope, self._sections.number()
        self._path, self._done = place.open_track(name)
        self._total = _count(total) if total is not None else len(iterable) if isinstance(iterable, Sized) else None

    def _between(self) -> Flow[None]:
        """End the open item, if there is one, and stand at a boundary. Raises `StepError`."""
        if self._item is not None:
            if not self._sections.scope.within(self._item):
                raise StepError(f"the track {self._path} goes on in the middle of an item of another one: side by side "
                                "they have no common position; go through zip(...) with one track")  # fmt: skip
            self._leave()
            self._done += 1
        if not self._outer.path:
            self._place.report_units(self._done, self._total)
        yield from self._place.at_item(self._path, self._done)

    def _enter(self) -> None:
        self._item = Scope(f"{self._path}@{self._done:012d}", self._outer)
        self._sections.move(self._item)

    def _leave(self) -> None:
        self._item = None
        self._sections.move(self._outer)

    def __del__(self) -> None:
        # A loop left by `break` or an exception drops its iterator at once: what follows is outside of the item.
        item = self._item
        if item is not None and self._sections.number() == self._section and item in self._sections.open_scopes():
            self._leave()
            self._place.leave_track(self._path)


class SyncTrack(_Track, Iterator[Any]):
    """`for item in ctx.track(...)`."""

    def __init__(self, place: Place, iterable: Iterable[Any], total: int | None, name: str) -> None:
        super().__init__(place, iterable, total, name)
        self._items = _items(iterable, self._done)

    def __next__(self) -> Any:
        self._place.exchange.drive(self._between())
        item = next(self._items)
        self._enter()
        return item


class AsyncTrack(_Track, AsyncIterator[Any]):
    """`async for item in ctx.track(...)`, over a plain or an async iterable."""

    def __init__(
        self, place: Place, iterable: Iterable[Any] | AsyncIterable[Any], total: int | None, name: str
    ) -> None:
        super().__init__(place, iterable, total, name)
        self._items = _async_items(iterable, self._done)

    def __iter__(self) -> Iterator[Any]:
        raise StepError("in an async task a track is gone through with: async for item in ctx.track(...)")

    async def __anext__(self) -> Any:
        await asyncio.sleep(0)  # a loop that awaits nothing else must not keep the other tasks from running
        await self._place.exchange.drive_async(self._between())
        item = await anext(self._items)
        self._enter()
        return item


def _count(total: Any) -> int:
    """A track's `total`. Raises `StepError` for what counts nothing."""
    try:
        count: int = math.floor(total)
    except (TypeError, ValueError, OverflowError):  # no number, not a number, infinite
        count = -1
    if isinstance(total, bool) or count != total or not 0 <= count <= UNITS_MAX:
        raise StepError(f"a track's total is {total!r}; give a whole number of items, or nothing if it is not known")
    return count


def _items(iterable: Iterable[Any], done: int) -> Iterator[Any]:
    """What is left of an iterable after `done` items."""
    if isinstance(iterable, Sequence):
        return (iterable[index] for index in range(done, len(iterable)))
    return itertools.islice(iter(iterable), done, None)


async def _async_items(iterable: Iterable[Any] | AsyncIterable[Any], done: int) -> AsyncIterator[Any]:
    if isinstance(iterable, AsyncIterable):
        async for item in iterable:
            if done > 0:
                done -= 1
            else:
                yield item
    else:
        for item in _items(iterable, done):
            yield item
