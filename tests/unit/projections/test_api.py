"""The HTTP API: what each address answers, and who gets no answer."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from starlette.types import ASGIApp, Message

from perdure.projections import auth
from perdure.projections.api import _Api, create_app
from perdure.projections.auth import BODY_MAX, Access, access, is_loopback
from perdure.projections.views import Views
from perdure.schemas import events
from perdure.schemas.common import Usage
from perdure.schemas.errors import (
    CommandRefused,
    ConfigurationError,
    DecodeError,
    InvalidRequest,
    NotFound,
    Unreachable,
    ValueTooLarge,
    WaitTimeout,
)
from perdure.schemas.public import ConfigRecord, TaskProgress
from perdure.streams.memory_log import MemoryLog
from tests.unit.projections.story import Clock, Story, append
from tests.unit.projections.test_views import filled, line, metrics, some, task, tell

TOKEN = "correct horse battery staple"
ACCEPTED = {"accepted": True, "reason": "", "field": None, "command_id": "c1", "task_id": "etl/1"}
ODD_IDS = [
    "etl/1",
    "etl/a/b",
    "etl/a/events",
    "etl/100%",
    "etl/%2F",
    "etl/größe ☃",
    "etl/a?b#c",
    "etl/..",
    "etl/a+b&c=d",
]


class Server:
    """The API over a log in memory, with requests as plain calls."""

    def __init__(self, tmp_path: Path, rules: Access | None = None) -> None:
        self.clock = Clock()
        self.log = MemoryLog(self.clock, partitions=2)
        self.path = tmp_path / "views.db"
        self.commands: list[dict[str, Any]] = []
        self.answer: Mapping[str, Any] | Exception = ACCEPTED
        self.state: dict[str, Any] = {"ok": True, "problems": []}
        self.views = Views(self.path)
        self.app = create_app(
            self.views, self.carry_out, lambda: self.state, rules or access("127.0.0.1", None), self.clock
        )

    def carry_out(self, command: dict[str, Any]) -> Mapping[str, Any]:
        self.commands.append(command)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def get(self, path: str, **said: Any) -> Any:
        """The JSON of a GET that succeeds, once all records are in the views."""
        filled(self.log, self.path)
        response = self.ask("GET", f"/api/v1/{path}", **said)
        assert response.status_code == 200, response.text
        return response.json()

    def refused(self, method: str, path: str, **said: Any) -> tuple[int, str, str | None]:
        """Status, code and field of a request that fails."""
        filled(self.log, self.path)
        response = self.ask(method, f"/api/v1/{path}", **said)
        error = response.json()["error"]
        assert set(error) == {"code", "message", "field"}
        assert error["message"]
        return response.status_code, error["code"], error["field"]

    def ask(self, method: str, path: str, **said: Any) -> httpx.Response:
        async def asked() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as client:
                return await client.request(method, path, **said)

        return asyncio.run(asked())


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


# Reading --------------------------------------------------------------------------------------------------------------


def test_a_task_has_the_names_of_status_json(server: Server) -> None:
    row = TaskProgress(
        task_id="etl/1", type="crunch", queue="etl", state="RUNNING", progress=0.5, submitted_at=1,
        started_at=1_990_000, eta_at=2_030_000, units_done=1, units_total=2, attempt=1, epoch=2, worker_id="w1",
        result=None, estimated_duration=60_000,
    )  # fmt: skip
    append(server.log, "task-progress", "etl/1", row)
    found = server.get("tasks/etl%2F1")
    expected = {
        "task_id": "etl/1", "type": "crunch", "state": "RUNNING", "reason": "", "progress": 0.5, "current_step": None,
        "steps_completed": 0, "total_steps": None, "units_done": 1, "units_total": 2, "attempt": 1, "epoch": 2,
        "elapsed_seconds": 10.0, "eta_seconds": 30.0, "submitted_at": 1, "started_at": 1_990_000, "finished_at": None,
        "worker_id": "w1", "result": None, "error": None, "checkpoint_version": None,
        "estimated_duration_seconds": 60.0,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_a_result_and_an_error_are_shown_whole(server: Server) -> None:
    done = Story("etl/done").running()
    done.then(events.TaskCompleted, result='{"größe":[1,2.5,null,"☃"]}'.encode())
    tell(server.log, done)
    tell(server.log, Story("etl/broken").running().failing())
    assert server.get("tasks/etl%2Fdone")["result"] == {"größe": [1, 2.5, None, "☃"]}
    broken = server.get("tasks/etl%2Fbroken")
    assert broken["error"] == {"type": "app.Broken", "message": "no", "error_types": ["app.Broken"], "traceback": ""}
    assert broken["dead_letter"] is True


@pytest.mark.parametrize("task_id", ODD_IDS)
def test_any_id_is_one_percent_encoded_segment(server: Server, task_id: str) -> None:
    story = Story(task_id).running().failing()
    tell(server.log, story)
    append(server.log, "task-logs", task_id, line(task_id, 1))
    name = quote(task_id, safe="")
    assert server.get(f"tasks/{name}")["task_id"] == task_id
    assert {e["task_id"] for e in server.get(f"tasks/{name}/events")["events"]} == {task_id}
    assert [n["task_id"] for n in server.get(f"tasks/{name}/logs")["lines"]] == [task_id]
    assert len(server.get(f"tasks/{name}/attempts")["attempts"]) == 1
    assert server.get(f"dead-letters/{name}")["task_id"] == task_id
    assert server.ask("POST", f"/api/v1/tasks/{name}/pause").status_code == 200
    assert server.commands == [{"command": "PauseTask", "task_id": task_id}]


def test_an_id_with_a_bare_slash_is_told_how_to_be_written(server: Server) -> None:
    task(server.log, "etl/1")
    filled(server.log, server.path)
    response = server.ask("GET", "/api/v1/tasks/etl/1")
    assert response.status_code == 404
    assert "etl%2F2026-11" in response.json()["error"]["message"]
    assert server.refused("GET", "tasks/etl%2F%FF") == (400, "invalid_request", "task_id")


def test_tasks_are_listed_filtered_and_paged(server: Server) -> None:
    some(server.log)

    def ids(query: str) -> list[str]:
        return [t["task_id"] for t in server.get(f"tasks?{query}")["tasks"]]

    assert ids("") == ["etl/4", "mail/3", "etl/2", "etl/1"]
    assert ids("state=running") == ["mail/3", "etl/1"]
    assert ids("state=Running,failed") == ids("state=running&state=FAILED") == ["mail/3", "etl/2", "etl/1"]
    assert ids("state=timeout") == []
    assert ids("label=env=prod&label=team=a") == ["etl/1"]
    assert ids("queue=etl&type=crunch&state=pending") == ["etl/4"]
    first = server.get("tasks?limit=3")
    rest = server.get("tasks", params={"cursor": first["next"]})
    assert [t["task_id"] for t in rest["tasks"]] == ["etl/1"]
    assert rest["next"] is None


def test_events_with_their_kind_and_recorded_values(server: Server) -> None:
    story = Story("etl/1").running(input=b'{"path":"x"}')
    story.then(events.StepCompleted, result=b"[1]")
    tell(server.log, story)
    first = server.get("tasks/etl%2F1/events?limit=2")
    assert [(e["kind"], e["seq"]) for e in first["events"]] == [("TaskSubmitted", 1), ("TaskQueued", 2)]
    assert first["events"][0]["input"] == {"path": "x"}
    assert first["events"][0]["cause"] == {"partition": 0, "offset": 1, "index": None, "command_id": None}
    assert (first["next"], first["more"]) == (2, True)
    rest = server.get("tasks/etl%2F1/events?after=2")
    assert rest["events"][-1]["result"] == [1]
    assert (rest["next"], rest["more"]) == (5, False)


def test_a_value_that_is_no_json_is_shown_as_text(server: Server) -> None:
    tell(server.log, Story("etl/1").running(input=b"{nonsense \xff"))
    tell(server.log, Story("etl/2").running(input=b"[" * 10_000 + b"]" * 10_000))
    tell(server.log, Story("etl/3").running(input=b'"\\ud800"'))
    shown = [server.get(f"tasks/etl%2F{i}/events?limit=1")["events"][0]["input"] for i in (1, 2, 3)]
    assert shown[0] == "{nonsense \ufffd"
    assert shown[1].startswith("[[[")
    assert len(shown[2].encode("utf-8", "surrogatepass")) == 3


def test_numbers_that_json_lacks_are_null(server: Server) -> None:
    append(server.log, "worker-metrics", "w1", metrics(cpu_percent=float("nan"), load=float("inf")))
    (worker,) = server.get("workers")["workers"]
    assert (worker["cpu_percent"], worker["load"]) == (None, None)


def test_attempts(server: Server) -> None:
    story = Story("etl/1").running()
    story.then(events.AttemptFailed, usage=Usage(exit_code=3, cpu_seconds=float("nan")))
    story.then(events.RetryScheduled)
    story.running(epoch=2, attempt=2)
    tell(server.log, story)
    first, second = server.get("tasks/etl%2F1/attempts")["attempts"]
    assert (first["number"], first["outcome"], first["error"]["type"]) == (1, "FAILED", "app.Broken")
    assert (first["epochs"][0]["usage"]["exit_code"], first["epochs"][0]["usage"]["cpu_seconds"]) == (3, None)
    assert (first["started_at"], first["ended_at"]) == (story.events[3].at, story.events[4].at)
    assert (second["outcome"], second["ended_at"]) == ("RUNNING", None)


def test_log_lines(server: Server) -> None:
    for i in range(5):
        append(server.log, "task-logs", "etl/1", line("etl/1", i, text="\x1b[31mred\u202e"))
    last = server.get("tasks/etl%2F1/logs?n=2")
    assert [n["number"] for n in last["lines"]] == [3, 4]
    assert server.get(f"tasks/etl%2F1/logs?after={last['next']}") == {"lines": [], "next": last["next"], "more": False}
    assert server.get("tasks/etl%2F1/logs?after=-1&limit=2")["more"] is True
    raw = server.ask("GET", "/api/v1/tasks/etl%2F1/logs?n=1").content
    assert raw.isascii()
    assert b"\x1b" not in raw


def test_dead_letters(server: Server) -> None:
    tell(server.log, Story("etl/1").running(input=b"1").failing())
    tell(server.log, Story("etl/2", at=5_000_000).running(input=b"2").failing())
    first = server.get("dead-letters?limit=1&queue=etl")
    assert [(d["task_id"], d["input"], d["state"]) for d in first["dead_letters"]] == [("etl/2", 2, "FAILED")]
    rest = server.get("dead-letters", params={"cursor": first["next"]})
    assert [d["task_id"] for d in rest["dead_letters"]] == ["etl/1"]
    same = server.get("dead-letters", params={"fingerprint": rest["dead_letters"][0]["fingerprint"], "type": "crunch"})
    assert len(same["dead_letters"]) == 2
    assert server.refused("GET", "dead-letters/etl%2F3") == (404, "not_found", None)


def test_workers_queues_and_types(server: Server) -> None:
    some(server.log)
    append(server.log, "worker-metrics", "w1", metrics("w1", at=server.clock.now - 1_500))
    append(server.log, "worker-metrics", "w2", metrics("w2", at=server.clock.now - 31_000))
    append(
        server.log, "config", "type/crunch", ConfigRecord(name="type/crunch", content=b'{"queue":"etl"}', issued_by="w")
    )
    alive = [(w["worker_id"], w["alive"], w["seen_seconds"]) for w in server.get("workers")["workers"]]
    assert alive == [("w1", True, 1.5), ("w2", False, 31.0)]
    assert server.get("queues")["queues"][0] == {
        "queue": "etl",
        "total": 3,
        "states": {"FAILED": 1, "PENDING": 1, "RUNNING": 1},
    }
    assert server.get("types")["types"] == [
        {"name": "crunch", "version": 0, "content": {"queue": "etl"}, "issued_by": "w", "at": 0}
    ]


@pytest.mark.parametrize("path", ["/health", "/api/v1/health"])
def test_health_is_its_status(server: Server, path: str) -> None:
    assert (server.ask("GET", path).status_code, server.ask("GET", path).json()) == (200, server.state)
    server.state = {"ok": False, "problems": ["progress failed"]}
    assert (server.ask("GET", path).status_code, server.ask("GET", path).json()) == (503, server.state)


BAD_QUESTIONS = [
    ("tasks?state=sleeping", "state"),
    ("tasks?limit=0", "limit"),
    ("tasks?limit=1001", "limit"),
    ("tasks?limit=ten", "limit"),
    ("tasks?limit=1e2", "limit"),
    ("tasks?limit=%D9%A3", "limit"),  # a digit, but not one of ours
    ("tasks?label=env", "label"),
    ("tasks?cursor=xyz", "cursor"),
    ("tasks?cursor=W251bGwsbnVsbF0=", "cursor"),  # [null,null]
    ("tasks?cursor=WzFlOTksImEiXQ==", "cursor"),  # [1e99,"a"]
    ("tasks?cursor=WzEsIlx1ZDgwMCJd", "cursor"),  # [1,"\\ud800"]
    ("tasks?cursor=" + "W1tb" * 10_000, "cursor"),
    ("tasks?statee=running", "statee"),
    ("tasks/etl%2F1/events?after=-1", "after"),
    ("tasks/etl%2F1/events?after=99999999999999999999", "after"),
    ("tasks/etl%2F1/logs?n=1001", "n"),
    ("dead-letters?state=FAILED", "state"),
]


@pytest.mark.parametrize(("path", "field"), BAD_QUESTIONS)
def test_a_bad_question_names_its_field(server: Server, path: str, field: str) -> None:
    assert server.refused("GET", path) == (400, "invalid_request", field)


def test_a_missing_task_is_not_found(server: Server) -> None:
    assert server.refused("GET", "tasks/etl%2F1") == (404, "not_found", None)


def test_a_missing_store_is_told_without_details(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    response = server.ask("GET", "/api/v1/tasks")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "infrastructure"
    assert str(server.path) not in response.text
    assert "the view store cannot be read" in caplog.text


# Commands -------------------------------------------------------------------------------------------------------------

CONTROLS = [
    ("tasks/etl%2F1/pause", "PauseTask", {}),
    ("tasks/etl%2F1/resume", "ResumeTask", {}),
    ("tasks/etl%2F1/cancel", "CancelTask", {"reason": "done"}),
    ("tasks/etl%2F1/retry", "RetryTask", {"input": {"path": "y"}}),
    ("dead-letters/etl%2F1/retry", "RetryTask", {"input": None}),
    ("dead-letters/etl%2F1/discard", "DiscardDeadLetter", {"reason": "known"}),
]


@pytest.mark.parametrize(("path", "name", "body"), CONTROLS)
def test_a_control_becomes_its_command(server: Server, path: str, name: str, body: dict[str, Any]) -> None:
    response = server.ask("POST", f"/api/v1/{path}", json=body)
    assert (response.status_code, response.json()) == (200, ACCEPTED)
    assert server.commands == [{**body, "command": name, "task_id": "etl/1"}]


def test_a_submit_is_the_json_command(server: Server) -> None:
    body = {"type": "crunch", "input": {"path": "x"}, "queue": "etl", "run_timeout": "6h", "labels": {"env": "prod"}}
    assert server.ask("POST", "/api/v1/tasks", json=body).status_code == 200
    assert server.ask("POST", "/api/v1/tasks", json=body | {"command": "SubmitTask"}).status_code == 200
    assert server.commands == [body | {"command": "SubmitTask"}] * 2


def test_a_command_without_a_verdict_yet_is_accepted(server: Server) -> None:
    server.answer = ACCEPTED | {"decided": False}
    response = server.ask("POST", "/api/v1/tasks/etl%2F1/pause")
    assert response.status_code == 202
    assert response.json()["decided"] is False


ANSWERS: list[tuple[Mapping[str, Any] | Exception, tuple[int, str, str | None]]] = [
    ({"accepted": False, "reason": "not_found", "field": "task_id"}, (404, "not_found", "task_id")),
    ({"accepted": False, "reason": "the task is COMPLETED", "field": None}, (409, "rejected", None)),
    (CommandRefused("no"), (409, "rejected", None)),
    (InvalidRequest("priority is 11", field="priority"), (400, "invalid_request", "priority")),
    (ValueTooLarge("input is big", field="input"), (413, "value_too_large", "input")),
    (DecodeError("command is 7"), (400, "invalid_request", "body")),
    (NotFound("no task"), (404, "not_found", None)),
    (WaitTimeout("later"), (503, "timeout", None)),
    (Unreachable("no broker"), (503, "unreachable", None)),
    (ConfigurationError("no topics"), (503, "configuration", None)),
]


@pytest.mark.parametrize(("answer", "expected"), ANSWERS, ids=lambda a: str(a)[:40])
def test_a_refusal_is_an_error(
    server: Server, answer: Mapping[str, Any] | Exception, expected: tuple[int, str, str | None]
) -> None:
    server.answer = answer
    assert server.refused("POST", "tasks/etl%2F1/cancel") == expected


BAD_BODIES: list[tuple[bytes, str]] = [
    (b"{", "body"),
    (b"[]", "body"),
    (b"7", "body"),
    (b'{"input": NaN}', "body"),
    (b'{"input": 1, "input": 2}', "body"),
    (b"\xff", "body"),
    (b'{"input":' + b"[" * 100 + b"]" * 100 + b"}", "body"),
    (b'{"input":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "body"),
    (b'{"command": "CancelTask"}', "command"),
    (b'{"task_id": "etl/2"}', "task_id"),
]


@pytest.mark.parametrize(("body", "field"), BAD_BODIES, ids=lambda v: str(v)[:40])
def test_a_bad_body_reaches_no_command(server: Server, body: bytes, field: str) -> None:
    assert server.refused("POST", "tasks/etl%2F1/retry", content=body) == (400, "invalid_request", field)
    assert server.commands == []


def test_a_defect_shows_nothing_of_the_inside(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.answer = RuntimeError("secret path /etc/x")
    response = server.ask("POST", "/api/v1/tasks", json={"type": "crunch"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "defect"
    assert "secret" not in response.text
    assert "Traceback" not in response.text


# The gate -------------------------------------------------------------------------------------------------------------

METHODS = ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE", "QUERY"]


def addresses() -> list[str]:
    """Every route with an id filled in, and some that are none."""
    nothing = Views(Path("none"))
    api = _Api(nothing, lambda c: c, dict, lambda: 0)
    known = {"/api/v1" + route.path.replace("{id}", "etl%2F1") for route in api.routes()} | {"/health"}
    odd = ["/", "/nothing", "/api/v1", "/api/v1/", "/api/v1/tasks/", "//api/v1/tasks", "/api/v1/%74asks",
           "/api/v1/../tasks", "/%2e%2e/health", "/health/", "/api/v2/tasks", "/static/x.js", "*"]  # fmt: skip
    return sorted(known) + odd


def raw(
    app: ASGIApp, method: str, target: str, headers: list[tuple[str, str]], body: list[Message] | None = None
) -> Any:
    """One request exactly as said, without a client that would tidy it; status, headers, body."""
    sent: list[Message] = []
    parts = body if body is not None else [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Message:
        if parts:
            return parts.pop(0)
        await asyncio.sleep(3600)
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": target, "raw_path": target.encode(), "query_string": b"", "root_path": "", "server": ("127.0.0.1", 80),
        "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in headers],
    }  # fmt: skip

    async def asked() -> None:
        await app(scope, receive, send)

    asyncio.run(asked())
    start = sent[0]
    found = {k.decode(): v.decode() for k, v in start["headers"]}
    return start["status"], found, b"".join(m.get("body", b"") for m in sent[1:])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", addresses())
def test_without_the_token_no_address_answers(tmp_path: Path, method: str, target: str) -> None:
    server = Server(tmp_path, access("0.0.0.0", TOKEN))
    for given in ([], [("authorization", "Bearer wrong")]):
        status, headers, body = raw(server.app, method, target, [("host", "127.0.0.1"), *given])
        assert status == 401
        assert headers["www-authenticate"] == "Bearer"
        assert json.loads(body)["error"]["code"] == "unauthorized"
    status, _, _ = raw(server.app, method, target, [("host", "127.0.0.1"), ("authorization", f"Bearer {TOKEN}")])
    assert status != 401


WRONG_TOKENS = [
    [f"Basic {TOKEN}"], [TOKEN], ["Bearer"], ["Bearer "], [f"Bearer {TOKEN}x"], [f"Bearer {TOKEN[:-1]}"],
    ["Bearer t\xf6ken"], [f"Bearer {TOKEN}", f"Bearer {TOKEN}"], [f"Bearer {TOKEN}, Bearer x"],
]  # fmt: skip


@pytest.mark.parametrize("given", WRONG_TOKENS)
def test_only_the_token_itself_opens(tmp_path: Path, given: list[str]) -> None:
    app = Server(tmp_path, access("127.0.0.1", TOKEN)).app
    headers = [("host", "localhost"), *(("authorization", value) for value in given)]
    assert raw(app, "GET", "/health", headers)[0] == 401
    assert raw(app, "GET", f"/health?token={quote(TOKEN)}", [("host", "localhost")])[0] == 401


def test_a_token_may_hold_any_text(tmp_path: Path) -> None:
    app = Server(tmp_path, access("127.0.0.1", "schlüssel")).app
    token = "schlüssel".encode().decode("latin-1")
    assert raw(app, "GET", "/health", [("host", "localhost"), ("authorization", f"bearer {token}")])[0] == 200


HOSTS = [
    # the Host header, the server's names, whether it is served
    ("localhost", [], True),
    ("localhost:8080", [], True),
    ("LOCALHOST", [], True),
    ("127.0.0.1:80", [], True),
    ("[::1]:80", [], True),
    ("10.1.2.3", [], True),  # an address is no name that somebody else could make point here
    ("perdure.example.org", ["perdure.example.org"], True),
    ("Perdure.Example.org:443", ["perdure.example.org"], True),
    ("evil.example.org", [], False),
    ("evil.example.org:8080", ["perdure.example.org"], False),
    ("localhost.evil.example.org", [], False),
    ("127.0.0.1.evil.example.org", [], False),
    ("localhost@evil.example.org", [], False),
    ("evil.example.org@localhost", [], False),
    ("localhost/evil", [], False),
    ("localhost:port", [], False),
    ("[::1", [], False),
    ("", [], False),
    (None, [], False),
]


@pytest.mark.parametrize(("host", "names", "served"), HOSTS)
def test_names_that_are_not_ours_are_refused(tmp_path: Path, host: str | None, names: list[str], served: bool) -> None:
    app = Server(tmp_path, access("127.0.0.1", None, names)).app
    headers = [] if host is None else [("host", host)]
    status, _, body = raw(app, "GET", "/health", headers)
    assert status == (200 if served else 403), body
    if host:
        assert raw(app, "GET", "/health", [("host", "localhost"), ("host", host)])[0] == 403


ORIGINS: list[tuple[dict[str, str], int]] = [
    ({}, 200),
    ({"origin": "http://localhost:8080"}, 200),
    ({"origin": "http://localhost:8080", "sec-fetch-site": "same-origin"}, 200),
    ({"sec-fetch-site": "none"}, 200),
    ({"origin": "http://localhost:9999"}, 403),
    ({"origin": "http://evil.example.org"}, 403),
    ({"origin": "null"}, 403),
    ({"origin": ""}, 403),
    ({"sec-fetch-site": "cross-site"}, 403),
    ({"sec-fetch-site": "same-site"}, 403),
    ({"content-type": "text/plain"}, 415),
    ({"content-type": "application/x-www-form-urlencoded"}, 415),
    ({"content-type": "Application/JSON; charset=utf-8"}, 200),
]


@pytest.mark.parametrize(("headers", "status"), ORIGINS)
def test_pages_of_other_sites_change_nothing(server: Server, headers: dict[str, str], status: int) -> None:
    assert server.ask("POST", "/api/v1/tasks/etl%2F1/cancel", headers=headers).status_code == status
    assert len(server.commands) == (status == 200)
    if status == 403:
        assert server.ask("GET", "/health", headers=headers).status_code == 200  # reading is harmless: no CORS


def test_no_answer_may_be_framed_stored_or_guessed_at(server: Server) -> None:
    for response in (server.ask("GET", "/health"), server.ask("GET", "/nothing"), server.ask("POST", "/health")):
        assert response.headers["content-type"] == "application/json"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert not any(name.startswith("access-control") for name in response.headers)


def test_other_methods_are_told_what_there_is(server: Server) -> None:
    response = server.ask("DELETE", "/api/v1/tasks/etl%2F1")
    assert response.status_code == 405
    assert "GET" in response.headers["allow"]


def test_a_body_is_limited_whatever_it_says_of_itself(server: Server) -> None:
    big = b'{"input": "' + b"x" * BODY_MAX + b'"}'
    assert server.refused("POST", "tasks", content=big) == (413, "value_too_large", "body")
    parts: list[Message] = [{"type": "http.request", "body": b"x" * 100_000, "more_body": True} for _ in range(6)]
    status, headers, _ = raw(server.app, "POST", "/api/v1/tasks", [("host", "localhost")], parts)
    assert (status, headers["connection"]) == (413, "close")
    assert len(parts) == 1  # it stopped reading
    odd = [("host", "localhost"), ("content-length", "-5")]
    assert raw(server.app, "POST", "/api/v1/tasks", odd)[0] == 413
    assert server.commands == []


def test_a_body_in_parts_arrives_whole(server: Server) -> None:
    parts: list[Message] = [
        {"type": "http.request", "body": b'{"type":', "more_body": True},
        {"type": "http.request", "body": b'"crunch"}', "more_body": False},
    ]
    assert raw(server.app, "POST", "/api/v1/tasks", [("host", "localhost")], parts)[0] == 200
    assert server.commands == [{"type": "crunch", "command": "SubmitTask"}]


def test_a_body_that_never_ends_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "BODY_SECONDS", 0.01)
    waiting: list[Message] = [{"type": "http.request", "body": b"{", "more_body": True}]
    assert raw(server.app, "POST", "/api/v1/tasks", [("host", "localhost")], waiting)[0] == 408
    gone: list[Message] = [{"type": "http.disconnect"}]
    assert raw(server.app, "POST", "/api/v1/tasks", [("host", "localhost")], gone)[0] == 400
    assert server.commands == []


BINDINGS: list[tuple[str, bool]] = [
    ("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True), ("LocalHost", True),
    ("0.0.0.0", False), ("::", False), ("", False), ("10.0.0.1", False), ("example.org", False),
    ("::ffff:10.0.0.1", False),
]  # fmt: skip


@pytest.mark.parametrize(("host", "loopback"), BINDINGS)
def test_nothing_listens_beyond_loopback_without_a_token(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
    refuse: Callable[[], Any] = lambda: access(host, None)  # noqa: E731
    if loopback:
        refuse()
    else:
        with pytest.raises(ConfigurationError, match="token"):
            refuse()
        with pytest.raises(ConfigurationError, match="token"):
            access(host, "")
    access(host, TOKEN)


def test_the_token_shows_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    rules = access("0.0.0.0", TOKEN)
    server = Server(tmp_path, rules)
    server.answer = RuntimeError("boom")
    bearer = {"authorization": f"Bearer {TOKEN}"}
    told = [
        server.ask(method, path, headers=headers).text
        for method, path in [("GET", "/health"), ("GET", "/x"), ("POST", "/api/v1/tasks")]
        for headers in ({}, bearer)
    ]
    assert TOKEN not in "".join(told) + caplog.text + repr(rules)
