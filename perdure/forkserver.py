"""The process that loads the user's modules and forks the children that run them, and the supervisor's handle on it.

    supervisor ──control──▶ fork server ──fork──▶ child (own process group) ──▶ whatever user code starts
         └───────────────── channel (perdure.channel) ─────────────▶ ┘

The fork server (`python -m perdure.forkserver`) has one thread, never imports Kafka, and does three things: import,
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

import gc
import os
import select
import signal
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
import psutil

from perdure import process
from perdure.capture import flush
from perdure.channel import Connection, Run, pack
from perdure.child import CHANNEL_FD, Settings, run_child
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
    to_server,
)
from perdure.loading import load
from perdure.rehearsal import rehearse
from perdure.schemas.errors import ConfigurationError, InfrastructureError
from perdure.tasks import default_registry, type_config

# The supervisor's side -----------------------------------------------------------------------------------------------


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

        Not to be called while another thread sends to this child. Raises `OSError` when the child is gone.
        """
        if self.kind == "async":
            self.connection.send(run)
            return None
        stdout, lent_stdout = os.pipe()
        stderr, lent_stderr = os.pipe()
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
        self, modules: Sequence[str], *, checkpoints: Path, start_method: str = "fork", max_tasks: int = 100
    ) -> None:
        """`modules`: dotted names or paths of files. `checkpoints`: directory of the local checkpoint store.
        `start_method`: fork, or spawn for modules whose import starts threads.
        """
        if start_method not in ("fork", "spawn"):
            raise ConfigurationError(f"the start method is fork or spawn, not {start_method!r}")
        self._plan = Plan(list(modules), str(checkpoints.absolute()), start_method, max_tasks)
        self._control: socket.socket
        self._process: subprocess.Popen[bytes]
        self._children: dict[str, Child] = {}
        self._made = 0
        self._lock = threading.Lock()

    def start(self, timeout_s: float = 300) -> Loaded:
        """Start the process; blocks until it has imported the modules.

        Raises `ConfigurationError` that says which module cannot be imported and why, or that none holds a task.
        """
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        plan = msgspec.json.encode(self._plan).decode()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "perdure.forkserver", str(theirs.fileno()), plan],
                stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
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
                socket.send_fds(self._control, [encode(Spawn(child.name, kind))], [theirs.fileno()])
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
        """End the fork server and every child that still runs. Blocks until all are gone or `timeout_s` is over."""
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
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        for child in self._children.values():
            if child.pid:
                process.kill_group(child.pid)
        return f"signal {-code}" if code < 0 else f"exit code {code}"


# The fork server's side ----------------------------------------------------------------------------------------------


class Server:
    """Forks and reaps, in one thread."""

    def __init__(self, control: socket.socket, plan: Plan, code_version: str) -> None:
        self._control, self._plan, self._code_version = control, plan, code_version
        self._children: dict[int, str] = {}
        self._pids: dict[str, int] = {}
        self._helpers = {child.pid for child in psutil.Process().children()}
        """Processes that importing has started: no strays."""
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def serve(self) -> None:
        """Work until the supervisor is gone, then end everything."""
        process.adopt_orphans()
        signal.signal(signal.SIGCHLD, lambda _signum, _frame: None)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        poller.register(self._woken, select.POLLIN)
        while True:
            ready = [descriptor for descriptor, _ in poller.poll()]
            if self._woken in ready:
                os.read(self._woken, PACKET_MAX)
                self._reap()
            if self._control.fileno() in ready and not self._obey():
                return self._end_all()

    def _obey(self) -> bool:
        """Carry out a command; False when the supervisor is gone."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, PACKET_MAX, 1, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            return False
        if not data:
            return False
        command = to_server.decode(data)
        if isinstance(command, Spawn):
            self._spawn(command, descriptors[0])
        elif command.name in self._pids:
            process.kill_group(self._pids[command.name], command.signum)
        return True

    def _spawn(self, command: Spawn, channel: int) -> None:
        plan = self._plan
        settings = Settings(command.name, command.kind, plan.modules, plan.checkpoints, plan.max_tasks, os.getpid())
        try:
            pid = (
                self._fork(settings, channel) if plan.start_method == "fork" else _spawn_interpreter(settings, channel)
            )
        except OSError as error:
            self._tell(Exited(command.name, 0, detail=f"no process can be made: {error}"))
            return
        finally:
            os.close(channel)
        with suppress(ProcessLookupError, PermissionError):  # it has done so itself, or is an interpreter by now
            os.setpgid(pid, pid)
        self._children[pid], self._pids[command.name] = command.name, pid
        self._tell(Spawned(command.name, pid))

    def _fork(self, settings: Settings, channel: int) -> int:
        flush()  # or what is in the streams' buffers would be written twice
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            for descriptor in (self._woken, self._wake, self._control.detach()):
                os.close(descriptor)
            run_child(socket.socket(fileno=channel), settings, self._code_version)
        return pid

    def _reap(self) -> None:
        """Take note of all processes that have ended. A group is killed while its leader's id is still taken."""
        while (pid := _ended_child()) is not None:
            name = self._children.pop(pid, None)
            if name is not None:
                process.kill_group(pid)
                del self._pids[name]
            _, status, usage = os.wait4(pid, 0)
            self._kill_strays()
            if name is not None:
                code = os.waitstatus_to_exitcode(status)
                self._tell(
                    Exited(name, pid, code if code >= 0 else None, -code if code < 0 else None,
                           usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
                )  # fmt: skip

    def _kill_strays(self) -> None:
        """Kill the descendants that came to us when their parents ended; theirs come at their own end."""
        for stray in psutil.Process().children():
            if stray.pid not in self._children and stray.pid not in self._helpers:
                with suppress(ProcessLookupError):
                    os.kill(stray.pid, signal.SIGKILL)

    def _end_all(self) -> None:
        signal.set_wakeup_fd(-1)
        for pid in self._children:
            process.kill_group(pid)
        self._children.clear()
        self._helpers.clear()
        self._kill_strays()
        with suppress(ChildProcessError):
            while True:
                os.wait()
                self._kill_strays()

    def _tell(self, packet: FromServer) -> None:
        with suppress(BrokenPipeError):  # the supervisor is gone: the next read says so
            self._control.send(encode(packet))


def _ended_child() -> int | None:
    """A process of ours that has ended and is still to be waited for."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return None if found is None else found.si_pid


def _spawn_interpreter(settings: Settings, channel: int) -> int:
    command = [sys.executable, "-m", "perdure.child", msgspec.json.encode(settings).decode()]
    actions = [(os.POSIX_SPAWN_DUP2, channel, CHANNEL_FD)]
    return os.posix_spawn(sys.executable, command, os.environ, file_actions=actions, setpgroup=0)


def _check_threads(plan: Plan) -> None:
    """A fork copies only the thread that calls it: locks that others hold would stay locked for ever."""
    others = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if others and plan.start_method == "fork":
        raise ConfigurationError(
            f"importing {', '.join(plan.modules)} started threads ({', '.join(others)}), so it cannot be forked; "
            "start them when a task runs, or start the worker with --start spawn"
        )


def main() -> None:
    """The fork server: its control socket's descriptor and its plan are its arguments."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    plan = msgspec.json.decode(sys.argv[2], type=Plan)
    process.die_with_parent()  # the supervisor's thread that started us waits for the import, but not longer
    try:
        version = load(plan.modules)
        _check_threads(plan)
    except ConfigurationError as error:
        control.send(encode(Refused(str(error)[: PACKET_MAX // 8])))
        sys.exit(1)
    for task_type in default_registry:
        control.send(encode(TypeLoaded(task_type.name, type_config(task_type))))
    process.die_with_parent(0)
    rehearse()
    gc.collect()
    gc.freeze()  # what is there now stays: children need not copy its pages to mark them
    server = Server(control, plan, version)
    control.send(encode(AllLoaded(version)))
    server.serve()


if __name__ == "__main__":
    main()
