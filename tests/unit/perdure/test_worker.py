from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from perdure import worker
from perdure.forkserver import ForkServer
from perdure.streams.memory_log import MemoryLog
from perdure.worker import TICK_MS, Worker
from tests.unit.perdure.answering import KEYS


def test_what_keeps_coming_does_not_hold_up_what_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(1_000)
    monkeypatch.setattr(worker, "_clock", lambda: next(clock))
    busy = Worker(MemoryLog(lambda: 1), KEYS, ForkServer(["x"]), slots=1, state_dir=tmp_path, checkpoint_dir=tmp_path)
    ticks: list[int] = []

    def tick(now: int) -> int:
        ticks.append(now)
        return now + 60_000

    monkeypatch.setattr(busy, "_tick", tick)

    full, end = os.pipe()
    os.write(end, b"never read")
    busy._events.watch(full, lambda: None)
    for _ in range(100):
        busy._turn()
    busy._events.close()
    os.close(full)
    os.close(end)
    gaps = [after - before for before, after in itertools.pairwise(ticks)]
    assert len(ticks) > 10
    assert max(gaps) <= TICK_MS + 3, "a turn takes two of this clock's ms"


def test_the_supervisor_does_not_import_what_only_children_need() -> None:
    code = "import sys, perdure.worker; print([m for m in ('perdure.attempt', 'asyncio') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
