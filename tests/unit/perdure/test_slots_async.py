from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from perdure import channel
from perdure.schemas.reports import (
    AttemptCrashed,
    AttemptStopped,
    ReportProgress,
)
from perdure.slots import STRICT_GRACE_MS
from tests.unit.perdure.slots_bench import Bench, completed


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.slots.close()
    made.events.close()


def test_async_attempts_share_one_child(bench: Bench) -> None:
    bench.ready()
    assert len(bench.children("async")) == 1
    children = {bench.begin(f"etl/{i}", "poll").name for i in range(5)}
    assert len(children) == 1
    (child,) = bench.children("async")
    child.say(channel.Line("etl/1", 1, 77, "stdout", "", "hello"), channel.Progress("etl/1", 1, 0.5))
    child.say(completed("etl/3"))
    bench.turn()
    assert [(line.task_id, line.at, line.text) for line in bench.lines] == [("etl/1", 77, "hello")]
    assert [r.fraction for r in bench.reports(ReportProgress)] == [0.5]
    assert bench.reported()["etl/3"] == ["AttemptStarted", "AttemptCompleted"]
    assert bench.slots.free(bench.shared) == 96
    assert bench.slots.free(bench.session) == 2, "the kinds are counted apart"


def test_an_async_task_that_does_not_stop_takes_its_child_along_but_not_the_blame_of_others(bench: Bench) -> None:
    bench.ready()
    child = bench.begin("etl/1", "poll")
    bench.begin("etl/2", "poll")
    bench.cancel(grace_ms=1_000, task_id="etl/1")
    assert [type(f) for f in child.heard()] == [channel.Stop]
    bench.turn(1_999)
    assert bench.server.killed == []
    bench.turn(1)
    assert bench.server.killed == [(child.name, signal.SIGKILL)], "SIGTERM would end the others as well"
    child.die(signal=signal.SIGKILL)
    bench.turn()
    assert [r.why for r in bench.reports(AttemptStopped)] == ["cancelled"]
    assert [r.innocent for r in bench.reports(AttemptCrashed)] == [True]
    assert len(bench.children("async")) == 1


def test_when_an_async_child_dies_by_itself_the_attempt_that_started_last_counts(bench: Bench) -> None:
    bench.ready()
    child = bench.begin("etl/1", "poll")
    bench.begin("etl/2", "poll")
    bench.take("etl/3", "poll")  # granted, but its code has not begun
    child.die(signal=signal.SIGSEGV)
    bench.turn()
    assert [r.innocent for r in bench.reports(AttemptCrashed)] == [True, False, True]


def test_a_revoked_async_attempt_is_asked_to_stop_and_then_takes_its_child_along(bench: Bench) -> None:
    bench.ready()
    child = bench.begin("etl/1", "poll", cancel_grace=1_000)
    bench.begin("etl/2", "poll", cancel_grace=1_000)
    bench.slots.revoke("etl/1", 1)
    bench.slots.revoke("etl/2", 1)
    assert [type(f) for f in child.heard()] == [channel.Stop, channel.Stop]
    child.say(channel.Stopped("etl/1", 1, 2, "cancelled", 1, 0.0))
    bench.turn()
    bench.turn(2_000)
    assert bench.server.killed == [(child.name, signal.SIGKILL)]
    child.die(signal=signal.SIGKILL)
    bench.turn()
    assert bench.reported() == {"etl/1": ["AttemptStarted"], "etl/2": ["AttemptStarted"]}


def test_a_strict_async_task_is_asked_first(bench: Bench) -> None:
    bench.ready()
    child = bench.begin("etl/1", "poll", strict_lease=True)
    bench.turn(8_001)
    assert [type(f) for f in child.heard()] == [channel.Stop]
    child.say(channel.Stopped("etl/1", 1, 2, "cancelled", 1, 0.0))
    bench.turn()
    bench.turn(STRICT_GRACE_MS)
    assert bench.server.killed == []
    assert [r.why for r in bench.reports(AttemptStopped)] == ["revoked"]


def test_all_grants_of_a_session_are_given_up_together(bench: Bench) -> None:
    bench.ready()
    mine = bench.begin("etl/1")
    bench.begin("etl/2", "poll")
    bench.slots.give_up(bench.session)
    assert bench.server.killed == [(mine.name, signal.SIGKILL)]
    assert bench.slots.running() == ["etl/2"]
