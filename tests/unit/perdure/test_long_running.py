"""Long tasks as objects: bound by a submit or by an id, and what "resume" means in each state."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from typing import Any

import pytest

from perdure.client import Client
from perdure.long_running import LongRunningTask, TaskQueue
from perdure.schemas import codec, ids
from perdure.schemas.commands import DescribeTask, ResumeTask, RetryTask, SubmitTask
from perdure.schemas.common import Retry as RetryRecord
from perdure.schemas.errors import CommandRefused, InvalidRequest, NotSubmitted
from perdure.schemas.public import LogLine
from perdure.streams.memory_log import MemoryLog
from perdure.tasks import Retry
from tests.unit.perdure.scripted_engine import Answer, configure, running, status

NOW = 1_800_000_000_000


@pytest.fixture
def log() -> MemoryLog:
    made = MemoryLog(lambda: NOW)
    configure(made, "type/t", {"queue": "etl"})
    return made


@pytest.fixture
def client(log: MemoryLog) -> Iterator[Client]:
    with Client(log, clock=lambda: NOW) as made:
        yield made


def test_a_submit_carries_all_and_binds_the_object(log: MemoryLog, client: Client) -> None:
    task = LongRunningTask(
        name="t", input_data={"dataset_path": "large.csv"}, agent_config={"model": "x"},
        estimated_duration="6 hours", retry_policy=Retry(max_attempts=4, backoff="fixed", retry_on=[ValueError]),
        on_failure="notify_admin", timeout="12h", priority=7, labels={"a": "b"},
    )  # fmt: skip
    task_id = TaskQueue(client).submit(task)
    assert task.task_id == task_id
    sent = codec.decode_as(SubmitTask, log.records("task-commands")[0].value or b"")
    assert (sent.task_id, sent.type, sent.input) == (task_id, "t", b'{"dataset_path":"large.csv"}')
    assert (sent.agent_config, sent.estimated_duration, sent.run_timeout) == (b'{"model":"x"}', 21_600_000, 43_200_000)
    assert sent.retry == RetryRecord(max_attempts=4, backoff="fixed", retry_on=["builtins.ValueError"])
    assert (sent.on_failure, sent.priority, sent.labels) == ("notify_admin", 7, {"a": "b"})


def test_an_illegal_task_is_refused_at_the_submit_and_stays_unbound(client: Client) -> None:
    task = LongRunningTask("t", estimated_duration="soon")
    with pytest.raises(InvalidRequest) as caught:
        TaskQueue(client).submit(task)
    assert caught.value.field == "estimated_duration"
    with pytest.raises(NotSubmitted):
        task.get_status()


def test_before_the_submit_there_is_nothing_to_control() -> None:
    task = LongRunningTask("t")
    for use in (task.get_status, task.pause, task.resume, task.cancel, task.get_logs, lambda: task.task_id):
        with pytest.raises(NotSubmitted, match="TaskQueue"):
            use()


def test_the_status_is_for_people(log: MemoryLog, client: Client) -> None:
    body = status(progress=0.4567, elapsed_seconds=90.5, eta_seconds=60.0, current_step="reading")
    with running(log, lambda *_: (True, {"body": body})):
        found = LongRunningTask.get("etl/1", client=client).get_status()
    assert (found.state, found.current_step) == ("RUNNING", "reading")
    assert found.progress == pytest.approx(45.67)
    assert found.elapsed_time == dt.timedelta(seconds=90.5)
    assert found.estimated_completion is not None
    in_a_minute = found.estimated_completion - dt.datetime.now(dt.UTC)
    assert dt.timedelta(seconds=30) < in_a_minute <= dt.timedelta(seconds=60)


def test_the_status_of_a_task_that_has_not_begun_and_of_one_that_has_ended(log: MemoryLog, client: Client) -> None:
    bodies = iter([status(state="PENDING")] * 2 + [status(state="COMPLETED", progress=1.0, finished_at=NOW)])
    with running(log, lambda *_: (True, {"body": next(bodies)})):
        task = LongRunningTask.get("etl/1", client=client)
        waiting = task.get_status()
        done = task.get_status()
    assert (waiting.progress, waiting.elapsed_time, waiting.estimated_completion) == (0.0, dt.timedelta(0), None)
    assert (done.progress, done.estimated_completion) == (100.0, dt.datetime.fromtimestamp(NOW / 1000, dt.UTC))


def test_get_binds_to_what_the_engine_knows(log: MemoryLog, client: Client) -> None:
    with running(log, lambda *_: (True, {"task_id": "etl/1", "body": status()})):
        task = LongRunningTask.get("1", client=client)
    assert (task.task_id, task.name) == ("etl/1", "t")


def test_log_lines_as_text(log: MemoryLog, client: Client) -> None:
    partition = ids.partition_of("etl", log.partitions)
    for n in range(3):
        line = LogLine(
            task_id="etl/1", epoch=1, attempt=1, worker_id="w", number=n, at=NOW, stream="stdout", text=f"line {n}"
        )
        log.producer().append("task-logs", partition, b"etl/1", codec.encode(line))
    with running(log, lambda *_: (True, {"body": status()})):
        assert LongRunningTask.get("etl/1", client=client).get_logs(last_n=2) == ["line 1", "line 2"]


RESUMES: list[tuple[dict[str, Any], list[type]]] = [
    ({"state": "PAUSED"}, [ResumeTask]),
    ({"state": "FAILED"}, [RetryTask]),
    ({"state": "TIMED_OUT"}, [RetryTask]),
    ({"state": "PENDING"}, []),
    ({"state": "RUNNING"}, []),
    ({"state": "RUNNING", "stopping": "cancelling"}, []),
    ({"state": "RUNNING", "stopping": "pausing"}, [ResumeTask]),
]


@pytest.mark.parametrize(("body", "sent"), RESUMES)
def test_resume_in_each_state(log: MemoryLog, client: Client, body: dict[str, Any], sent: list[type]) -> None:
    with running(log, lambda command, _: (True, {"body": status(**body)})) as engine:
        task = LongRunningTask.resume("etl/1", client=client)
        assert [type(c) for _, c in engine.seen if not isinstance(c, DescribeTask)] == sent
        task.resume()
        assert [type(c) for _, c in engine.seen if not isinstance(c, DescribeTask)] == sent * 2
    assert task.task_id == "etl/1"


@pytest.mark.parametrize("state", ["COMPLETED", "CANCELLED"])
def test_resume_of_a_task_that_is_over_is_refused(log: MemoryLog, client: Client, state: str) -> None:
    def script(command: Any, _: int) -> Answer:
        if isinstance(command, DescribeTask):
            return True, {"body": status(state=state)}
        return False, {"reason": f"the task is {state}"}

    with running(log, script), pytest.raises(CommandRefused, match=state):
        LongRunningTask.resume("etl/1", client=client)


def test_resume_of_a_task_that_moves_meanwhile(log: MemoryLog, client: Client) -> None:
    """Somebody else resumed it between the look and the command: that is what was wanted."""
    states = iter(["PAUSED", "PAUSED", "PENDING", "PENDING"])

    def script(command: Any, _: int) -> Answer:
        if isinstance(command, DescribeTask):
            return True, {"body": status(state=next(states))}
        return False, {"reason": "the task is PENDING"}

    with running(log, script):
        LongRunningTask.resume("etl/1", client=client)


def test_resume_needs_to_know_of_what() -> None:
    with pytest.raises(TypeError):
        LongRunningTask.resume()


def test_pause_and_cancel(log: MemoryLog, client: Client) -> None:
    with running(log, lambda *_: (True, {"body": status()})) as engine:
        task = LongRunningTask.get("etl/1", client=client)
        assert task.pause() is True
        assert task.cancel(reason="User requested") is True
    assert getattr(engine.seen[-1][1], "reason", None) == "User requested"
