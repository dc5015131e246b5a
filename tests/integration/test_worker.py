"""A worker with real children, the real engine, and a log in memory."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from perdure.forkserver import ForkServer
from perdure.schemas import codec, ids
from perdure.schemas.errors import ConfigurationError
from perdure.schemas.inbox import EndSession
from perdure.worker import SUPERSEDED, Worker
from tests.integration.worker_bench import Bench, alive, bench_in, until


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with bench_in(tmp_path) as made:
        yield made


def test_a_task_runs_and_its_result_is_recorded(bench: Bench) -> None:
    bench.start()
    task = bench.submit("add", a=1, b=2)
    done = bench.await_event(task, "TaskCompleted")
    assert done.result == b"3"
    assert done.usage.peak_rss > 1_000_000
    kinds = [type(e).__name__ for e in bench.events(task)]
    if "TaskPolicyBound" in kinds:  # the submit came before the type's configuration had arrived in the partition
        kinds.remove("TaskPolicyBound")
    assert kinds == ["TaskSubmitted", "TaskQueued", "TaskGranted", "AttemptStarted", "TaskCompleted"]


def test_an_exception_is_a_failed_attempt(bench: Bench) -> None:
    bench.start()
    task = bench.submit("fail")
    failed = bench.await_event(task, "AttemptFailed")
    assert (failed.error.type, failed.error.message) == ("builtins.LookupError", "no such thing")
    assert "worker_tasks.py" in failed.error.traceback
    bench.await_event(task, "TaskFailed")


def test_types_are_published_once_and_known_by_their_version(bench: Bench) -> None:
    first = bench.start(name="w")
    published = {r.key: r.offset for r in bench.log.records("config")}
    assert b"type/add" in published
    assert sum(b"schema/" in (key or b"") for key in published) == len(codec.published_schemas())
    first.stop()
    bench.start(name="w")
    assert {r.key: r.offset for r in bench.log.records("config")} == published, "nothing new is said again"
    for started in bench.messages("task-commands", "WorkerStarted"):
        assert started.types == {t: published[f"type/{t}".encode()] for t in started.types}


def test_every_way_of_saying_something_is_captured_before_the_end(bench: Bench) -> None:
    bench.start(slots=1)
    task = bench.submit("talk", number=7)
    bench.await_event(task, "TaskCompleted")
    until("the lines", lambda: len(bench.lines(task)) == 6)
    lines = bench.lines(task)
    assert sorted((line.stream, line.text) for line in lines) == [
        ("log", "7 logged"), ("stderr", "7 careful"), ("stdout", "7 echo"), ("stdout", "7 print"),
        ("stdout", "7 raw"), ("stdout", "7 unfinished"),
    ]  # fmt: skip
    assert [line.number for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {line.level for line in lines if line.stream == "log"} == {"WARNING"}


def test_no_line_of_200_tasks_in_one_reused_child_goes_astray(bench: Bench) -> None:
    bench.start(slots=1, max_tasks=1_000)
    tasks = [bench.submit("talk", f"t{n}", number=n) for n in range(200)]
    pids = {bench.await_event(task, "TaskCompleted").result for task in tasks}
    assert len(pids) == 1, "one child for all"
    until("all lines", lambda: len(bench.messages("task-logs")) == 200 * 6)
    for n, task in enumerate(tasks):
        assert {line.text.split()[0] for line in bench.lines(task)} == {str(n)}


def test_a_task_that_leaves_a_thread_behind_says_nothing_under_another(bench: Bench) -> None:
    bench.start(slots=1)
    tasks = [bench.submit("late", f"t{n}", number=n) for n in range(5)]
    for task in tasks:
        bench.await_event(task, "TaskCompleted")
    until("the lines", lambda: all(bench.lines(task) for task in tasks))
    for n, task in enumerate(tasks):
        assert {digit for line in bench.lines(task) for digit in re.findall(r"\d", line.text)} == {str(n)}


def test_a_flood_of_lines_is_capped_and_counted(bench: Bench) -> None:
    bench.start()
    task = bench.submit("flood", lines=50_000)
    bench.await_event(task, "TaskCompleted")
    until("the end of the lines", lambda: bench.lines(task) and bench.lines(task)[-1].dropped)
    lines = bench.lines(task)
    assert sum(line.dropped for line in lines) + sum(line.stream == "stdout" for line in lines) == 50_000
    assert 5_000 <= len(lines) < 50_000


def test_a_dead_child_is_seen_at_once_and_its_task_runs_again(bench: Bench) -> None:
    bench.start()
    task = bench.submit("crash", folder=str(bench.folder))
    bench.await_event(task, "TaskCompleted")
    assert [(e.why, e.detail) for e in bench.events(task, "AttemptLost")] == [
        ("crashed", "exit code 3"), ("crashed", f"signal {int(signal.SIGSEGV)}")
    ]  # fmt: skip
    lost, again = bench.events(task, "AttemptLost")[0], bench.events(task, "TaskGranted")[1]
    assert again.at - lost.at < 1_000
    assert bench.events(task, "TaskCompleted")[0].attempt == 1, "a crash spends no retry"
    until(
        "where it was",
        lambda: any("worker_tasks.py" in line.text and "in crash" in line.text for line in bench.lines(task)),
    )


def test_a_task_that_always_dies_fails_in_the_end(bench: Bench) -> None:
    bench.start()
    task = bench.submit("crash", folder=str(bench.folder), exit_code=4)
    failed = bench.await_event(task, "TaskFailed")
    assert failed.error.type == "crash_loop"
    assert len(bench.witnessed("crash")) == 5


def test_pause_stops_at_the_next_item_and_resume_goes_on_there(bench: Bench) -> None:
    bench.start()
    task = bench.submit("files", folder=str(bench.folder), count=60)
    until("some files", lambda: len(bench.witnessed("file")) > 3)
    bench.pause(task)
    bench.await_event(task, "TaskPaused")
    at_pause = len(bench.witnessed("file"))
    assert at_pause < 60
    bench.resume(task)
    done = bench.await_event(task, "TaskCompleted")
    assert done.result == str(sum(range(60))).encode()
    assert bench.witnessed("file") == [f"file {n}" for n in range(60)], "each file once"


def test_recorded_steps_come_in_pages(bench: Bench) -> None:
    bench.start()
    task = bench.submit("pages", folder=str(bench.folder), count=8, size=100_000)
    assert bench.await_event(task, "TaskCompleted").result == b"800000"
    assert bench.witnessed("page") == [f"page {n}" for n in range(8)]
    assert len(bench.messages("worker-inbox", "StepPage")) >= 4


@pytest.mark.parametrize("ignore", [False, True])
def test_cancel_ends_a_task_that_never_stops_and_what_it_started(bench: Bench, ignore: bool) -> None:
    bench.start()
    task = bench.submit("stubborn", folder=str(bench.folder), ignore=ignore)
    (line,) = until("the task runs", lambda: bench.witnessed("pids"))
    child, grandchild = map(int, line.split()[1:])
    bench.cancel(task)
    cancelled = bench.await_event(task, "TaskCancelled")
    assert cancelled.reason == "enough"
    assert not alive(child)
    until("the grandchild is gone", lambda: not alive(grandchild))


def test_120_tasks_run_at_the_same_time(bench: Bench) -> None:
    bench.start(slots=120)
    tasks = [bench.submit("together", f"t{n}", folder=str(bench.folder), number=n) for n in range(120)]
    until("all 120 run", lambda: len(list(bench.folder.glob("here-*"))) == 120)
    (bench.folder / "go").touch()
    for n, task in enumerate(tasks):
        assert bench.await_event(task, "TaskCompleted").result == str(n).encode()
    assert bench.messages("task-events", "AttemptLost") == []


def test_more_tasks_than_slots_wait_for_their_turn(bench: Bench) -> None:
    bench.start(slots=2)
    tasks = [bench.submit("add", f"t{n}", a=n, b=0) for n in range(50)]
    for n, task in enumerate(tasks):
        assert bench.await_event(task, "TaskCompleted").result == str(n).encode()
    assert bench.messages("task-events", "AttemptLost") == [], "none was declined"


def test_process_and_async_tasks_do_not_take_each_others_slots(bench: Bench) -> None:
    bench.start(slots=1, async_slots=300, name="w")
    blocked = [bench.submit("together", f"p{n}", folder=str(bench.folder), number=n) for n in range(2)]
    until("the process task runs", lambda: (bench.folder / "here-0").exists())
    polls = [bench.submit("poll", f"a{n}", number=n) for n in range(300)]
    for task in polls:
        bench.await_event(task, "TaskCompleted")
    assert not bench.events(blocked[1], "TaskGranted")
    assert bench.messages("task-events", "AttemptLost") == []
    assert {line.text for task in polls[:20] for line in bench.lines(task)} <= {f"{n} polls" for n in range(20)}
    assert {e.worker_id for e in bench.messages("task-events", "TaskGranted")} == {"w", "w.async"}
    (bench.folder / "go").touch()


def test_an_async_task_that_hogs_the_loop_is_cancelled_by_force_and_the_others_run_again(bench: Bench) -> None:
    bench.start()
    waiting = bench.submit("wait", "1", folder=str(bench.folder), number=1)
    bench.await_event(waiting, "AttemptStarted")
    hog = bench.submit("hog", "2", folder=str(bench.folder))
    until("the loop is taken", lambda: bench.witnessed("hog"))
    bench.cancel(hog)
    bench.await_event(hog, "TaskCancelled")
    lost = bench.await_event(waiting, "AttemptLost")
    assert lost.why == "bystander"
    (bench.folder / "go").touch()
    assert bench.await_event(waiting, "TaskCompleted").result == b"1"


def test_a_worker_that_stops_hands_its_tasks_back_and_another_goes_on(bench: Bench) -> None:
    first = bench.start(name="first")
    task = bench.submit("files", folder=str(bench.folder), count=40)
    until("some files", lambda: len(bench.witnessed("file")) > 3)
    assert first.stop() == 0
    queued = bench.events(task, "TaskQueued")
    assert queued[-1].reason == "drained"
    assert bench.events(task, "TaskCompleted") == []
    bench.start(name="second")
    bench.await_event(task, "TaskCompleted")
    assert sorted(bench.witnessed("file")) == sorted(f"file {n}" for n in range(40))


def test_what_does_not_drain_in_time_is_killed_and_handed_back(bench: Bench) -> None:
    worker = bench.start(drain_timeout_s=0.2)
    task = bench.submit("stubborn", folder=str(bench.folder), ignore=True)
    (line,) = until("the task runs", lambda: bench.witnessed("pids"))
    assert worker.stop() == 0
    assert [e.why for e in bench.events(task, "AttemptLost")] == ["drained"]
    assert [pid for pid in map(int, line.split()[1:]) if alive(pid)] == []


def test_a_second_stop_does_not_wait(bench: Bench) -> None:
    worker = bench.start(drain_timeout_s=3_600)
    task = bench.submit("stubborn", folder=str(bench.folder))
    until("the task runs", lambda: bench.witnessed("pids"))
    worker.worker.request_stop()
    assert worker.stop() == 0
    assert [e.why for e in bench.events(task, "AttemptLost")] == ["drained"]


def test_a_stopping_worker_takes_no_more(bench: Bench) -> None:
    worker = bench.start(drain_timeout_s=3_600)
    bench.submit("stubborn", folder=str(bench.folder))
    until("the task runs", lambda: bench.witnessed("pids"))
    worker.worker.request_stop()
    until("it says so", lambda: bench.messages("task-commands", "WorkerStopping"))
    later = bench.submit("add", "later", a=1, b=1)
    bench.start(name="other")
    assert bench.await_event(later, "TaskCompleted").result == b"2"
    worker.worker.request_stop()
    assert worker.join() == 0


def test_unnamed_workers_of_one_host_have_two_names(bench: Bench) -> None:
    bench.start()
    bench.start()
    names = {s.worker_id for s in bench.messages("task-commands", "WorkerStarted")}
    assert {name.split("-", 1)[1] for name in names} == {"w0", "w0.async", "w1", "w1.async"}
    assert bench.messages("worker-inbox", "EndSession") == []


def test_of_two_workers_with_one_name_the_newer_wins(bench: Bench) -> None:
    old = bench.start(name="same")
    task = bench.submit("stubborn", folder=str(bench.folder))
    (line,) = until("the task runs", lambda: bench.witnessed("pids"))
    bench.start(name="same")
    assert old.join() == SUPERSEDED
    assert [pid for pid in map(int, line.split()[1:]) if alive(pid)] == []
    until("the newer one has the task", lambda: len(bench.witnessed("pids")) == 2)
    assert [e.why for e in bench.events(task, "AttemptLost")] == ["superseded"]


def test_an_expired_session_is_followed_by_a_new_one(bench: Bench) -> None:
    bench.start(name="w")
    task = bench.submit("stubborn", folder=str(bench.folder))
    (line,) = until("the task runs", lambda: bench.witnessed("pids"))
    (started,) = [s for s in bench.messages("task-commands", "WorkerStarted") if s.worker_id == "w"]
    partition = ids.partition_of("etl", bench.log.partitions)
    end = EndSession(worker_id="", session=started.session, why="expired")
    bench.log.producer().append("worker-inbox", partition, b"", codec.encode(end))
    until("the task runs again", lambda: len(bench.witnessed("pids")) == 2)
    assert not alive(int(line.split()[1]))
    sessions = [s.session for s in bench.messages("task-commands", "WorkerStarted") if s.worker_id == "w"]
    assert len(set(sessions)) == 2
    assert [e.why for e in bench.events(task, "AttemptLost")] == ["superseded"]


def test_a_module_that_cannot_be_imported_is_named(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere\n")
    modules = [str(tmp_path / "broken.py")]
    worker = Worker(bench.log, bench.keys, ForkServer(modules), slots=1, state_dir=tmp_path, checkpoint_dir=tmp_path)
    with pytest.raises(ConfigurationError, match="no_such_module_anywhere"):
        worker.run()


def test_metrics_are_published(bench: Bench) -> None:
    bench.start(name="w")
    (metrics,) = until("metrics", lambda: bench.messages("worker-metrics"))[:1]
    assert (metrics.worker_id, metrics.queues, metrics.slots, metrics.state) == ("w", ["etl"], 1_002, "running")
    assert metrics.rss > 0


def test_nothing_is_left_of_a_worker_that_has_stopped(bench: Bench) -> None:
    before = _descendants()
    worker = bench.start()
    bench.await_event(bench.submit("talk", number=1), "TaskCompleted")
    assert _descendants() - before
    worker.stop()
    assert _descendants() - before == set()


def _descendants() -> set[Any]:
    return {p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE}
