"""What an engine's host makes of the configuration."""

from __future__ import annotations

import pytest

from perdure.streams.config_view import ConfigView
from perdure.streams.decision import LEVEL
from perdure.streams.host import namespace_level
from perdure.streams.memory_log import MemoryLog


@pytest.mark.parametrize(
    ("content", "level"),
    [(b'{"level": 3}', 3), (None, 1), (b"{}", 1), (b"no JSON", 1), (b"[]", 1), (b"7", 1), (b'{"level": "two"}', 1)],
)
def test_what_is_no_level_stops_no_engine(content: bytes | None, level: int) -> None:
    config = ConfigView(MemoryLog(lambda: 0, 1))
    assert namespace_level(config) == 1
    config.names[LEVEL] = (5, content)
    assert namespace_level(config) == level
