"""The sweeper: what the engine's answers mean, and that it goes on whatever is away."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest

from perdure.connectors.large_values import SLICES, LargeValues
from perdure.schemas.errors import Unreachable
from perdure.value_sweeper import Sweeper


def answer(**said: Any) -> dict[str, Any]:
    return {"accepted": True, "decided": True, "reason": "", "task_id": "etl/1"} | said


@pytest.mark.parametrize(("said", "known"), [
    (answer(), True),
    (answer(accepted=False, reason="not_found"), False),
    (answer(accepted=False, reason="not_found: no such task"), False),
    (answer(task_id="other/etl/1"), True),
])  # fmt: skip
def test_what_the_engine_says(said: dict[str, Any], known: bool) -> None:
    asked: list[Any] = []

    def commands(command: dict[str, Any]) -> dict[str, Any]:
        asked.append(command)
        return said

    assert Sweeper(LargeValues(), commands).known("etl/1") == known
    assert asked == [{"command": "DescribeTask", "task_id": "etl/1"}]


@pytest.mark.parametrize("said", [answer(decided=False), answer(accepted=False, reason="busy")])
def test_anything_else_is_no_answer(said: dict[str, Any]) -> None:
    with pytest.raises(Unreachable, match="etl/1"):
        Sweeper(LargeValues(), lambda _: said).known("etl/1")


class Slices(LargeValues):
    """Notes which slices are swept; every second time the store is away."""

    def __init__(self, enough: int) -> None:
        super().__init__()
        self.swept: list[int] = []
        self.enough, self.stop = enough, threading.Event()

    def sweep(self, part: int, known: Any) -> int:
        self.swept.append(part)
        if len(self.swept) == self.enough:
            self.stop.set()
        if len(self.swept) % 2:
            raise Unreachable("the store is away")
        return 0


def test_all_slices_have_their_turn_and_an_outage_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    slices = Slices(enough=SLICES + 1)
    with caplog.at_level(logging.ERROR):
        Sweeper(slices, lambda _: answer(), every_s=0).run(slices.stop)
    assert sorted(slices.swept[:SLICES]) == list(range(SLICES))
    assert slices.swept[SLICES] == slices.swept[0]
    assert len([r for r in caplog.records if "the store is away" in r.message]) == SLICES // 2 + 1
