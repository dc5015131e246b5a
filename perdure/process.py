"""What Linux offers to keep a tree of processes together (prctl(2)), and Python to processes that handle records."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import signal

_PDEATHSIG = 1
_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(signum: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when the thread that made it ends; 0: no more."""
    _prctl(_PDEATHSIG, signum)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, however they detached themselves."""
    _prctl(_CHILD_SUBREAPER, 1)


def kill_group(pid: int, signum: int = signal.SIGKILL) -> None:
    """Signal the process group that `pid` leads; nothing happens if it is empty."""
    try:
        os.killpg(pid, signum)
    except ProcessLookupError:
        return


def tell_crashes() -> None:
    """Have a process that dies of a fatal signal in foreign code say where it was, on stderr: every thread's stack."""
    faulthandler.enable(2)


def collect_seldom() -> None:
    """Look for cycles of objects a hundredth as often: records and rows make none, and a look walks all that is kept.

    For processes that handle record after record: the engine executes an eighth to a fifth more inputs so.
    """
    gc.set_threshold(100_000, 50, 100)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")
