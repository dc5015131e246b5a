"""Quix Streams in Python, exactly once, with two intervals between commits."""

from __future__ import annotations

from benchmarks.peers.stream import StreamPeer


class Quix(StreamPeer):
    """Commits as often as the others."""

    name = "quix"
    title = "Quix Streams, commit each 0.1 s"
    folder = "quix"
    packages = ("quixstreams==3.28.1",)
    durability = "exactly-once, RocksDB, changelog"
    settings = "one process (one thread), commit each 0.1 s"
    commit_s = "0.1"

    def environment(self) -> dict[str, str]:
        return {"PEER_COMMIT": self.commit_s}


class QuixDefault(Quix):
    """Commits as it does by default."""

    name = "quix-default"
    title = "Quix Streams, commit each 5 s"
    settings = "one process (one thread), commit each 5 s (default)"
    commit_s = "5.0"


PEERS = (Quix(), QuixDefault())
