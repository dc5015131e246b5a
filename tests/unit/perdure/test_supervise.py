"""Processes that are kept alive."""

from __future__ import annotations

import os
import select
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


def test_nothing_outlives_a_supervisor_that_is_killed() -> None:
    """It could be stopped by nobody any more, and the next supervisor would start as many again."""
    child = "import os, time; from perdure.cli_run import _end_with_owner as tie; tie(); "
    child += "print(os.getpid(), flush=True); time.sleep(600)"
    supervisor = f"import sys; from perdure.supervise import supervise; supervise([sys.executable, '-c', {child!r}], 1)"
    with subprocess.Popen([sys.executable, "-c", supervisor], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child_fd = os.pidfd_open(int(process.stdout.readline()))
        process.kill()
    assert select.select([child_fd], [], [], 30)[0], "it goes on"
    os.close(child_fd)


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
