"""A supervisor that the test plays, over a real fork server and real children."""

from __future__ import annotations

import json
import os
import selectors
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from perdure import channel
from perdure.forkserver import Child, ChildExit, ForkServer, Loaded, Outputs
from perdure.schemas import codec
from perdure.schemas.common import Policy, Retry
from perdure.schemas.inbox import RunAttempt

DEADLINE_S = 60
LAST = (channel.Completed, channel.Failed, channel.Stopped)
Answer = Callable[[channel.Frame], None]


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Wait for a condition, with a deadline."""
    ends = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < ends, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    """Whether the process does not run any more; one that nobody has waited for counts as gone."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@dataclass
class Ran:
    """What was seen of an attempt."""

    frames: list[channel.Frame] = field(default_factory=list)
    stdout: bytes = b""
    stderr: bytes = b""
    idle: bool = False
    exited: ChildExit | None = None

    @property
    def last(self) -> Any:
        """The frame that ended it."""
        (found,) = [frame for frame in self.frames if isinstance(frame, LAST)]
        return found

    @property
    def result(self) -> Any:
        """What the task returned."""
        assert isinstance(self.last, channel.Completed), self.last
        return json.loads(self.last.result)

    def lines(self, stream: str) -> list[str]:
        """Texts of the `Line` frames of a stream."""
        return [frame.text for frame in self.frames if isinstance(frame, channel.Line) and frame.stream == stream]


class Supervisor:
    """Starts children of one module and runs attempts in them, acknowledging all they say."""

    def __init__(self, module: Path, checkpoints: Path, **options: Any) -> None:
        self.server = ForkServer([str(module)], **options)
        self.server.checkpoints = checkpoints
        self.server.start()
        self.loaded: Loaded = self.server.loaded(DEADLINE_S)
        self._epoch = 0
        self._children: list[Child] = []

    def spawn(self, kind: str = "process") -> Child:
        """A child that has said hello."""
        child = self.server.spawn(kind)
        self._children.append(child)
        frames = child.connection.receive()
        assert frames is not None
        (hello,) = frames
        assert isinstance(hello, channel.Hello)
        assert (hello.child, hello.code_version) == (child.name, self.loaded.code_version)
        child.pid = hello.pid
        return child

    def close(self) -> None:
        """End everything."""
        self.server.stop()
        for child in self._children:
            child.close()

    def begin(self, child: Child, type_: str, value: Any = None, **policy: Any) -> tuple[int, Outputs | None]:
        """Hand the child an attempt; its epoch and pipes."""
        self._epoch += 1
        grant = RunAttempt(
            worker_id="w", session="s", grant=self._epoch, task_id="q/t", type=type_, input=json.dumps(value).encode(),
            input_ref=None, policy=Policy(retry=Retry(), **policy), attempt=1, epoch=self._epoch,
        )  # fmt: skip
        return self._epoch, child.start(channel.Run("q/t", self._epoch, codec.encode(grant)))

    def run(
        self, child: Child, type_: str, value: Any = None, on_frame: Answer = lambda frame: None, **policy: Any
    ) -> Ran:
        """Run an attempt until nothing of it is left: idle or exited, and its pipes at their end."""
        epoch, outputs = self.begin(child, type_, value, **policy)
        return self.follow(child, epoch, outputs, on_frame)

    def follow(self, child: Child, epoch: int, outputs: Outputs | None, on_frame: Answer = lambda frame: None) -> Ran:
        """Watch an attempt to its end."""
        ran = Ran()
        reads: dict[int, Callable[[], bool]] = {}
        reads[child.connection.fileno()] = lambda: self._hear(child, epoch, ran, on_frame)
        reads[self.server.fileno()] = lambda: self._note_exits(child, ran)
        for name, pipe in zip(("stdout", "stderr"), outputs or (), strict=False):
            reads[pipe] = lambda name=name, pipe=pipe: read_pipe(ran, name, pipe)  # type: ignore[misc]
        left = set(outputs or ())
        ends = time.monotonic() + DEADLINE_S
        with selectors.DefaultSelector() as selector:
            for descriptor in reads:
                selector.register(descriptor, selectors.EVENT_READ)
            while left or not (ran.idle or ran.exited or (outputs is None and ended(ran))):
                assert time.monotonic() < ends, ran
                for key, _ in selector.select(1):
                    if not reads[key.fd]():
                        selector.unregister(key.fd)
                        left.discard(key.fd)
        for pipe in outputs or ():
            os.close(pipe)
        return ran

    def exit_of(self, child: Child) -> ChildExit:
        """Wait for the child's end."""
        ran = Ran()
        wait_until(lambda: self._note_exits(child, ran) and ran.exited is not None, f"end of {child.name}")
        assert ran.exited is not None
        return ran.exited

    def _hear(self, child: Child, epoch: int, ran: Ran, on_frame: Answer) -> bool:
        try:
            frames = child.connection.receive()
        except ConnectionResetError:  # it ended without reading all it was sent
            frames = None
        for frame in frames or ():
            ran.frames.append(frame)
            ran.idle = ran.idle or isinstance(frame, channel.Idle)
            if hasattr(frame, "number") and not isinstance(frame, LAST):
                with suppress(BrokenPipeError):
                    child.connection.send(channel.Ack("q/t", epoch, frame.number))
            on_frame(frame)
        return frames is not None

    def _note_exits(self, child: Child, ran: Ran) -> bool:
        for ended in self.server.exits():
            if ended.child == child.name:
                ran.exited = ended
        return True


def ended(ran: Ran) -> bool:
    """Whether the last frame has come."""
    return any(isinstance(frame, LAST) for frame in ran.frames)


def read_pipe(ran: Ran, name: str, pipe: int) -> bool:
    """Take what is in a pipe; False at its end."""
    data = os.read(pipe, 65536)
    setattr(ran, name, getattr(ran, name) + data)
    return bool(data)


@contextmanager
def supervising(tmp_path: Path, source: str, **options: Any) -> Iterator[Supervisor]:
    """A supervisor of the tasks in `source`."""
    supervisor = Supervisor(write_module(tmp_path, source), tmp_path / "checkpoints", **options)
    try:
        yield supervisor
    finally:
        supervisor.close()


def write_module(tmp_path: Path, source: str, name: str = "user_tasks") -> Path:
    """A file of user code."""
    path = tmp_path / f"{name}.py"
    path.write_text("from perdure.tasks import task\n" + textwrap.dedent(source))
    return path
