"""Workers and engines with crashes, duplicates, delays, lost workers and clock leaps: every task ends as it must.

A failing test names its seed, and the seed makes it fail again. More seeds by hand:
PERDURE_SEEDS=1000:2000 pytest tests/simulation/test_lives.py
"""

from __future__ import annotations

import os
import random

import pytest

from perdure.schemas import events
from tests.auditing import assert_sound
from tests.simulation.lives import PLANS, Lives
from tests.world import MINUTE

_FIRST, _, _LAST = os.environ.get("PERDURE_SEEDS", "0:12").partition(":")


@pytest.mark.parametrize("seed", range(int(_FIRST), int(_LAST)))
def test_every_task_ends_as_it_must(seed: int) -> None:
    lives = Lives(seed)
    lives.run(lives.healed_at)
    lives.heal()
    for _ in range(20):
        lives.run(lives.world.now + MINUTE)
        still_open = lives.open_tasks()
        if not still_open:
            break
    assert not still_open, f"seed {seed}: {still_open}"
    check_ends(lives)
    lives.held.check_replay(random.Random(seed))
    assert_sound(lives.world.log)


def check_ends(lives: Lives) -> None:
    world = lives.world
    assert not [q for q in world.quarantined() if q.cause == "defect"]
    for task_id, plan in lives.plans.items():
        name = task_id.removeprefix("default/").partition("-")[0]
        steps = [e.step_id for e in world.of_kind(events.StepCompleted, task_id)]
        assert len(steps) == len(set(steps))
        charged = [e.attempt for e in world.of_kind(events.AttemptFailed, task_id)]
        if world.task(task_id).state == "COMPLETED":
            assert steps == sorted(steps)
            assert len(steps) == plan.steps, f"{task_id}: {steps}"
        if name == "doomed":
            assert charged == [1, 2, 3]
        elif name == "fatal":
            assert charged == [1]
        elif name == "crashy":
            assert [e.why for e in world.of_kind(events.TaskFailed, task_id)] == ["crash_loop"]
        elif name in ("endless", "stuck", "unserved"):
            which = {"endless": "run", "stuck": "no_progress", "unserved": "queue"}[name]
            assert [e.which for e in world.of_kind(events.TaskTimedOut, task_id)] == [which]


def test_every_plan_is_in_every_simulation() -> None:
    assert {p.partition("-")[0].removeprefix("default/") for p in Lives(0).plans} == set(PLANS)


def test_a_seed_makes_the_same_life_again() -> None:
    def told(seed: int) -> list[tuple[bytes | None, bytes | None]]:
        lives = Lives(seed, tasks=4, minutes=1)
        lives.run(lives.healed_at)
        return [(r.key, r.value) for r in lives.world.log.records("task-events")]

    assert told(3) == told(3)
    assert told(3) != told(4)
