"""A member that its group does not take in says so, and only then."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from perdure.schemas import topics
from perdure.streams import join_watch
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
        watch.look()
        said.append(len(caplog.records))
    assert said == [0, 0, 1, 1, 1, 2, 2]
    assert "engine: the group has not taken this member in for 40 s" in caplog.records[-1].getMessage()


def test_who_belongs_to_the_group_says_nothing_until_it_is_put_out(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    watch = JoinWatch("engine", clock)
    watch.inside()
    clock.now = 1_000
    watch.look()
    watch.outside()
    clock.now = 1_019
    watch.look()
    assert not caplog.records
    clock.now = 1_020
    watch.look()
    assert "for 20 s" in caplog.records[-1].getMessage()


def test_a_runner_watches_its_own_member(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(join_watch, "_SAY_S", 0.0)
    log = MemoryLog(lambda: 1_000, partitions=1)
    name = topics.COMMANDS.name
    kind = Kind("idle", (name,), None, lambda store, _: Table("idle", store, lambda *_: None, (name,)))
    ready = threading.Event()
    runner = Runner(log, kind, tmp_path, on_ready=lambda _: ready.set())
    member = runner.member
    assert isinstance(member, MemoryMember)
    member._pending.clear()  # the group does not answer
    thread = threading.Thread(target=runner.run)
    thread.start()

    def said() -> bool:
        return "idle: the group has not taken this member in" in caplog.text

    try:
        until("a word while it is outside", said)
        member.assign([(name, 0)])
        assert ready.wait(60)
        looks = _count_of(monkeypatch, JoinWatch, "look")
        until("a look", lambda: looks)
        caplog.clear()
        seen = len(looks)
        until("more looks", lambda: len(looks) > seen + 2)
        assert not said(), "it has its partitions"
        member.revoke()
        until("a word after it was put out", said)
    finally:
        runner.stop()
        thread.join()


def _count_of(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[None]:
    """Grows with each call of a method."""
    calls: list[None] = []
    method = getattr(owner, name)

    def counted(*arguments: object) -> object:
        calls.append(None)
        return method(*arguments)

    monkeypatch.setattr(owner, name, counted)
    return calls
