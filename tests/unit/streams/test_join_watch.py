"""A member that its group does not take in says so, and only then."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from perdure.schemas import topics
from perdure.streams import join_watch
from perdure.streams import runner as runner_module
from perdure.streams.join_watch import JoinWatch
from perdure.streams.memory_log import MemoryLog, MemoryMember
from perdure.streams.processor import Kind, Table
from perdure.streams.runner import Runner
from tests.integration.stack import until


class Clock:
    """Set by the test."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_it_is_said_now_and_then_while_it_lasts(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    watch = JoinWatch("engine", clock)
    said = []
    for now in (0, 19, 20, 21, 39, 40, 41):
        clock.now = now
        said.append((watch.look(), len(caplog.records)))
    assert said == [(False, 0), (False, 0), (True, 1), (False, 1), (False, 1), (True, 2), (False, 2)]
    assert "engine: the group has not taken this member in for 40 s" in caplog.records[-1].getMessage()


def test_who_belongs_to_the_group_says_nothing_until_it_is_put_out(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    watch = JoinWatch("engine", clock)
    watch.inside()
    clock.now = 1_000
    watch.look()
    watch.outside()
    clock.now = 1_010
    watch.outside()  # still, or again as another member
    clock.now = 1_019
    watch.look()
    assert not caplog.records
    clock.now = 1_020
    watch.look()
    assert "for 20 s" in caplog.records[-1].getMessage()


class Idling:
    """A runner that has nothing to do, on a log in memory, with all members that it has ever been."""

    def __init__(self, folder: Path) -> None:
        self.name = topics.COMMANDS.name
        kind = Kind(
            "idle", (self.name,), topics.CHANGELOG.name,
            lambda store, _: Table("idle", store, lambda *_: None, (self.name,)),
        )  # fmt: skip
        self.log = MemoryLog(lambda: 1_000, partitions=1)
        self.ready: list[int] = []
        self.runner = Runner(self.log, kind, folder, on_ready=self.ready.append)

    @property
    def member(self) -> MemoryMember:
        """The one of now."""
        assert isinstance(self.runner.member, MemoryMember)
        return self.runner.member

    def execute_one(self) -> None:
        """Have it execute an input, of which the group does not hear at once."""
        self.log.producer().append(self.name, 0, b"k", b"v")
        until("it is executed", lambda: self.runner._lanes[0].reached == {(self.name, 0): 1})

    def __enter__(self) -> Idling:
        self._thread = threading.Thread(target=self.runner.run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.stop()
        self._thread.join(60)
        assert not self._thread.is_alive(), "it ends"


def test_a_member_that_the_group_does_not_take_in_makes_room_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(join_watch, "_SAY_S", 0.2)
    idling = Idling(tmp_path)
    first = idling.member
    first._pending.clear()  # the group does not answer it
    with idling:
        until("it has its partition", lambda: idling.ready)
        assert idling.member is not first
        assert first.gone
        assert "idle: the group has not taken this member in" in caplog.text
        second = idling.member
        looks = _count_of(monkeypatch, JoinWatch, "look")
        caplog.clear()
        until("more looks than it needs to lose patience", lambda: len(looks) > 3)
        assert not caplog.text, "it has its partition"
        assert idling.member is second


@pytest.fixture
def never_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """No runner tells its group each second how far it is, nor loses patience."""
    monkeypatch.setattr(runner_module, "_TELL_S", 600.0)
    monkeypatch.setattr(join_watch, "_SAY_S", 600.0)


@pytest.mark.usefixtures("never_by_itself")
def test_a_member_that_has_lost_its_partitions_tells_the_group_nothing_and_makes_room_for_another(
    tmp_path: Path,
) -> None:
    with Idling(tmp_path) as idling:
        until("it has its partition", lambda: idling.ready)
        first = idling.member
        told: list[object] = []
        first.tell = told.append  # type: ignore[method-assign]
        idling.execute_one()
        first.revoke(lost=True)
        until("it has its partition again", lambda: len(idling.ready) == 2)
        assert idling.member is not first
        assert first.gone
        assert told == []


@pytest.mark.usefixtures("never_by_itself")
def test_a_member_that_gives_its_partitions_back_stays_and_says_how_far_they_are(tmp_path: Path) -> None:
    with Idling(tmp_path) as idling:
        until("it has its partition", lambda: idling.ready)
        first = idling.member
        idling.execute_one()
        first.revoke()
        until("it is told", lambda: idling.log.committed("idle", [(idling.name, 0)]) == {(idling.name, 0): 1})
        assert idling.member is first


@pytest.mark.usefixtures("never_by_itself")
def test_what_a_member_of_the_past_says_does_not_count_and_its_end_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "_LEAVE_S", 0.05)
    with Idling(tmp_path) as idling:
        until("it has its partition", lambda: idling.ready)
        first, closing, let_go = idling.member, threading.Event(), threading.Event()

        def close() -> None:
            closing.set()
            first._on_revoked([(idling.name, 0)], False)
            let_go.wait(60)

        first.close = close  # type: ignore[method-assign]
        first.gone = True
        idling.log._members["idle"].remove(first)
        first.revoke(lost=True)
        assert closing.wait(60)
        until("it has its partition again", lambda: len(idling.ready) == 2)
        first._on_revoked([(idling.name, 0)], True)
        assert list(idling.runner._lanes) == [0]
        let_go.set()


def _count_of(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[None]:
    """Grows with each call of a method."""
    calls: list[None] = []
    method = getattr(owner, name)

    def counted(*arguments: object) -> object:
        calls.append(None)
        return method(*arguments)

    monkeypatch.setattr(owner, name, counted)
    return calls
