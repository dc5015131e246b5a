"""Restate's client: HTTP calls to its ingress, 64 at a time."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import aiohttp

from benchmarks.peers import drive

_IN_FLIGHT = 64
_INGRESS = os.environ.get("PEER_INGRESS", "")


class RestateDriver(drive.Driver):
    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._session = self._loop.run_until_complete(self._open())

    async def _open(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=_IN_FLIGHT))

    async def _call(self, path: str, body: Any = None) -> Any:
        given = {"skip_auto_headers": ["content-type"]} if body is None else {"json": body}
        async with self._session.post(f"{_INGRESS}/Bench/{path}", **given) as answer:
            answer.raise_for_status()
            return await answer.json(content_type=None)

    def _run(self, path: str, body: Any = None) -> Any:
        return self._loop.run_until_complete(self._call(path, body))

    def tiny(self, count: int) -> None:
        async def all_of_them() -> None:
            await asyncio.gather(*(self._call("tiny") for _ in range(count)))

        self._loop.run_until_complete(all_of_them())

    def start(self) -> int:
        return int(self._run("first_line"))

    def steps(self, count: int) -> tuple[int, int]:
        first, last = self._run("steps", count)
        return first, last

    def slow(self, count: int, witness: str) -> None:
        self._run("slow/send", {"count": count, "witness": witness})

    def close(self) -> None:
        self._loop.run_until_complete(self._session.close())


if __name__ == "__main__":
    drive.main(RestateDriver())
