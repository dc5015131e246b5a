"""The supervisor's handle on its fork server: the process that loads the user's modules and forks their children.

    supervisor ──control──▶ fork server ──fork──▶ child (own process group) ──▶ whatever user code starts
         └───────────────── channel (perdure.channel) ─────────────▶ ┘

The fork server (`perdure.fork_main`) has one thread, never imports Kafka, and does three things: import,
fork, reap. **Control** is a SOCK_SEQPACKET socket pair; each packet is one struct of `perdure.control`:

    fork server → supervisor   `TypeLoaded`*, then `Loaded`, or `Refused`; later `Spawned` and `Exited` for each child
    supervisor → fork server   `Spawn` with the child's end of its channel as SCM_RIGHTS; `Kill`

**Channel.** `spawn` makes a socket pair, keeps one end and hands the other over, so nothing listens anywhere and a
child needs no password: `Hello.secret` is empty. A child of kind `process` gets the write ends of two fresh pipes as
SCM_RIGHTS with each `Run` frame (`Child.start` does that) and puts them on descriptors 1 and 2 for just that attempt.

**A child's life.** `Hello`, then attempts. After the last frame of an attempt (`Completed`, `Failed`, `Stopped`) the
child gives up the pipes and either says `Idle`, or ends by itself because it is not fit for another attempt: the
attempt failed or was stopped, left threads or processes behind, or was its last (`max_tasks`). So the supervisor reads
both pipes to their end before it reports the attempt's end, and only ever hands a `Run` to a child that said `Hello`
or `Idle`. Processes that user code left behind hold the pipes open only until the fork server has seen the child's
end: it kills the group and every stray descendant (it is their subreaper), which brings the pipes to their end.
An `async` child runs many attempts at once, has no pipes (its lines come as `Line` frames), says no `Idle`, and ends
on `Exit`.

**Death.** Supervisor gone: control and channels close; children kill their own group, the fork server kills all groups
and strays and ends. Fork server gone: children get SIGKILL (PDEATHSIG) and the supervisor kills the groups, in
`exits`. Child gone: `Exited` at once.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from perdure import process
from perdure.channel import Connection, Run, pack
from perdure.connectors.large_values import Place
from perdure.control import (
    PACKET_MAX,
    AllLoaded,
    Exited,
    FromServer,
    Kill,
    Plan,
    Refused,
    Spawn,
    Spawned,
    TypeLoaded,
    encode,
    from_server,
)
from perdure.schemas.errors import ConfigurationError, InfrastructureError


@dataclass(frozen=True)
class Loaded:
    """What the fork server has imported."""

    types: dict[str, dict[str, Any]]
    """Task type -> content of `config/type/<name>`."""
    code_version: str


class Outputs(NamedTuple):
    """Read ends of the pipes on an attempt's descriptors 1 and 2. The caller closes them."""

    stdout: int
    stderr: int


@dataclass(frozen=True)
class ChildExit:
    """A child has ended; everything it left behind has been killed."""

    child: str
    pid: int
    """0: it could not be started at all."""
    exit_code: int | None
    signal: int | None
    cpu_seconds: float
    """User and system time of the child and of the processes it waited for."""
    peak_rss: int
    """Bytes."""
    detail: str = ""
    """Why it could not be started."""


class Child:
    """A child process, as its supervisor holds it."""

    def __init__(self, name: str, kind: str, sock: socket.socket) -> None:
        self.name = name
        self.kind = kind
        """process or async."""
        self.pid = 0
        """0 until the fork server has told it to `exits`; the `Hello` frame has it too."""
        self.connection = Connection(sock, child=False)
        self._socket = sock

    def start(self, run: Run) -> Outputs | None:
        """Send an attempt to the child; for kind `process` with fresh pipes, whose read ends are returned.

        Not to be called while another thread sends to this child. Raises `OSError` when the child is gone, or when no
        pipe can be made; then it is fit for nothing more.
        """
        if self.kind == "async":
            self.connection.send(run)
            return None
        stdout, lent_stdout = os.pipe()
        try:
            stderr, lent_stderr = os.pipe()
        except OSError:
            os.close(stdout)
            os.close(lent_stdout)
            raise
        try:
            data = pack(run)
            sent = socket.send_fds(self._socket, [data], [lent_stdout, lent_stderr])
            if sent < len(data):  # a child that has got it all may have ended by now, which is no error of sending
                self._socket.sendall(data[sent:])
        except OSError:
            os.close(stdout)
            os.close(stderr)
            raise
        finally:
            os.close(lent_stdout)
            os.close(lent_stderr)
        return Outputs(stdout, stderr)

    def close(self) -> None:
        """Let go of the channel; a child that still runs kills itself and its group when it next reads or writes."""
        self.connection.close()


class ForkServer:
    """The supervisor's handle on its fork server. `spawn` and `kill` may be called from any thread."""

    def __init__(
        self,
        modules: Sequence[str],
        *,
        start_method: str = "fork",
        max_tasks: int = 100,
    ) -> None:
        """`modules`: dotted names or paths of files. `start_method`: fork, or spawn for modules whose import starts
        threads. Raises `ConfigurationError` for another one.
        """
        if start_method not in ("fork", "spawn"):
            raise ConfigurationError(f"the start method is fork or spawn, not {start_method!r}")
        self._plan = Plan(list(modules), start_method, max_tasks)
        self.checkpoints = Path()
        """Directory of the children's local checkpoint store; to be set before the first `spawn`."""
        self.large: Place | None = None
        """Where values too large for a record lie, if anywhere; as above."""
        self._control: socket.socket
        self._process: subprocess.Popen[bytes] | None = None
        self._children: dict[str, Child] = {}
        self._made = 0
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the process; returns at once, while it imports the modules. Does nothing if it was started before."""
        if self._process is not None:
            return
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        plan = msgspec.json.encode(self._plan).decode()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "perdure.fork_main", str(theirs.fileno()), plan],
                stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip

    def loaded(self, timeout_s: float = 300) -> Loaded:
        """What the modules hold; blocks until they are imported.

        Raises `ConfigurationError` that says which module cannot be imported and why, or that none holds a task; the
        process has ended then.
        """
        self._control.settimeout(timeout_s)
        try:
            loaded = self._await_loaded()
        except TimeoutError:
            self.stop(0)
            names = ", ".join(self._plan.modules)
            raise ConfigurationError(f"importing {names} took more than {timeout_s:.0f} s") from None
        except BaseException:
            self.stop()
            raise
        self._control.settimeout(None)
        return loaded

    def spawn(self, kind: str) -> Child:
        """Ask for a child (`process` or `async`); returns at once, the child's `Hello` or its `ChildExit` follows.

        Raises `InfrastructureError` when the fork server is gone.
        """
        ours, theirs = socket.socketpair()
        with self._lock, theirs:
            self._made += 1
            child = Child(f"{kind}-{self._made}", kind, ours)
            self._children[child.name] = child
            try:
                told = Spawn(child.name, kind, str(self.checkpoints.absolute()), self.large)
                socket.send_fds(self._control, [encode(told)], [theirs.fileno()])
            except OSError as error:
                child.close()
                raise InfrastructureError(f"the fork server is gone: {error}") from error
        return child

    def kill(self, child: Child, signum: int) -> None:
        """Send a signal to the child's process group; nothing happens if the child has ended."""
        with suppress(BrokenPipeError, ConnectionResetError):  # the fork server is gone; `exits` tells it
            self._control.send(encode(Kill(child.name, signum)))

    def fileno(self) -> int:
        """Readable when `exits` has something to tell; for selectors."""
        return self._control.fileno()

    def exits(self) -> list[ChildExit]:
        """The children that have ended since the last call. Never blocks.

        Raises `InfrastructureError` once the fork server itself is gone, after killing all that it left.
        """
        found: list[ChildExit] = []
        while True:
            try:
                packet = self._receive(socket.MSG_DONTWAIT)
            except BlockingIOError:
                return found
            if isinstance(packet, Spawned):
                self._children[packet.name].pid = packet.pid
            elif isinstance(packet, Exited):
                del self._children[packet.name]
                found.append(ChildExit(*msgspec.structs.astuple(packet)))
            elif found:
                return found  # the next call tells the rest
            else:
                raise InfrastructureError(
                    f"the fork server has ended ({self._end(5)}) and every task of this worker with it"
                )

    def stop(self, timeout_s: float = 10) -> None:
        """End the fork server and every child that still runs. Blocks until all are gone or `timeout_s` is over.

        A second call finds nothing left to do.
        """
        self._control.close()
        self._end(timeout_s)

    def _await_loaded(self) -> Loaded:
        types: dict[str, dict[str, Any]] = {}
        while True:
            match self._receive():
                case TypeLoaded(name, content):
                    types[name] = content
                case AllLoaded(code_version):
                    return Loaded(types, code_version)
                case Refused(message):
                    raise ConfigurationError(message)
                case _:
                    names = ", ".join(self._plan.modules)
                    raise ConfigurationError(
                        f"importing {names} ended the process ({self._end(5)}); its output says more"
                    )

    def _receive(self, flags: int = 0) -> FromServer | None:
        """The next packet; None when the fork server is gone."""
        try:
            data = self._control.recv(PACKET_MAX, flags)
        except ConnectionResetError:
            return None
        return from_server.decode(data) if data else None

    def _end(self, timeout_s: float) -> str:
        """Wait for the fork server's end, enforce it, and say how it ended."""
        assert self._process is not None, "asked of a fork server that was started"
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        for child in self._children.values():
            if child.pid:
                process.kill_group(child.pid)
        self._children.clear()
        return f"signal {-code}" if code < 0 else f"exit code {code}"
