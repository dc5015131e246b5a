"""What the worker's main thread waits on, and its end of a child's channel and pipes.

Nothing here blocks on a child: one that does not read its channel, or that prints without end, holds up nobody else.
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import psutil

from perdure.channel import Frame, FromChild, Run, pack
from perdure.forkserver import Child, Outputs
from perdure.schemas.errors import InfrastructureError

READ_BYTES = 64 * 1024
DRAIN_READS = 64
"""Reads that may be needed to empty a pipe whose writers are gone: more than any pipe holds."""

Action = Callable[[], object]


@dataclass(frozen=True, eq=False)
class _Watched:
    readable: Action
    writable: Action


class Events:
    """Descriptors to watch, and a mailbox for other threads. `post` is for any thread, the rest for one."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._watched: dict[int, _Watched] = {}
        self._posted: deque[Action] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.watch(self._wake, self._woken)

    def watch(self, descriptor: int, readable: Action, writable: Action = lambda: None) -> None:
        """Call `readable` whenever the descriptor can be read, and `writable`, when that is wanted, for writing."""
        self._watched[descriptor] = _Watched(readable, writable)
        self._poll.register(descriptor, select.EPOLLIN)

    def unwatch(self, descriptor: int) -> None:
        """Forget the descriptor; nothing happens if it is not watched."""
        if self._watched.pop(descriptor, None) is not None:
            self._poll.unregister(descriptor)

    def want_writable(self, descriptor: int, wanted: bool) -> None:
        """Whether `writable` is to be called for the descriptor, if it is still watched."""
        if descriptor in self._watched:
            self._poll.modify(descriptor, select.EPOLLIN | select.EPOLLOUT if wanted else select.EPOLLIN)

    def post(self, action: Action) -> None:
        """Have `action` called by the thread that waits. Safe in signal handlers."""
        self._posted.append(action)
        os.eventfd_write(self._wake, 1)

    def wait(self, timeout_ms: int) -> bool:
        """Wait for something to happen, and let it happen; False if the time ran out first."""
        ready = [(fd, events, self._watched[fd]) for fd, events in self._poll.poll(max(0, timeout_ms) / 1000)]
        for fd, events, watched in ready:
            # An action before may have let go of the descriptor, and its number may be another's by now.
            if events & select.EPOLLOUT and self._watched.get(fd) is watched:
                watched.writable()
            if events & ~select.EPOLLOUT and self._watched.get(fd) is watched:
                watched.readable()
        return bool(ready)

    def close(self) -> None:
        """Let go of everything; nothing may be posted any more."""
        self._poll.close()
        os.close(self._wake)

    def _woken(self) -> None:
        os.eventfd_read(self._wake)
        while self._posted:
            self._posted.popleft()()


class KillLadder:
    """Which signal is due when, for an attempt that does not stop by itself. Times in ms."""

    def __init__(self, *steps: tuple[int, int]) -> None:
        self._steps = deque(steps)

    @property
    def due(self) -> int | None:
        """When the next signal is due; None: all have been sent."""
        return self._steps[0][0] if self._steps else None

    def signal(self, now: int) -> int | None:
        """The signal to send now, the strongest of those that are due."""
        found = None
        while self._steps and self._steps[0][0] <= now:
            _, found = self._steps.popleft()
        return found


def kill_ladder(executor: str, now: int, grace_ms: int) -> KillLadder:
    """SIGTERM after one grace, SIGKILL after two; a child that others share gets only the latter."""
    kill = (now + 2 * grace_ms, int(signal.SIGKILL))
    return KillLadder(kill) if executor == "async" else KillLadder((now + grace_ms, int(signal.SIGTERM)), kill)


class Pipes:
    """The read ends of an attempt's stdout and stderr."""

    def __init__(self, events: Events, outputs: Outputs, write: Callable[[str, bytes], None]) -> None:
        self._events, self._write = events, write
        self._open = {"stdout": outputs.stdout, "stderr": outputs.stderr}
        for stream, descriptor in self._open.items():
            os.set_blocking(descriptor, False)
            events.watch(descriptor, partial(self._read, stream))

    def close(self) -> None:
        """Take what is still in the pipes, whose writers are gone, and let go."""
        for stream in list(self._open):
            for _ in range(DRAIN_READS):
                if not self._read(stream):
                    break
            self._close(stream)

    def _read(self, stream: str) -> bool:
        try:
            data = os.read(self._open[stream], READ_BYTES)
        except BlockingIOError:
            return False
        if data:
            self._write(stream, data)
        else:
            self._close(stream)
        return bool(data)

    def _close(self, stream: str) -> None:
        descriptor = self._open.pop(stream, None)
        if descriptor is not None:
            self._events.unwatch(descriptor)
            os.close(descriptor)


class Link:
    """A child and the supervisor's end of its channel. `send` and `send_if` are for any thread."""

    def __init__(
        self,
        child: Child,
        events: Events,
        said: Callable[[Link, FromChild], None],
        broken: Callable[[Link, InfrastructureError], None],
    ) -> None:
        """`said` takes each frame of the child; `broken` is called when it sends what is no frame."""
        self.child, self._events, self._said, self._broken = child, events, said, broken
        self._descriptor = child.connection.fileno()
        self._sending = socket.socket(fileno=os.dup(self._descriptor))
        self._lock = threading.Lock()
        self._backlog = bytearray()
        self._gone = False
        events.watch(self._descriptor, self._readable, self._writable)

    def send(self, frame: Frame) -> None:
        """Send a frame, now or when the child reads again. To a child that is gone nothing is sent: its end follows."""
        self.send_if(lambda: True, frame)

    def send_if(self, still: Callable[[], bool], frame: Frame) -> None:
        """`send`, if `still()` holds; no `start` comes in between."""
        with self._lock:
            if still():
                self._backlog += pack(frame)
                self._flush()

    def start(self, run: Run) -> Outputs | None:
        """Hand an attempt to the child, which has said that it is ready. Raises `OSError` when it is gone."""
        with self._lock:
            self._sending.sendall(self._backlog)
            self._backlog.clear()
            return self.child.start(run)

    def drain(self) -> None:
        """Take what a child that has ended said last, and let go of it."""
        os.set_blocking(self._descriptor, False)
        while self._receive():
            pass
        self.close()

    def close(self) -> None:
        """Let go of the child; one that still runs ends itself."""
        self._gone = True
        self._events.unwatch(self._descriptor)
        with self._lock:
            self._sending.close()
        self.child.close()

    def _readable(self) -> None:
        if not self._receive():
            self._events.unwatch(self._descriptor)

    def _writable(self) -> None:
        self._events.want_writable(self._descriptor, False)
        with self._lock:
            self._flush()

    def _receive(self) -> bool:
        """Take the next frames; False at their end."""
        try:
            frames = self.child.connection.receive()
            for frame in frames or ():
                self._said(self, cast("FromChild", frame))
        except (BlockingIOError, ConnectionResetError):
            return False
        except InfrastructureError as error:
            self._broken(self, error)
            return False
        return frames is not None

    def _flush(self) -> None:
        try:
            while self._backlog:
                sent = self._sending.send(self._backlog, socket.MSG_DONTWAIT)
                del self._backlog[:sent]
        except BlockingIOError:
            self._events.post(self._block)
        except OSError:  # the child is gone
            self._backlog.clear()

    def _block(self) -> None:
        if not self._gone:
            self._events.want_writable(self._descriptor, True)


# What a process uses -------------------------------------------------------------------------------------------------


def io_of(pid: int) -> tuple[int, int]:
    """Bytes that the process has read from storage and written to it; zeros if it is gone."""
    try:
        counters = psutil.Process(pid).io_counters()
    except psutil.Error:
        return 0, 0
    return counters.read_bytes, counters.write_bytes


def peak_rss_of(pid: int) -> int:
    """The process's largest resident set since `reset_peak_rss`, bytes; 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def reset_peak_rss(pid: int) -> None:
    """Measure the peak from now on (proc(5): clear_refs); where that is not allowed, it stays that of the child."""
    with suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")
