from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from perdure import channel
from perdure.children import KillLadder, kill_ladder
from perdure.forkserver import Outputs
from perdure.schemas import codec
from perdure.schemas.inbox import CheckpointAccepted, RunAttempt, StepPage
from perdure.schemas.reports import (
    AttemptCompleted,
    AttemptCrashed,
    AttemptDeclined,
    AttemptFailed,
    AttemptStarted,
    AttemptStopped,
    ReportStep,
    SendSteps,
)
from perdure.slots import FINISH_MS, SPARE, SPAWN_AGAIN_MOST_MS, SPAWN_AGAIN_MS
from tests.unit.perdure.played import PlayedChild
from tests.unit.perdure.slots_bench import TASK, Bench, completed


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.slots.close()
    made.events.close()


def test_an_attempt_runs_in_a_ready_child_and_hears_its_acknowledgements(bench: Bench) -> None:
    bench.ready()
    bench.take()
    (child,) = [c for c in bench.children() if (frames := c.heard()) and (run := frames[0])]
    assert isinstance(run, channel.Run)
    grant = codec.decode_as(RunAttempt, run.grant)
    assert (grant.task_id, grant.input, grant.token) == (TASK, b'{"x":1}', b""), "the token stays with the supervisor"
    child.say(channel.Started(TASK, 1, 1), channel.Step(TASK, 1, 2, "a", "a", "m.f", "v1", "h", 5, b"1"))
    child.say(channel.Milestone(TASK, 1, 3, "half"), channel.WantSteps(TASK, 1, 4, "a"))
    bench.turn()
    assert child.heard()[-1] == channel.Ack(TASK, 1, 4)
    started, step, _, wanted = bench.reports()
    assert started == AttemptStarted(seq=1, pid=os.getpid())
    assert isinstance(step, ReportStep)
    assert (step.seq, step.step_id, step.result, step.args_hash, step.duration_ms) == (2, "a", b"1", "h", 5)
    assert wanted == SendSteps(seq=4, after="a")
    assert bench.slots.free(bench.session) == 1


def test_step_pages_reach_the_child_after_the_run_even_when_no_child_is_ready_yet(bench: Bench) -> None:
    bench.take()
    page = StepPage(worker_id="w", session="s", task_id=TASK, epoch=1, after="", steps=[], more=False)
    bench.slots.page(page)
    bench.ready()
    frames = [c.heard() for c in bench.children()]
    assert [[type(f).__name__ for f in found] for found in frames if found] == [["Run", "Page"]]
    bench.slots.page(page)
    assert [f for c in bench.children() for f in c.heard()] == [channel.Page(TASK, 1, codec.encode(page))]


def test_the_end_is_reported_when_the_pipes_are_read_and_the_child_is_idle(bench: Bench) -> None:
    bench.ready()
    child = bench.begin()
    child.print("one\ntw")
    child.say(completed())
    bench.turn()
    child.print("o\n")
    child.print("careful\n", stream=1)
    bench.turn()
    assert bench.reports(AttemptCompleted) == []
    child.give_up_pipes()
    child.say(channel.Idle())
    bench.turn()
    (end,) = bench.reports(AttemptCompleted)
    assert (end.result, end.usage.duration_ms, end.usage.cpu_seconds, end.usage.exit_code) == (b"42", 12, 0.25, None)
    assert end.usage.peak_rss > 1_000_000
    assert sorted(line.text for line in bench.lines) == ["careful", "one", "two"]
    assert bench.freed == ["process"]
    assert bench.slots.free(bench.session) == 2
    bench.take("etl/2")
    assert any(isinstance(f, channel.Run) for f in child.heard()), "the child is used again"


def test_a_child_that_ends_after_its_attempt_gives_its_exit_code(bench: Bench) -> None:
    bench.ready()
    child = bench.begin()
    child.say(channel.Failed(TASK, 1, 2, ["app.Bad", "Exception"], "no", "trace", 3, 0.1, final=True))
    bench.turn()
    assert bench.reports(AttemptFailed) == []
    child.die(exit_code=0)
    bench.turn()
    (end,) = bench.reports(AttemptFailed)
    assert (end.error_types, end.message, end.traceback, end.final) == (["app.Bad", "Exception"], "no", "trace", True)
    assert end.usage.exit_code == 0
    assert len(bench.children()) == 2, "another child has taken its place"


@pytest.mark.parametrize(("exit_code", "signum"), [(3, None), (None, signal.SIGSEGV)])
def test_a_dead_child_is_a_crash_and_has_a_successor_at_once(
    bench: Bench, exit_code: int | None, signum: int | None
) -> None:
    bench.ready()
    child = bench.begin()
    child.print("last words")
    child.say(channel.Step(TASK, 1, 2, "a", "a", "m.f", "v1", "h", 5, b"1"))
    child.die(exit_code, signum)
    bench.turn()
    assert bench.reported() == {TASK: ["AttemptStarted", "ReportStep", "AttemptCrashed"]}
    (end,) = bench.reports(AttemptCrashed)
    assert (end.exit_code, end.signal, end.innocent) == (exit_code, signum, False)
    assert (end.usage.cpu_seconds, end.usage.peak_rss) == (1.5, 4096)
    assert [line.text for line in bench.lines] == ["last words"]
    assert len(bench.children()) == 2


def test_what_cannot_run_is_declined(bench: Bench) -> None:
    bench.ready()
    bench.begin("etl/1")
    bench.begin("etl/2")
    bench.take("etl/3")
    assert bench.session.declined
    bench.take("etl/4", "nobody knows")
    bench.slots.drain()
    bench.take("etl/5", "poll")
    assert [r.reason for r in bench.reports(AttemptDeclined)] == ["full", "unknown_type", "stopping"]
    assert bench.session.grants_seen == 4, "declined grants have been seen"


def test_a_grant_that_is_read_twice_runs_once(bench: Bench) -> None:
    bench.ready()
    child = bench.begin()
    bench.take()
    assert [f for c in bench.children() for f in c.heard()] == []
    assert bench.reported() == {TASK: ["AttemptStarted"]}
    assert child.alive


def test_cancel_asks_then_terminates_then_kills(bench: Bench) -> None:
    bench.ready()
    child = bench.begin()
    bench.cancel(grace_ms=1_000)
    assert child.heard() == [channel.Stop(TASK, 1, "cancelled", "cancelled: by you")]
    bench.turn(999)
    assert bench.server.killed == []
    assert bench.slots.next_due() == bench.now + 1
    bench.turn(1)
    assert bench.server.killed == [(child.name, signal.SIGTERM)]
    bench.turn(1_000)
    assert bench.server.killed[1:] == [(child.name, signal.SIGKILL)]
    assert bench.reports(AttemptStopped) == []
    child.die(signal=signal.SIGKILL)
    bench.turn()
    (end,) = bench.reports(AttemptStopped)
    assert end.why == "cancelled"
    assert bench.slots.free(bench.session) == 2


def test_a_task_that_stops_in_time_gets_no_signal(bench: Bench) -> None:
    bench.ready()
    child = bench.begin()
    bench.cancel("timed_out: run")
    child.say(channel.Stopped(TASK, 1, 2, "timed_out", 5, 0.1))
    child.give_up_pipes()
    bench.turn()
    child.die(exit_code=0)
    bench.turn()
    bench.turn(10_000)
    assert [r.why for r in bench.reports(AttemptStopped)] == ["timed_out"]
    assert bench.server.killed == []


def test_a_result_that_comes_before_the_stop_counts(bench: Bench) -> None:
    bench.ready()
    child = bench.begin()
    bench.cancel()
    child.say(completed())
    child.give_up_pipes()
    child.say(channel.Idle())
    bench.turn()
    assert bench.reported()[TASK] == ["AttemptStarted", "AttemptCompleted"]


def test_a_revoked_attempt_is_killed_and_nothing_is_said(bench: Bench) -> None:
    bench.ready()
    child = bench.begin()
    bench.slots.revoke(TASK, 1)
    assert bench.server.killed == [(child.name, signal.SIGKILL)]
    assert bench.slots.free(bench.session) == 2, "the engine counts the slot as free already"
    bench.take(epoch=2)
    assert [f.epoch for c in bench.children() for f in c.heard() if isinstance(f, channel.Run)] == [2]
    child.say(channel.Step(TASK, 1, 2, "a", "a", "m.f", "v1", "h", 5, b"1"))
    child.die(signal=signal.SIGKILL)
    bench.turn()
    assert bench.reported() == {TASK: ["AttemptStarted"]}
    bench.slots.revoke(TASK, 1)


def test_what_is_recorded_of_checkpoints_is_passed_on(bench: Bench) -> None:
    bench.ready()
    child = bench.begin()
    for task_id, epoch in ((TASK, 1), (TASK, 2), ("etl/9", 1)):
        bench.slots.accepted(CheckpointAccepted(worker_id="w", session="s", task_id=task_id, epoch=epoch, version=7))
    assert child.heard() == [channel.Accepted(TASK, 1, 7)]


def test_pause_is_passed_on_and_may_be_undone(bench: Bench) -> None:
    bench.ready()
    child = bench.begin()
    bench.pause()
    bench.pause(undo=True)
    assert child.heard() == [channel.Stop(TASK, 1, "paused"), channel.Stop(TASK, 1, "paused", undo=True)]
    bench.pause(undo=True)
    assert child.heard() == []
    bench.pause()
    bench.turn(3_600_000)
    assert bench.server.killed == [], "a task that never reaches a boundary stays as it is"
    child.say(channel.Stopped(TASK, 1, 2, "paused", 5, 0.1))
    child.die(exit_code=0)
    bench.turn()
    assert [r.why for r in bench.reports(AttemptStopped)] == ["paused"]


def test_an_attempt_that_no_child_has_yet_is_stopped_without_one(bench: Bench) -> None:
    bench.take()
    bench.pause()
    assert [r.why for r in bench.reports(AttemptStopped)] == ["paused"]
    bench.ready()
    assert [f for c in bench.children() for f in c.heard()] == []


def test_drain_asks_everyone_and_what_does_not_stop_is_killed_and_handed_back(bench: Bench) -> None:
    bench.ready()
    one, two = bench.begin("etl/1"), bench.begin("etl/2")
    bench.slots.drain()
    assert [c.heard()[0] for c in (one, two)] == [
        channel.Stop("etl/1", 1, "drained", "the worker shuts down"),
        channel.Stop("etl/2", 1, "drained", "the worker shuts down"),
    ]
    one.say(channel.Stopped("etl/1", 1, 2, "drained", 5, 0.1))
    one.die(exit_code=0)
    bench.turn()
    assert bench.slots.running() == ["etl/2"]
    bench.slots.kill()
    assert bench.server.killed == [(two.name, signal.SIGKILL)]
    two.die(signal=signal.SIGKILL)
    bench.turn()
    assert bench.slots.running() == []
    assert [r.why for r in bench.reports(AttemptStopped)] == ["drained", "drained"]
    assert bench.children() == [], "no child is started while the worker ends"


def test_a_child_that_hangs_after_its_attempt_is_killed_and_the_result_counts(bench: Bench) -> None:
    bench.ready()
    child = bench.begin()
    child.say(completed())
    bench.turn()
    bench.turn(FINISH_MS)
    assert bench.server.killed == [(child.name, signal.SIGKILL)]
    child.die(signal=signal.SIGKILL)
    bench.turn()
    assert bench.reported()[TASK] == ["AttemptStarted", "AttemptCompleted"]


def test_a_child_that_died_while_idle_costs_no_attempt(bench: Bench) -> None:
    bench.ready()
    for child in bench.children():
        child.die(signal=signal.SIGKILL)
    bench.take()
    bench.ready()
    runs = [f for c in bench.children() for f in c.heard() if isinstance(f, channel.Run)]
    assert [run.task_id for run in runs] == [TASK]
    assert bench.reported() == {}


def test_a_child_that_could_not_be_handed_its_attempt_is_killed_and_another_takes_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when this process is out of descriptors for a moment; the child would be idle for ever."""
    bench.ready()
    refused: list[str] = []

    def once(child: PlayedChild, run: channel.Run) -> Outputs | None:
        if refused:
            return start(child, run)
        refused.append(child.name)
        raise OSError(errno.EMFILE, "too many open files")

    start = PlayedChild.start
    monkeypatch.setattr(PlayedChild, "start", once)
    bench.take()
    assert bench.server.killed == [(refused[0], signal.SIGKILL)]
    next(c for c in bench.children() if c.name == refused[0]).die(signal=signal.SIGKILL)
    bench.ready()
    runs = [f for c in bench.children() for f in c.heard() if isinstance(f, channel.Run)]
    assert [run.task_id for run in runs] == [TASK]
    assert bench.reported() == {}


def test_when_no_child_can_be_started_the_grant_goes_back(bench: Bench) -> None:
    bench.take()
    before = len(bench.server.children)
    bench.children()[0].die(detail="fork: Cannot allocate memory")
    bench.turn()
    assert [r.reason for r in bench.reports(AttemptDeclined)] == ["unloadable"]
    assert len(bench.server.children) == before, "not again at once"
    due = bench.slots.next_due()
    assert due is not None
    bench.turn(due - bench.now)
    assert len(bench.server.children) == before + 1


def test_while_no_child_can_be_started_no_slot_is_offered_and_the_pauses_grow(bench: Bench) -> None:
    """Tasks go to workers that can run them, instead of being granted here and declined every second."""
    pauses = []
    for _ in range(7):
        for child in bench.children():
            child.die(detail="fork: Resource temporarily unavailable")
        bench.turn()
        assert bench.slots.free(bench.session) == 0
        due = bench.slots.next_due()
        assert due is not None
        pauses.append(due - bench.now)
        bench.turn(pauses[-1])
        assert bench.slots.free(bench.session) == 2
    assert pauses[0] == SPAWN_AGAIN_MS
    assert pauses == sorted(pauses)
    assert pauses[-1] == SPAWN_AGAIN_MOST_MS
    bench.ready()
    bench.begin()
    for _ in range(2):  # those that had begun, and those that were to follow them
        for child in bench.children():
            child.die(detail="fork: Resource temporarily unavailable")
        bench.turn()
    assert bench.slots.next_due() == bench.now + SPAWN_AGAIN_MS, "one has worked meanwhile"


def test_beside_a_busy_child_nothing_is_taken_that_no_child_can_run(bench: Bench) -> None:
    bench.ready()
    busy = bench.begin()
    for _ in range(2):
        for child in bench.children():
            if child is not busy:
                child.die(detail="fork: Resource temporarily unavailable")
        bench.turn()
    assert bench.slots.free(bench.session) == 0
    bench.take("etl/2")
    assert [r.reason for r in bench.reports(AttemptDeclined)] == ["unloadable"]
    bench.turn(SPAWN_AGAIN_MS)
    bench.ready()
    assert bench.slots.free(bench.session) == 1


def test_a_child_that_ends_before_its_first_attempt_is_not_replaced_at_once(bench: Bench) -> None:
    bench.ready()
    before = len(bench.server.children)
    for child in bench.children():
        child.die(exit_code=70)
    bench.turn()
    assert len(bench.server.children) == before
    bench.turn(SPAWN_AGAIN_MS)
    assert len(bench.server.children) > before


def test_a_few_children_are_kept_ready_up_to_the_slots() -> None:
    bench = Bench(slots=SPARE + 2)
    assert len(bench.children()) == SPARE
    bench.ready()
    bench.begin("etl/1")
    assert len(bench.children()) == SPARE + 1
    bench.ready()
    for i in range(2, SPARE + 3):
        bench.take(f"etl/{i}")
        bench.ready()
    assert len(bench.children()) == SPARE + 2
    assert len(bench.slots.running()) == SPARE + 2
    bench.slots.close()
    bench.events.close()


def test_a_child_that_reads_nothing_holds_up_nobody(bench: Bench) -> None:
    bench.ready()
    child = bench.begin()
    text = "x" * 250_000
    for i in range(20):  # far more than a socket holds
        bench.slots.page(
            StepPage(worker_id="w", session="s", task_id=TASK, epoch=1, after=f"{i}{text}", steps=[], more=True)
        )
        bench.turn()
    frames: list[Any] = []
    for _ in range(200):
        frames += child.heard()
        bench.turn()
    assert [codec.decode(f.page).after[:2] for f in frames] == [f"{i}{text}"[:2] for i in range(20)]


def test_a_child_that_says_what_is_no_frame_is_killed(bench: Bench) -> None:
    bench.ready()
    child = bench.begin()
    child._theirs.send(b"\xff\xff\xff\xff nonsense")
    bench.turn()
    assert bench.server.killed == [(child.name, signal.SIGKILL)]
    child.die(signal=signal.SIGKILL)
    bench.turn()
    assert [r.signal for r in bench.reports(AttemptCrashed)] == [signal.SIGKILL]


def test_a_strict_task_is_killed_before_its_lease_may_be_over(bench: Bench) -> None:
    bench.ready()
    child = bench.begin(strict_lease=True)
    other = bench.begin("etl/2")
    assert bench.slots.next_due() == bench.session.stale_at
    bench.turn(8_000)
    assert bench.server.killed == []
    bench.turn(1)
    assert bench.server.killed == [(child.name, signal.SIGKILL)]
    child.die(signal=signal.SIGKILL)
    bench.turn()
    assert [r.why for r in bench.reports(AttemptStopped)] == ["revoked"]
    assert other.alive


@pytest.mark.parametrize(
    ("executor", "sent"),
    [
        ("process", {9_999: None, 10_000: signal.SIGTERM, 19_999: None, 20_000: signal.SIGKILL, 99_999: None}),
        ("async", {10_000: None, 19_999: None, 20_000: signal.SIGKILL, 20_001: None}),
        ("process", {50_000: signal.SIGKILL, 50_001: None}),  # long overdue: the strongest alone
    ],
)
def test_a_kill_ladder_climbs_with_time(executor: str, sent: dict[int, int | None]) -> None:
    ladder = kill_ladder(executor, 0, 10_000)
    assert {now: ladder.signal(now) for now in sent} == sent
    assert ladder.due is None
    assert KillLadder().signal(1) is None
