"""The API over a log in memory, asked without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from perdure.connectors.blobs import MemoryBlobs
from perdure.connectors.large_values import LargeValues
from perdure.projections.api import create_app
from perdure.projections.auth import Access, access
from perdure.projections.views import Views
from perdure.streams.memory_log import MemoryLog
from tests.unit.projections.filling import filled
from tests.unit.projections.story import Clock

ACCEPTED = {"accepted": True, "reason": "", "field": None, "command_id": "c1", "task_id": "etl/1"}


class Server:
    """The API over a log in memory, with requests as plain calls."""

    def __init__(self, tmp_path: Path, rules: Access | None = None) -> None:
        self.clock = Clock()
        self.log = MemoryLog(self.clock, partitions=2)
        self.path = tmp_path / "views.db"
        self.commands: list[dict[str, Any]] = []
        self.answer: Mapping[str, Any] | Exception = ACCEPTED
        self.fetched: list[tuple[str, bytes]] = []
        blobs = MemoryBlobs()
        self.large = LargeValues(lambda: (blobs, "home"))
        self.state: dict[str, Any] = {"ok": True, "problems": [], "lag": {}}
        self.views = Views(self.path)
        self.app = create_app(
            self.views, self.carry_out, self.fetch, lambda: self.state, rules or access("127.0.0.1", None), self.clock
        )

    def carry_out(self, command: dict[str, Any]) -> Mapping[str, Any]:
        self.commands.append(command)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def fetch(self, task_id: str, recorded: bytes) -> bytes:
        self.fetched.append((task_id, recorded))
        return self.large.fetched(task_id, recorded)

    def get(self, path: str, **said: Any) -> Any:
        """The JSON of a GET that succeeds, once all records are in the views."""
        filled(self.log, self.path)
        response = self.ask("GET", f"/api/v1/{path}", **said)
        assert response.status_code == 200, response.text
        return response.json()

    def refused(self, method: str, path: str, **said: Any) -> tuple[int, str, str | None]:
        """Status, code and field of a request that fails."""
        filled(self.log, self.path)
        response = self.ask(method, f"/api/v1/{path}", **said)
        error = response.json()["error"]
        assert set(error) == {"code", "message", "field"}
        assert error["message"]
        return response.status_code, error["code"], error["field"]

    def ask(self, method: str, path: str, **said: Any) -> httpx.Response:
        async def asked() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as client:
                return await client.request(method, path, **said)

        return asyncio.run(asked())
