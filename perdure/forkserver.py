"""The process that loads the user's modules and forks the children that run them, and the supervisor's handle on it.

    supervisor ──control──▶ fork server ──fork──▶ child (own process group) ──▶ whatever user code starts
         └───────────────── channel (perdure.channel) ─────────────▶ ┘

The fork server (`python -m perdure.forkserver`) has one thread, never imports Kafka, and does three things: import,
fork, reap. **Control** is a SOCK_SEQPACKET socket pair; each packet is one msgpack array of a struct below:

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

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from perdure.channel import Connection, Run


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

    name: str
    kind: str
    """process or async."""
    pid: int
    """0 until `exits` (or the `Hello` frame) has told it."""
    connection: Connection

    def start(self, run: Run) -> Outputs | None:
        """Send an attempt to the child; for kind `process` with fresh pipes, whose read ends are returned.

        Not to be called while another thread sends to this child. Raises `OSError` when the child is gone.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the channel; a child that still runs kills itself and its group."""
        raise NotImplementedError


class ForkServer:
    """The supervisor's handle on its fork server. `spawn` and `kill` may be called from any thread."""

    def __init__(
        self, modules: Sequence[str], *, checkpoints: Path, start_method: str = "fork", max_tasks: int = 100
    ) -> None:
        """`modules`: dotted names or paths of files. `checkpoints`: directory of the local checkpoint store.
        `start_method`: fork, or spawn for modules whose import starts threads.
        """

    def start(self, timeout_s: float = 300) -> Loaded:
        """Start the process; blocks until it has imported the modules.

        Raises `ConfigurationError` that says which module cannot be imported and why, or that none holds a task.
        """
        raise NotImplementedError

    def spawn(self, kind: str) -> Child:
        """Ask for a child (`process` or `async`); returns at once, the child's `Hello` or its `ChildExit` follows.

        Raises `InfrastructureError` when the fork server is gone.
        """
        raise NotImplementedError

    def kill(self, child: Child, signum: int) -> None:
        """Send a signal to the child's process group; nothing happens if the child has ended."""
        raise NotImplementedError

    def fileno(self) -> int:
        """Readable when `exits` has something to tell; for selectors."""
        raise NotImplementedError

    def exits(self) -> list[ChildExit]:
        """The children that have ended since the last call. Never blocks.

        Raises `InfrastructureError` once the fork server itself is gone, after killing all that it left.
        """
        raise NotImplementedError

    def stop(self, timeout_s: float = 10) -> None:
        """End the fork server and every child that still runs. Blocks until all are gone or `timeout_s` is over."""
        raise NotImplementedError
