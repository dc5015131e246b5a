"""The Redis that the queue libraries use, with the durability that their users are told to switch on."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers import cache
from benchmarks.peers.peer import Peer
from benchmarks.peers.processes import Process, free_port, listening

DURABILITY = "Redis append-only file, fsync each second (a power cut can lose the last second)"


class RedisPeer(Peer):
    """A peer on a Redis of its own."""

    durability = DURABILITY

    def install(self) -> dict[str, str]:
        cache.redis()
        return super().install()

    def start_servers(self, folder: Path) -> None:
        binary, environment = cache.redis()
        port = free_port()
        data = folder / "redis"
        data.mkdir()
        server = Process(
            [binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", data, "--appendonly", "yes",
             "--appendfsync", "everysec", "--save", ""],
            folder / "redis.log", environment,
        )  # fmt: skip
        self.servers.append(server)
        listening(port, server)
        self.environment["PEER_REDIS"] = f"redis://127.0.0.1:{port}/0"
