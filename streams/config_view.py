"""What the `config` topic says now: name -> (version, content), the version being the record's offset."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from perdure.schemas import codec, topics
from perdure.schemas.errors import DecodeError, Unreachable
from perdure.schemas.public import ConfigRecord
from perdure.streams.log import Log, Reader

_STILL_S = 10.0


@dataclass
class ConfigView:
    """The newest version of each name, kept up to date by `refresh`. For one thread, and readers of `names`."""

    log: Log
    names: dict[str, tuple[int, bytes | None]] = field(default_factory=dict)
    """Name -> (version, content); content None: deleted."""
    read_to: int = 0
    """Offset before which everything is in `names`."""
    _reader: Reader | None = None

    def refresh(self, timeout_s: float = 0.0) -> set[str]:
        """Read on; the names that have changed. The first call reads to the topic's present end."""
        return self.refresh_to_end() if self._reader is None else self._read(timeout_s)

    def refresh_to_end(self) -> set[str]:
        """Read on to the topic's present end; the names that have changed.

        Blocks for milliseconds. Raises `Unreachable` when nothing has come for 10 s; what was read stays.
        """
        reader = self._reader or self.log.reader()
        first, end = reader.bounds(topics.CONFIG.name, 0)
        if self._reader is None:
            # A number, not BEGIN: a fresh consumer takes half a second to resolve that.
            reader.assign({(topics.CONFIG.name, 0): first})
            self._reader = reader
        changed: set[str] = set()
        moved, position = time.monotonic(), self.read_to
        while not reader.caught_up(topics.CONFIG.name, 0, end):
            changed |= self._read(0.2)
            if self.read_to > position:
                moved, position = time.monotonic(), self.read_to
            elif time.monotonic() - moved > _STILL_S:
                raise Unreachable(f"{topics.CONFIG.name} stands still at {self.read_to} of {end}")
        self.read_to = max(self.read_to, end)
        return changed

    def _read(self, timeout_s: float) -> set[str]:
        assert self._reader is not None
        changed = set()
        for record in self._reader.read(1_000, timeout_s):
            self.read_to = record.offset + 1
            name = (record.key or b"").decode(errors="replace")
            content: bytes | None = None
            if record.value is not None:
                if codec.class_of(record.value) is not ConfigRecord:
                    continue  # and a schema that is unknown here must not be asked for: it would be looked for here
                try:
                    content = codec.decode_as(ConfigRecord, record.value).content
                except DecodeError:
                    continue  # a foreign record in config names nothing; writers are the CLI, the API and workers
            self.names[name] = (record.offset, content)
            changed.add(name)
        return changed

    def close(self) -> None:
        """Stop reading."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
