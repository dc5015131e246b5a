"""What of a namespace's topics is held against it at the start."""

from __future__ import annotations

from typing import Any

import pytest

from perdure.schemas import topics
from perdure.schemas.errors import InfrastructureError, Unreachable
from perdure.streams.log import append_one
from perdure.streams.memory_log import MemoryLog
from perdure.streams.topology import settings_off


@pytest.mark.parametrize(("kept", "off"), [("86400000", True), ("172800000", False), ("777777777", False)])
def test_deletions_are_kept_as_long_as_recovery_counts_on(kept: str, off: bool) -> None:
    """A store or a snapshot older than the deletions that are still there brings deleted rows back."""
    found = settings_off(topics.CHANGELOG, {**topics.CHANGELOG.settings, "delete.retention.ms": kept})
    assert found == ([f"delete.retention.ms is {kept}, should be at least 172800000"] if off else [])


class Refusing(MemoryLog):
    """Its producer hears what it is told, or nothing."""

    def __init__(self, answer: InfrastructureError | None) -> None:
        super().__init__(lambda: 0, partitions=1)
        self.answer = answer

    def producer(self) -> Any:
        log = self

        class Producer:
            def append(self, *record: Any) -> None:
                if log.answer is not None:
                    record[-1](-1, log.answer)

            def flush(self, _: float) -> bool:
                return log.answer is not None

            def close(self) -> None: ...

        return Producer()


def test_an_append_that_is_refused_or_not_answered_has_not_been_made() -> None:
    with pytest.raises(InfrastructureError, match="not authorized"):
        append_one(Refusing(InfrastructureError("not authorized")), "config", 0, b"k", b"v")
    with pytest.raises(Unreachable, match="config/0 was not acknowledged"):
        append_one(Refusing(None), "config", 0, b"k", b"v")
