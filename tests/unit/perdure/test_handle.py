"""The handle: status, waiting, results, history and logs of one task; by script, and against the engine itself."""

from __future__ import annotations

import datetime as dt
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from perdure import client as client_module
from perdure import handle as handle_module
from perdure.client import Client
from perdure.handle import Handle
from perdure.schemas import codec, commands, events, ids, values
from perdure.schemas.commands import AwaitTask, DescribeTask, RetryTask, SubmitTask
from perdure.schemas.common import Cause, ErrorInfo
from perdure.schemas.errors import (
    CommandRefused,
    DecodeError,
    NotFound,
    TaskCancelled,
    TaskFailed,
    TaskTimedOut,
    Unreachable,
    WaitTimeout,
)
from perdure.schemas.public import LogLine
from perdure.schemas.signing import Keys
from perdure.status import parse_status
from perdure.streams.local_engine import LocalEngine
from perdure.streams.memory_log import MemoryLog
from tests.unit.perdure.scripted_engine import NOT_FOUND, Answer, append_event, configure, reply, running, status

NOW = 1_800_000_000_000
HEAD: dict[str, Any] = {"cause": Cause(partition=0, offset=0), "build": "b", "feature_level": 1, "at": NOW}


@pytest.fixture
def log() -> MemoryLog:
    made = MemoryLog(lambda: NOW)
    configure(made, "type/t", {"queue": "etl"})
    return made


@pytest.fixture
def client(log: MemoryLog) -> Iterator[Client]:
    with Client(log, clock=lambda: NOW) as made:
        yield made


def answering(**body: Any) -> Callable[[Any, int], Answer]:
    return lambda command, _: (True, {"body": status(command.task_id, **body)})


def soon(condition: Callable[[], bool]) -> None:
    """Wait until another thread has done its part."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 10 s"
        threading.Event().wait(0.005)


# Status --------------------------------------------------------------------------------------------------------------


def test_a_status_has_all_that_the_engine_said_by_name_and_as_it_was(log: MemoryLog, client: Client) -> None:
    said = {
        "progress": 0.25,
        "attempt": 2,
        "milestones": ["a"],
        "error": {"type": "E", "message": "m"},
        "from_the_future": 1,
    }
    with running(log, answering(**said)):
        found = client.get("etl/1").status()
    assert (found.task_id, found.type, found.state, found.progress, found.attempt) == ("etl/1", "t", "RUNNING", 0.25, 2)
    assert (found.milestones, found.error) == (("a",), {"type": "E", "message": "m"})
    assert found.raw["from_the_future"] == 1


def test_a_result_comes_back_as_the_value_that_was_returned() -> None:
    result = {"at": dt.date(2026, 11, 21), "n": [1, 2]}
    body = json.dumps(status(state="COMPLETED", result=json.loads(values.dumps(result, field="result")))).encode()
    assert parse_status(body).result == result
    assert parse_status(body).raw["result"]["at"] == {"$perdure": "date", "value": "2026-11-21"}


@pytest.mark.parametrize("body", [b"", b"[]", b"5", b'{"task_id": "etl/1"}', b"null"])
def test_an_answer_that_is_no_status_is_a_decode_error(body: bytes) -> None:
    with pytest.raises(DecodeError):
        parse_status(body)


def test_the_engine_does_not_know_the_task(log: MemoryLog, client: Client) -> None:
    with running(log, lambda *_: NOT_FOUND):
        for ask in (Handle.status, Handle.pause, Handle.result, lambda h: list(h.events())):
            with pytest.raises(NotFound):
                ask(Handle(client, "etl/1"))


def test_a_refused_submit_shows_in_its_handle(log: MemoryLog, client: Client) -> None:
    """The status that comes back is that of the task which had the id before."""

    def script(command: Any, _: int) -> Answer:
        if isinstance(command, SubmitTask):
            return False, {"reason": "key 'k' was used before with another input", "field": "key"}
        return True, {"body": status(command.task_id, state="COMPLETED", result=1)}

    with running(log, script):
        handle = client.submit("t", 2, key="k")
        for _ in range(2):
            with pytest.raises(CommandRefused, match="used before") as caught:
                handle.result()
            assert caught.value.field == "key"
        assert client.get(handle.id).result() == 1


# Waiting -------------------------------------------------------------------------------------------------------------


def test_wait_is_told_of_the_end_at_once(log: MemoryLog, client: Client) -> None:
    waiting: list[tuple[AwaitTask, int]] = []

    def script(command: Any, partition: int) -> Answer | None:
        if isinstance(command, AwaitTask):
            waiting.append((command, partition))
            return None
        return True, {"body": status(command.task_id)}

    with running(log, script):
        results: list[Any] = []
        waiter = threading.Thread(target=lambda: results.append(client.get("etl/1").result(timeout=60)))
        waiter.start()
        soon(lambda: bool(waiting))
        [(command, partition)] = waiting
        assert command.timeout == 20_000
        reply(log, command, partition, (True, {"body": status(state="COMPLETED", result={"n": 1})}))
        waiter.join(5)
    assert results == [{"n": 1}]


def test_wait_is_renewed_until_the_end(log: MemoryLog, client: Client) -> None:
    answers = iter(["RUNNING", "RUNNING", "PAUSED", "RUNNING", "COMPLETED"])
    with running(log, lambda command, _: (True, {"body": status(state=next(answers))})) as engine:
        assert client.get("etl/1").wait().state == "COMPLETED"
    assert [type(c).__name__ for _, c in engine.seen] == ["DescribeTask"] + ["AwaitTask"] * 4


def test_a_wait_that_ends_before_the_task_says_so(log: MemoryLog, client: Client) -> None:
    def script(command: Any, _: int) -> Answer | None:
        return None if isinstance(command, AwaitTask) else (True, {"body": status()})

    with running(log, script):
        for timeout in (0, 0.05, "50ms"):
            with pytest.raises(WaitTimeout, match="goes on"):
                client.get("etl/1").wait(timeout)


def test_a_wait_outlives_an_engine_that_forgot_it(
    log: MemoryLog, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handle_module, "_RENEW_S", 0.01)
    monkeypatch.setattr(handle_module, "_GRACE_S", 0.01)
    described = iter(["RUNNING", "RUNNING", "COMPLETED"])

    def script(command: Any, _: int) -> Answer | None:
        return None if isinstance(command, AwaitTask) else (True, {"body": status(state=next(described))})

    with running(log, script):
        assert client.get("etl/1").wait().ended


def test_waiting_for_a_silent_engine_is_unreachable(
    log: MemoryLog, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_VERDICT_S", 0.02)
    with pytest.raises(Unreachable):
        client.get("etl/1").wait(timeout=60)


@pytest.mark.parametrize("timeout", [None, 60])
def test_a_wait_outlives_an_engine_that_is_away(
    log: MemoryLog, client: Client, monkeypatch: pytest.MonkeyPatch, timeout: float | None
) -> None:
    monkeypatch.setattr(client_module, "_VERDICT_S", 1.0)
    said = iter([(True, {"body": status()}), None, None, None])
    last = (True, {"body": status(state="COMPLETED")})
    for name in ("_RENEW_S", "_GRACE_S", "_POLL_S"):
        monkeypatch.setattr(handle_module, name, 0.02)
    with running(log, lambda *_: next(said, last)) as engine:
        assert client.get("etl/1").wait(timeout).state == "COMPLETED"
    assert [type(c).__name__ for _, c in engine.seen][:4] == ["DescribeTask", "AwaitTask", "DescribeTask", "AwaitTask"]


@pytest.mark.parametrize("timeout", [None, 2.5])
def test_a_wait_for_an_engine_that_does_not_come_back_is_unreachable(
    log: MemoryLog, client: Client, monkeypatch: pytest.MonkeyPatch, timeout: float | None
) -> None:
    monkeypatch.setattr(client_module, "_VERDICT_S", 1.0)
    monkeypatch.setattr(handle_module, "_SILENCE_S", 2.5)
    for name in ("_RENEW_S", "_GRACE_S", "_POLL_S"):
        monkeypatch.setattr(handle_module, name, 0.02)
    said = iter([(True, {"body": status()})])
    with running(log, lambda *_: next(said, None)) as engine, pytest.raises(Unreachable):
        client.get("etl/1").wait(timeout)
    assert len(engine.seen) > 4, "it has asked again"


ERROR = {"type": "builtins.ValueError", "message": "bad row", "error_types": [], "traceback": "..."}
OUTCOMES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"state": "FAILED", "error": ERROR}, TaskFailed, "bad row"),
    ({"state": "TIMED_OUT", "timeout": "queue"}, TaskTimedOut, "queue"),
    ({"state": "CANCELLED", "cancel_reason": "not needed"}, TaskCancelled, "not needed"),
]


@pytest.mark.parametrize(("body", "kind", "told"), OUTCOMES)
def test_a_result_that_will_never_be_raises_why(
    log: MemoryLog, client: Client, body: dict[str, Any], kind: type[TaskFailed], told: str
) -> None:
    with running(log, answering(**body)), pytest.raises(kind, match=told) as caught:
        client.get("etl/1").result()
    assert caught.value.task_id == "etl/1"
    assert caught.value.error == body.get("error")


# Control -------------------------------------------------------------------------------------------------------------


def test_every_verb_sends_its_command(log: MemoryLog, client: Client) -> None:
    handle = client.get("etl/1")
    with running(log, lambda *_: (True, {})) as engine:
        done = [
            handle.pause(),
            handle.resume(),
            handle.cancel("why"),
            handle.retry(),
            handle.retry(None),
            handle.discard("old"),
        ]
    assert done == [True] * 6
    sent = [(type(c).__name__, getattr(c, "reason", getattr(c, "input", None))) for _, c in engine.seen]
    assert sent == [
        ("PauseTask", None),
        ("ResumeTask", None),
        ("CancelTask", "why"),
        ("RetryTask", None),
        ("RetryTask", b"null"),
        ("DiscardDeadLetter", "old"),
    ]
    assert {p for p, _ in engine.seen} == {ids.partition_of("etl", log.partitions)}
    assert all(c.task_id == "etl/1" and c.issued_by for _, c in engine.seen)


# History and logs ----------------------------------------------------------------------------------------------------


def queued(seq: int, task_id: str = "etl/1") -> events.TaskQueued:
    return events.TaskQueued(**HEAD, task_id=task_id, seq=seq, reason="queued")


def failed(seq: int) -> events.TaskFailed:
    return events.TaskFailed(**HEAD, task_id="etl/1", seq=seq, error=ErrorInfo(type="E", message="m"))


def test_the_history_so_far(log: MemoryLog, client: Client) -> None:
    append_event(log, queued(1))
    append_event(log, queued(1, "etl/another"))
    append_event(log, queued(2))
    found = list(client.get("etl/1").events(follow=False))
    assert [(e.kind, e.seq, e.at) for e in found] == [("TaskQueued", 1, NOW), ("TaskQueued", 2, NOW)]
    assert found[0].record.reason == "queued"


def redriven(seq: int) -> events.TaskRedriven:
    return events.TaskRedriven(**HEAD, task_id="etl/1", seq=seq)


def test_the_history_ends_with_the_task_and_with_all_that_follows_its_end(log: MemoryLog, client: Client) -> None:
    dead = events.TaskDeadLettered(**HEAD, task_id="etl/1", seq=4, state="FAILED")
    for event in (failed(1), redriven(2), failed(3), dead):
        append_event(log, event)
    found = [e.kind for e in client.get("etl/1").events()]
    assert found == ["TaskFailed", "TaskRedriven", "TaskFailed", "TaskDeadLettered"]


def test_the_history_of_a_redriven_task_is_followed_to_its_new_end(log: MemoryLog, client: Client) -> None:
    append_event(log, failed(1))
    append_event(log, redriven(2))
    kinds: list[str] = []
    reader = threading.Thread(target=lambda: kinds.extend(e.kind for e in client.get("etl/1").events()), daemon=True)
    with running(log, answering()):
        reader.start()
        soon(lambda: not reader.is_alive() or len(kinds) == 2)
        append_event(log, failed(3))
        reader.join(10)
    assert kinds == ["TaskFailed", "TaskRedriven", "TaskFailed"]


def line(number: int, task_id: str = "etl/1") -> bytes:
    text = f"line {number}"
    return codec.encode(
        LogLine(task_id=task_id, epoch=1, attempt=1, worker_id="w", number=number, at=NOW, stream="stdout", text=text)
    )


def test_the_newest_log_lines_and_those_that_come(log: MemoryLog, client: Client) -> None:
    partition = ids.partition_of("etl", log.partitions)
    producer = log.producer()
    for number in range(5):
        producer.append("task-logs", partition, b"etl/1", line(number))
        producer.append("task-logs", partition, b"etl/2", line(number, "etl/2"))
    handle = client.get("etl/1")
    assert [n.number for n in handle.logs(last_n=2)] == [3, 4]
    assert handle.logs(last_n=0) == []
    states = iter(["RUNNING", "COMPLETED"])

    def script(command: Any, _: int) -> Answer:
        producer.append("task-logs", partition, b"etl/1", line(7))
        return True, {"body": status(state=next(states))}

    with running(log, script):
        assert [n.number for n in handle.log_lines(2)] == [3, 4, 7, 7]


def test_what_is_no_line_hides_none(log: MemoryLog, client: Client) -> None:
    """Anybody may write to the topic, under any key."""
    partition = ids.partition_of("etl", log.partitions)
    producer = log.producer()
    for data in (line(0), b"garbage", line(1)):
        producer.append("task-logs", partition, b"etl/1", data)
    texts = [n.text for n in client.get("etl/1").logs()]
    assert (texts[0], texts[2]) == ("line 0", "line 1")
    assert "task-logs" in texts[1]
    assert "is no line" in texts[1]


# Against the engine --------------------------------------------------------------------------------------------------


@contextmanager
def engine_at_work(log: MemoryLog) -> Iterator[None]:
    """The engine itself, in a thread."""
    engine = LocalEngine(log, Keys.generate(), log.clock)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            if not engine.step():
                stop.wait(0.002)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10)
        engine.close()


def test_a_task_without_a_worker_is_submitted_seen_paused_resumed_and_cancelled(client: Client, log: MemoryLog) -> None:
    with engine_at_work(log):
        handle = client.submit("t", {"n": 1}, priority=7, labels={"a": "b"})
        found = handle.status()
        assert (found.task_id, found.type, found.state, found.priority) == (handle.id, "t", "PENDING", 7)
        assert found.labels == {"a": "b"}
        assert found.why
        assert handle.pause() is True
        assert handle.status().state == "PAUSED"
        with pytest.raises(CommandRefused, match="PAUSED"):
            handle.pause()
        assert handle.resume() is True
        with pytest.raises(WaitTimeout):
            handle.wait(timeout=0)
        assert handle.cancel("not needed") is True
        with pytest.raises(TaskCancelled, match="not needed"):
            handle.result(timeout=10)
        kinds = [e.kind for e in handle.events()]
        assert kinds[0] == "TaskSubmitted"
        assert kinds[-1] == "TaskCancelled"
        assert {"TaskPaused", "TaskResumed"} < set(kinds)


def test_the_engine_finds_ids_and_prefixes(client: Client, log: MemoryLog) -> None:
    with engine_at_work(log):
        first = client.submit("t")
        second = client.submit("unheard", queue="somewhere", id="my own id/1")
        local = ids.split(first.id)[1]
        assert client.get(first.id).status().task_id == first.id
        assert client.get(local).id == first.id
        assert client.get(local[:-4]).id == first.id
        assert client.get("my own id/1").id == second.id == "somewhere/my own id/1"
        assert client.get("somewhere/my own id/1").status().task_id == second.id
        for unknown in ("nothing of that kind", "etl/nothing", "no"):
            with pytest.raises(NotFound):
                client.get(unknown).status()


def test_the_same_submit_is_the_same_task_and_another_one_is_refused(client: Client, log: MemoryLog) -> None:
    with engine_at_work(log):
        first = client.submit("t", 1, key="2026-11")
        again = client.submit("t", 1, key="2026-11")
        other = client.submit("t", 2, key="2026-11")
        assert first.id == again.id == other.id
        assert again.status().state == "PENDING"
        with pytest.raises(CommandRefused) as caught:
            other.status()
        assert caught.value.field == "key"
        assert [e.kind for e in first.events(follow=False)].count("TaskSubmitted") == 1


def test_a_command_class_that_is_no_query_is_answered_too(client: Client, log: MemoryLog) -> None:
    with engine_at_work(log):
        handle = client.submit("t")
        with pytest.raises(CommandRefused, match="FAILED and TIMED_OUT"):
            client.decide(RetryTask(**client.head(), task_id=handle.id))
        assert client.ask(DescribeTask(**client.head(), task_id=handle.id)).accepted
        with pytest.raises(NotFound):
            client.decide(commands.DiscardDeadLetter(**client.head(), task_id="etl/none"))
