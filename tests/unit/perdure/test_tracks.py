"""Tracks, positions, checkpoints and the state they hold."""

from __future__ import annotations

import datetime as dt
import errno
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from perdure import carriage, channel
from perdure.checkpoint import interval_ms
from perdure.connectors import checkpoints
from perdure.context import Context
from perdure.schemas import limits
from perdure.schemas.errors import InfrastructureError, StepError
from tests.unit.perdure.attempting import TASK, engine_for, failure_of, once, result_of


@pytest.mark.parametrize(
    ("elapsed_ms", "last_save_ms", "expected"),
    [
        (0, 0, 1_000),
        (100_000, 0, 1_000),
        (1_000_000, 0, 5_000),
        (10_000_000, 0, 10_000),  # elapsed / 200 = 50 s, but 10 s is enough for a cheap one
        (10_000_000, 30, 30_000),  # 1000 times what it costs
        (10_000_000, 300, 50_000),  # no rarer than elapsed / 200
        (10**9, 10**6, 300_000),
    ],
)
def test_interval_rule(elapsed_ms: float, last_save_ms: float, expected: float) -> None:
    assert interval_ms(None, elapsed_ms, last_save_ms) == expected
    assert interval_ms(2_500, elapsed_ms, last_save_ms) == 2_500


def test_checkpoints_come_at_the_first_boundary_after_the_interval() -> None:
    def job(ctx: Context) -> None:
        for i in ctx.track(range(10)):
            ctx.state["i"] = i
            engine.clock.now += 700

    engine = engine_for(job, checkpoint_interval="2s")
    way = engine.run()
    assert [saved.positions for saved in way.of(channel.Checkpoint)] == [{"track": 3}, {"track": 6}, {"track": 9}]
    assert [saved.version for saved in way.of(channel.Checkpoint)] == [1, 2, 3]


def test_unset_interval_follows_the_tasks_age_over_attempts() -> None:
    def job(ctx: Context) -> None:
        for _ in ctx.track(range(4_000)):
            engine.clock.now += 1_000
            if ctx.epoch == 1 and engine.clock.now >= 1_000_000 + 1_000_000:
                raise ValueError

    engine = engine_for(job)
    first = engine.run()
    saves = [saved.positions["track"] for saved in first.of(channel.Checkpoint)]
    assert saves[:3] == [1, 2, 3], "every second while the task is young"
    assert saves[-1] - saves[-2] == 5, "every elapsed / 200 later on"
    second = engine.run()
    later = [saved.positions["track"] for saved in second.of(channel.Checkpoint)]
    assert later[1] - later[0] in (5, 6), "a resumed task is as old as it was"
    assert later[-1] - later[-2] == 10, "and never rarer than 10 s while they cost nothing"


@pytest.mark.parametrize("make", [list, tuple, lambda r: r, lambda r: (x for x in r), dict.fromkeys])
def test_a_resume_goes_on_at_the_checkpoints_position(make: Callable[[range], Any]) -> None:
    done: list[int] = []

    def job(ctx: Context) -> int:
        ctx.state.setdefault("sum", 0)
        for item in ctx.track(make(range(10)), total=10):
            done.append(item)
            ctx.state["sum"] += item
            engine.clock.now += 1_000
            if ctx.epoch == 1 and item == 6:
                raise ValueError
        return int(ctx.state["sum"])

    engine = engine_for(job, checkpoint_interval="3s")
    engine.run()
    assert engine.checkpoint is not None
    assert engine.checkpoint.positions == {"track": 6}
    assert result_of(engine.run()) == sum(range(10))
    assert done == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9]


def test_a_finished_track_is_not_done_again() -> None:
    done: list[str] = []

    def job(ctx: Context) -> None:
        for item in ctx.track("ab", name="first"):
            done.append(item)
        ctx.checkpoint()
        for item in ctx.track("cd", name="second"):
            done.append(item)
            if ctx.epoch == 1:
                raise ValueError

    engine = engine_for(job, checkpoint_interval="1h")
    engine.run()
    assert engine.checkpoint is not None
    assert engine.checkpoint.positions == {"first": 2}
    result_of(engine.run())
    assert done == ["a", "b", "c", "c", "d"]


def test_positions_of_nested_tracks_go_with_their_item() -> None:
    def job(ctx: Context) -> None:
        for a in ctx.track(range(2), name="a"):
            for _ in ctx.track(range(2), name="b"):
                engine.clock.now += 1_000
            for _ in ctx.track(range(1), name="c"):
                engine.clock.now += 1_000
            if ctx.epoch == 1 and a == 1:
                raise ValueError

    engine = engine_for(job, checkpoint_interval="1ms")
    way = engine.run()
    assert [saved.positions for saved in way.of(channel.Checkpoint)] == [
        {"a": 0, "a@000000000000/b": 1},
        {"a": 0, "a@000000000000/b": 2},
        {"a": 0, "a@000000000000/b": 2, "a@000000000000/c": 1},
        {"a": 1, "a@000000000001/b": 1},
        {"a": 1, "a@000000000001/b": 2},
        {"a": 1, "a@000000000001/b": 2, "a@000000000001/c": 1},
    ]
    resumed = engine.run()
    assert [saved.positions for saved in resumed.of(channel.Checkpoint)] == [], "nothing was left to do"
    assert isinstance(resumed.last, channel.Completed)


def test_a_checkpoint_is_one_object() -> None:
    def job(ctx: Context) -> None:
        ctx.state["when"] = dt.date(2026, 1, 2)
        ctx.milestone("begun")
        ctx.step("s", once)
        ctx.step("s", once)
        for _ in ctx.track(range(4)):
            engine.clock.now += 500

    engine = engine_for(job, checkpoint_interval="1500ms")
    way = engine.run()
    (saved,) = way.of(channel.Checkpoint)
    text = checkpoints.unpack(engine.store.load(saved.uri, saved.sha256))
    assert json.loads(text) == {
        "state": {"when": {"$perdure": "date", "value": "2026-01-02"}},
        "positions": {"track": 3},
        "scopes": {"": {"/s": 2}},
        "progress": {"current_step": "", "fraction": 0.75, "units_done": 3, "units_total": 4},
        "milestones": ["begun"],
        "at": 1_001_500,
        "elapsed_ms": 1_500.0,
        "code_version": "v1",
    }


def test_a_checkpoint_is_saved_before_it_is_told_and_awaited() -> None:
    def job(ctx: Context) -> None:
        ctx.state["a"] = 1
        ctx.checkpoint()
        raise AssertionError("went on without it")

    engine = engine_for(job)
    engine.acknowledges = False
    attempt, way = engine.attempt()

    class Outage(BaseException): ...

    def wait() -> None:
        (told,) = way.of(channel.Checkpoint)
        assert engine.store.load(told.uri, told.sha256)
        raise Outage

    way.wait = wait  # type: ignore[method-assign]
    attempt.run()
    assert failure_of(way).error_types[0].endswith("Outage")


def _saves_six(ctx: Context) -> None:
    for i in range(6):
        ctx.state["i"] = i
        ctx.checkpoint()


def test_only_the_newest_checkpoints_are_kept() -> None:
    engine = engine_for(_saves_six)
    engine.run()
    assert [kept.version for kept in engine.store.list(TASK)] == [4, 5, 6]


def test_no_checkpoint_goes_before_the_engine_says_that_a_newer_one_is_recorded() -> None:
    """The reports may be in the log behind the end of the grant: the next one then resumes from the first."""
    engine = engine_for(_saves_six)
    engine.run()
    engine.accepts = False
    engine.run()
    assert [kept.version for kept in engine.store.list(TASK)] == [4, 5, 6, 7, 8, 9, 10, 11, 12]
    engine.accepts = True
    engine.run()
    assert [kept.version for kept in engine.store.list(TASK)] == [16, 17, 18]


def test_state_that_is_no_json_ends_the_task_by_name() -> None:
    def job(ctx: Context) -> None:
        ctx.state["lock"] = threading.Lock()
        ctx.checkpoint()

    failed = failure_of(engine_for(job).run())
    assert failed.final
    assert "ctx.state" in failed.message


def test_a_checkpoint_that_cannot_be_loaded_fails_the_attempt_by_name() -> None:
    def job(ctx: Context) -> None:
        ctx.checkpoint()
        assert ctx.epoch > 1

    engine = engine_for(job)
    engine.run()
    assert engine.checkpoint is not None
    engine.store.delete(engine.checkpoint.uri)
    failed = failure_of(engine.run())
    assert engine.checkpoint.uri in failed.message
    assert not failed.final


def test_a_checkpoint_store_that_is_not_there_is_refused_by_name() -> None:
    def job(ctx: Context) -> None: ...

    assert result_of(engine_for(job, checkpoint_storage="local").run()) is None
    failed = failure_of(engine_for(job, checkpoint_storage="s3").run())
    assert "'s3'" in failed.message


@pytest.mark.parametrize("inside", ["track", "checkpoint"])
def test_nothing_is_saved_inside_a_step(inside: str) -> None:
    def body(ctx: Context) -> None:
        if inside == "track":
            list(ctx.track([1]))
        else:
            ctx.checkpoint()

    def job(ctx: Context) -> None:
        ctx.step("s", body, ctx)

    failed = failure_of(engine_for(job).run())
    assert failed.final
    assert "inside the step /s" in failed.message


def test_a_set_cannot_be_tracked() -> None:
    def job(ctx: Context) -> None:
        list(ctx.track({"a", "b"}))

    assert "sort it" in failure_of(engine_for(job).run()).message


class Left(Exception):
    pass


@pytest.mark.parametrize("by", ["break", "error"])
@pytest.mark.parametrize("outer", [False, True])
def test_what_an_item_did_before_it_was_left_is_not_done_twice(by: str, outer: bool) -> None:
    """State and position agree in every checkpoint, also after a loop that ended in the middle of an item."""

    def job(ctx: Context) -> int:
        ctx.state.setdefault("sum", 0)
        for _ in ctx.track([1], name="outer") if outer else [1]:
            try:
                for number in ctx.track(range(10), name="a"):
                    ctx.state["sum"] += number
                    if number == 5:
                        if by == "break":
                            break
                        raise Left
            except Left:
                pass
            for _ in ctx.track(range(10), name="b"):
                engine.clock.now += 10_000
        if ctx.epoch == 1:
            raise ValueError
        return int(ctx.state["sum"])

    engine = engine_for(job, checkpoint_interval="5s")
    engine.run()
    assert result_of(engine.run()) == 15


def test_an_outer_item_that_goes_on_makes_up_for_what_was_left_in_it() -> None:
    def job(ctx: Context) -> None:
        for _ in ctx.track(range(3), name="outer"):
            for _ in ctx.track(range(3), name="inner"):
                break
            engine.clock.now += 10_000

    engine = engine_for(job, checkpoint_interval="5s")
    assert [saved.positions for saved in engine.run().of(channel.Checkpoint)] == [{"outer": n} for n in (1, 2, 3)]


def test_an_explicit_checkpoint_is_saved_wherever_it_is_asked_for() -> None:
    def job(ctx: Context) -> None:
        for _ in ctx.track(range(3)):
            break
        ctx.checkpoint()

    assert [saved.positions for saved in engine_for(job).run().of(channel.Checkpoint)] == [{"track": 0}]


@pytest.mark.parametrize("total", [-1, 2.5, float("nan"), float("inf"), "10", 1 << 63, True])
def test_a_total_that_counts_nothing_is_refused_by_name(total: Any) -> None:
    failed = failure_of(engine_for(lambda ctx: list(ctx.track([1, 2], total=total)), name="job").run())
    assert "total" in failed.message
    assert failed.error_types[0] == f"{StepError.__module__}.StepError"


@pytest.mark.parametrize("total", [0, 1, 3, 1e6])
def test_a_wrong_total_changes_no_item(total: Any) -> None:
    way = engine_for(lambda ctx: list(ctx.track(iter([1, 2]), total=total)), name="job").run()
    assert result_of(way) == [1, 2]
    assert all(0 <= said.fraction <= 1 for said in way.of(channel.Progress) if said.fraction is not None)


def test_tracks_side_by_side_are_refused() -> None:
    """Their positions would be saved apart: one has gone on, the other has not."""

    def job(ctx: Context) -> None:
        for _ in zip(ctx.track(range(3), name="a"), ctx.track(range(3), name="b"), strict=True):
            pass

    assert "side by side" in failure_of(engine_for(job).run()).message


def test_an_outer_track_goes_on_past_an_inner_one_that_is_kept() -> None:
    def job(ctx: Context) -> list[str]:
        kept, seen = [], []
        for item in ctx.track("ab"):
            kept.append(ctx.track("xy", name="inner"))
            seen.append(item + next(kept[-1]))
        return seen

    assert result_of(engine_for(job).run()) == ["ax", "bx"]


def test_too_many_tracks_are_refused_by_name() -> None:
    def job(ctx: Context) -> None:
        for _ in range(limits.POSITIONS_MAX + 1):
            list(ctx.track([1]))

    assert str(limits.POSITIONS_MAX) in failure_of(engine_for(job).run()).message


def test_tracks_with_more_names_than_a_checkpoint_takes_are_refused_at_once() -> None:
    """The engine would refuse the checkpoint, and the attempt would believe that it has one."""

    def job(ctx: Context) -> None:
        kept = []
        for n in range(100):
            kept.append(ctx.track([1, 2], name=f"{n}/" + "x" * 120))
            next(kept[-1])
        ctx.checkpoint()

    assert "too long names" in failure_of(engine_for(job).run()).message


def test_a_track_in_a_thread_is_gone_through_without_a_position() -> None:
    def job(ctx: Context) -> None:
        def side() -> None:
            for i in ctx.track(range(3), name="side"):
                ctx.step("s", once, i)

        with ThreadPoolExecutor(1) as pool:
            pool.submit(side).result()
        ctx.checkpoint()
        assert ctx.epoch > 1

    engine = engine_for(job)
    way = engine.run()
    assert [step.step_id for step in way.of(channel.Step)] == [f"side@{i:012d}/s" for i in range(3)]
    assert way.of(channel.Checkpoint)[0].positions == {}
    assert engine.run().of(channel.Step) == []


class Full(checkpoints.LocalCheckpoints):
    """A store on a disk that is full, and takes no more after some."""

    left = 0

    def save(self, task_id: str, version: int, data: bytes) -> checkpoints.Saved:
        if self.left <= 0:
            raise InfrastructureError("the checkpoint cannot be written: No space left on device")
        self.left -= 1
        return super().save(task_id, version, data)

    def delete(self, uri: str) -> None:
        raise OSError("Input/output error")


@pytest.mark.parametrize("left", [0, 2, 100])
def test_a_store_that_takes_no_more_costs_no_attempt(left: int, tmp_path: Path, caplog: Any) -> None:
    def job(ctx: Context) -> None:
        for i in ctx.track(range(10)):
            ctx.state["i"] = i
            engine.clock.now += 1_000

    store = Full(tmp_path)
    store.left = left
    engine = engine_for(job, checkpoint_interval="1s")
    engine.store = store
    assert isinstance(engine.run().last, channel.Completed)
    assert (engine.checkpoint.version if engine.checkpoint else 0) == min(left, 10)
    assert ("No space left" in caplog.text) == (left < 10)


@pytest.mark.parametrize(("number", "waits"), [(errno.EIO, True), (errno.ESTALE, True), (errno.EACCES, False)])
def test_a_store_that_cannot_be_read_for_a_while_costs_no_attempt(
    number: int, waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a file system is away. Who has closed it has to open it again."""
    begun: list[int] = []

    def job(ctx: Context) -> int:
        begun.append(ctx.state.get("n", 0))
        ctx.state["n"] = 7
        ctx.checkpoint()
        if len(begun) == 1:
            raise ValueError("once")
        return begun[-1]

    monkeypatch.setattr(carriage, "FIRST_PAUSE_S", 0.0)
    engine = engine_for(job)
    engine.store = checkpoints.LocalCheckpoints(tmp_path)
    engine.run()
    read, away = Path.read_bytes, [2]

    def reading(path: Path) -> bytes:
        if away[0]:
            away[0] -= 1
            raise OSError(number, os.strerror(number), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", reading)
    ended = engine.run().last
    if waits:
        assert isinstance(ended, channel.Completed)
        assert begun == [0, 7]
    else:
        assert isinstance(ended, channel.Failed)
        assert "Permission denied" in ended.message


def test_a_checkpoint_that_was_asked_for_fails_where_the_store_does(tmp_path: Path) -> None:
    def job(ctx: Context) -> None:
        ctx.state["n"] = 1
        ctx.checkpoint()

    engine = engine_for(job)
    engine.store = Full(tmp_path)
    assert isinstance(engine.run().last, channel.Failed)
