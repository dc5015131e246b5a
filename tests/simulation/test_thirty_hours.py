"""Long tasks under many deaths, whole: client, engine, worker and user code, on virtual time.

What is held here: the result is that of an undisturbed run, a recorded step never runs again (G3), and with the default
checkpoint interval a death costs less work than the task makes between two saves.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from perdure.context import AsyncContext, Context
from perdure.schemas import codec
from perdure.tasks import Registry, Retry, task
from perdure.testing import START_MS, Kit, KitHandle
from tests.auditing import assert_sound

HOURS = 30
ITEM_S = 24
DEATHS = 50


class Laboratory:
    """Tasks that note each execution of a step, and see to it that none runs which is recorded already."""

    def __init__(self) -> None:
        self.kit: Kit
        self.executed: Counter[str] = Counter()
        self.registry = Registry()
        for function in (self.process_large_dataset, self.mixed, self.gathering, self.restless):
            task(registry=self.registry, retry=Retry(50, delay="1m"))(function)

    def note(self, key: str) -> str:
        """The body of every step."""
        assert key not in self.recorded(), f"step {key} runs although it is recorded"
        self.executed[key] += 1
        return key.upper()

    def recorded(self) -> Counter[str]:
        """Result of a step -> how often it is in the log, as its key."""
        found = [codec.decode(r.value or b"") for r in self.kit.log.records("task-events")]
        return Counter(e.result.decode()[1:-1].lower() for e in found if type(e).__name__ == "StepCompleted")

    # The tasks

    def process_large_dataset(self, ctx: Context, dataset_path: str) -> dict[str, Any]:
        """The example of the design."""
        schema = ctx.step("read-schema", self.note, dataset_path)
        ctx.state.setdefault("sum", 0)
        for batch in ctx.track([[n, n + 1] for n in range(5)], total=5):
            ctx.state["sum"] += sum(batch)
        ctx.milestone("aggregated")
        return {"sum": ctx.state["sum"], "schema": schema}

    def mixed(self, ctx: Context, dataset_path: str) -> list[str]:
        """Steps inside of nested tracks, before and after them, and explicit checkpoints."""
        found = [ctx.step("first", self.note, f"{dataset_path}-first")]
        for outer in ctx.track(range(2), name="outer"):
            ctx.state[f"o{outer}"] = True
            for inner in ctx.track(range(2), name="inner"):
                name = f"{dataset_path}-{outer}-{inner}"
                ctx.state.setdefault("seen", [])
                result = ctx.step("work", self.note, name)
                self.kit.sleep(20)
                again = ctx.step("work", self.note, f"{name}-again")
                ctx.state["seen"] = [*ctx.state["seen"], result, again]
            ctx.checkpoint()
        ctx.milestone("walked")
        found.append(ctx.step("last", self.note, f"{dataset_path}-last"))
        return [*found, *ctx.state["seen"]]

    async def gathering(self, ctx: AsyncContext, dataset_path: str) -> list[str]:
        """Steps that run at the same time."""

        async def work(key: str) -> str:
            await asyncio.sleep(10)
            return self.note(key)

        async for item in ctx.track(range(3)):
            keys = [f"{dataset_path}-{item}-{n}" for n in range(2)]
            found = await asyncio.gather(*(ctx.step("work", work, key, key=key) for key in keys))
            ctx.state["found"] = [*ctx.state.get("found", []), *found]
        return list(ctx.state["found"])

    def restless(self, ctx: Context, dataset_path: str, chance: float) -> int:
        """Waits, fails now and then, and counts."""
        dice = random.Random(f"{ctx.task_id}{ctx.epoch}")
        for item in ctx.track(range(12)):
            self.kit.sleep(dice.uniform(0, 1200))
            if dice.random() < chance:
                raise OSError("bad luck")
            ctx.step("work", self.note, f"{ctx.task_id}-{item}".lower())
            ctx.state["done"] = item + 1
        return int(ctx.state["done"])


Death = Callable[[Kit, KitHandle, Any], None]
DEATHS_OF: dict[str, Death] = {
    "task": lambda kit, handle, at: kit.kill_task(handle, at=at),
    "worker": lambda kit, handle, at: kit.crash_worker(at=at),
    "worker for good": lambda kit, handle, at: kit.crash_worker(down="1m", at=at),
    "engine": lambda kit, handle, at: kit.crash_engine(at=at),
    "engine with its disk": lambda kit, handle, at: kit.crash_engine(lose_disk=True, at=at),
}


@pytest.fixture
def laboratory() -> Laboratory:
    return Laboratory()


def undisturbed(laboratory: Laboratory, name: str) -> tuple[Any, Counter[str], int]:
    """(result, executions, reports) of a run in which nobody dies."""
    with Kit([laboratory.registry]) as laboratory.kit:
        handle = laboratory.kit.submit(name, {"dataset_path": "data"})
        result = handle.result()
        executed, laboratory.executed = laboratory.executed, Counter()
        return result, executed, handle.reports


@pytest.mark.parametrize("who", DEATHS_OF)
@pytest.mark.parametrize("name", ["process_large_dataset", "mixed", "gathering"])
def test_a_death_at_every_report(laboratory: Laboratory, name: str, who: str) -> None:
    result, executed, reports = undisturbed(laboratory, name)
    assert reports > 10
    for number in itertools.count(1):
        for after in (False, True):
            with Kit([laboratory.registry]) as laboratory.kit:
                handle = laboratory.kit.submit(name, {"dataset_path": "data"})
                moment = handle.after_report(number) if after else handle.before_report(number)
                DEATHS_OF[who](laboratory.kit, handle, moment)
                assert handle.result() == result, moment
                assert laboratory.recorded() == dict.fromkeys(executed, 1), moment
                had_more_to_say = number <= reports - after
                assert handle.status().epoch == 1 + (had_more_to_say and not who.startswith("engine")), moment
                # Only what was executed and not yet reported can be executed again: it was under way.
                under_way = 0 if who.startswith("engine") else {"gathering": 2}.get(name, 0 if after else 1)
                assert (laboratory.executed - executed).total() <= under_way, moment
                laboratory.executed.clear()
                check(laboratory.kit)
        if handle.reports < number:
            break
    assert number == reports + 1


@pytest.mark.parametrize("seed", [1])
def test_thirty_hours_and_fifty_deaths(seed: int) -> None:
    items = HOURS * 3600 // ITEM_S
    steps: Counter[int] = Counter()
    dice = random.Random(seed)

    def marathon(ctx: Context) -> int:
        ctx.state.setdefault("sum", 0)
        for item in ctx.track(range(items)):
            kit.sleep(ITEM_S / 2)
            if item % 10 == 0:
                ctx.state["sum"] += ctx.step("square", square, item)
            kit.sleep(ITEM_S / 2)
        return int(ctx.state["sum"])

    def square(item: int) -> int:
        steps[item] += 1
        return item * item

    with Kit([marathon], partitions=1) as kit:
        handle = kit.submit(marathon)
        moments = sorted(dice.uniform(0, HOURS * 3600) for _ in range(DEATHS))
        for moment in moments:
            kit.advance(max(0.0, moment - elapsed_s(kit)))
            dice.choice([lambda: kit.kill_task(handle), kit.crash_worker])()
            if dice.random() < 0.2:
                kit.crash_engine(lose_disk=dice.random() < 0.5)
        assert handle.result() == sum(item * item for item in range(0, items, 10))
        assert handle.status().epoch == DEATHS + 1
        assert steps == dict.fromkeys(range(0, items, 10), 1)
        recomputed = elapsed_s(kit) / (HOURS * 3600) - 1
        assert 0 < recomputed < 0.01
        check(kit)


@pytest.mark.parametrize("seed", range(8))
def test_many_tasks_under_random_disturbance(laboratory: Laboratory, seed: int) -> None:
    dice = random.Random(seed)
    with Kit([laboratory.registry], queues=["default", "etl"], partitions=3, slots=3) as kit:
        laboratory.kit = kit
        handles = [
            kit.submit("restless", {"dataset_path": "", "chance": chance}, priority=dice.randrange(10), queue=queue)
            for chance in (0.0, 0.05, 0.1)
            for queue in ("default", "etl", "etl")
        ]
        for _ in range(40):
            kit.advance(dice.uniform(0, 900))
            disturb(kit, dice, dice.choice(handles))
        for handle in handles:
            if handle.status().state == "PAUSED":
                handle.resume()
        for handle in handles:
            assert handle.result() == 12
        assert set(laboratory.recorded().values()) == {1}
        check(kit)


def disturb(kit: Kit, dice: random.Random, handle: KitHandle) -> None:
    """Do one thing that is possible at this moment."""
    status = handle.status()
    possible: list[Callable[[], Any]] = [kit.crash_engine, lambda: kit.crash_engine(lose_disk=True)]
    if status.state == "RUNNING":
        possible += [kit.restart_worker, kit.crash_worker, lambda: kit.crash_worker(down=dice.uniform(0, 120))]
        possible += [lambda: kit.kill_task(handle)]
        possible += [handle.pause] if status.stopping in ("none", "draining") else []
    if status.state == "PAUSED" or status.stopping == "pausing":
        possible.append(handle.resume)
    if status.state == "PENDING":
        possible.append(handle.pause)
    if status.state == "FAILED":
        possible.append(handle.retry)
    dice.choice(possible)()


def elapsed_s(kit: Kit) -> float:
    return kit.time() - START_MS / 1000


def check(kit: Kit) -> None:
    """What has to hold at the end of every run."""
    assert kit.log.records("quarantine") == []
    assert_sound(kit.log)
    found = [codec.decode(r.value or b"") for r in kit.log.records("task-events")]
    assert not [
        e for e in found if type(e).__name__ == "ReportRejected" and e.why not in ("stale_session", "stale_epoch")
    ]
    sequences: dict[str, int] = {}
    for event in found:
        if getattr(event, "task_id", None):
            assert event.seq == sequences.get(event.task_id, 0) + 1
            sequences[event.task_id] = event.seq
