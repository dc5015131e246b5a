"""The test kit, as its users see it: virtual time, deaths, and the same task states as in production."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import runpy
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from perdure import testing
from perdure.context import AsyncContext, Context
from perdure.failures import AttemptStop
from perdure.schemas.errors import (
    CommandRefused,
    ConfigurationError,
    InvalidRequest,
    NotFound,
    TaskCancelled,
    TaskFailed,
    TaskTimedOut,
    UnknownType,
    WaitTimeout,
)
from perdure.streams.memory_log import MemoryLog
from perdure.tasks import Registry, Retry, task
from perdure.testing import START_MS, Kit, KitHandle

Make = Callable[..., Kit]


def kinds(handle: KitHandle) -> list[str]:
    return [event.kind for event in handle.events()]


def hours(kit: Kit) -> float:
    return (kit.time() * 1000 - START_MS) / 3_600_000


class Walk:
    """A task that needs an hour of virtual time for each item, and says what it did."""

    def __init__(self, items: int = 5) -> None:
        self.items = items
        self.kit: Kit
        self.done: list[int] = []
        self.cleaned = 0
        self.registry = Registry()
        task(registry=self.registry)(self.walk)

    def walk(self, ctx: Context) -> int:
        try:
            for item in ctx.track(range(self.items)):
                self.kit.sleep(3600)
                self.done.append(item)
                ctx.state["last"] = item
        finally:
            self.cleaned += 1
        return int(ctx.state["last"])


@pytest.fixture
def walk(perdure_kit: Make) -> Walk:
    made = Walk()
    made.kit = perdure_kit([made.registry])
    return made


# Time -----------------------------------------------------------------------------------------------------------------


def test_a_task_of_thirty_hours_that_fails_twice(perdure_kit: Make) -> None:
    ran: list[tuple[int, int]] = []

    def crawl(ctx: Context) -> str:
        for hour in ctx.track(range(30)):
            ran.append((ctx.attempt, hour))
            kit.sleep(3600)
            if (ctx.attempt, hour) in ((1, 9), (2, 19)):
                raise ConnectionError("gone for a moment")
        return "there"

    kit = perdure_kit([crawl])
    handle = kit.submit(crawl, retry=Retry(delay="10m", max_delay="10m", backoff="fixed", jitter=False))
    assert handle.result() == "there"
    assert [hour for _, hour in ran] == [*range(10), *range(9, 20), *range(19, 30)]
    assert hours(kit) == pytest.approx(32 + 20 / 60, abs=0.001)
    assert kinds(handle).count("RetryScheduled") == 2


def test_nothing_happens_before_its_time(walk: Walk) -> None:
    handle = walk.kit.submit("walk", delay="2h")
    walk.kit.advance("1h 59m")
    assert handle.status().state == "PENDING"
    assert handle.status().reason == "delayed"
    walk.kit.advance("1m")
    assert handle.status().state == "RUNNING"
    walk.kit.advance("90m")
    assert walk.done == [0]
    status = handle.status()
    assert (status.units_done, status.units_total, status.checkpoint_version) == (1, 5, 1)
    assert status.elapsed_seconds == 5400


def test_tasks_share_time_but_not_slots(perdure_kit: Make) -> None:
    together, alone = Walk(), Walk()
    together.kit = perdure_kit([together.registry])
    alone.kit = perdure_kit([alone.registry], slots=1)
    for walk, expected in ((together, 5), (alone, 10)):
        walk.kit.run_until(walk.kit.submit("walk"), walk.kit.submit("walk"))
        assert hours(walk.kit) == expected


def test_run_lets_no_time_pass(walk: Walk) -> None:
    handle = walk.kit.submit("walk")
    assert walk.done == []
    walk.kit.run()
    assert (hours(walk.kit), handle.status().current_step, kinds(handle)[-1]) == (0, None, "AttemptStarted")


def test_time_sleep_can_be_made_virtual(perdure_kit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def nap(ctx: Context) -> float:
        began = ctx.started_at
        time.sleep(86_400)
        time.sleep(0.5)
        return (kit.now - began).total_seconds()

    kit = perdure_kit([nap])
    monkeypatch.setattr("time.sleep", kit.sleep)
    assert kit.submit(nap).result() == 86_400.5
    time.sleep(60)
    assert hours(kit) * 3600 == pytest.approx(86_460.5)


def test_the_example_in_the_modules_text(tmp_path: Path) -> None:
    def process_large_dataset(ctx: Context, dataset_path: str) -> dict[str, int]:
        ctx.state.setdefault("sum", 0)
        for number in ctx.track(range(1000)):
            ctx.state["sum"] += ctx.step("number", int, number)
        return {"sum": ctx.state["sum"]}

    tasks = Registry()
    task(registry=tasks)(process_large_dataset)
    example = tmp_path / "example.py"
    example.write_text((testing.__doc__ or "").split("```python")[1].split("```")[0])
    names = runpy.run_path(str(example), {"myapp": types.SimpleNamespace(tasks=tasks)})
    names["test_survives_everything"]()


def test_every_run_is_the_same_run(perdure_kit: Make) -> None:
    def history() -> list[tuple[str, int]]:
        walk = Walk()
        walk.kit = perdure_kit([walk.registry])
        handle = walk.kit.submit("walk", retry=Retry(5))
        walk.kit.advance("100m")
        walk.kit.crash_worker(down="5s")
        walk.kit.advance("100m")
        walk.kit.kill_task(handle)
        handle.result()
        return [(event.kind, event.at) for event in handle.events()]

    assert history() == history()


# Control --------------------------------------------------------------------------------------------------------------


def test_pause_at_the_next_boundary_and_resume(walk: Walk) -> None:
    handle = walk.kit.submit("walk")
    walk.kit.advance("90m")
    assert handle.pause()
    assert handle.status().stopping == "pausing"
    walk.kit.advance("10h")
    assert handle.status().state == "PAUSED"
    assert walk.done == [0, 1]
    assert handle.resume()
    assert handle.result() == 4
    assert walk.done == [0, 1, 2, 3, 4]


def test_a_pause_that_is_undone_stops_nothing(walk: Walk) -> None:
    handle = walk.kit.submit("walk")
    walk.kit.advance("90m")
    handle.pause()
    walk.kit.advance("1m")
    handle.resume()
    assert handle.result() == 4
    assert "TaskPaused" not in kinds(handle)


def test_cancel_interrupts_a_sleep_after_the_grace(walk: Walk) -> None:
    handle = walk.kit.submit("walk")
    walk.kit.advance("90m")
    handle.cancel(reason="not needed")
    walk.kit.advance("9s")
    assert (handle.status().state, handle.status().stopping) == ("RUNNING", "cancelling")
    walk.kit.advance("1s")
    assert handle.status().state == "CANCELLED"
    assert walk.cleaned == 1
    with pytest.raises(TaskCancelled, match="not needed"):
        handle.result()


def test_a_task_that_resists_its_cancellation_is_killed(perdure_kit: Make) -> None:
    def stubborn(ctx: Context) -> None:
        while True:
            with contextlib.suppress(AttemptStop):
                kit.sleep(3600)

    kit = perdure_kit([stubborn])
    handle = kit.submit(stubborn)
    kit.run()
    handle.cancel()
    kit.advance("19s")
    assert handle.status().state == "RUNNING"
    kit.advance("1s")
    assert handle.status().state == "CANCELLED"


def test_a_run_timeout_counts_as_a_failed_attempt(walk: Walk) -> None:
    handle = walk.kit.submit("walk", timeout="190m", retry=Retry(2, delay="1m", jitter=False))
    walk.kit.advance("191m")
    assert handle.status().state == "PENDING"
    assert handle.result() == 4
    assert walk.done == [0, 1, 2, 3, 4]
    assert [e.record.outcome for e in handle.events() if e.kind == "AttemptFailed"] == ["TIMED_OUT"]


@pytest.mark.parametrize(
    ("options", "which"),
    [
        ({"total_timeout": "3h"}, "total"),
        ({"timeout": "150m"}, "run"),
        ({"no_progress_timeout": "30m"}, "no_progress"),
        ({"queue_timeout": "1h", "delay": "1s"}, "queue"),
    ],
)
def test_timeouts(perdure_kit: Make, options: dict[str, Any], which: str) -> None:
    walk = Walk()
    walk.kit = perdure_kit([walk.registry], slots=1)
    if which == "queue":
        walk.kit.submit("walk")
    handle = walk.kit.submit("walk", **options)
    with pytest.raises(TaskTimedOut, match=which):
        handle.result()


def test_progress_holds_off_the_no_progress_timeout(walk: Walk) -> None:
    assert walk.kit.submit("walk", no_progress_timeout="61m").result() == 4


def test_deadline_and_cancelled_are_in_virtual_time(perdure_kit: Make) -> None:
    def patient(ctx: Context) -> float:
        assert ctx.deadline is not None
        left = (ctx.deadline - kit.now).total_seconds()
        while not ctx.cancelled:
            kit.sleep(10)
        return left

    kit = perdure_kit([patient])
    assert kit.submit(patient, timeout="1h").result() == 3600
    assert hours(kit) == pytest.approx(1, abs=0.001)


# Deaths ---------------------------------------------------------------------------------------------------------------


def test_after_a_kill_nothing_of_the_task_runs(walk: Walk) -> None:
    handle = walk.kit.submit("walk")
    walk.kit.advance("90m")
    walk.kit.kill_task(handle)
    walk.kit.run()
    assert walk.cleaned == 0
    assert handle.status().epoch == 2
    assert handle.result() == 4
    assert walk.done == [0, 1, 2, 3, 4]
    assert walk.cleaned == 1
    assert [e.record.detail for e in handle.events() if e.kind == "AttemptLost"] == ["signal 9"]


def test_a_task_can_die_in_the_middle_of_a_step(perdure_kit: Make) -> None:
    began: list[int] = []

    def fragile(ctx: Context) -> str:
        return str(ctx.step("charge", charge, ctx.epoch))

    def charge(epoch: int) -> str:
        began.append(epoch)
        if epoch == 1:
            kit.kill_task(handle)
            raise AssertionError("a dead process goes on")
        return "charged"

    kit = perdure_kit([fragile])
    handle = kit.submit(fragile)
    assert handle.result() == "charged"
    assert began == [1, 2]
    assert kinds(handle).count("StepCompleted") == 1


def test_before_and_after_a_report(perdure_kit: Make) -> None:
    ran: list[str] = []

    def two_steps(ctx: Context) -> None:
        ctx.step("one", ran.append, "one")
        ctx.step("two", ran.append, "two")

    kit = perdure_kit([two_steps])
    calm = kit.submit(two_steps)
    calm.result()
    # started; progress and result of each step; completed
    assert (calm.reports, ran) == (6, ["one", "two"])
    for moment, again in (("before_report", ["one", "one", "two"]), ("after_report", ["one", "two"])):
        ran.clear()
        handle = kit.submit(two_steps)
        kit.kill_task(handle, at=getattr(handle, moment)(3))
        handle.result()
        assert ran == again


def test_a_moment_that_has_passed_is_refused(walk: Walk) -> None:
    handle = walk.kit.submit("walk")
    walk.kit.run()
    with pytest.raises(InvalidRequest, match="past its report 1"):
        walk.kit.kill_task(handle, at=handle.after_report(1))


def test_five_deaths_without_a_step_are_a_crash_loop(perdure_kit: Make) -> None:
    def doomed(ctx: Context) -> None:
        kit.kill_task(handle)

    kit = perdure_kit([doomed])
    handle = kit.submit(doomed)
    with pytest.raises(TaskFailed, match="crash_loop"):
        handle.result()


def test_at_most_once_is_not_tried_again(perdure_kit: Make) -> None:
    def pay(ctx: Context) -> None:
        ctx.step("pay", kit.kill_task, handle, at_most_once=True)

    kit = perdure_kit([pay])
    handle = kit.submit(pay)
    with pytest.raises(TaskFailed, match="outcome is unknown"):
        handle.result()


def test_a_crashed_worker_that_comes_back_at_once(walk: Walk) -> None:
    handle = walk.kit.submit("walk")
    walk.kit.advance("90m")
    walk.kit.crash_worker()
    walk.kit.run()
    assert handle.status().state == "RUNNING"
    assert handle.result() == 4
    assert [e.record.why for e in handle.events() if e.kind == "AttemptLost"] == ["superseded"]
    assert hours(walk.kit) == 5.5


def test_a_worker_that_stays_away_loses_its_leases(walk: Walk) -> None:
    handle = walk.kit.submit("walk")
    walk.kit.advance("90m")
    walk.kit.crash_worker(down="2h")
    walk.kit.advance("9s")
    assert handle.status().state == "RUNNING"
    walk.kit.advance("6s")
    assert (handle.status().state, handle.status().reason) == ("PENDING", "no_worker")
    with pytest.raises(InvalidRequest, match="worker is down"):
        walk.kit.kill_task(handle)
    assert handle.result() == 4
    assert [e.record.why for e in handle.events() if e.kind == "AttemptLost"] == ["session_ended"]
    assert hours(walk.kit) == 7.5


@pytest.mark.parametrize("lose_disk", [False, True])
def test_an_engine_crash_disturbs_no_task(walk: Walk, lose_disk: bool) -> None:
    handle = walk.kit.submit("walk")
    for number in (1, 4, 6):
        walk.kit.crash_engine(lose_disk=lose_disk, at=handle.before_report(number))
        walk.kit.crash_engine(lose_disk=lose_disk, at=handle.after_report(number))
    walk.kit.advance("90m")
    walk.kit.crash_engine(lose_disk=lose_disk)
    assert handle.result() == 4
    assert (hours(walk.kit), kinds(handle).count("TaskGranted")) == (5, 1)


def test_a_worker_that_dies_at_a_report(walk: Walk) -> None:
    handle = walk.kit.submit("walk")
    walk.kit.crash_worker(at=handle.before_report(5))
    assert handle.result() == 4
    assert handle.status().epoch == 2


def test_two_deaths_at_one_moment(walk: Walk) -> None:
    handle = walk.kit.submit("walk")
    walk.kit.kill_task(handle, at=handle.after_report(4))
    walk.kit.crash_engine(at=handle.after_report(4), lose_disk=True)
    assert handle.result() == 4
    assert handle.status().epoch == 2


@pytest.mark.parametrize(("policy", "state"), [("drain", "RUNNING"), ("pause", "PAUSED")])
def test_a_restart_hands_tasks_back_at_a_boundary(perdure_kit: Make, policy: str, state: str) -> None:
    done: list[int] = []
    registry = Registry()

    @task(registry=registry, on_shutdown=policy)
    def walk(ctx: Context) -> None:
        for item in ctx.track(range(5)):
            kit.sleep(30)
            done.append(item)

    kit = perdure_kit([registry])
    handle = kit.submit("walk")
    kit.advance("40s")
    kit.restart_worker()
    assert done == [0, 1]
    kit.run()
    assert handle.status().state == state
    if state == "PAUSED":
        handle.resume()
    handle.result()
    assert done == [0, 1, 2, 3, 4]


def test_a_restart_kills_what_reaches_no_boundary(walk: Walk) -> None:
    handle = walk.kit.submit("walk")
    walk.kit.advance("90m")
    walk.kit.restart_worker(drain_timeout="10s")
    assert walk.kit.now.minute == 30
    assert handle.result() == 4
    assert [e.record.why for e in handle.events() if e.kind == "AttemptLost"] == ["drained"]


def test_many_recorded_steps_come_back_in_pages(perdure_kit: Make) -> None:
    ran: list[int] = []

    def heavy(ctx: Context) -> int:
        total = 0
        for number in range(8):
            total += len(ctx.step("part", part, number, key=number))
        if ctx.epoch == 1:
            kit.kill_task(handle)
        return total

    def part(number: int) -> str:
        ran.append(number)
        return "x" * 100_000

    kit = perdure_kit([heavy])
    handle = kit.submit(heavy)
    assert handle.result() == 800_000
    assert ran == list(range(8))


def test_closing_unwinds_what_was_killed() -> None:
    before = threading.active_count()
    walk = Walk()
    with Kit([walk.registry]) as walk.kit:
        killed = walk.kit.submit("walk")
        walk.kit.submit("walk")
        walk.kit.advance("90m")
        walk.kit.kill_task(killed)
        walk.kit.advance("1m")
        assert walk.cleaned == 0
        assert threading.active_count() > before
    assert walk.cleaned == 3
    assert threading.active_count() == before


# Async ----------------------------------------------------------------------------------------------------------------


def test_async_sleeps_are_virtual_and_concurrent(perdure_kit: Make) -> None:
    async def fetch_all(ctx: AsyncContext) -> list[str]:
        async def fetch(name: str) -> str:
            await asyncio.sleep(3600)
            return name.upper()

        found = await asyncio.gather(*(ctx.step("fetch", fetch, name, key=name) for name in "abc"))
        found.append(await asyncio.to_thread("d".upper))
        async for _ in ctx.track(range(2)):
            await asyncio.sleep(1800)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.sleep(9999), timeout=3600)
        return found

    kit = perdure_kit([fetch_all])
    handle = kit.submit(fetch_all)
    kit.advance("30m")
    assert handle.status().steps_completed == 0
    kit.advance("30m")
    assert handle.status().steps_completed == 3
    assert handle.result() == ["A", "B", "C", "D"]
    assert hours(kit) == pytest.approx(3, abs=0.001)


def test_the_same_step_in_two_branches_is_a_duplicate(perdure_kit: Make) -> None:
    async def careless(ctx: AsyncContext) -> None:
        await asyncio.gather(ctx.step("fetch", asyncio.sleep, 1), ctx.step("fetch", asyncio.sleep, 2))

    kit = perdure_kit([careless])
    handle = kit.submit(careless, retry=Retry(5))
    with pytest.raises(TaskFailed, match="DuplicateStep"):
        handle.result()
    assert handle.status().attempt == 1


def test_async_tasks_pause_cancel_and_die(perdure_kit: Make) -> None:
    done: list[int] = []
    cleaned: list[int] = []

    async def stroll(ctx: AsyncContext) -> str:
        try:
            async for item in ctx.track(range(4)):
                await asyncio.sleep(3600)
                done.append(item)
        finally:
            cleaned.append(ctx.epoch)
        return "home"

    kit = perdure_kit([stroll])
    handle = kit.submit(stroll)
    kit.advance("90m")
    handle.pause()
    kit.advance("90m")
    assert handle.status().state == "PAUSED"
    handle.resume()
    kit.advance("90m")
    kit.kill_task(handle)
    kit.run()
    assert cleaned == [1]
    assert handle.result() == "home"
    assert done == [0, 1, 2, 3]
    other = kit.submit(stroll)
    kit.advance("90m")
    other.cancel()
    kit.advance("10s")
    assert other.status().state == "CANCELLED"
    assert cleaned == [1, 3, 1]


def test_an_async_task_that_resists_is_killed_with_the_second_grace(perdure_kit: Make) -> None:
    async def stubborn(ctx: AsyncContext) -> None:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)

    kit = perdure_kit([stubborn])
    handle = kit.submit(stubborn)
    kit.run()
    handle.cancel()
    kit.advance("19s")
    assert handle.status().state == "RUNNING"
    kit.advance("1s")
    assert handle.status().state == "CANCELLED"


# Around a task --------------------------------------------------------------------------------------------------------


def test_what_a_task_prints_and_logs(perdure_kit: Make, capsys: pytest.CaptureFixture[str]) -> None:
    def talk(ctx: Context) -> None:
        print("one\ntwo")
        print("oops", file=sys.stderr)
        ctx.log.info("attempt %d", ctx.attempt)
        logging.getLogger("a.library").warning("careful")
        kit.sleep(60)
        print("no line end", end="")

    kit = perdure_kit([talk])
    handle = kit.submit(talk)
    kit.run()
    print("the test's own")
    handle.result()
    lines = [(line.stream, line.level, line.text) for line in handle.logs()]
    assert lines == [
        ("stdout", "", "one"),
        ("stdout", "", "two"),
        ("stderr", "", "oops"),
        ("log", "INFO", "attempt 1"),
        ("log", "WARNING", "careful"),
        ("stdout", "", "no line end"),
    ]
    assert [line.at - START_MS for line in handle.logs()] == [0, 0, 0, 0, 0, 60_000]
    assert capsys.readouterr().out == "one\ntwo\nthe test's own\nno line end"


def test_a_task_can_use_the_client(perdure_kit: Make) -> None:
    def parent(ctx: Context) -> str:
        return str(kit.client.submit("child", {"name": "n"}, id="the-child").id)

    def child(ctx: Context, name: str) -> str:
        return name * 2

    kit = perdure_kit([parent, child])
    assert kit.submit(parent).result() == "default/the-child"
    assert kit.handle("the-child").result() == "nn"
    with pytest.raises(NotFound):
        kit.handle("another-one")


def test_a_step_that_pauses_its_own_task(perdure_kit: Make) -> None:
    def self_conscious(ctx: Context) -> str:
        ctx.step("think", handle.pause)
        return str(ctx.step("act", str, "acted"))

    kit = perdure_kit([self_conscious])
    handle = kit.submit(self_conscious)
    kit.run()
    assert (handle.status().state, handle.status().steps_completed) == ("PAUSED", 1)
    handle.resume()
    assert handle.result() == "acted"


def test_steps_in_threads_of_the_task(perdure_kit: Make) -> None:
    def fan_out(ctx: Context) -> list[int]:
        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(lambda n: ctx.step("square", pow, n, 2, key=n), range(10)))

    kit = perdure_kit([fan_out])
    assert kit.submit(fan_out).result() == [n * n for n in range(10)]


def test_a_thread_of_the_task_cannot_wait_in_virtual_time(perdure_kit: Make) -> None:
    def fan_out(ctx: Context) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(kit.sleep, 1).result()

    kit = perdure_kit([fan_out])
    with pytest.raises(TaskFailed, match="only the task's own thread"):
        kit.submit(fan_out).result()


def test_only_the_test_lets_time_pass(perdure_kit: Make) -> None:
    def meddling(ctx: Context) -> None:
        kit.advance("1h")

    kit = perdure_kit([meddling])
    with pytest.raises(TaskFailed, match=r"use kit\.sleep here"):
        kit.submit(meddling).result()


def test_waiting_for_what_never_comes_says_why(walk: Walk) -> None:
    handle = walk.kit.submit("walk")
    walk.kit.run()
    handle.pause()
    with pytest.raises(WaitTimeout, match="PAUSED, paused; resume it"):
        handle.result()
    with pytest.raises(WaitTimeout, match="in 1h: PENDING"):
        walk.kit.submit("walk", delay="2h").result(timeout="1h")
    assert hours(walk.kit) < 2


def test_refusals_come_from_the_submit(walk: Walk) -> None:
    with pytest.raises(UnknownType):
        walk.kit.submit("stroll")
    walk.kit.submit("walk", id="mine", priority=1)
    with pytest.raises(CommandRefused, match="another task has the id"):
        walk.kit.submit("walk", id="mine", priority=2)
    with pytest.raises(InvalidRequest, match="no task of this kit"):
        walk.kit.submit(print)
    with pytest.raises(InvalidRequest, match="no process to kill"):
        walk.kit.kill_task(walk.kit.handle("mine"))


def test_an_idempotency_key_makes_one_task(walk: Walk) -> None:
    assert walk.kit.submit("walk", key="2026-11").id == walk.kit.submit("walk", key="2026-11").id


def test_what_a_kit_takes_as_tasks(perdure_kit: Make) -> None:
    module = types.ModuleType("my_tasks")
    registry = Registry()

    @task(registry=registry)
    def inside(ctx: Context) -> str:
        return "inside"

    module.__dict__.update(inside=inside, registry=registry, unrelated=len)
    assert perdure_kit([module]).submit(inside).result() == "inside"
    with pytest.raises(ConfigurationError, match="no task in empty"):
        perdure_kit([types.ModuleType("empty")])
    with pytest.raises(ConfigurationError, match="at least one task"):
        perdure_kit([])
    with pytest.raises(ConfigurationError, match="is a list of"):
        perdure_kit(module)


def test_the_worker_serves_the_queues_it_is_told_to(perdure_kit: Make) -> None:
    walk = Walk(1)
    walk.kit = perdure_kit([walk.registry], queues=["night"])
    day, night = walk.kit.submit("walk"), walk.kit.submit("walk", queue="night")
    assert night.result() == 0
    assert day.status().reason == "no_worker"


def test_a_task_with_its_own_queue_on_many_partitions(perdure_kit: Make) -> None:
    registry = Registry()
    for queue in ("alpha", "beta", "gamma"):
        task(registry=registry, name=queue, queue=queue)(lambda ctx: ctx.task_id)
    kit = perdure_kit([registry], partitions=8)
    handles = [kit.submit(queue) for queue in ("alpha", "beta", "gamma")]
    kit.run_until(*handles)
    assert [handle.result() for handle in handles] == ["alpha/task-1", "beta/task-2", "gamma/task-3"]


# The plugin -----------------------------------------------------------------------------------------------------------


def test_a_memory_log_whose_clock_stands(perdure_memory_log: MemoryLog) -> None:
    perdure_memory_log.producer().append("task-events", 1, b"k", b"v")
    assert [(r.partition, r.at) for r in perdure_memory_log.records("task-events")] == [(1, START_MS)]


def test_the_plugin_imports_nothing_heavy() -> None:
    code = (
        "import sys, perdure.pytest_plugin; "
        "print([m for m in ('confluent_kafka', 'rocksdict', 'fastavro', 'perdure.testing') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


@pytest.fixture
def root_level() -> Iterator[int]:
    level = logging.root.level
    yield level
    assert logging.root.level == level


def test_a_closed_kit_leaves_logging_as_it_was(root_level: int) -> None:
    handlers = list(logging.root.handlers)
    walk = Walk()
    with Kit([walk.registry]) as walk.kit:
        walk.kit.submit("walk").result()
        assert logging.root.handlers == handlers
