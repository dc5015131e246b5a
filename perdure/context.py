"""`ctx`: what a task function is handed first, and all it needs to know of Perdure."""

from __future__ import annotations

import datetime as dt
import logging
import math
from collections.abc import AsyncIterable, Callable, Iterable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from perdure.schemas import limits
from perdure.schemas.errors import InvalidRequest, StepError
from perdure.tracks import UNITS_MAX, AsyncTrack, SyncTrack

if TYPE_CHECKING:
    from perdure.attempt import Attempt

running_step: ContextVar[str | None] = ContextVar("perdure_running_step", default=None)
"""Identity of the step whose function runs in this context."""


def _guarded(kind: type, name: str) -> Callable[..., Any]:
    plain = getattr(kind, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        step = running_step.get()
        if step is not None:
            raise StepError(f"ctx.state is read-only inside a step ({step}): return the value and assign it outside")
        return plain(self, *args, **kwargs)

    method.__name__ = name
    method.__doc__ = plain.__doc__
    return method


class State(dict[str, Any]):
    """A task's own state: a dict of JSON values that refuses changes while a step runs, also to the lists and dicts in
    it that the step gets from it. Raises `StepError`.
    """

    __setitem__ = _guarded(dict, "__setitem__")
    __delitem__ = _guarded(dict, "__delitem__")
    __ior__ = _guarded(dict, "__ior__")
    setdefault = _guarded(dict, "setdefault")
    update = _guarded(dict, "update")
    pop = _guarded(dict, "pop")
    popitem = _guarded(dict, "popitem")
    clear = _guarded(dict, "clear")

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        return value if running_step.get() is None else _read_only(value)

    def get(self, key: str, default: Any = None, /) -> Any:
        """The value of `key`, or `default`."""
        try:
            return self[key]
        except KeyError:
            return default

    def __reduce__(self) -> Any:
        return dict, (dict(self),)  # a copy is nobody's state


class _Items(list[Any]):
    """A list in the state, as a step sees it."""

    __setitem__ = _guarded(list, "__setitem__")
    __delitem__ = _guarded(list, "__delitem__")
    __iadd__ = _guarded(list, "__iadd__")
    __imul__ = _guarded(list, "__imul__")
    append = _guarded(list, "append")
    extend = _guarded(list, "extend")
    insert = _guarded(list, "insert")
    remove = _guarded(list, "remove")
    pop = _guarded(list, "pop")
    clear = _guarded(list, "clear")
    sort = _guarded(list, "sort")
    reverse = _guarded(list, "reverse")

    def __reduce__(self) -> Any:
        return list, (list(self),)


def _read_only(value: Any) -> Any:
    if isinstance(value, list):
        return _Items(map(_read_only, value))
    if isinstance(value, dict):
        return State((name, inner) for name, inner in value.items())  # which makes read-only what is taken out of it
    return value


class Context:
    """One attempt of a task, as its function sees it. Usable from threads of the task.

    In an `async def` task `step`, `checkpoint` and the items of `track` are awaited; nothing else changes.
    """

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt

    # What the attempt is ----------------------------------------------------------------------------------------------

    @property
    def task_id(self) -> str:
        """Routing key, slash, local id."""
        return self._attempt.grant.task_id

    @property
    def type(self) -> str:
        """Registered task type."""
        return self._attempt.grant.type

    @property
    def input(self) -> Any:
        """The input value as a whole."""
        return self._attempt.input

    @property
    def config(self) -> dict[str, Any]:
        """The `agent_config` that the task was submitted with."""
        return self._attempt.config

    @property
    def attempt(self) -> int:
        """Runs charged to `max_attempts`, this one included."""
        return self._attempt.grant.attempt

    @property
    def epoch(self) -> int:
        """Grants so far; raised by every restart, also by those that cost no attempt."""
        return self._attempt.grant.epoch

    @property
    def started_at(self) -> dt.datetime:
        """When this attempt started, UTC."""
        return _time(self._attempt.started_at)

    @property
    def timeout(self) -> dt.timedelta | None:
        """The run timeout of one attempt."""
        ms = self._attempt.grant.policy.run_timeout
        return None if ms is None else dt.timedelta(milliseconds=ms)

    @property
    def deadline(self) -> dt.datetime | None:
        """When this attempt will be timed out, by its run timeout or the task's total timeout, UTC."""
        at = self._attempt.deadline
        return None if at is None else _time(at)

    @property
    def cancelled(self) -> bool:
        """Whether the task has been told to stop for good (cancelled or timed out). The next boundary will end it."""
        return self._attempt.stopping()

    @property
    def log(self) -> logging.Logger:
        """A logger of the task type; its lines go to the task's log."""
        return self._attempt.log

    @property
    def state(self) -> State:
        """The task's own state, restored before the first line and saved with the track positions."""
        return self._attempt.state

    @property
    def idempotency_key(self) -> str:
        """A key for outside systems, the same in every attempt: of the step that runs, or of the track item or task
        outside of steps.
        """
        return self._attempt.idempotency_key()

    # What it does -----------------------------------------------------------------------------------------------------

    def step(
        self,
        name: str,
        fn: Callable[..., Any],
        /,
        *args: Any,
        key: object = None,
        at_most_once: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Call `fn(*args, **kwargs)` and return its result as JSON gives it back, or return what an earlier attempt
        recorded. Blocks until the result is in the log; in async tasks to be awaited, `fn` may then be async.

        `key` tells apart uses of one name (give it where the order of uses can differ). `at_most_once` records the
        start first: should a crash leave the outcome unknown, the task fails and waits for a person.

        Raises what `fn` raises; `DuplicateStep`, `StepMismatch`, `NotSerializable` and `ValueTooLarge` end the task.
        """
        return self._attempt.exchange.drive(self._attempt.step(name, fn, args, kwargs, key, at_most_once))

    def track(self, iterable: Iterable[Any], total: int | None = None, name: str | None = None) -> Any:
        """Go through `iterable` item by item, from the position of the newest checkpoint, reporting progress.

        The iterable must give the same items in the same order in every attempt. The start of an item is a boundary:
        there checkpoints are saved and the task pauses, drains or stops. Every item is done at least once. In a
        thread or asyncio task that user code started, a track has no saved position.
        """
        return SyncTrack(self._attempt, iterable, total, name or "track")

    def checkpoint(self) -> Any:
        """Save state and positions now. Blocks until recorded; in async tasks to be awaited."""
        return self._attempt.exchange.drive(self._attempt.boundary(explicit=True))

    def progress(
        self,
        fraction: float | None = None,
        *,
        done: int | None = None,
        total: int | None = None,
        step: str | None = None,
    ) -> None:
        """Say where the task stands: a fraction from 0 to 1, or units, and what it is doing. Cheap.

        Raises `InvalidRequest` naming what cannot be shown.
        """
        shown = None if step is None else str(step)[: limits.TEXT_MAX].encode("utf-8", "replace").decode()
        units_done, units_total = _units(done, "done"), _units(total, "total")
        if fraction is None and units_done is not None and units_total:
            fraction = units_done / units_total
        if fraction is not None:
            if not math.isfinite(fraction):
                raise InvalidRequest(f"the progress fraction is {fraction}; give 0 to 1", field="fraction")
            fraction = min(max(float(fraction), 0.0), 1.0)
        self._attempt.progress(fraction, units_done, units_total, shown)

    def milestone(self, name: str) -> None:
        """Say that a named point has been passed; later attempts passing it again say nothing."""
        self._attempt.milestone(name)

    def defer(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        """Call `fn` when the attempt ends in any way but the death of its process; the last deferred comes first."""
        self._attempt.defer(fn, args, kwargs)


class AsyncContext(Context):
    """The `ctx` of an `async def` task."""

    def step(
        self,
        name: str,
        fn: Callable[..., Any],
        /,
        *args: Any,
        key: object = None,
        at_most_once: bool = False,
        **kwargs: Any,
    ) -> Any:
        """See `Context.step`. The identity is taken at the call, not when it is awaited."""
        return self._attempt.exchange.drive_async(self._attempt.step(name, fn, args, kwargs, key, at_most_once))

    def track(
        self, iterable: Iterable[Any] | AsyncIterable[Any], total: int | None = None, name: str | None = None
    ) -> AsyncTrack:
        """See `Context.track`; to be gone through with `async for`."""
        return AsyncTrack(self._attempt, iterable, total, name or "track")

    def checkpoint(self) -> Any:
        """See `Context.checkpoint`."""
        return self._attempt.exchange.drive_async(self._attempt.boundary(explicit=True))


def _units(count: int | None, field: str) -> int | None:
    try:
        units = None if count is None else int(count)
    except (TypeError, ValueError, OverflowError):  # no number, not a number, infinite
        units = -1
    if units is not None and not 0 <= units <= UNITS_MAX:
        raise InvalidRequest(f"progress: {field} is {count!r}; give a number of units from 0 on", field=field)
    return units


def _time(ms: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(ms / 1000, dt.UTC)
