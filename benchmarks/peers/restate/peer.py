"""Restate: one server, one process of handlers."""

from __future__ import annotations

import json
import urllib.request
from contextlib import suppress
from pathlib import Path

from benchmarks.peers import cache
from benchmarks.peers.peer import Peer
from benchmarks.peers.processes import Process, free_port, listening, until

_VERSION = "1.7.12"
_BINARY = "@restatedev/restate-server-linux-x64/bin/restate-server"


class Restate(Peer):
    """The server as it comes; hypercorn with one process."""

    name = "restate"
    title = "Restate"
    folder = "restate"
    packages = ("restate_sdk[serde]==1.3.0", "hypercorn==0.18.0", "aiohttp==3.14.5")
    durability = "its own log in RocksDB, one node, default settings"
    settings = "tiny tasks are handlers without ctx.run, 64 calls at a time; steps are ctx.run; hypercorn, 1 process"

    def install(self) -> dict[str, str]:
        cache.npm(f"@restatedev/restate-server@{_VERSION}", _BINARY)
        return {"restate-server": _VERSION} | super().install()

    def start_servers(self, folder: Path) -> None:
        binary = cache.npm(f"@restatedev/restate-server@{_VERSION}", _BINARY)
        ingress, admin, node, self._app = (free_port() for _ in range(4))
        addresses = {
            "RESTATE_INGRESS__BIND_ADDRESS": f"127.0.0.1:{ingress}",
            "RESTATE_ADMIN__BIND_ADDRESS": f"127.0.0.1:{admin}",
            "RESTATE_BIND_ADDRESS": f"127.0.0.1:{node}",
            "RESTATE_ADVERTISED_ADDRESS": f"http://127.0.0.1:{node}",
            "RESTATE_LISTEN_MODE": "tcp",
            "RESTATE_LOG_FILTER": "warn",
            "DO_NOT_TRACK": "1",
        }
        server = Process(
            [binary, "--no-logo", "--node-name", "bench", "--base-dir", folder / "restate"],
            folder / "restate.log", addresses,
        )  # fmt: skip
        self.servers.append(server)
        self._admin = f"http://127.0.0.1:{admin}"
        self.environment["PEER_INGRESS"] = f"http://127.0.0.1:{ingress}"
        listening(admin, server)
        listening(ingress, server)

    def worker_commands(self) -> list[list[str | Path]]:
        return [
            [self.python, "-m", "hypercorn", "--bind", f"127.0.0.1:{self._app}", "benchmarks.peers.restate.app:app"]
        ]

    def start(self, folder: Path) -> None:
        super().start(folder)
        listening(self._app, self.workers[0])
        until(self._registered, "registration of the handlers")

    def _registered(self) -> bool:
        body = json.dumps({"uri": f"http://127.0.0.1:{self._app}", "force": True}).encode()
        asked = urllib.request.Request(f"{self._admin}/deployments", body, {"content-type": "application/json"})
        with suppress(OSError), urllib.request.urlopen(asked, timeout=30) as answer:
            return 200 <= int(answer.status) < 300
        return False


PEERS = (Restate(),)
