"""`perdure engine` with faults: run as a program, it breaks what production code does, where the test asks for it.

    python faulty_engine.py engine

A submitted task's type says what goes wrong while it is decided; the file `armed` in the current directory kills the
process once, between a commit that changes the task `dies-before-store` and the writing of the local store.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

from perdure import cli
from perdure.schemas.common import Cause
from perdure.schemas.events import ProgressReported
from perdure.streams import engine
from perdure.streams.decide import Input
from perdure.streams.decide import decide as decide_really
from perdure.streams.decision import Moment, Outputs, Telemetry
from perdure.streams.state import State
from perdure.streams.store import RocksStore

ARMED = Path("armed")
_apply = RocksStore.apply


def decide(s: State, m: Moment, given: Input) -> Outputs:
    """The real decision, and a fault in the middle of it."""
    yield from decide_really(s, m, given)
    match getattr(given.message, "type", None):
        case "raises":
            raise ZeroDivisionError("a defect in a decision")
        case "kills":
            os.kill(os.getpid(), signal.SIGKILL)
        case "oversized":
            cause = Cause(partition=m.cause.partition, offset=m.cause.offset)
            yield Telemetry(
                ProgressReported(
                    task_id="etl/1",
                    at=m.at,
                    cause=cause,
                    epoch=1,
                    attempt=1,
                    worker_id="w",
                    current_step="x" * 1_100_000,
                )
            )


def apply(self: RocksStore, writes: Mapping[bytes, bytes | None]) -> None:
    """The real write, unless the process dies before it."""
    if ARMED.exists() and any(b"dies-before-store" in key for key in writes):
        ARMED.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    _apply(self, writes)


if __name__ == "__main__":
    engine.decide = decide  # type: ignore[attr-defined]
    RocksStore.apply = apply  # type: ignore[method-assign]
    cli.main()
