"""A client on the log itself: turned away while the engine is far behind, and by nothing else."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from perdure.schemas import topics
from perdure.schemas.errors import Busy, Unreachable
from perdure.streams import admission
from perdure.streams.admission import RETRY_AFTER_S, Admission
from perdure.streams.memory_log import MemoryLog

FREE, LAG = 3, 6


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "FREE_SUBMITS", FREE)
    monkeypatch.setattr(admission, "BUSY_LAG", LAG)


class Stage:
    """A client whose every submit is let in or not, the engine behind it, and a watch."""

    def __init__(self) -> None:
        self.log = MemoryLog(lambda: 1_000, partitions=2)
        self.now = 0.0
        self.refused: list[int] = []
        self.submits = 0
        self._member = self.log.member(
            topics.ENGINE_GROUP, [topics.COMMANDS.name], on_assigned=lambda _: None, on_revoked=lambda *_: None
        )
        self._producer = self.log.producer()
        self.admission = self.client()

    def client(self) -> Admission:
        return Admission(self.log, lambda: self.now)

    def submit(self) -> bool:
        """Whether it was let in."""
        self.submits += 1
        try:
            self.admission.admit_submit()
        except Busy as busy:
            self.refused.append(busy.retry_after)
            return False
        self._producer.append(topics.COMMANDS.name, self.submits % 2, None, b"a submit")
        return True

    def execute_all(self) -> None:
        """The engine catches up, and tells the group."""
        name = topics.COMMANDS.name
        self._member.tell({(name, p): len(self.log.records(name, p)) for p in range(2)})


@pytest.fixture
def stage() -> Stage:
    return Stage()


def flood(stage: Stage, most: int = 50) -> int:
    """Submits, one a second, until one is refused; how many were let in."""
    for n in range(most):
        if not stage.submit():
            return n
        stage.now += 1
    return most


def test_a_flood_is_refused_until_the_engine_has_caught_up(stage: Stage) -> None:
    assert LAG < flood(stage) <= LAG + FREE + RETRY_AFTER_S
    assert not stage.submit()
    stage.execute_all()
    assert not stage.submit(), "it has been told when to come again"
    stage.now += RETRY_AFTER_S
    assert stage.submit()
    assert set(stage.refused) == {RETRY_AFTER_S}


def test_it_stays_refused_while_nothing_is_executed(stage: Stage) -> None:
    flood(stage)
    for _ in range(5):
        stage.now += RETRY_AFTER_S
        assert not stage.submit()


def test_nobody_is_refused_while_the_engine_follows(stage: Stage) -> None:
    for _ in range(30):
        assert stage.submit()
        stage.execute_all()
        stage.now += 1


def test_who_submits_little_is_never_kept_for_a_look(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    flood(stage)
    monkeypatch.setattr(stage.log, "committed", lambda *_: pytest.fail("looked"))
    for _ in range(10):
        stage.admission = stage.client()
        for _ in range(FREE - 1):
            assert stage.submit()


def test_looks_are_seldom(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []
    ask = stage.log.committed
    monkeypatch.setattr(stage.log, "committed", lambda *a: (looks.append(stage.now), ask(*a))[1])
    for _ in range(1_000):
        stage.submit()
        stage.execute_all()
        stage.now += 0.05
    assert all(b - a >= RETRY_AFTER_S for a, b in itertools.pairwise(looks))
    assert len(looks) >= 9


def test_a_log_that_does_not_tell_turns_nobody_away(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: Any) -> Any:
        raise Unreachable("no coordinator")

    monkeypatch.setattr(stage.log, "committed", silent)
    assert flood(stage, 20) == 20
