"""Processes of a peer: started, found ready, weighed and ended, each by its own id."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.peers.errors import Failed

ROOT = Path(__file__).resolve().parent.parent.parent
_STOP_S = 10.0
_LISTEN_S = 120.0


class Process:
    """A process and all below it."""

    def __init__(self, command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None,
                 cwd: Path = ROOT) -> None:  # fmt: skip
        self.command, self.log = [str(part) for part in command], log
        self._env, self._cwd = dict(env or {}), cwd
        self.start()

    def start(self) -> None:
        """Run it, with what it says in its log."""
        with self.log.open("ab") as output:
            self._popen = subprocess.Popen(
                self.command, env=os.environ | self._env, cwd=self._cwd, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Its id."""
        return self._popen.pid

    def check(self) -> None:
        """Raise `Failed` with its last words if it has ended."""
        if self._popen.poll() is not None:
            raise Failed(f"{Path(self.command[0]).name} ended with {self._popen.returncode}: {last_words(self.log)}")

    def says(self, word: str) -> bool:
        """Whether it has written a word. Raises `Failed` if it has ended."""
        self.check()
        return word in self.log.read_text(errors="replace")

    def tree(self) -> list[psutil.Process]:
        """It and its descendants."""
        with suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.pid)
            return [top, *top.children(recursive=True)]
        return []

    def kill(self) -> None:
        """SIGKILL for all of it, at once."""
        kill(self.tree())
        self._popen.wait()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for what is left after 10 s."""
        everyone = self.tree()
        if self._popen.poll() is None:
            self._popen.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(_STOP_S)
        kill(everyone)
        self._popen.wait()


def kill(everyone: Iterable[psutil.Process]) -> None:
    """SIGKILL for each that still runs."""
    for process in everyone:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def last_words(log: Path) -> str:
    """The last lines of a log."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-500:] or "it said nothing"


def until(ready: Callable[[], bool], what: str, timeout_s: float = 60.0, pause_s: float = 0.05) -> None:
    """Wait for a condition. Raises `Failed`."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise Failed(f"{what}: not within {timeout_s:g} s")
        time.sleep(pause_s)


def listening(port: int, process: Process) -> None:
    """Wait until somebody accepts connections on a port, as long as the process lives. Raises `Failed`."""

    def accepts() -> bool:
        process.check()
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    try:
        until(accepts, f"{Path(process.command[0]).name} listens", _LISTEN_S)
    except Failed as error:
        raise Failed(f"{error}; its last words: {last_words(process.log)}") from error


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def memory(everyone: Sequence[psutil.Process]) -> tuple[float, float]:
    """(resident, proportional) megabytes now; what processes share counts once in the second."""
    found = [p.memory_full_info() for p in everyone if p.is_running()]
    return sum(m.rss for m in found) / 1e6, sum(m.pss for m in found) / 1e6


def cpu(everyone: Sequence[psutil.Process], seconds: float) -> float:
    """Percent of one core used over the next seconds."""
    before = _cpu_seconds(everyone)
    began = time.monotonic()
    time.sleep(seconds)
    return 100 * (_cpu_seconds(everyone) - before) / (time.monotonic() - began)


def _cpu_seconds(everyone: Sequence[psutil.Process]) -> float:
    times = [p.cpu_times() for p in everyone if p.is_running()]
    return float(sum(t.user + t.system for t in times))
