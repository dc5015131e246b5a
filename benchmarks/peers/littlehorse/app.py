"""LittleHorse's tasks, workflow definitions and worker."""

from __future__ import annotations

import asyncio
import time

import littlehorse
from grpc import RpcError
from littlehorse.config import LHConfig
from littlehorse.worker import LHTaskWorker
from littlehorse.workflow import Workflow, WorkflowThread

from benchmarks.peers import drive, work

_RETRY_S = 0.2
_READY_S = 120.0


async def tiny() -> int:
    """Nothing; a task has to return something."""
    return 0


async def step() -> int:
    """When it began."""
    return work.now()


async def slow_step(number: int, witness: str) -> int:
    """A slow step."""
    return await asyncio.to_thread(work.slow_step, number, witness)


TASKS = {"tiny": tiny, "step": step, "slow-step": slow_step}


def workflows(steps: int = 1, slow_steps: int = drive.SLOW_STEPS) -> list[Workflow]:
    """A definition has its steps one by one, so there is one for each number of steps."""

    def one(wf: WorkflowThread) -> None:
        wf.execute("tiny")

    def first(wf: WorkflowThread) -> None:
        wf.execute("step")

    def many(wf: WorkflowThread) -> None:
        for _ in range(steps):
            wf.execute("step")

    def slow(wf: WorkflowThread) -> None:
        witness = wf.declare_str("witness")
        for number in range(slow_steps):
            wf.execute("slow-step", number, witness, timeout_seconds=2, retries=3)

    bodies = {"tiny": one, "first-line": first, f"steps-{steps}": many, "slow": slow}
    return [Workflow(name, body) for name, body in bodies.items()]


def patiently(call: object, *arguments: object) -> None:
    """Call, and again while the server is starting or has not taken in what this stands on."""
    end = time.monotonic() + _READY_S
    while True:
        try:
            call(*arguments)  # type: ignore[operator]
            return
        except RpcError:
            if time.monotonic() > end:
                raise
            time.sleep(_RETRY_S)


async def main() -> None:
    """Work until killed."""
    config = LHConfig()
    for name, function in TASKS.items():
        patiently(littlehorse.create_task_def, function, name, config)
    for workflow in workflows():
        patiently(littlehorse.create_workflow_spec, workflow, config)
    print("ready", flush=True)
    await littlehorse.start(*(LHTaskWorker(function, name, config) for name, function in TASKS.items()))


if __name__ == "__main__":
    asyncio.run(main())
