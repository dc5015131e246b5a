"""A log in memory, its clock, and a place for a view store."""

from __future__ import annotations

from pathlib import Path

import pytest

from perdure.streams.memory_log import MemoryLog
from tests.unit.projections.serving import Server
from tests.unit.projections.story import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock) -> MemoryLog:
    return MemoryLog(clock, partitions=2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "views" / "views.db"


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)
