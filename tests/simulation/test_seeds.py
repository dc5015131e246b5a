"""Thousands of short lives of a whole deployment under random faults: everything holds, and everything ends.

A failing test names its seed and the command that lives that life again, exactly. More by hand:
PERDURE_SEEDS=10000:20000 pytest -n 2 tests/simulation/test_seeds.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.simulation.faults import FAULTS
from tests.simulation.simulator import Simulator
from tests.simulation.workers import PLANS

_FIRST, _, _LAST = os.environ.get("PERDURE_SEEDS", "0:2000").partition(":")
_TOGETHER = 25
REGRESSIONS: dict[int, str] = {
    201248: "the quarantine named an object's address, so a replay differed",
    202711: "nobody sent what was to be forwarded, nor anything after it, once a commit's outcome had been unknown",
}
"""Seed -> what it found. A change of the simulator makes another life of it: what matters has a test of its own too."""


def live(seed: int) -> Simulator:
    """One life; a failure says how to see it again."""
    try:
        life = Simulator(seed)
        life.run()
    except Exception as error:
        error.add_note(f"again: PERDURE_SEEDS={seed}:{seed + 1} pytest tests/simulation/test_seeds.py::test_lives")
        raise
    return life


@pytest.mark.parametrize("first", range(int(_FIRST), int(_LAST), _TOGETHER))
def test_lives(first: int) -> None:
    for seed in range(first, min(first + _TOGETHER, int(_LAST))):
        live(seed)


@pytest.mark.parametrize("seed", REGRESSIONS, ids=str)
def test_lives_that_failed_before(seed: int) -> None:
    live(seed)


def test_every_fault_and_every_plan_is_in_some_of_the_seeds() -> None:
    lives = [Simulator(seed) for seed in range(100)]
    faults = Counter(fault for life in lives for fault in life.faults)
    plans = Counter(task_id.partition("/")[2].partition("-")[0] for life in lives for task_id in life.plans)
    assert min(faults[fault] for fault in FAULTS) > 20
    assert plans.keys() == PLANS.keys()


_TELL = """
import hashlib
from tests.simulation.simulator import Simulator
life = Simulator(7)
life.run()
print(hashlib.sha256(repr(sorted((w, [e.record for e in p.entries]) for w, p in life.log._data.items())).encode()).hexdigest())
"""


def test_a_seed_makes_the_same_life_in_every_process() -> None:
    """Whatever order sets have there."""
    told = {
        subprocess.run(
            [sys.executable, "-c", _TELL], env=os.environ | {"PYTHONHASHSEED": str(n)}, capture_output=True, check=True
        ).stdout
        for n in range(2)
    }
    assert len(told) == 1
