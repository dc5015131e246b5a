"""The server as a process: real sockets, real threads, real signals; at the end a real broker."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from perdure import server_main, standstill
from perdure.projections import server
from perdure.projections.api import DOWNLOADS_AT_ONCE
from perdure.projections.processors import DEAD_LETTERS, PROGRESS
from perdure.projections.progress import ProgressProcessor
from perdure.projections.view_writer import Reading, ViewWriter
from perdure.schemas import events, limits
from perdure.schemas.codec import encode
from perdure.schemas.errors import ConfigurationError, InfrastructureError, Unreachable
from perdure.streams.memory_log import MemoryLog
from tests.unit.projections import filling
from tests.unit.projections.story import Story, append

TOKEN = "correct horse battery staple"


class Running:
    """A server in a thread of the test."""

    def __init__(self, log: Any, db_path: Path, **said: Any) -> None:
        self.stop = threading.Event()
        self.exit_code: int | None = None
        self.error: Exception | None = None
        self._url: str | None = None
        self._said: dict[str, Any] = {
            "host": "127.0.0.1",
            "port": 0,
            "token": None,
            "commands": lambda c: {"accepted": True, **c},
            "fetch": _fetch,
        } | said
        self._thread = threading.Thread(target=self._run, args=(log, db_path))
        self._thread.start()
        until(lambda: self._url or not self._thread.is_alive(), "the server answers")

    @property
    def url(self) -> str:
        assert self._url, self.error
        return self._url

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        return self.send("GET", path, None, headers)

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def ended(self, seconds: float = 30) -> Any:
        """The exit code, once it has ended by itself."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the server goes on"
        if self.error is not None:
            raise self.error
        return self.exit_code

    def _run(self, log: Any, db_path: Path) -> None:
        def ready(url: str) -> None:
            self._url = url

        try:
            self.exit_code = server.main(log, db_path=db_path, ready=ready, stop=self.stop, **self._said)
        except Exception as error:  # noqa: BLE001 - handed to the test by `ended`
            self.error = error


def _fetch(task_id: str, recorded: bytes) -> bytes:
    return recorded


@contextmanager
def running(log: Any, db_path: Path, **said: Any) -> Iterator[Running]:
    """A server that is stopped at the end, whatever happens."""
    found = Running(log, db_path, **said)
    try:
        yield found
    finally:
        found.stop.set()
        found._thread.join(60)


def until(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def clock() -> int:
    return time.time_ns() // 1_000_000


@pytest.fixture
def log() -> MemoryLog:
    return MemoryLog(clock, partitions=2)


@pytest.fixture
def db_path(tmp_path: Path) -> Path:
    return tmp_path / "views.db"


def test_it_answers_and_follows_the_log(log: MemoryLog, db_path: Path) -> None:
    story = Story("etl/a/b").running()
    with running(log, db_path) as it:
        until(lambda: it.get("/health")[0] == 200, "the views are filled")
        assert it.get("/health")[1]["parts"] == {"views": "runs"}
        assert it.get("/api/v1/tasks/etl%2Fa%2Fb/events")[0] == 404
        append(log, "task-events", "etl/a/b", story.events[0])
        until(lambda: it.get("/api/v1/tasks/etl%2Fa%2Fb/events")[0] == 200, "the event is in the views")
        assert it.send("POST", "/api/v1/tasks/etl%2Fa%2Fb/cancel", b'{"reason":"x"}') == (
            200, {"accepted": True, "command": "CancelTask", "task_id": "etl/a/b", "reason": "x"},
        )  # fmt: skip
        it.stop.set()
        assert it.ended() == 0


def test_it_says_that_it_is_still_filling(log: MemoryLog, db_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(log, "task-events", "etl/1", Story("etl/1").running().events[0])
    may_read, step = threading.Event(), ViewWriter.step
    monkeypatch.setattr(ViewWriter, "step", lambda w, s: step(w, s) if may_read.is_set() else time.sleep(0.01))
    with running(log, db_path) as it:
        status, told = it.get("/health")
        assert (status, told["problems"]) == (503, ["the views are still being filled"])
        may_read.set()
        until(lambda: it.get("/health")[0] == 200, "the views are filled")


def test_nothing_is_served_beyond_loopback_without_a_token(log: MemoryLog, db_path: Path) -> None:
    with running(log, db_path, host="0.0.0.0") as it, pytest.raises(ConfigurationError, match="token"):
        it.ended()
    assert not db_path.exists()


def test_with_a_token_it_serves_only_who_has_it(log: MemoryLog, db_path: Path) -> None:
    with running(log, db_path, host="0.0.0.0", token=TOKEN) as it:
        assert it.get("/health")[0] == 401
        assert it.get("/nothing")[0] == 401
        assert it.get("/api/v1/tasks", Authorization=f"Bearer {TOKEN}") == (200, {"tasks": [], "next": None})


def test_an_address_in_use_is_named(log: MemoryLog, db_path: Path, tmp_path: Path) -> None:
    with running(log, db_path) as it:
        port = int(it.url.rpartition(":")[2])
        with (
            running(log, tmp_path / "other.db", port=port) as other,
            pytest.raises(ConfigurationError, match=str(port)),
        ):
            other.ended()
        with running(log, db_path) as other, pytest.raises(ConfigurationError, match="in use by another server"):
            other.ended()
        assert it.get("/health")[0] in (200, 503)


def test_it_stops_though_a_client_holds_its_connection(log: MemoryLog, db_path: Path) -> None:
    with running(log, db_path) as it:
        held = http.client.HTTPConnection(it.url.removeprefix("http://"), timeout=30)
        held.request("GET", "/health")
        held.getresponse().read()
        it.stop.set()
        assert it.ended(10) == 0
        held.close()


def test_clients_that_say_nothing_do_not_keep_others_out(
    log: MemoryLog, db_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than the server has places for: some silent, some in the middle of a request's head, some after a request."""
    monkeypatch.setattr(server, "PATIENCE_S", 1.0)
    whole = b"GET /api/v1/queues HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with running(log, db_path) as it, ExitStack() as held:
        host, _, port = it.url.removeprefix("http://").rpartition(":")
        for i in range(600):
            wire = held.enter_context(socket.create_connection((host, int(port)), timeout=30))
            if i % 3 == 2:
                wire.sendall(whole)
                wire.recv(4_096)
            if i % 3:
                wire.sendall(whole[:20])
        until(lambda: raw(it, ASK).split(b" ", 2)[1] == b"200", "the API answers")


def test_clients_that_do_not_take_what_they_asked_for_lose_their_places(
    log: MemoryLog, db_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large value, of which much is left to be sent, and of one piece, which may lie in the sockets as a whole."""
    monkeypatch.setattr(server, "PATIENCE_S", 0.5)
    sizes = {"etl/much": 8 << 20, "etl/piece": 256 << 10}
    for task_id in sizes:
        filling.tell(log, Story(task_id).running(input=b"@a reference"))

    def asked(held: ExitStack, name: str) -> socket.socket:
        wire = held.enter_context(socket.socket())
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        host, _, port = it.url.removeprefix("http://").rpartition(":")
        wire.connect((host, int(port)))
        wire.settimeout(30)
        wire.sendall(b"GET /api/v1/tasks/etl%2F" + name.encode() + b"/input HTTP/1.1\r\nHost: localhost\r\n\r\n")
        return wire

    with running(log, db_path, fetch=lambda task_id, _: b"1" * sizes[task_id]) as it, ExitStack() as held:
        until(lambda: it.get("/health")[0] == 200, "the views are filled")
        stalled = [asked(held, name) for name in ("much", "piece") for _ in range(DOWNLOADS_AT_ONCE)]
        for wire in stalled:
            assert wire.recv(12) == b"HTTP/1.1 200"  # it had a place, and takes no more of it
        assert len(raw(it, b"GET /api/v1/tasks/etl%2Fmuch/input HTTP/1.1\r\n" + ASK.split(b"\r\n", 1)[1])) > 8 << 20
        for wire in stalled:  # what lies in the sockets' buffers, and then the end
            with suppress(ConnectionResetError):
                assert sum(len(part) for part in iter(lambda wire=wire: wire.recv(1 << 16), b"")) < 8 << 20


ASK = b"GET /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def test_commands_that_wait_do_not_keep_questions_waiting(log: MemoryLog, db_path: Path) -> None:
    decided = threading.Event()

    def undecided(_: dict[str, Any]) -> Mapping[str, Any]:
        decided.wait(60)
        return {"accepted": True, "decided": False}

    with running(log, db_path, commands=undecided) as it, ThreadPoolExecutor(100) as clients:
        waiting = [clients.submit(it.send, "POST", "/api/v1/tasks", b'{"type":"x"}') for _ in range(100)]
        try:
            for _ in range(20):
                assert it.get("/api/v1/tasks")[0] == 200
            assert not any(w.done() for w in waiting)
        finally:
            decided.set()
        assert {w.result()[0] for w in waiting} == {202}


def raw(it: Running, request: bytes) -> bytes:
    """The answer to bytes as they are."""
    host, _, port = it.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as wire:
        wire.sendall(request)
        found = b""
        while part := wire.recv(65_536):
            found += part
    return found


ODD_REQUESTS = [
    (b"GET /api/v1/tasks/etl%2F1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"404"),
    (b"GET /health HTTP/1.1\r\nHost: evil.example.org\r\nConnection: close\r\n\r\n", b"403"),
    (b"GET /health HTTP/1.0\r\n\r\n", b"403"),
    (b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"404"),
    (b"GET /health HTTP/1.1\r\n\r\n", b"400"),
    (b"nonsense\r\n\r\n", b"400"),
    (b"POST /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n", b"413"),
]


@pytest.mark.parametrize(("request_", "status"), ODD_REQUESTS, ids=lambda v: v[:40])
def test_odd_requests_are_refused_and_hurt_nobody(
    log: MemoryLog, db_path: Path, request_: bytes, status: bytes
) -> None:
    with running(log, db_path) as it:
        answer = raw(it, request_)
        assert answer.split(b" ", 2)[1] == status, answer
        assert b"Traceback" not in answer
        assert it.get("/api/v1/tasks")[0] == 200


# Parts ----------------------------------------------------------------------------------------------------------------


def waits(stop: threading.Event) -> None:
    stop.wait()


def test_other_parts_run_until_the_server_stops(log: MemoryLog, db_path: Path) -> None:
    ended = []

    def part(stop: threading.Event) -> None:
        stop.wait()
        ended.append(True)

    with running(log, db_path, background={"one": part, "other": part}) as it:
        assert len(it.get("/health")[1]["parts"]) == 3
        it.stop.set()
        assert it.ended() == 0
    assert ended == [True, True]


def breaks(_: threading.Event) -> None:
    raise RuntimeError("password=hunter2")


def is_refused(_: threading.Event) -> None:
    raise Unreachable("no broker")


def leaves(_: threading.Event) -> None:
    return


FAILURES: list[tuple[Callable[[threading.Event], None], str]] = [
    (breaks, "failed: RuntimeError"),
    (is_refused, "failed: no broker"),
    (leaves, "ended by itself"),
]


@pytest.mark.parametrize(("part", "told"), FAILURES)
def test_a_part_that_dies_shows_in_health_and_ends_the_server(
    log: MemoryLog, db_path: Path, part: Callable[[threading.Event], None], told: str
) -> None:
    with running(log, db_path, background={"waits": waits, "part": part}, linger_s=600) as it:
        until(lambda: it.get("/health")[1]["caught_up"], "the views are filled")
        status, health = it.get("/health")
        assert (status, health["problems"]) == (503, [f"part {told}"])
        assert it.get("/api/v1/tasks")[0] == 200
        it.stop.set()
        assert it.ended() == server.FAILED
    with running(log, db_path, background={"part": part}, linger_s=0) as it:
        assert it.ended() == server.FAILED  # by itself


def test_a_view_writer_that_dies_ends_the_server(
    log: MemoryLog, db_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: ViewWriter, __: float) -> int:
        raise InfrastructureError("no room on the disk")

    monkeypatch.setattr(ViewWriter, "step", full)
    with running(log, db_path, linger_s=600) as it:
        until(lambda: "views failed: no room on the disk" in it.get("/health")[1]["problems"], "health says so")
        it.stop.set()
        assert it.ended() == server.FAILED


FINE = Reading(caught_up=True, lag={"task-events": 3}, skew_ms=-20)
PROBLEMS: list[tuple[dict[str, Any], str]] = [
    ({"reading": Reading()}, "still being filled"),
    ({"reading": Reading(caught_up=True, skew_ms=limits.CLOCK_AGREES_MS + 1)}, "30.0 s ahead"),
    ({"reading": Reading(caught_up=True, skew_ms=-limits.CLOCK_AGREES_MS - 1)}, "30.0 s late"),
    ({"reading": Reading(caught_up=True, lag={"task-events": 10_001})}, "views: 10,001 records behind in task-events"),
    ({"reading": Reading(caught_up=True, problem="no broker")}, "no broker"),
    ({"lags": {"progress": {"task-events": 20_000}}}, "progress: 20,000 records behind"),
    ({"parts": {"progress": "failed: x"}}, "progress failed: x"),
    ({"found": ["engine: task-commands/0 stands still at 1 of 2"]}, "engine: task-commands/0 stands still"),
]


def test_health_is_ok_when_nothing_is_wrong() -> None:
    told = server.health_of(FINE, {"views": "runs"}, {"progress": {"task-events": 1}})
    assert told == {
        "ok": True, "problems": [], "caught_up": True, "skew_ms": -20,
        "lag": {"views": {"task-events": 3}, "progress": {"task-events": 1}}, "parts": {"views": "runs"},
    }  # fmt: skip


@pytest.mark.parametrize(("said", "problem"), PROBLEMS)
def test_health_names_what_is_wrong(said: dict[str, Any], problem: str) -> None:
    fine: dict[str, Any] = {"reading": FINE, "parts": {"views": "runs"}, "lags": {}}
    told = server.health_of(**fine | said)
    assert not told["ok"]
    assert [problem in found for found in told["problems"]] == [True]


# A process of its own -------------------------------------------------------------------------------------------------

PROCESS = """
import logging, sys, time
from pathlib import Path
from perdure.projections import server
from perdure.streams.memory_log import MemoryLog

logging.basicConfig(level=logging.DEBUG)
log = MemoryLog(lambda: time.time_ns() // 1_000_000, partitions=1)
sys.exit(server.main(log, host="127.0.0.1", port=0, token=sys.argv[2], db_path=Path(sys.argv[1]),
                     commands=lambda c: {}, fetch=lambda task_id, recorded: recorded, ready=lambda url: print(url, flush=True)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly(db_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-W", "error", "-c", PROCESS, str(db_path), TOKEN]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path.cwd()
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            url = process.stdout.readline().strip()
            connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
            connection.request("GET", "/health", headers={"Authorization": f"Bearer {TOKEN}"})
            assert connection.getresponse().status in (200, 503)
            connection.close()
            os.kill(process.pid, number)
            assert process.wait(30) == 0
            said = process.stdout.read() + process.stderr.read()
            assert TOKEN not in said
            assert "Traceback" not in said
        finally:
            process.kill()


# A real broker --------------------------------------------------------------------------------------------------------


@pytest.mark.kafka
def test_from_events_to_answers_on_kafka(
    kafka_bootstrap: str, topic_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events become progress, dead letters and views; a rebuilt store says the same."""
    from perdure.streams.kafka_log import KafkaLog
    from perdure.streams.topology import create_topics

    create_topics(kafka_bootstrap, topic_prefix, partitions=2)
    log = KafkaLog(kafka_bootstrap, topic_prefix)

    done, broken = Story("etl/done").running(), Story("mail/broken").running().failing()
    half = done.progress(fraction=0.5)
    producer = log.producer()
    tell(log, producer, done, broken)
    producer.append("task-telemetry", where(log, "etl/done"), b"etl/done", encode(half))

    monkeypatch.setattr(server_main, "MEASURE_EVERY_S", 0.1)
    monkeypatch.setattr(standstill, "STILL_S", 1.0)
    may_fold, handle = threading.Event(), ProgressProcessor.handle
    monkeypatch.setattr(ProgressProcessor, "handle", lambda *said: handle(*said) if may_fold.wait(60) else None)
    parts = [server_main.Projection(log, kind, tmp_path / "state") for kind in (PROGRESS, DEAD_LETTERS)]
    background = {p.name: p.run for p in parts}
    lags, problems = lambda: {p.name: p.lag for p in parts}, lambda: [text for p in parts for text in p.problems()]
    with running(log, tmp_path / "views.db", background=background, lags=lags, problems=problems) as it:
        assert set(it.get("/health")[1]["parts"]) == {"views", "progress", "dead_letters"}
        # Each story has a partition of its own, with a bad record more, and room for a marker less.
        behind = len(done.events) + len(broken.events)
        until(lambda: lag(it, "progress") == {"task-events": behind, "task-telemetry": 0}, "progress waits", 60)
        until(
            lambda: "progress: task-events/" in str(it.get("/health")[1]["problems"]), "health says that it stands", 60
        )
        may_fold.set()
        until(lambda: it.get("/api/v1/tasks/etl%2Fdone")[1].get("progress") == 0.5, "progress is folded", 60)
        until(lambda: it.get("/api/v1/dead-letters")[1]["dead_letters"], "the dead letter is folded", 60)
        done.then(events.TaskCompleted)
        producer.append("task-events", where(log, "etl/done"), b"etl/done", encode(done.events[-1]))
        until(lambda: it.get("/api/v1/tasks/etl%2Fdone")[1]["state"] == "COMPLETED", "the end is folded", 60)
        until(lambda: it.get("/health")[0] == 200, "all is read, transaction markers too")
        until(lambda: lag(it, "progress") == {"task-events": 0, "task-telemetry": 0}, "progress says so too")
        until(lambda: lag(it, "dead_letters") == {"task-events": 0}, "dead letters too")
        seen = everything(it)
    assert it.ended() == 0
    (tmp_path / "views.db").unlink()
    with running(log, tmp_path / "views.db") as it:
        until(lambda: it.get("/health")[0] == 200, "the views are filled again")
        assert everything(it) == seen
    with running(log, tmp_path / "views.db") as it:
        until(lambda: it.get("/health")[0] == 200, "the views are read on")
        assert everything(it) == seen
    assert it.ended() == 0
    producer.close()


def lag(it: Running, projection: str) -> Any:
    return it.get("/health")[1]["lag"][projection]


def where(log: Any, task_id: str) -> int:
    from perdure.schemas import ids

    return ids.partition_of(ids.split(task_id)[0], log.partitions)


def tell(log: Any, producer: Any, *stories: Story) -> None:
    """Events with a bad record among them."""
    for story in stories:
        for event in story.events:
            producer.append("task-events", where(log, story.task_id), story.task_id.encode(), encode(event))
        producer.append("task-events", where(log, story.task_id), b"bad", b"nonsense")
    assert producer.flush(30)


def everything(it: Running) -> list[Any]:
    """All that does not depend on the time of day."""
    paths = ["dead-letters", "queues", "tasks/etl%2Fdone/events", "tasks/mail%2Fbroken/attempts", "tasks?state=failed"]
    found = [it.get(f"/api/v1/{path}") for path in paths]
    assert {status for status, _ in found} == {200}
    assert all(found)
    return found
