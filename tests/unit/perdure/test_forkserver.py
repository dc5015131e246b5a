"""Real processes: loading, forking, reuse, death in every direction, and what is left behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from perdure import channel
from perdure.forkserver import Child, ForkServer
from perdure.schemas.errors import ConfigurationError, InfrastructureError
from tests.unit.perdure.forking import Supervisor, is_gone, supervising, wait_until, write_module

FAMILY = """
    import subprocess, sys, os, time

    def sleeper(**options):
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], **options).pid

    @task
    def simple(ctx, value=None):
        return value

    @task
    def family(ctx):
        '''Two processes of its own: one in its group, one that has left it.'''
        pids = [os.getpid(), sleeper(), sleeper(start_new_session=True)]
        ctx.step("pids", lambda: pids)
        time.sleep(3600)

    @task
    def leaves_processes(ctx):
        return [sleeper(), sleeper(start_new_session=True)]

    @task
    def leaves_orphans(ctx):
        '''What a daemon does: its parent ends at once.'''
        out = subprocess.run(["sh", "-c", "setsid sleep 3600 >&2 & echo $!"], stdout=subprocess.PIPE, check=True).stdout
        return int(out)

    @task
    def leaves_thread(ctx):
        import threading
        threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()

    @task
    def ends(ctx, how):
        if how == "exit":
            os._exit(7)
        os.kill(os.getpid(), getattr(__import__("signal"), how))

    @task
    def fails(ctx):
        raise ValueError("no")

    @task
    def modules(ctx):
        return [name for name in sys.modules if name.startswith(("confluent_kafka", "rocksdict", "perdure.streams"))]
"""


def pids_of(frames: list[channel.Frame]) -> list[int]:
    """What the step of `family` recorded."""
    (step,) = [frame for frame in frames if isinstance(frame, channel.Step)]
    assert step.result is not None
    found: list[int] = json.loads(step.result)
    return found


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_types_are_told_and_a_child_runs_one_attempt_after_the_other(tmp_path: Path, method: str) -> None:
    with supervising(tmp_path, FAMILY, start_method=method) as supervisor:
        assert set(supervisor.loaded.types) >= {"simple", "family"}
        published = supervisor.loaded.types["simple"]
        assert published["code_version"] == published["policy"]["code_version"] == supervisor.loaded.code_version != ""
        child = supervisor.spawn()
        for value in range(3):
            ran = supervisor.run(child, "simple", {"value": value})
            assert ran.result == value
            assert ran.idle
        assert supervisor.run(child, "modules").result == [], "user code never shares a process with Kafka"
        child.connection.send(channel.Exit())
        ended = supervisor.exit_of(child)
        assert (ended.pid, ended.exit_code, ended.signal) == (child.pid, 0, None)
        assert ended.cpu_seconds > 0
        assert ended.peak_rss > 1_000_000


def test_each_child_has_a_group_of_its_own(tmp_path: Path) -> None:
    with supervising(tmp_path, FAMILY) as supervisor:
        children = [supervisor.spawn() for _ in range(3)]
        groups = {os.getpgid(child.pid) for child in children}
        assert groups == {child.pid for child in children}
        assert os.getpgid(0) not in groups


@pytest.mark.parametrize(("how", "expected"), [("exit", (7, None)), ("SIGKILL", (None, 9)), ("SIGSEGV", (None, 11))])
def test_a_child_that_dies_is_told_at_once(tmp_path: Path, how: str, expected: tuple[int | None, int | None]) -> None:
    with supervising(tmp_path, FAMILY) as supervisor:
        child = supervisor.spawn()
        ran = supervisor.run(child, "ends", {"how": how})
        assert ran.exited is not None
        assert (ran.exited.exit_code, ran.exited.signal) == expected
        assert supervisor.run(supervisor.spawn(), "simple", {"value": 1}).result == 1, "the others live on"


def test_kill_takes_the_child_and_all_that_it_started(tmp_path: Path) -> None:
    with supervising(tmp_path, FAMILY) as supervisor:
        child = supervisor.spawn()

        def kill(frame: channel.Frame) -> None:
            if isinstance(frame, channel.Step):
                supervisor.server.kill(child, signal.SIGKILL)

        ran = supervisor.run(child, "family", on_frame=kill)
        assert ran.exited is not None
        assert ran.exited.signal == signal.SIGKILL
        for pid in pids_of(ran.frames):
            wait_until(lambda pid=pid: is_gone(pid), f"end of {pid}")  # type: ignore[misc]
        supervisor.server.kill(child, signal.SIGKILL)  # no such child any more: nothing happens
        assert supervisor.run(supervisor.spawn(), "simple", {"value": 1}).result == 1


@pytest.mark.parametrize("what", ["leaves_processes", "leaves_orphans", "leaves_thread", "fails"])
def test_a_child_that_is_not_clean_ends_and_takes_everything_along(tmp_path: Path, what: str) -> None:
    with supervising(tmp_path, FAMILY) as supervisor:
        child = supervisor.spawn()
        ran = supervisor.run(child, what)
        assert not ran.idle
        assert ran.exited is not None
        assert ran.exited.exit_code == 0
        if what.startswith("leaves_") and ran.result is not None:
            for pid in ran.result if isinstance(ran.result, list) else [ran.result]:
                wait_until(lambda pid=pid: is_gone(pid), f"end of {pid}")  # type: ignore[misc]


def test_a_child_ends_after_its_last_task(tmp_path: Path) -> None:
    with supervising(tmp_path, FAMILY, max_tasks=2) as supervisor:
        child = supervisor.spawn()
        assert supervisor.run(child, "simple").idle
        second = supervisor.run(child, "simple")
        assert not second.idle
        assert second.exited is not None
        assert second.exited.exit_code == 0


def test_stop_ends_everything(tmp_path: Path) -> None:
    with supervising(tmp_path, FAMILY) as supervisor:
        pids = begin_family(supervisor)
        supervisor.server.stop()
        for pid in pids:
            assert is_gone(pid)


def test_the_fork_servers_death_is_the_end_of_all_its_children(tmp_path: Path) -> None:
    with supervising(tmp_path, FAMILY) as supervisor:
        pids = begin_family(supervisor)
        supervisor.server.exits()  # learns the children's ids
        (server,) = [p for p in psutil.Process().children() if "perdure.fork_main" in p.cmdline()]
        server.kill()
        wait_until(lambda: is_gone(pids[0]), "end of the child")
        with pytest.raises(InfrastructureError, match="signal 9"):
            supervisor.server.exits()
        wait_until(lambda: is_gone(pids[1]), "end of the child's group")
        with pytest.raises(InfrastructureError, match="gone"):
            supervisor.server.spawn("process")
        os.kill(pids[2], signal.SIGKILL)  # it has left the group, and whoever knew of it is dead


def begin_family(supervisor: Supervisor) -> list[int]:
    """Ids of a child and the two processes it started."""
    child = supervisor.spawn()
    epoch, outputs = supervisor.begin(child, "family")
    frames: list[channel.Frame] = []
    while not any(isinstance(frame, channel.Step) for frame in frames):
        frames += child.connection.receive() or []
    for pipe in outputs or ():
        os.close(pipe)
    assert epoch == 1
    return pids_of(frames)


PLAYED_SUPERVISOR = """
import sys, time
from pathlib import Path
from tests.unit.perdure.forking import Supervisor
from tests.unit.perdure.test_forkserver import begin_family

supervisor = Supervisor(Path(sys.argv[1]), Path(sys.argv[2]))
idle = supervisor.spawn()
supervisor.server.exits()
print(idle.pid, *begin_family(supervisor), flush=True)
time.sleep(3600)
"""


def test_the_supervisors_death_is_the_end_of_all_that_it_started(tmp_path: Path) -> None:
    module = write_module(tmp_path, FAMILY)
    command = [sys.executable, "-c", PLAYED_SUPERVISOR, str(module), str(tmp_path / "checkpoints")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        pids = [int(word) for word in supervisor.stdout.readline().split()]
        assert len(pids) == 4
        (server,) = psutil.Process(supervisor.pid).children()
        supervisor.kill()
    for pid in [*pids, server.pid]:
        wait_until(lambda pid=pid: is_gone(pid), f"end of {pid}")  # type: ignore[misc]


# Loading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_module_anywhere", r"no_such_module_anywhere.*user_tasks\.py, line 2"),
        ("def broken(:", r"SyntaxError.*user_tasks\.py, line 2"),
        ("raise ValueError('at import')", r"ValueError: at import \(.*user_tasks\.py, line 2\)"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("import os; os._exit(5)", "exit code 5"),
        ("pass", "no task in .*@perdure.task"),
        ("@task\ndef one(): ...", "takes ctx first"),
        (
            "import threading, time\n"
            "threading.Thread(target=time.sleep, args=(3600,), daemon=True, name='poller').start()"
            "\n@task\ndef job(ctx): ...",
            "poller.*--start spawn",
        ),
    ],
)
def test_modules_that_cannot_be_used_are_refused_in_one_message(tmp_path: Path, source: str, message: str) -> None:
    module = tmp_path / "user_tasks.py"
    module.write_text("from perdure.tasks import task\n" + source)
    server = ForkServer([str(module)])
    server.start()
    with pytest.raises(ConfigurationError, match=message) as caught:
        server.loaded(60)
    assert "user_tasks" in str(caught.value)


def test_a_module_by_name_finds_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "user_app"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "more.py").write_text("VALUE = 5\n")
    (package / "jobs.py").write_text(
        "from perdure.tasks import task\nfrom user_app.more import VALUE\n@task\ndef job(ctx): return VALUE\n"
    )
    monkeypatch.chdir(tmp_path)
    server = ForkServer(["user_app.jobs"])
    server.start()
    try:
        assert list(server.loaded(60).types) == ["job"]
    finally:
        server.stop()


def test_a_module_that_starts_threads_runs_with_spawn(tmp_path: Path) -> None:
    source = """
    import threading, time
    threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()

    @task
    def job(ctx):
        return threading.active_count()
    """
    with supervising(tmp_path, source, start_method="spawn") as supervisor:
        assert supervisor.run(supervisor.spawn(), "job").result == 2


def test_an_import_without_end_is_given_up(tmp_path: Path) -> None:
    module = write_module(tmp_path, "import time; time.sleep(3600)")
    server = ForkServer([str(module)])
    server.start()
    with pytest.raises(ConfigurationError, match="more than 1 s"):
        server.loaded(1)


def test_unknown_start_method_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="fork or spawn"):
        ForkServer(["x"], start_method="thread")


def test_a_child_that_gets_only_one_pipe_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []

    def once() -> tuple[int, int]:
        if made:
            raise OSError(errno.EMFILE, "too many open files")
        made.append(pipe())
        return made[0]

    pipe = os.pipe
    ours, theirs = socket.socketpair()
    with theirs:
        child = Child("process-1", "process", ours)
        monkeypatch.setattr(os, "pipe", once)
        with pytest.raises(OSError, match="too many"):
            child.start(channel.Run("q/1", 1, b""))
        child.close()
    for descriptor in made[0]:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
