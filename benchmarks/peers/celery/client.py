"""Celery's client; a task of many steps is a chain."""

from __future__ import annotations

from celery import chain
from celery.result import ResultSet

from benchmarks.peers import drive
from benchmarks.peers.celery import app


class CeleryDriver(drive.Driver):
    def tiny(self, count: int) -> None:
        ResultSet([app.tiny.delay() for _ in range(count)]).join_native(timeout=600)

    def start(self) -> int:
        return int(app.first_line.delay().get(timeout=60))

    def steps(self, count: int) -> tuple[int, int]:
        links = [app.step.s(None), *[app.step.s() for _ in range(count - 2)], app.last_step.s()]
        first, last = chain(links).apply_async().get(timeout=600)
        return first, last

    def slow(self, count: int, witness: str) -> None:
        chain([app.slow_step.si(i, witness) for i in range(count)]).apply_async()


if __name__ == "__main__":
    drive.main(CeleryDriver())
