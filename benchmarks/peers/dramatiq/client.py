"""Dramatiq's client; a task of many steps is a pipeline."""

from __future__ import annotations

from dramatiq import pipeline

from benchmarks.peers import drive
from benchmarks.peers.dramatiq import app

_WAIT_MS = 600_000


class DramatiqDriver(drive.Driver):
    def tiny(self, count: int) -> None:
        for message in [app.tiny.send() for _ in range(count)]:
            message.get_result(block=True, timeout=_WAIT_MS)

    def start(self) -> int:
        return int(app.first_line.send().get_result(block=True, timeout=_WAIT_MS))

    def steps(self, count: int) -> tuple[int, int]:
        links = [app.step.message(None), *[app.step.message() for _ in range(count - 2)], app.last_step.message()]
        first, last = pipeline(links).run().get_result(block=True, timeout=_WAIT_MS)
        return first, last

    def slow(self, count: int, witness: str) -> None:
        links = [app.slow_step.message_with_options(args=(i, witness), pipe_ignore=i > 0) for i in range(count)]
        pipeline(links).run()


if __name__ == "__main__":
    drive.main(DramatiqDriver())
