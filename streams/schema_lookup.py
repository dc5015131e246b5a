"""Schemas of other builds, as they are published in `config`: how builds of two versions understand each other."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

from perdure.schemas import codec
from perdure.streams.config_view import ConfigView
from perdure.streams.log import Log

LOOKS_PER_S = 20
"""Who writes records with made-up fingerprints gets no more looks at the topic than this."""


class SchemaLookup:
    """Reads `config` on when a fingerprint is unknown; for `codec.learn_from`. Thread-safe."""

    def __init__(self, log: Log) -> None:
        self._config = ConfigView(log)
        self._lock = threading.Lock()
        self._left, self._since = LOOKS_PER_S, 0.0

    def __call__(self, fingerprint: str) -> dict[str, Any] | None:
        """The schema published under a fingerprint (hex). Blocks for milliseconds; raises `Unreachable`."""
        name = codec.schema_name(fingerprint)
        with self._lock:
            if name not in self._config.names and self._may_look():
                self._config.refresh_to_end()
            _, content = self._config.names.get(name, (0, None))
        return None if content is None else _object(content)

    def close(self) -> None:
        """Stop reading."""
        with self._lock:
            self._config.close()

    def _may_look(self) -> bool:
        now = time.monotonic()
        if now - self._since >= 1.0:
            self._left, self._since = LOOKS_PER_S, now
        self._left -= 1
        return self._left >= 0


def _object(content: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None  # nobody's schema: its fingerprint is no one's
    return found if isinstance(found, dict) else None
