"""Children: what they print and log, how they are stopped, and how much progress they tell."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from perdure import channel
from tests.unit.perdure.forking import Supervisor, supervising

SOURCE = """
    import asyncio, ctypes, logging, os, subprocess, sys, time

    logging.basicConfig(level=logging.DEBUG, format="%(name)s says %(message)s")

    @task
    def speaks(ctx, word):
        print(word, "printed")
        print(word, "complained", file=sys.stderr)
        os.write(1, f"{word} written\\n".encode())
        subprocess.run(["echo", word, "echoed"], check=True)
        logging.getLogger("app").debug("%s logged", word)
        ctx.log.warning("%s warned", word)
        sys.stdout.write(word + " unfinished")
        ctypes.CDLL(None).printf(b" in C")

    @task
    def closes_stdout(ctx):
        sys.stdout.close()

    @task
    def floods(ctx, size):
        print("x" * size)

    @task
    def waits(ctx, path):
        ctx.defer(lambda: open(path, "w").write("cleaned"))
        ctx.milestone("waiting")
        while True:
            time.sleep(0.01)

    @task
    def steps_on(ctx):
        ctx.milestone("going")
        n = 0
        while True:
            ctx.step("s", abs, n)
            n += 1

    def in_pool(n):
        logging.getLogger("app").info("in the pool %s", n)
        print("printed in the pool", flush=True)
        return n

    def use(ctx):
        try:
            ctx.milestone("in another process")
        except Exception as error:
            os._exit(7 if "own process" in str(error) else 8)

    def pools(ctx):
        import multiprocessing
        fork = multiprocessing.get_context("fork")
        for n in range(20):
            ctx.step("before", abs, n)
        pool = fork.Pool(2)
        got = pool.map(in_pool, range(4))
        pool.terminate()  # SIGTERM to processes that were forked off this one
        pool.join()
        stranger = fork.Process(target=use, args=(ctx,))
        stranger.start()
        stranger.join()
        return [*got, stranger.exitcode]

    @task
    def forks(ctx):
        return [*pools(ctx), *[ctx.step("after", abs, n) for n in range(20)]]

    @task
    def progresses(ctx, n):
        for i in range(n):
            ctx.progress(done=i + 1, total=n)
        ctx.step("one", time.sleep, 0)
        ctx.progress(0.5)
        time.sleep(0.5)
        ctx.milestone("slept")

    @task
    def steps(ctx, n):
        ctx.state["n"] = sum(ctx.step("s", abs, i, key=i) for i in range(n))
        ctx.checkpoint()
        return ctx.state["n"]

    @task
    async def asteps(ctx, n):
        print("first", end=" ")
        for i in range(n):
            await ctx.step("s", abs, i, key=i)
        print("second")
        logging.getLogger("app").info("logged")
        print("unfinished", end="", file=sys.stderr)
        return n

    @task
    async def awaits(ctx):
        ctx.milestone("waiting")
        await asyncio.Event().wait()

    @task
    async def exits(ctx):
        raise SystemExit(3)
"""


@pytest.fixture(scope="module")
def supervisor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONUNBUFFERED", raising=False)  # buffers are what the tests of output are about
        with supervising(tmp_path_factory.mktemp("child"), SOURCE) as found:
            yield found


def test_output_belongs_to_its_attempt_alone(supervisor: Supervisor) -> None:
    child = supervisor.spawn()
    for word in ("one", "two"):
        ran = supervisor.run(child, "speaks", {"word": word})
        assert ran.idle
        assert ran.stdout.decode() in (
            f"{word} printed\n{word} written\n{word} echoed\n{word} unfinished in C",
            f"{word} printed\n{word} written\n{word} echoed\n in C{word} unfinished",
        )
        assert ran.stderr.decode() == f"{word} complained\n"
        said = [(f.level, f.text) for f in ran.frames if isinstance(f, channel.Line)]
        assert said == [("DEBUG", f"app says {word} logged"), ("WARNING", f"perdure.task.speaks says {word} warned")]


def test_a_child_whose_stdout_was_closed_is_not_used_again(supervisor: Supervisor) -> None:
    child = supervisor.spawn()
    ran = supervisor.run(child, "closes_stdout")
    assert isinstance(ran.last, channel.Completed)
    assert not ran.idle


def test_more_output_than_a_pipe_holds(supervisor: Supervisor) -> None:
    ran = supervisor.run(supervisor.spawn(), "floods", {"size": 3_000_000})
    assert len(ran.stdout) == 3_000_001


def test_a_cancelled_attempt_that_reaches_no_boundary_is_interrupted_by_sigterm(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    child = supervisor.spawn()

    def cancel(frame: channel.Frame) -> None:
        if isinstance(frame, channel.Milestone):
            child.connection.send(channel.Stop("q/t", frame.epoch, "cancelled"))
            supervisor.server.kill(child, signal.SIGTERM)

    note = tmp_path / "note"
    ran = supervisor.run(child, "waits", {"path": str(note)}, cancel)
    assert isinstance(ran.last, channel.Stopped)
    assert ran.last.why == "cancelled"
    assert note.read_text() == "cleaned"
    assert not ran.idle
    assert ran.exited is not None
    assert ran.exited.exit_code == 0


def test_sigterm_without_a_stop_is_left_to_the_supervisor(supervisor: Supervisor, tmp_path: Path) -> None:
    """A service manager tells every process of a service: the fork server and its children go on until they are told."""
    child = supervisor.spawn()

    def terminate(frame: channel.Frame) -> None:
        if isinstance(frame, channel.Milestone):
            os.kill(supervisor.server._process.pid, signal.SIGTERM)
            supervisor.server.kill(child, signal.SIGTERM)
            child.connection.send(channel.Stop("q/t", frame.epoch, "cancelled"))
            supervisor.server.kill(child, signal.SIGTERM)

    ran = supervisor.run(child, "waits", {"path": str(tmp_path / "note")}, terminate)
    assert isinstance(ran.last, channel.Stopped)
    assert supervisor.server._process.poll() is None


@pytest.mark.parametrize("pause", range(12))
def test_sigterm_never_breaks_a_frame(supervisor: Supervisor, pause: int) -> None:
    """The signal lands anywhere in a task that does nothing but steps; what it says stays readable to the end."""
    child = supervisor.spawn()

    def cancel(frame: channel.Frame) -> None:
        if isinstance(frame, channel.Step) and frame.step_id == f"/s#{20 + pause}":
            child.connection.send(channel.Stop("q/t", frame.epoch, "cancelled"))
            time.sleep(pause / 20_000)
            supervisor.server.kill(child, signal.SIGTERM)

    assert isinstance(supervisor.run(child, "steps_on", on_frame=cancel).last, channel.Stopped)


def test_processes_that_user_code_forks_leave_the_channel_alone(supervisor: Supervisor) -> None:
    ran = supervisor.run(supervisor.spawn(), "forks")
    assert ran.result == [*range(4), 7, *range(20)]
    assert len([f for f in ran.frames if isinstance(f, channel.Step)]) == 40
    assert ran.stdout.count(b"printed in the pool") == 4
    assert ran.stderr.count(b"in the pool") == 4, "what cannot go to the task's log goes to its stderr"


def test_progress_is_thinned_out_and_the_last_is_never_lost(supervisor: Supervisor) -> None:
    ran = supervisor.run(supervisor.spawn(), "progresses", {"n": 2_000})
    told = [frame for frame in ran.frames if isinstance(frame, channel.Progress)]
    assert len(told) < 100
    slept = next(i for i, f in enumerate(ran.frames) if isinstance(f, channel.Milestone))
    before = [f for f in ran.frames[:slept] if isinstance(f, channel.Progress)]
    assert (before[-1].fraction, before[-1].current_step) == (0.5, "one"), "told while the task slept, not at its end"


def test_steps_and_checkpoints_of_a_real_child(supervisor: Supervisor) -> None:
    ran = supervisor.run(supervisor.spawn(), "steps", {"n": 300})
    assert ran.result == sum(range(300))
    assert len([f for f in ran.frames if isinstance(f, channel.Step)]) == 300
    (saved,) = [f for f in ran.frames if isinstance(f, channel.Checkpoint)]
    assert saved.uri.startswith("local:")


def test_an_async_child_runs_many_attempts_and_knows_whose_lines_are_whose(supervisor: Supervisor) -> None:
    child = supervisor.spawn("async")
    begun = [supervisor.begin(child, "asteps", {"n": n}) for n in range(20)]
    assert all(outputs is None for _, outputs in begun)
    seen: dict[int, list[channel.Frame]] = {epoch: [] for epoch, _ in begun}
    while not all(any(isinstance(f, channel.Completed) for f in frames) for frames in seen.values()):
        for frame in child.connection.receive() or []:
            if isinstance(frame, channel.Step | channel.Completed | channel.Line):
                seen[frame.epoch].append(frame)
            if isinstance(frame, channel.Step):
                child.connection.send(channel.Ack("q/t", frame.epoch, frame.number))
    for n, (epoch, _) in enumerate(begun):
        frames = seen[epoch]
        lines = [(f.stream, f.level, f.text) for f in frames if isinstance(f, channel.Line)]
        assert lines == [
            ("stdout", "", "first second"), ("log", "INFO", "app says logged"), ("stderr", "", "unfinished"),
        ]  # fmt: skip
        assert len([f for f in frames if isinstance(f, channel.Step)]) == n
        assert isinstance(frames[-1], channel.Completed)
    child.connection.send(channel.Exit())
    assert supervisor.exit_of(child).exit_code == 0


def test_an_async_attempt_that_reaches_no_boundary_is_cancelled_after_its_grace(supervisor: Supervisor) -> None:
    child = supervisor.spawn("async")

    def cancel(frame: channel.Frame) -> None:
        if isinstance(frame, channel.Milestone):
            child.connection.send(channel.Stop("q/t", frame.epoch, "timed_out"))

    ran = supervisor.run(child, "awaits", None, cancel, cancel_grace=10)
    assert isinstance(ran.last, channel.Stopped)
    assert supervisor.run(child, "asteps", {"n": 1}).result == 1, "the others go on"


def test_system_exit_in_an_async_task_fails_only_that_attempt(supervisor: Supervisor) -> None:
    child = supervisor.spawn("async")
    ran = supervisor.run(child, "exits")
    assert ran.last.error_types[0] == "builtins.SystemExit"
    assert supervisor.run(child, "asteps", {"n": 1}).result == 1


def test_a_child_ends_when_its_channel_does(supervisor: Supervisor) -> None:
    for kind in ("process", "async"):
        child = supervisor.spawn(kind)
        child.close()
        assert supervisor.exit_of(child).signal == signal.SIGKILL
