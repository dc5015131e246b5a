"""Killed at every line and around every frame, a task comes to the same result and no recorded step runs again (G3)."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import pytest

from perdure import channel
from perdure.context import Context
from tests.unit.perdure.attempting import Engine, Killed, Way, engine_for

BATCHES = 6
calls: Counter[str] = Counter()
"""How often each function of a step was run, by what it was run for."""


def read_schema(path: str) -> dict[str, Any]:
    calls[f"schema {path}"] += 1
    return {"columns": ["a", "b"], "path": path}


def batches(path: str) -> Iterator[list[int]]:
    for n in range(BATCHES):
        yield [n, n + 1, n + 2]


def total(batch: list[int]) -> int:
    return sum(batch)


def example(ctx: Context, dataset_path: str) -> dict[str, Any]:
    """DESIGN section 7."""
    schema = ctx.step("read-schema", read_schema, dataset_path)
    ctx.state.setdefault("sum", 0)
    for batch in ctx.track(batches(dataset_path), total=BATCHES):
        ctx.state["sum"] += total(batch)
        engine_of["now"].clock.now += 1_000
    ctx.milestone("aggregated")
    return {"sum": ctx.state["sum"], "columns": schema["columns"]}


def review(name: str, part: int) -> str:
    calls[f"review {name} {part}"] += 1
    return f"{name}:{part}"


def publish(count: int) -> int:
    calls["publish"] += 1
    return count


def nested(ctx: Context, dataset_path: str) -> dict[str, Any]:
    """The demo's shape: steps inside tracks, and steps around them."""
    ctx.state.setdefault("done", [])
    names = ctx.step("list", lambda: ["x", "y", "z"])
    for name in ctx.track(names, name="files"):
        for part in ctx.track(range(2), name="parts"):
            text = ctx.step("review", review, name, part)
            if text not in ctx.state["done"]:
                ctx.state["done"].append(text)
            engine_of["now"].clock.now += 1_000
    ctx.milestone("reviewed")
    return {"done": ctx.state["done"], "published": ctx.step("publish", publish, len(ctx.state["done"]))}


EXPECTED: dict[Any, Any] = {
    example: {"sum": sum(sum(batch) for batch in batches("/d")), "columns": ["a", "b"]},
    nested: {"done": [f"{n}:{p}" for n in "xyz" for p in range(2)], "published": 6},
}
CODES: dict[Any, set[CodeType]] = {
    example: {example.__code__, read_schema.__code__, batches.__code__, total.__code__},
    nested: {nested.__code__, review.__code__, publish.__code__},
}
engine_of: dict[str, Engine] = {}


class KillAtLine:
    """Kills the process when the n-th line of the user's code is about to run."""

    def __init__(self, codes: set[CodeType], line: int, way: Way) -> None:
        self._codes, self._left, self._way = codes, line, way

    def __call__(self, frame: FrameType, event: str, _arg: Any) -> Any:
        return self._line if frame.f_code in self._codes and not self._way.dead else None

    def _line(self, _frame: FrameType, event: str, _arg: Any) -> Any:
        if event == "line":
            self._left -= 1
            if self._left == 0:
                self._way.dead = True
                raise Killed
        return self._line


def finish(engine: Engine, job: Any) -> None:
    """Run until the task ends, and check what it came to."""
    recorded_before: Counter[str] = Counter(calls)
    kept = set(engine.steps)
    way = engine.run({"dataset_path": "/d"})
    assert isinstance(way.last, channel.Completed), way.last
    assert json.loads(way.last.result) == EXPECTED[job]
    ran_again = {step.step_id for step in way.of(channel.Step)} & kept
    assert not ran_again, "a recorded step ran again"
    assert sum((calls - recorded_before).values()) <= len(way.of(channel.Step))


def lines_of(job: Any, interval: str) -> int:
    """How many lines of user code a whole run takes."""
    engine = engine_of["now"] = engine_for(job, checkpoint_interval=interval)
    count = 0

    def counting(frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return counting if frame.f_code in CODES[job] else None

    sys.settrace(counting)
    try:
        engine.run({"dataset_path": "/d"})
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize("interval", ["1ms", "2500ms", "1h"])
@pytest.mark.parametrize("job", [example, nested])
def test_killed_at_every_line(job: Any, interval: str) -> None:
    lines = lines_of(job, interval)
    assert lines > 25
    for line in range(1, lines + 1):
        calls.clear()
        engine = engine_of["now"] = engine_for(job, checkpoint_interval=interval, page_size=3)
        attempt, way = engine.attempt({"dataset_path": "/d"})
        sys.settrace(KillAtLine(CODES[job], line, way))
        try:
            attempt.run()
        finally:
            sys.settrace(None)
        if way.dead:
            finish(engine, job)
            assert all(times <= 2 for times in calls.values()), calls
        else:
            assert isinstance(way.last, channel.Completed)


@pytest.mark.parametrize("interval", ["1ms", "1h"])
@pytest.mark.parametrize("heard", [True, False])
@pytest.mark.parametrize("job", [example, nested])
def test_killed_before_and_after_every_frame_is_heard(job: Any, heard: bool, interval: str) -> None:
    place = 0
    while True:
        place += 1
        calls.clear()
        engine = engine_of["now"] = engine_for(job, checkpoint_interval=interval, page_size=3)
        if not kill_at_frame(engine, place, heard=heard):
            break
        finish(engine, job)
        assert all(times <= 2 for times in calls.values()), calls
        if heard:
            assert set(calls.values()) == {1}, "what was recorded ran again"
    assert place > 10


def kill_at_frame(engine: Engine, place: int, *, heard: bool) -> bool:
    """Run an attempt that dies at its n-th frame; False if it has fewer."""
    attempt, way = engine.attempt({"dataset_path": "/d"})
    left = place

    def on_send(frame: channel.Frame) -> None:
        nonlocal left
        left -= 1
        if left == 0 and not isinstance(frame, channel.Completed):
            if heard:
                engine.take(frame)
            way.dead = True
            raise Killed

    way.on_send = on_send
    attempt.run()
    return way.dead


@pytest.mark.parametrize("job", [example, nested])
def test_killed_again_and_again(job: Any) -> None:
    """Each attempt dies a few frames further on: it still ends, with each step recorded once."""
    calls.clear()
    engine = engine_of["now"] = engine_for(job, checkpoint_interval="1ms", page_size=3)
    for _ in range(100):
        if not kill_at_frame(engine, 9, heard=True):
            break
    finish_again = engine.run({"dataset_path": "/d"})
    assert json.loads(finish_again.last.result) == EXPECTED[job]
    assert set(calls.values()) == {1}
