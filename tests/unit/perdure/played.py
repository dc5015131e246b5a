"""A fork server and children that the test plays itself, over real sockets and pipes."""

from __future__ import annotations

import os
import socket
from collections import deque

from perdure.channel import Connection, Frame, Hello, Run
from perdure.forkserver import Child, ChildExit, ForkServer, Outputs


class PlayedChild(Child):
    """The supervisor's side is what `Child` promises; `said`, `say`, `printed` and `die` are the child's side."""

    def __init__(self, server: PlayedServer, name: str, kind: str) -> None:
        ours, theirs = socket.socketpair()
        self.name, self.kind, self.pid = name, kind, 0
        self.connection = Connection(ours, child=False)
        self._server = server
        self._theirs = theirs
        self._end = Connection(theirs, child=True)
        self._heard: deque[Frame] = deque()
        self.outputs: list[int] = []
        self.alive = True
        self.greeted = False

    def start(self, run: Run) -> Outputs | None:
        self.connection.send(run)
        if self.kind == "async":
            return None
        (stdout, w1), (stderr, w2) = os.pipe(), os.pipe()
        self.outputs = [w1, w2]
        return Outputs(stdout, stderr)

    def close(self) -> None:
        self.connection.close()
        self.let_go()

    # The child's side

    def hello(self, pid: int = 0) -> None:
        self.greeted = True
        self.say(Hello(self.name, pid or os.getpid(), "", "v1"))

    def say(self, *frames: Frame) -> None:
        for frame in frames:
            self._end.send(frame)

    def heard(self) -> list[Frame]:
        """What the supervisor has sent since the last call."""
        found: list[Frame] = []
        self._theirs.setblocking(False)
        try:
            while frames := self._end.receive():
                found += frames
        except BlockingIOError:
            pass
        self._theirs.setblocking(True)
        return found

    def print(self, text: str, stream: int = 0) -> None:
        os.write(self.outputs[stream], text.encode())

    def give_up_pipes(self) -> None:
        for descriptor in self.outputs:
            os.close(descriptor)
        self.outputs = []

    def let_go(self) -> None:
        self.give_up_pipes()
        self._end.close()
        self.alive = False

    def die(self, exit_code: int | None = None, signal: int | None = None, detail: str = "") -> None:
        self.let_go()
        self._server.told(
            ChildExit(self.name, self.pid, exit_code, signal, cpu_seconds=1.5, peak_rss=4096, detail=detail)
        )


class PlayedServer(ForkServer):
    """Starts nothing; remembers what it was asked."""

    def __init__(self) -> None:
        self.children: list[PlayedChild] = []
        self.killed: list[tuple[str, int]] = []
        self._exits: list[ChildExit] = []
        self._ready = os.eventfd(0, os.EFD_NONBLOCK)

    def spawn(self, kind: str) -> Child:
        child = PlayedChild(self, f"c{len(self.children) + 1}", kind)
        self.children.append(child)
        return child

    def kill(self, child: Child, signum: int) -> None:
        self.killed.append((child.name, signum))

    def fileno(self) -> int:
        return self._ready

    def exits(self) -> list[ChildExit]:
        os.eventfd_read(self._ready)
        found, self._exits = self._exits, []
        return found

    def told(self, ended: ChildExit) -> None:
        self._exits.append(ended)
        os.eventfd_write(self._ready, 1)

    def stop(self, timeout_s: float = 10) -> None:
        for child in self.children:
            if child.alive:
                child.let_go()
        os.close(self._ready)
