"""The fork server's process (`python -m perdure.fork_main`): it imports the user's modules, forks children, reaps them.

`perdure.forkserver` has the whole picture. One thread, and never Kafka.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import threading
from contextlib import suppress

import msgspec
import psutil

from perdure import process
from perdure.capture import flush
from perdure.child import CHANNEL_FD, Settings, run_child
from perdure.control import (
    PACKET_MAX,
    AllLoaded,
    Exited,
    FromServer,
    Plan,
    Refused,
    Spawn,
    Spawned,
    TypeLoaded,
    encode,
    to_server,
)
from perdure.loading import load
from perdure.rehearsal import rehearse
from perdure.schemas.errors import ConfigurationError
from perdure.tasks import default_registry, type_config


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
        # A service manager tells all processes of a service to end. The supervisor then has its children finish, and
        # without us they would be killed. A function: `SIG_IGN` would be handed on to the programs that tasks start.
        signal.signal(signal.SIGTERM, lambda _signum, _frame: None)
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
        settings = Settings(
            command.name, command.kind, plan.modules, command.checkpoints, command.large, plan.max_tasks, os.getpid()
        )
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
                with suppress(ProcessLookupError, PermissionError):  # as one that is another user's
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
