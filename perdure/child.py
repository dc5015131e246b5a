"""The process that runs user code: it speaks with the supervisor over its channel and knows nothing of Kafka.

Kind `process` runs one attempt at a time in its main thread; nobody reads the channel but whoever waits. Kind `async`
runs many attempts on one event loop. `perdure.forkserver` says when each begins and ends.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn, cast

import msgspec

from perdure import process
from perdure.attempt import HARD, Attempt
from perdure.capture import Descriptors, Lines, TaskStream, capture_logging, flush
from perdure.channel import (
    Completed,
    Connection,
    Exit,
    Failed,
    Frame,
    Hello,
    Idle,
    Line,
    Progress,
    Run,
    Stop,
    Stopped,
    ToChild,
    Unpacker,
)
from perdure.clock import MachineClock
from perdure.connectors.checkpoints import LocalCheckpoints
from perdure.connectors.large_values import LargeValues, Place
from perdure.exchange import Channel
from perdure.loading import load
from perdure.schemas import codec, limits
from perdure.schemas.errors import InfrastructureError, StepError
from perdure.schemas.inbox import RunAttempt
from perdure.tasks import default_registry

PROGRESS_S = 0.1
"""Least time between two progress frames of an attempt; the last one is never lost."""
READ_BYTES = 256 * 1024
DEFECT = 70
"""Exit code after an error of Perdure's own (EX_SOFTWARE)."""
CHANNEL_FD = 3
"""Where a child that is an interpreter of its own finds its channel."""
LAST = (Completed, Failed, Stopped)
"""The frames that end an attempt."""


class Settings(msgspec.Struct, frozen=True):
    """What a child needs to know."""

    name: str
    kind: str
    modules: list[str]
    checkpoints: str
    large: Place | None
    """Where values too large for a record lie."""
    max_tasks: int
    parent: int
    """Process id of the fork server."""


class ProgressRelay(threading.Thread):
    """Thins out progress: at once where it is rare, else the newest of each attempt every `PROGRESS_S`."""

    def __init__(self, send: Callable[[Frame], None]) -> None:
        super().__init__(name="perdure-progress", daemon=True)
        self._send = send
        self._changed = threading.Condition()
        self._waiting: dict[tuple[str, int], Progress] = {}
        self._sent: dict[tuple[str, int], float] = {}

    def offer(self, frame: Progress) -> None:
        """Send the frame now or soon."""
        key = frame.task_id, frame.epoch
        with self._changed:
            now = time.monotonic()
            if key not in self._waiting and now - self._sent.get(key, 0.0) >= PROGRESS_S:
                self._sent[key] = now
                self._send(frame)
                return
            self._waiting[key] = frame
            if not self.is_alive():
                self.start()
            self._changed.notify()

    def end(self, task_id: str, epoch: int) -> None:
        """Send what waits of an attempt, and forget it."""
        with self._changed:
            last = self._waiting.pop((task_id, epoch), None)
            self._sent.pop((task_id, epoch), None)
            if last is not None:
                self._send(last)

    def run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
            time.sleep(PROGRESS_S)
            with self._changed:
                for key, frame in self._waiting.items():
                    self._sent[key] = time.monotonic()
                    self._send(frame)
                self._waiting.clear()


class Wire:
    """A child's end of its channel. Whatever says that the supervisor is gone ends the process here."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._connection = Connection(sock, child=True)
        self._unpacker = Unpacker(child=True)
        self.relay = ProgressRelay(self._put)
        self.left = False
        """Whether this is not the child any more but a process that user code has forked off it."""

    def leave(self) -> None:
        """Let go in a forked process, which must neither read nor write what belongs to the child."""
        self.left = True
        self._socket.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def send(self, frame: Frame) -> None:
        """Send a frame. Thread-safe; blocks while the socket's buffer is full."""
        if self.left:
            raise StepError("ctx belongs to the task's own process; return what this process found and report it there")
        if isinstance(frame, Progress):
            self.relay.offer(frame)
            return
        if isinstance(frame, LAST):
            self.relay.end(frame.task_id, frame.epoch)
        self._put(frame)

    def _put(self, frame: Frame) -> None:
        try:
            self._connection.send(frame)
        except OSError:
            die()

    def ready(self, timeout_ms: int | None = 0) -> bool:
        """Whether `read` would not block; waits for at most `timeout_ms`, None: until it is so."""
        poller = select.poll()  # a new one each time: a signal handler may ask while this waits
        poller.register(self._socket, select.POLLIN)
        return bool(poller.poll(timeout_ms))

    def read(self) -> tuple[bytes, list[int]]:
        """Bytes for `frames`, and descriptors that came with them. Blocks."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, READ_BYTES, 2, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            die()
        if not data:
            die()
        return data, descriptors

    def frames(self, data: bytes) -> list[ToChild]:
        """The frames that `data` completes."""
        return cast("list[ToChild]", list(self._unpacker.feed(data)))


class ProcessChild:
    """Runs one attempt at a time, in the main thread. To an attempt it is the channel."""

    def __init__(self, wire: Wire, settings: Settings) -> None:
        self._wire, self._settings = wire, settings
        self._store, self._clock = LocalCheckpoints(Path(settings.checkpoints)), MachineClock()
        self._large = LargeValues.at(settings.large)
        self._descriptors = Descriptors()
        self._attempt: Attempt | None = None
        self._lines: Lines | None = None
        self._undivided = False
        self._signalled = False

    def serve(self) -> None:
        """Run attempts until told to exit, or until this process is not fit for another."""
        capture_logging(lambda: None if self._wire.left else self._lines)
        for count in range(1, self._settings.max_tasks + 1):
            if not self._next() or count == self._settings.max_tasks:
                return
            self._wire.send(Idle())

    def _next(self) -> bool:
        """Wait for an attempt and run it. Whether this process may run another."""
        outputs: list[int] = []
        while True:
            data, descriptors = self._wire.read()
            frames = self._wire.frames(data)
            outputs += descriptors
            for place, frame in enumerate(frames):
                if isinstance(frame, Exit):
                    return False
                if isinstance(frame, Run):  # anything else is a late word to the attempt before
                    return self._run(frame, outputs, frames[place + 1 :])

    def _run(self, run: Run, outputs: list[int], early: list[ToChild]) -> bool:
        self._attempt = attempt = new_attempt(run, self, self._store, self._clock, self._large)
        self._lines = Lines(partial(_line, self.send, run))
        self._descriptors.lend(*outputs)
        for frame in early:
            attempt.receive(frame)
        signal.signal(signal.SIGTERM, self._terminated)
        whole = attempt.run()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._attempt = self._lines = None
        return self._descriptors.take_back() and whole and not self._left_threads() and not _left_processes()

    def _left_threads(self) -> bool:
        return threading.active_count() > 1 + self._wire.relay.is_alive()

    def send(self, frame: Frame) -> None:
        """See `Channel`."""
        with self._whole():
            self._wire.send(frame)

    def poll(self) -> None:
        """See `Channel`."""
        if self._wire.ready():
            self.wait()

    def wait(self) -> None:
        """See `Channel`."""
        self._wire.ready(None)
        with self._whole():
            for frame in self._wire.frames(self._wire.read()[0]):
                if self._attempt is not None:
                    self._attempt.receive(frame)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What a signal must not break off: it is answered at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._undivided = True
        yield
        self._undivided = False
        if self._signalled:
            self._signalled = False
            self._terminated(signal.SIGTERM, None)

    def _terminated(self, _signum: int, _frame: FrameType | None) -> None:
        """SIGTERM: the grace of a stop is over, so user code is interrupted where it stands.

        Without a stop it is a service manager's word to the whole service: the supervisor hears it as well, and has us
        finish.
        """
        if self._undivided:
            self._signalled = True
            return
        if self._attempt is None or self._attempt.over:
            return  # it is ending anyway
        stop = self._attempt.interrupt()
        if stop is not None:
            raise stop


class AsyncChannel:
    """The channel of one attempt on the event loop, which does the reading."""

    def __init__(self, wire: Wire, lines: Lines) -> None:
        self._wire, self._lines = wire, lines

    def send(self, frame: Frame) -> None:
        """See `Channel`."""
        if isinstance(frame, LAST):
            self._lines.close()
        self._wire.send(frame)

    def poll(self) -> None:
        """Nothing: the loop reads."""

    def wait(self) -> None:
        """Not on the event loop: async attempts await."""
        raise AssertionError("an async attempt never blocks for a frame")


class AsyncChild:
    """Runs many attempts at the same time, each in an asyncio task of its own."""

    def __init__(self, wire: Wire, settings: Settings) -> None:
        self._wire = wire
        self._store, self._clock = LocalCheckpoints(Path(settings.checkpoints)), MachineClock(shared=True)
        self._large = LargeValues.at(settings.large)
        self._attempts: dict[tuple[str, int], tuple[Attempt, asyncio.Task[None]]] = {}
        self._exit = asyncio.Event()

    async def serve(self) -> NoReturn:
        """Run attempts until told to exit; those that still run then end with the process."""
        capture_logging(self._find)
        sys.stdout = TaskStream("stdout", sys.stdout, self._find)
        sys.stderr = TaskStream("stderr", sys.stderr, self._find)
        asyncio.get_running_loop().add_reader(self._wire.fileno(), _or_die, self._read)
        await self._exit.wait()
        flush()
        os._exit(0)

    def _find(self) -> Lines | None:
        return None if self._wire.left else _lines.get()

    def _read(self) -> None:
        for frame in self._wire.frames(self._wire.read()[0]):
            if isinstance(frame, Exit):
                self._exit.set()
            elif isinstance(frame, Run):
                self._start(frame)
            elif (frame.task_id, frame.epoch) in self._attempts:
                attempt, running = self._attempts[frame.task_id, frame.epoch]
                attempt.receive(frame)
                if isinstance(frame, Stop) and frame.why in HARD:  # what SIGTERM is to a process
                    grace_s = attempt.grant.policy.cancel_grace / 1000
                    asyncio.get_running_loop().call_later(grace_s, running.cancel)

    def _start(self, run: Run) -> None:
        lines = Lines(partial(_line, self._wire.send, run))
        attempt = new_attempt(run, AsyncChannel(self._wire, lines), self._store, self._clock, self._large)
        running = asyncio.get_running_loop().create_task(self._run(attempt, lines), name=run.task_id)
        self._attempts[run.task_id, run.epoch] = attempt, running

    async def _run(self, attempt: Attempt, lines: Lines) -> None:
        _lines.set(lines)
        try:
            await attempt.run_async()
        except BaseException:  # noqa: BLE001  an attempt takes whatever its user code raises: this is a defect of ours
            defect()
        del self._attempts[attempt.grant.task_id, attempt.grant.epoch]


_lines: ContextVar[Lines | None] = ContextVar("perdure_lines", default=None)
"""Lines of the attempt that this context belongs to, in an async child."""


def new_attempt(run: Run, way: Channel, store: LocalCheckpoints, clock: MachineClock, large: LargeValues) -> Attempt:
    """The attempt that a frame asks for. Raises `InfrastructureError` for a type that is not loaded."""
    grant = codec.decode_as(RunAttempt, run.grant)
    task_type = default_registry.get(grant.type)
    if task_type is None:
        raise InfrastructureError(f"task {grant.task_id} is of type {grant.type!r}, which this worker has not loaded")
    return Attempt(grant, task_type, way, store, clock, large)


def _line(send: Callable[[Frame], None], run: Run, stream: str, level: str, text: str) -> None:
    cut = text.encode("utf-8", "replace")[: limits.LINE_MAX].decode("utf-8", "ignore")
    send(Line(run.task_id, run.epoch, time.time_ns() // 1_000_000, stream, level, cut))


def _left_processes() -> bool:
    """Whether anything that user code started still runs: this process is the subreaper of all of it."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _or_die(read: Callable[[], None]) -> None:
    try:
        read()
    except BaseException:  # noqa: BLE001  the event loop would only log it
        defect()


def die() -> NoReturn:
    """End this process and all of its group: the supervisor is gone."""
    process.kill_group(os.getpid())
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("killed")


def defect() -> NoReturn:
    """End this process after an error of our own, the one being handled."""
    traceback.print_exc()
    flush()
    os._exit(DEFECT)


def run_child(sock: socket.socket, settings: Settings, version: str) -> NoReturn:
    """Be a child from here on."""
    try:
        process.die_with_parent()
        process.adopt_orphans()
        process.tell_crashes()
        if os.getppid() != settings.parent:
            die()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        wire = Wire(sock)
        os.register_at_fork(after_in_child=wire.leave)
        wire.send(Hello(settings.name, os.getpid(), "", version))
        if settings.kind == "async":
            asyncio.run(_serve_async(wire, settings))
        else:
            ProcessChild(wire, settings).serve()
    except BaseException:  # noqa: BLE001  nothing may escape into the fork server's code
        defect()
    flush()
    os._exit(0)


async def _serve_async(wire: Wire, settings: Settings) -> None:
    await AsyncChild(wire, settings).serve()


def main() -> NoReturn:
    """A child that is an interpreter of its own: settings in its argument, channel on a known descriptor."""
    settings = msgspec.json.decode(sys.argv[1], type=Settings)
    run_child(socket.socket(fileno=CHANNEL_FD), settings, load(settings.modules))


if __name__ == "__main__":
    main()
