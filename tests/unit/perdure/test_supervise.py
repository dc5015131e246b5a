"""Processes that are kept alive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from perdure import supervise


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_one_that_cannot_be_started_is_said_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    started = threading.Event()

    def popen(command: list[str], **how: Any) -> subprocess.Popen[bytes]:
        if not said:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.set()
        return real(command, **how)

    def then_stop() -> None:
        started.wait(30)
        os.kill(os.getpid(), signal.SIGTERM)

    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", popen)
    stopping = threading.Thread(target=then_stop)
    stopping.start()
    assert supervise.supervise([sys.executable, "-c", "import time; time.sleep(3600)"], 1, said.append) == 0
    stopping.join()
    assert started.is_set()
    assert said == [
        "process 0 could not be started: [Errno 11] Resource temporarily unavailable; starts again in 0.1 s"
    ]
