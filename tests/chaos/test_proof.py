"""A campaign can fail, and a seed gives the same faults again."""

from __future__ import annotations

from itertools import islice

import pytest

from tests.chaos.faults import KINDS, schedule
from tests.chaos.load import Wanted
from tests.chaos.proof import wrong_life, wrong_work
from tests.chaos.watch import Life, Probes
from tests.integration.stack import Execution


def ran(epoch: int, at: int, number: int) -> tuple[int, Execution]:
    return epoch, Execution(at, 1, ("item", "q/t", str(epoch), str(number)))


def life(**changes: object) -> Life:
    """Three steps: the first two in epoch 1, whose process then died, the third in epoch 2."""
    one = Life(
        epoch=2, attempt=1, steps={0: (1, 10), 1: (1, 20), 2: (2, 40)}, over={1: "crashed"}, end="TaskCompleted",
        result=b"3", kinds={"TaskSubmitted": 1, "TaskCompleted": 1},
    )  # fmt: skip
    for name, value in changes.items():
        setattr(one, name, value)
    return one


GOOD = [ran(1, 5, 0), ran(1, 15, 1), ran(1, 25, 2), ran(2, 35, 2)]


def test_a_kill_may_cost_one_execution() -> None:
    assert list(wrong_work(life(), GOOD)) == []


@pytest.mark.parametrize(
    ("executions", "over", "wrong"),
    [
        ([*GOOD, ran(2, 45, 1)], {1: "crashed"}, "recorded in epoch 1"),
        ([*GOOD[:2], ran(1, 22, 1), *GOOD[2:]], {1: "crashed"}, "ran twice in epoch 1"),
        ([*GOOD[:3], ran(1, 27, 3), GOOD[3]], {1: "crashed"}, "2 executions of epoch 1"),
        ([*GOOD[:3], ran(1, 27, 3), GOOD[3]], {1: "drained"}, "2 executions of epoch 1"),
        ([*GOOD, ran(2, 41, 3)], {1: "crashed"}, "1 executions of epoch 2"),
        (GOOD[:3], {1: "crashed"}, "recorded and never ran"),
        ([ran(1, 1, 2), *GOOD[:2], GOOD[3]], {1: "crashed"}, "not the first ones"),
    ],
)
def test_what_no_fault_excuses_is_seen(
    executions: list[tuple[int, Execution]], over: dict[int, str], wrong: str
) -> None:
    assert any(wrong in what for what in wrong_work(life(over=over), executions))


def test_a_zombie_in_its_old_epoch_is_excused() -> None:
    late = [ran(1, 5, 0), ran(1, 15, 1), ran(2, 35, 2), ran(1, 50, 2)]
    assert list(wrong_work(life(over={1: "session_ended"}), late)) == []


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"end": "TaskFailed"}, "ended with TaskFailed"),
        ({"end": "TaskCancelled"}, "ended with TaskCancelled"),
        ({"result": b"4"}, "has the result"),
        ({"attempt": 2}, "a fault was charged"),
        ({"steps": {0: (1, 10)}}, "1 of 3 steps"),
        ({"kinds": {"TaskSubmitted": 1, "TaskCompleted": 2}}, "has 2 TaskCompleted"),
    ],
)
def test_what_no_task_may_become_is_seen(changes: dict[str, object], wrong: str) -> None:
    wanted = Wanted(count=3, seconds=0.1, stumbles=0, origin=0)
    assert list(wrong_life(wanted, life())) == []
    assert any(wrong in what for what in wrong_life(wanted, life(**changes)))


def test_a_seed_gives_the_same_faults_again() -> None:
    assert list(islice(schedule(7, KINDS), 200)) == list(islice(schedule(7, KINDS), 200))
    assert list(islice(schedule(7, KINDS), 200)) != list(islice(schedule(8, KINDS), 200))


def test_a_round_begins_with_one_of_each_kind() -> None:
    names = [kind.kind for kind in KINDS]
    assert len(set(names)) == len(names) >= 15
    assert sorted(k.kind for k in islice(schedule(7, KINDS), len(KINDS))) == sorted(names)


def test_a_partition_that_executes_nothing_is_not_flowing() -> None:
    probes = Probes(2)
    since = 0.0
    numbers = [probes.sent(0), probes.sent(1)]
    assert probes.flowing(since) is None
    probes.seen(0, numbers[0])
    assert probes.flowing(since) is None
    probes.seen(1, numbers[1])
    moment = probes.flowing(since)
    assert moment is not None
    assert probes.flowing(moment) is None, "only what was sent afterwards counts"
