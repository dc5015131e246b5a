"""Faust in Python."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.stream import StreamPeer


class Faust(StreamPeer):
    """At least once, its default; its tables on rocksdict."""

    name = "faust"
    title = "Faust, at least once"
    folder = "faust"
    packages = ("faust-streaming[rocksdict]==0.15.3",)
    durability = "at least once (default), RocksDB by rocksdict, changelog"
    settings = "one process, no web server"
    workloads = ("S100k",)
    not_run = {"S1M": "ten times the records tell nothing new at its rate, and take ten times as long"}  # noqa: RUF012
    exactly_once = False

    def command(self) -> list[str | Path]:
        return [self.python, "-m", "benchmarks.peers.faust.app", "worker", "--loglevel", "warn"]


PEERS = (Faust(),)
