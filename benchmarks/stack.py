"""What `perdure dev` costs: from nothing to the first task, progress to be seen, checkpoints, and doing nothing."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

from benchmarks.measure import Row, percentile
from perdure.api_client import ApiClient
from perdure.cli_dev import launch
from perdure.client import Client
from perdure.dev import stop_running
from perdure.schemas.errors import NotFound
from perdure.settings import DevStack, Settings
from perdure.streams.kafka_log import KafkaLog

_MODULES = ("benchmarks.tasks",)
_SETTLE_S, _IDLE_S = 10.0, 30.0
_REPORTS, _PAUSE_S = 200, 0.11
_STATES = (1, 100, 1_000)
"""Megabytes of a task's state."""


def start_rows(folder: Path, runs: int) -> list[Row]:
    """Stacks of their own, each ended again."""
    begun = [_start(folder / f"start-{n}") for n in range(runs)]
    return [Row("perdure dev, from nothing running to the first task's end", "s", "<= 10", begun)]


def rows(stack: DevStack, runs: int) -> list[Row]:
    """On a running stack, which has to have nothing else to do."""
    log = KafkaLog(stack.bootstrap)
    client = Client(log)
    try:
        client.submit("first_line").result(timeout=60)
        time.sleep(_SETTLE_S)
        idle = [_idle(stack) for _ in range(runs)]
        seen = [_visible(client, ApiClient(Settings.load(api=stack.api))) for _ in range(runs)]
        saves = {mb: client.submit("saves", {"megabytes": mb, "count": runs}).result(timeout=600) for mb in _STATES}
    finally:
        client.close()
    return [
        Row("the idle dev stack: CPU", "% of a core", "<= 5", [cpu for cpu, _ in idle]),
        Row("the idle dev stack: memory, shared pages once", "MB", "<= 700", [memory for _, memory in idle]),
        Row("progress to be seen in the API, p50", "ms", "", [percentile(s, 0.5) for s in seen]),
        Row("progress to be seen in the API, p99", "ms", "<= 700", [percentile(s, 0.99) for s in seen]),
        *(Row(f"a checkpoint holds up a task with {mb:,} MB of state", "s", "< 1", took) for mb, took in saves.items()),
    ]


def _start(folder: Path) -> float:
    began = time.perf_counter()
    stack = launch(folder, _MODULES, slots=2, port=None)
    try:
        client = Client(KafkaLog(stack.bootstrap))
        client.submit("first_line").result(timeout=60)
        took = time.perf_counter() - began
        client.close()
        return took
    finally:
        stop_running(folder)


def _processes(stack: DevStack) -> list[psutil.Process]:
    """Those of the stack, and its Kafka, which belongs to nobody once it runs."""
    root = psutil.Process(stack.pid)
    found = [root, *root.children(recursive=True)]
    kafka = [p for p in psutil.process_iter() if p not in found and str(stack.data_dir) in " ".join(_command(p))]
    return found + kafka


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _idle(stack: DevStack) -> tuple[float, float]:
    """(% of a core, MB)."""
    processes = _processes(stack)

    def spent() -> float:
        return sum(t.user + t.system for t in (p.cpu_times() for p in processes))

    begun = spent()
    time.sleep(_IDLE_S)
    cpu = (spent() - begun) / _IDLE_S * 100
    return cpu, sum(p.memory_full_info().pss for p in processes) / 1e6


def _visible(client: Client, api: ApiClient) -> list[float]:
    """Age of each report when it is first to be seen, ms."""
    handle = client.submit("stamps", {"count": _REPORTS, "pause_s": _PAUSE_S})
    ages: dict[str, float] = {}
    while True:
        try:
            task = api.get("tasks", {}, handle.id)
        except NotFound:
            continue
        stamp = task["current_step"]
        if stamp:
            ages.setdefault(stamp, (time.time_ns() - int(stamp)) / 1e6)
        if task["state"] == "COMPLETED":
            return list(ages.values())
        time.sleep(0.005)
