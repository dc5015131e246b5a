"""`perdure asof` on a life in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from perdure import cli, cli_asof
from perdure.client import Client
from perdure.connectors.large_values import LargeValues
from perdure.schemas import topics
from tests.world import MINUTE, SECOND, ScriptedWorker, World, completed, progress, step


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A namespace of two partitions that every command here looks at, at the present time of the world."""
    made = World()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Client, "_open", lambda _: (made.log, LargeValues()))
    monkeypatch.setattr(cli_asof, "present", lambda: made.now)
    return made


def asof(*args: Any) -> Any:
    return CliRunner().invoke(cli.main, ["asof", *map(str, args)])


def answer(*args: Any) -> Any:
    result = asof(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_task_at_several_times_of_its_life(world: World) -> None:
    worker = ScriptedWorker(world, slots=1).start()
    task_id = world.submit(task_id="default/nightly")
    second = world.submit()
    grant = worker.run(task_id)
    worker.report(grant, step("a"), progress(0.25, current_step="sums"))
    running = world.now
    world.advance(SECOND)
    worker.report(grant, completed(7))
    world.advance(MINUTE)

    task = answer(running, task_id)["task"]
    assert (task["state"], task["progress"], task["current_step"], task["steps_completed"]) == (
        "RUNNING",
        0.25,
        "sums",
        1,
    )
    assert "runs on worker w1" in task["why"]
    assert "every slot is taken" in answer(running, second)["task"]["why"]
    done = answer("1 minute ago", "night")["task"]
    assert (done["task_id"], done["state"], done["result"]) == (task_id, "COMPLETED", 7)
    assert asof(running - 1, task_id).exit_code == 3, "it was not submitted yet"
    text = asof(running, "nightly").stdout
    assert text.startswith("as of 20")
    assert "25.0 %" in text


def test_a_task_after_each_of_its_events(world: World) -> None:
    worker = ScriptedWorker(world).start()
    task_id = world.submit()
    worker.report(worker.run(), completed(1))
    partition = world.partition_of(task_id)
    mine = [r for r in world.log.records(topics.EVENTS.name, partition) if r.key == task_id.encode()]
    told = [answer(f"events/{partition}:{r.offset}", task_id)["task"] for r in mine]
    assert [t["state"] for t in told] == ["PENDING", "PENDING", "RUNNING", "RUNNING", "COMPLETED"]
    assert [t["seq"] for t in told] == [1, 2, 3, 4, 5]


def test_the_fleet_with_queues_workers_and_why_each_waits(world: World) -> None:
    ScriptedWorker(world, slots=1).start()
    first, second = world.submit(), world.submit()
    lonely = world.submit("nobody", queue="default")
    then = world.now
    world.advance(MINUTE)
    told = answer(then)
    assert told["queues"] == [{"queue": "default", "total": 3, "states": {"RUNNING": 1, "PENDING": 2}}]
    assert [(w["worker_id"], w["slots"], w["running"]) for w in told["workers"]] == [("w1", 1, 1)]
    by_id = {t["task_id"]: t for t in told["tasks"]}
    assert by_id[first]["state"] == "RUNNING"
    assert "every slot is taken" in by_id[second]["why"]
    assert "no live worker serves type 'nobody'" in by_id[lonely]["why"]
    assert answer("now")["workers"] == [], "it has not been heard for a minute"
    text = asof(then, "--limit", "1").stdout
    assert "RUNNING 1, PENDING 2" in text
    assert "and 2 more" in text


def test_offsets_show_the_other_partitions_at_the_same_time(world: World) -> None:
    one, two = 0, 1
    queues = {world.partition_of(f"q{n}/x"): f"q{n}" for n in range(20)}
    first = world.submit(task_id=f"{queues[one]}/a", queue=queues[one])
    world.advance(SECOND)
    world.submit(task_id=f"{queues[two]}/b", queue=queues[two])
    last = world.executed(one) - 1
    assert [t["task_id"] for t in answer(f"{one}:{last}")["tasks"]] == [first]


def test_a_worker_that_the_engine_refused_was_not_there(world: World) -> None:
    honest = ScriptedWorker(world, "honest").start()
    world.send(ScriptedWorker(world, "forged").started(), honest.partition)
    assert [w["worker_id"] for w in answer("now")["workers"]] == ["honest"]


def test_what_the_log_has_lost_is_said(world: World) -> None:
    ScriptedWorker(world, slots=1, beating=True).start()
    old = world.submit(not_before=world.now + 10 * MINUTE)
    world.advance(SECOND)
    partition = world.partition_of(old)
    submitted = next(r for r in world.log.records(topics.EVENTS.name, partition) if r.key == old.encode())
    world.log.truncate(topics.EVENTS.name, partition, submitted.offset + 1)
    world.log.truncate(topics.COMMANDS.name, partition, world.executed(partition) - 1)
    world.advance(5 * SECOND)
    gone = asof("now", old)
    assert (gone.exit_code, "no longer in task-events" in gone.output) == (3, True)
    result = asof("now")
    assert "left out: 1 task(s)" in result.stderr
    assert "not known: what 1 worker(s)" in result.stderr


def test_two_tasks_of_one_beginning_are_ambiguous(world: World) -> None:
    world.submit(task_id="default/night-1")
    world.submit(task_id="default/night-2")
    result = asof("now", "night")
    assert result.exit_code == 2
    assert "default/night-1, default/night-2" in result.output
