"""Temporal's workflows, activities and worker."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.common import RetryPolicy
from temporalio.worker import Worker

with workflow.unsafe.imports_passed_through():
    from benchmarks.peers import work

QUEUE = "bench"
_LIMIT = timedelta(seconds=10)
_RETRY = RetryPolicy(initial_interval=timedelta(milliseconds=100))


@activity.defn
def step() -> int:
    """When it began."""
    return work.now()


@activity.defn
def slow_step(number: int, witness: str) -> int:
    """A slow step."""
    return work.slow_step(number, witness)


@workflow.defn
class Tiny:
    """Nothing."""

    @workflow.run
    async def run(self) -> None:
        """Nothing."""


@workflow.defn
class FirstLine:
    """When its first line of user code, an activity, ran."""

    @workflow.run
    async def run(self) -> int:
        """One activity."""
        return await workflow.execute_activity(step, start_to_close_timeout=_LIMIT)


@workflow.defn
class Steps:
    """Activities one after another; when the first and the last began."""

    @workflow.run
    async def run(self, count: int, local: bool) -> list[int]:
        """The steps; local activities are recorded with the workflow task that they belong to."""
        run = workflow.execute_local_activity if local else workflow.execute_activity
        times = [await run(step, start_to_close_timeout=_LIMIT) for _ in range(count)]
        return [times[0], times[-1]]


@workflow.defn
class Slow:
    """Slow activities, one after another."""

    @workflow.run
    async def run(self, count: int, witness: str) -> None:
        """The steps."""
        for number in range(count):
            await workflow.execute_activity(
                slow_step, args=[number, witness], start_to_close_timeout=_LIMIT, retry_policy=_RETRY
            )


async def main() -> None:
    """Work until killed."""
    client = await Client.connect(os.environ["PEER_TEMPORAL"])
    with ThreadPoolExecutor(16) as threads:
        await Worker(
            client, task_queue=QUEUE, workflows=[Tiny, FirstLine, Steps, Slow], activities=[step, slow_step],
            activity_executor=threads,
        ).run()  # fmt: skip


if __name__ == "__main__":
    asyncio.run(main())
