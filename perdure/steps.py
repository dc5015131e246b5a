"""Recorded steps, and how a step that is asked for again is recognised."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from perdure.schemas import values
from perdure.schemas.common import StepRecord
from perdure.schemas.errors import NotSerializable
from perdure.schemas.inbox import StepPage
from perdure.tracks import Scope

UNHASHED = "-"
"""Hash of arguments that are no JSON: they are not compared."""


class OpenStep(NamedTuple):
    """A step on its way."""

    scope: Scope
    base: str
    """Identity without occurrence."""
    step_id: str
    name: str
    function: str
    args_hash: str
    at_most_once: bool


class RecordedSteps:
    """What earlier attempts recorded, page by page in the order of step ids. The first page comes unasked."""

    def __init__(self, total: int) -> None:
        self.complete = total == 0
        self.last = ""
        """Last step id read."""
        self._asked = {""}
        self._records: dict[str, StepRecord] = {}

    def ask(self, after: str) -> bool:
        """Whether the page behind `after` has not been asked for yet; from now on it has."""
        known = after in self._asked
        self._asked.add(after)
        return not known

    def add(self, page: StepPage) -> None:
        """Take the next page; one that was read before is passed over."""
        if self.complete or page.after != self.last:
            return
        self._records.update((record.step_id, record) for record in page.steps)
        if page.steps:
            self.last = page.steps[-1].step_id
        self.complete = not page.more

    def went_on(self, after: str) -> bool:
        """Whether the page behind `after` has been read."""
        return self.complete or self.last > after

    def settled(self, step_id: str) -> bool:
        """Whether the page that would hold the step has been read."""
        return self.complete or step_id <= self.last

    def take(self, step_id: str) -> StepRecord | None:
        """The record of a step, once: an identity is not asked for again."""
        return self._records.pop(step_id, None)


def differences(record: StepRecord, function: str, args_hash: str) -> list[str]:
    """How the step asked for differs from the recorded one, in words."""
    found = []
    if record.function != function:
        found.append(f"it was recorded with {record.function} and is asked for with {function}")
    if record.args_hash != args_hash and UNHASHED not in (record.args_hash, args_hash):
        found.append("it was recorded with other arguments")
    return found


def unwrapped(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """What a `functools.partial` stands for: the function and all arguments."""
    inner: Any = fn
    while isinstance(inner, functools.partial):
        inner, args, kwargs = inner.func, inner.args + args, inner.keywords | kwargs
    return inner, args, kwargs


def hash_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """A hash over arguments; `UNHASHED` if they are no JSON."""
    try:
        text = values.dumps([args, kwargs], field="arguments", limit=sys.maxsize)
    except NotSerializable:
        return UNHASHED
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def name_of(fn: Callable[..., Any]) -> str:
    """Dotted name of what a step calls; of its class, if it has no name."""
    named = fn if hasattr(fn, "__qualname__") else type(fn)
    return f"{getattr(named, '__module__', None) or 'builtins'}.{named.__qualname__}"  # methods of built-in types: none
