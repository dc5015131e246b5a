"""Fixtures for tests of durable tasks. Every pytest run where Perdure is installed loads this module, so nothing heavy
is imported before a test asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from perdure.streams.memory_log import MemoryLog
    from perdure.testing import Kit


@pytest.fixture
def perdure_kit() -> Iterator[Callable[..., Kit]]:
    """Makes kits, `perdure_kit(tasks=[...])`, and closes them after the test. See `perdure.testing.Kit`."""
    from perdure.testing import Kit

    made: list[Kit] = []

    def make(*args: Any, **options: Any) -> Kit:
        made.append(Kit(*args, **options))
        return made[-1]

    yield make
    for kit in made:
        kit.close()


@pytest.fixture
def perdure_memory_log() -> MemoryLog:
    """An empty log in memory, with two partitions, on a clock that stands still: `perdure.testing.VirtualClock`."""
    from perdure.streams.memory_log import MemoryLog
    from perdure.testing import VirtualClock

    return MemoryLog(VirtualClock(), 2)
