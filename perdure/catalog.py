"""What the namespace is configured to: its types and queues, as clients and the command line see them.

A reader's view of the compacted `config` topic. The version of a name is the offset of its record.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perdure.schemas import codec, ids, json_commands, limits, topics
from perdure.schemas.errors import DecodeError, Unreachable
from perdure.schemas.public import ConfigRecord
from perdure.streams.log import Log, Record
from perdure.streams.policies import fault

_FRESH_S = 1.0
_READ_S = 5.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One name's present version and value."""

    version: int
    content: Mapping[str, Any]


class Catalog:
    """The present configuration, read when asked for; thread-safe."""

    def __init__(self, log: Log) -> None:
        self._lock = threading.Lock()
        self._reader = log.reader()
        self._entries: dict[str, Entry] = {}
        self._assigned = False
        self._fresh_until = 0.0

    def type(self, name: str) -> Entry | None:
        """A task type; one that is not known yet is looked for once more. Blocks up to 5 s, then `Unreachable`."""
        self.refresh()
        if f"type/{name}" not in self._entries:
            self.refresh(force=True)
        return self._entries.get(f"type/{name}")

    def queue_of(self, task_type: str) -> str | None:
        """The queue of a type; None if the type is unknown."""
        known = self.type(task_type)
        return None if known is None else str(known.content.get("queue") or limits.DEFAULT_QUEUE)

    def routing_key(self, queue: str, local_id: str) -> str:
        """The routing key of a queue's task: always the same for a local id, and the same that the engine takes."""
        keys = self.routing_keys_of(queue)
        return keys[int.from_bytes(hashlib.sha256(local_id.encode()).digest()[:4], "big") % len(keys)]

    def routing_keys_of(self, queue: str) -> list[str]:
        """The routing keys of a queue; most have one, their name."""
        known = self._entries.get(f"queue/{queue}")
        return list(known.content.get("routing_keys") or [queue]) if known else [queue]

    def routing_keys(self) -> frozenset[str]:
        """Every routing key that the configuration knows. Blocks as `refresh` does."""
        self.refresh()
        found = {limits.DEFAULT_QUEUE}
        for name, entry in self._entries.items():
            kind, _, rest = name.partition("/")
            if kind == "queue":
                found |= {rest, *entry.content.get("routing_keys", ())}
            elif kind == "type" and entry.content.get("queue"):
                found.add(entry.content["queue"])
        return frozenset(found)

    def is_whole(self, task_id: str) -> bool:
        """Whether an id begins with a known routing key."""
        head, local = ids.split(task_id)
        return bool(head and local) and head in self.routing_keys()

    def refresh(self, *, force: bool = False) -> None:
        """Read what is new, unless that was done within the last second. Blocks up to 5 s, then `Unreachable`."""
        with self._lock:
            now = time.monotonic()
            if force or now >= self._fresh_until:
                self._read(now + _READ_S)
                self._fresh_until = time.monotonic() + _FRESH_S

    def close(self) -> None:
        """Let go of the log."""
        with self._lock:
            self._reader.close()

    def _read(self, deadline: float) -> None:
        name = topics.CONFIG.name
        first, end = self._reader.bounds(name, 0)
        if not self._assigned:
            # By number: a consumer that has to look BEGIN up waits half a second for it.
            self._reader.assign({(name, 0): first})
            self._assigned = True
        while not self._reader.caught_up(name, 0, end):
            if time.monotonic() > deadline:
                raise Unreachable(f"the configuration could not be read within {_READ_S:g} s")
            for record in self._reader.read(1000, 0.2):
                self._take(record)

    def _take(self, record: Record) -> None:
        name = (record.key or b"").decode(errors="replace")
        if record.value is None:
            self._entries.pop(name, None)
            return
        try:
            text = codec.decode_as(ConfigRecord, record.value).content
            content = json_commands.strict_loads(text)
        except DecodeError:
            return  # the engine hosts quarantine it, with its cause; the version before it stays in force here as there
        if name.partition("/")[0] in ("type", "queue") and fault(name, text) is not None:
            return
        if isinstance(content, dict):
            self._entries[name] = Entry(record.offset, content)
