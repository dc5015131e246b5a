"""Stop signals, and processes that are started again when they die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from perdure.cli_run import OWNER

_BACKOFF_MIN_S = 0.1
_BACKOFF_MAX_S = 10.0
_HEALTHY_S = 30.0


def on_stop_signals(stop: Callable[[], None]) -> None:
    """Call `stop` at SIGTERM and SIGINT. For the main thread."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def supervise(command: Sequence[str], count: int, say: Callable[[str], None] = _say) -> int:
    """Keep `count` processes of `command` running until SIGTERM or SIGINT; returns 0. Blocks.

    One that ends is started again, at once at first and at growing intervals while it keeps dying young. Where this
    process is killed, those that ask for it (every `perdure` command that runs) end with it.
    """
    stopping = threading.Event()
    on_stop_signals(stopping.set)
    threads = [threading.Thread(target=_keep, args=(command, i, stopping, say)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)
    return 0


def _keep(command: Sequence[str], number: int, stopping: threading.Event, say: Callable[[str], None]) -> None:
    backoff = _BACKOFF_MIN_S
    while not stopping.is_set():
        began = time.monotonic()
        try:
            with subprocess.Popen(command, env=os.environ | {OWNER: str(os.getpid())}) as child:
                while child.poll() is None and not stopping.wait(0.1):
                    pass
                if stopping.is_set():
                    child.terminate()
                    return
            what = f"ended with code {child.returncode}"
        except OSError as error:  # out of processes or memory, which may pass
            what = f"could not be started: {error}"
        if time.monotonic() - began > _HEALTHY_S:
            backoff = _BACKOFF_MIN_S
        say(f"process {number} {what}; starts again in {backoff:.1f} s")
        stopping.wait(backoff)
        backoff = min(backoff * 2, _BACKOFF_MAX_S)
