"""Any task made of steps, tracks and loops that are left early, killed or stopped anywhere, comes to the same result.

Hypothesis draws the task and its deaths. What a task does to its state is either the same however often it is done, or
done at the end of an item that holds no other track: that, and only that, is saved together with its position.
By hand, with more examples: PERDURE_EXAMPLES=2000 pytest tests/simulation/test_any_task.py
"""

from __future__ import annotations

import contextlib
import itertools
import os
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from perdure import channel
from perdure.context import Context
from tests.unit.perdure.attempting import Engine, Killed, Way, engine_for, result_of, stop

EXAMPLES = int(os.environ.get("PERDURE_EXAMPLES", "300"))


class Left(Exception):
    """What a loop is left by, if not by `break`."""


@dataclass(frozen=True)
class Step:
    name: str
    key: object


@dataclass(frozen=True)
class Work:
    ms: int


@dataclass(frozen=True)
class Loop:
    items: int
    sliced: bool
    body: tuple[Any, ...]
    leaves_at: int
    leaves_by: str


@dataclass(frozen=True)
class Death:
    frame: int
    kind: str


@dataclass(frozen=True)
class Plan:
    """A task, how often it is saved, and how its attempts end."""

    body: tuple[Any, ...]
    interval: str
    page_size: int
    deaths: list[Death]


leaves = st.one_of(
    st.builds(Step, st.sampled_from(["a", "b/c"]), st.sampled_from([None, None, 1, "k"])),
    st.builds(Work, st.sampled_from([10, 20_000])),
)


def _loops(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    body = st.lists(inner, min_size=1, max_size=3).map(tuple)
    return st.builds(
        Loop, st.integers(0, 4), st.booleans(), body, st.integers(0, 3), st.sampled_from(["break", "error"])
    )


plans = st.builds(
    Plan,
    body=st.lists(st.recursive(leaves, _loops, max_leaves=6), min_size=1, max_size=4).map(tuple),
    interval=st.sampled_from(["1ms", "10s"]),
    page_size=st.sampled_from([1, 3, 500]),
    deaths=st.lists(
        st.builds(Death, st.integers(0, 20), st.sampled_from(["kill", "kill", "paused", "drained"])),
        min_size=1,
        max_size=4,
    ),
)


class Life:
    """One task from its first attempt to its result."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.engine: Engine = engine_for(self.job, checkpoint_interval=plan.interval, page_size=plan.page_size)

    def job(self, ctx: Context) -> Any:
        ctx.state.setdefault("seen", {})
        ctx.state.setdefault("sum", 0)
        self._do(ctx, self.plan.body, "")
        return ctx.state

    def _do(self, ctx: Context, body: tuple[Any, ...], path: str) -> None:
        for place, part in enumerate(body):
            here = f"{path}.{place}"
            match part:
                case Step():
                    ctx.state["seen"][here] = ctx.step(part.name, str, here, key=part.key)
                case Work():
                    self.engine.clock.now += part.ms
                case Loop():
                    try:
                        self._loop(ctx, part, here)
                    except Left:
                        ctx.state["seen"][here] = "left"

    def _loop(self, ctx: Context, loop: Loop, here: str) -> None:
        items: Any = range(loop.items) if loop.sliced else iter(range(loop.items))
        innermost = not any(isinstance(part, Loop) for part in loop.body)
        for item in ctx.track(items):
            self._do(ctx, loop.body, f"{here}:{item}")
            if innermost:
                ctx.state["sum"] += item + 1
            if item == loop.leaves_at:
                if loop.leaves_by == "break":
                    break
                raise Left

    def attempt(self, death: Death) -> Way:
        """An attempt that dies or is stopped when it says its n-th frame, if it says so many."""
        attempt, way = self.engine.attempt()
        frames = itertools.count()

        def on_send(_frame: channel.Frame) -> None:
            if next(frames) == death.frame:
                if death.kind == "kill":
                    way.dead = True
                    raise Killed
                stop(way, death.kind)

        way.on_send = on_send
        recorded = set(self.engine.steps)
        with contextlib.suppress(Killed):  # while it said how it ended
            attempt.run()
        again = recorded & {said.step_id for said in way.of(channel.Step)}
        assert not again, f"G3: recorded steps ran again: {again}"
        return way


@settings(max_examples=EXAMPLES)
@given(plans)
def test_any_task_comes_to_its_result_whatever_happens(plan: Plan) -> None:
    undisturbed = result_of(Life(plan).engine.run())
    life = Life(plan)
    for death in plan.deaths:
        way = life.attempt(death)
        if way.sent and isinstance(way.last, channel.Completed):
            break
    else:
        way = life.engine.run()
    assert result_of(way) == undisturbed
