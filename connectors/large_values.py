"""Values too large for a record: their JSON text lies in a store of blobs, and a reference travels in their place.

Each task has its own: a blob's name begins with a digest of the task's id, so two tasks never share one, and what
belongs to a task is known from its name alone. `sweep` deletes what belongs to no task (docs/decisions/0008).
"""

from __future__ import annotations

import hashlib
import json
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


class Place(NamedTuple):
    """Where large values lie, in words that fit into a child's settings."""

    url: str
    home: str
    """A folder name that no other namespace and no other life of this one has."""


class LargeValues:
    """The store of a namespace's large values, or the lack of one. All methods block; for any thread.

    `blobs` is opened at its first use. Errors of the store: `Unreachable` where trying again may help.
    """

    def __init__(self, blobs: Callable[[], Blobs] | None = None, home: str = "", day: Callable[[], int] | None = None):
        self._open, self._home, self._day = blobs, home, day or _today

    @classmethod
    def at(cls, place: Place | None) -> LargeValues:
        """The store at a place; None: there is no store, so every value has to fit into its record."""
        return cls() if place is None else cls(lambda: open_blobs(place.url), place.home)

    @cached_property
    def _blobs(self) -> Blobs:
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
        self._blobs.put(self._name(task_id, reference), json.dumps(task_id).encode() + b"\n" + text)
        return reference.encode()

    def fetched(self, task_id: str, carried: bytes) -> bytes:
        """The JSON text that a record of the task carries or refers to. Raises `ValueLost`."""
        if not references.is_reference(carried):
            return carried
        reference = references.parse(carried)
        name = self._name(task_id, reference)
        try:
            text = self._blobs.get(name).partition(b"\n")[2]
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
        for blob in self._blobs.list(f"values/{self._home}/{part:02x}"):
            owner, day, _ = blob.name.rpartition("/")[2].split(".")
            if int(day) < oldest_kept:
                old.setdefault(owner, []).append(blob.name)
        deleted = 0
        for names in old.values():
            if known(self._owner(names[0])):
                continue
            for name in names:
                self._blobs.delete(name)
                deleted += 1
        return deleted

    def _name(self, task_id: str, reference: Reference) -> str:
        owner = hashlib.sha256(task_id.encode("utf-8", "surrogatepass")).hexdigest()
        return f"values/{self._home}/{owner[:2]}/{owner}.{reference.day}.{reference.sha256}"

    def _owner(self, name: str) -> str:
        """The task that a blob belongs to, which is its first line."""
        try:
            task_id = json.loads(self._blobs.head(name, _HEAD_MAX).partition(b"\n")[0])
        except ValueError as error:
            raise InfrastructureError(f"the blob {name} does not say whose it is: delete it, or restore it") from error
        return str(task_id)


def _today() -> int:
    return time.time_ns() // 1_000_000 // _DAY_MS
