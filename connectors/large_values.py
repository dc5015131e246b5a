"""Values too large for a record: their JSON text lies in a store of blobs, and a reference travels in their place.

Each task has its own: a blob's name begins with a digest of the task's id, so two tasks never share one, and what
belongs to a task is known from its name alone. `sweep` deletes what belongs to no task (docs/decisions/0008).
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

from perdure.connectors.blobs import Blobs, open_blobs
from perdure.schemas import limits, references, values
from perdure.schemas.errors import ConfigurationError, InfrastructureError, NotFound, ValueLost, ValueTooLarge
from perdure.schemas.references import Reference

SETTING = "PERDURE_BLOBS"
SLICES = 256
"""Parts that `sweep` takes one at a time."""
_DAY_MS = 24 * 3600 * 1000
_HEAD_MAX = 8 * 1024
"""Bytes that hold the first line of every blob: a task id, escaped."""


_NAME = re.compile(r"values/[^/]+/[0-9a-f]{2}/(?P<owner>[0-9a-f]{64})\.(?P<day>\d+)\.[0-9a-f]{64}")


class Place(NamedTuple):
    """Where large values lie, in words that fit into a child's settings."""

    url: str
    home: str
    """A folder name that no other namespace and no other life of this one has."""

    def open(self) -> tuple[Blobs, str]:
        """The store and the folder. Raises `ConfigurationError`."""
        return open_blobs(self.url), self.home


class LargeValues:
    """The store of a namespace's large values, or the lack of one. All methods block; for any thread.

    `open`: gives the blobs and the folder for them, at the first use; None: every value has to fit into its record.
    Errors of the store: `Unreachable` where trying again may help.
    """

    def __init__(
        self, open: Callable[[], tuple[Blobs, str]] | None = None, *, day: Callable[[], int] | None = None
    ) -> None:
        self._open, self._day = open, day or today

    @classmethod
    def at(cls, place: Place | None) -> LargeValues:
        """The store at a place; None: there is none."""
        return cls() if place is None else cls(place.open)

    @cached_property
    def _opened(self) -> tuple[Blobs, str]:
        if self._open is None:
            raise ConfigurationError(
                f"a value lies in the store of large values, which this process does not know: set {SETTING} as for "
                "those that write there"
            )
        return self._open()

    def text(self, value: Any, field: str) -> bytes:
        """The value's JSON text, if there is a place for it. Raises `NotSerializable`, `ValueTooLarge`."""
        data = values.dumps(value, field=field, limit=limits.LARGE_VALUE_MAX)
        if self._open is None and len(data) > limits.VALUE_MAX:
            raise ValueTooLarge(
                f"{field} is {len(data):,} bytes of JSON; at most {limits.VALUE_MAX:,} are taken, unless {SETTING} "
                "names a store for larger ones",
                field=field,
            )
        return data

    def carried(self, task_id: str, text: bytes) -> bytes:
        """What a record of the task carries for a value: its text, or a reference to what now lies in the store."""
        if len(text) <= limits.VALUE_MAX:
            return text
        preview = text[: 4 * limits.PREVIEW_MAX].decode(errors="ignore")[: limits.PREVIEW_MAX]
        reference = Reference(self._day(), hashlib.sha256(text).hexdigest(), len(text), preview)
        blobs, home = self._opened
        blobs.put(_name(home, task_id, reference), json.dumps(task_id).encode() + b"\n" + text)
        return reference.encode()

    def fetched(self, task_id: str, carried: bytes) -> bytes:
        """The JSON text that a record of the task carries or refers to. Raises `ValueLost`."""
        if not references.is_reference(carried):
            return carried
        reference = references.parse(carried)
        blobs, home = self._opened
        name = _name(home, task_id, reference)
        try:
            text = blobs.get(name).partition(b"\n")[2]
        except NotFound as error:
            raise ValueLost(f"a value of {reference.size:,} bytes of task {task_id} is lost: {error}") from error
        if len(text) != reference.size or hashlib.sha256(text).hexdigest() != reference.sha256:
            raise ValueLost(
                f"a value of task {task_id} is damaged: the blob {name} holds {len(text):,} bytes, and not the "
                f"{reference.size:,} with the recorded SHA-256; restore it from a copy"
            )
        return text

    def sweep(self, part: int, known: Callable[[str], bool]) -> int:
        """Delete what the slice `part` holds of tasks that are not known; how many blobs.

        `known` says whether the engine knows a task, after everything that was in the log when it was asked; it
        raises where it cannot tell, and nothing more is deleted then. What is younger than `UNCLAIMED_DAYS` stays: a
        value is written before the record that refers to it. What is written again meanwhile has another day in its
        name, so it is not what is deleted here. Any process may do this, at any time, and be killed over it.
        """
        oldest_kept = self._day() - limits.UNCLAIMED_DAYS
        old: dict[str, list[str]] = {}
        blobs, home = self._opened
        for blob in blobs.list(f"values/{home}/{part:02x}"):
            found = _NAME.fullmatch(blob.name)
            if found and int(found["day"]) < oldest_kept:
                old.setdefault(found["owner"], []).append(blob.name)
        deleted, nobodys = 0, []
        for owner, names in old.items():
            task_id = _owner(blobs, names[0], owner)
            if task_id is None:
                nobodys.append(names[0])
            elif not known(task_id):
                for name in names:
                    blobs.delete(name)
                deleted += len(names)
        if nobodys:
            raise InfrastructureError(f"blobs that do not say whose they are; look at them and delete them: {nobodys}")
        return deleted


def _name(home: str, task_id: str, reference: Reference) -> str:
    owner = _digest(task_id)
    return f"values/{home}/{owner[:2]}/{owner}.{reference.day}.{reference.sha256}"


def _owner(blobs: Blobs, name: str, owner: str) -> str | None:
    """The task that a blob belongs to, which is its first line; None if that is not what its name says."""
    try:
        task_id = json.loads(blobs.head(name, _HEAD_MAX).partition(b"\n")[0])
    except (ValueError, NotFound):
        return None
    return task_id if isinstance(task_id, str) and _digest(task_id) == owner else None


def _digest(task_id: str) -> str:
    return hashlib.sha256(task_id.encode("utf-8", "surrogatepass")).hexdigest()


def today() -> int:
    """Days since 1970, UTC."""
    return time.time_ns() // 1_000_000 // _DAY_MS
