"""Temporal's client, 64 workflows at a time."""

from __future__ import annotations

import asyncio
import os
import uuid
from typing import Any

from temporalio.client import Client

from benchmarks.peers import drive
from benchmarks.peers.temporal import app

_IN_FLIGHT = 64


class TemporalDriver(drive.Driver):
    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = self._loop.run_until_complete(Client.connect(os.environ["PEER_TEMPORAL"]))

    async def _execute(self, run: Any, *arguments: Any) -> Any:
        return await self._client.execute_workflow(
            run, args=list(arguments), id=str(uuid.uuid4()), task_queue=app.QUEUE
        )

    def tiny(self, count: int) -> None:
        gate = asyncio.Semaphore(_IN_FLIGHT)

        async def one() -> None:
            async with gate:
                await self._execute(app.Tiny.run)

        async def all_of_them() -> None:
            await asyncio.gather(*(one() for _ in range(count)))

        self._loop.run_until_complete(all_of_them())

    def start(self) -> int:
        return int(self._loop.run_until_complete(self._execute(app.FirstLine.run)))

    def steps(self, count: int) -> tuple[int, int]:
        local = "PEER_LOCAL" in os.environ
        first, last = self._loop.run_until_complete(self._execute(app.Steps.run, count, local))
        return first, last

    def slow(self, count: int, witness: str) -> None:
        self._loop.run_until_complete(
            self._client.start_workflow(app.Slow.run, args=[count, witness], id=str(uuid.uuid4()), task_queue=app.QUEUE)
        )


if __name__ == "__main__":
    drive.main(TemporalDriver())
    os._exit(0)  # its threads abort the interpreter's end now and then
