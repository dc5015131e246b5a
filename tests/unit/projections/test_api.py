"""The HTTP API: what each address answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import pytest

from perdure.projections import history
from perdure.schemas import events, limits
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
from perdure.schemas.json_commands import InvalidCommand
from perdure.schemas.public import ConfigRecord, TaskProgress
from tests.unit.projections.filling import filled, line, metrics, some, task, tell
from tests.unit.projections.serving import ACCEPTED, Server
from tests.unit.projections.story import Story, append

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


def test_a_large_value_is_described_and_can_be_downloaded(server: Server) -> None:
    text = b'"' + b"v" * limits.VALUE_MAX + b'"'
    carried = server.large.carried("etl/1", text)
    story = Story("etl/1").running(input=carried)
    story.then(events.TaskCompleted, result=carried)
    tell(server.log, story)
    shown = server.get("tasks/etl%2F1")
    assert (shown["result"], shown["result_ref"]["size"]) == (None, len(text))
    first = server.get("tasks/etl%2F1/events?limit=1")["events"][0]
    assert (first["input"], first["input_ref"]) == (None, shown["result_ref"])
    assert server.fetched == [], "what is shown needs no store"
    for name in ("input", "result"):
        answer = server.ask("GET", f"/api/v1/tasks/etl%2F1/{name}")
        assert (answer.status_code, answer.content) == (200, text)
        assert answer.headers["content-disposition"] == f'attachment; filename="{name}.json"'
        assert answer.headers["content-type"] == "application/json"


def test_a_small_value_can_be_downloaded_too_and_the_newest_one_counts(server: Server) -> None:
    story = Story("etl/1").running(input=b"[1]")
    story.failing()
    story.then(events.TaskRedriven, input=b"[2]")
    tell(server.log, story)
    assert server.get("tasks/etl%2F1/input") == [2]
    assert server.refused("GET", "tasks/etl%2F1/result") == (404, "not_found", None)
    assert server.refused("GET", "tasks/etl%2F2/result") == (404, "not_found", None)
    later = Story("etl/1", at=story.events[-1].at + 1)
    later.then(events.TaskSubmitted, input=b"[3]")
    assert history.recorded([*story.events, *later.events], "input") == b"[3]"


def test_a_result_of_an_earlier_task_of_the_same_id_is_not_this_ones(server: Server) -> None:
    story = Story("etl/1").running(input=b"1")
    story.then(events.TaskCompleted, result=b"2")
    again = Story("etl/1").running(input=b"3")
    assert history.recorded([*story.events, *again.events], "result") is None


def test_a_large_value_that_is_lost_is_told(server: Server) -> None:
    carried = server.large.carried("etl/2", b'"' + b"v" * limits.VALUE_MAX + b'"')
    tell(server.log, Story("etl/1").running(input=carried))
    assert server.refused("GET", "tasks/etl%2F1/input") == (410, "value_lost", None)


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
    task(server.log, "etl/1")
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


@pytest.mark.parametrize(
    ("reader", "topic", "most"),
    [("engine", "task-commands", 100_000), ("progress", "task-events", 100_000), ("views", "task-logs", 10**9)],
)
def test_new_tasks_are_turned_away_while_too_much_waits_already(
    server: Server, reader: str, topic: str, most: int
) -> None:
    server.state["lag"] = {"views": {}, reader: {topic: most}}
    assert server.ask("POST", "/api/v1/tasks", json={"type": "crunch"}).status_code == 200
    if topic == "task-logs":
        return
    server.state["lag"] = {"views": {}, reader: {topic: most + 1}}
    response = server.ask("POST", "/api/v1/tasks", json={"type": "crunch"})
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert response.json()["error"]["code"] == "busy"
    assert server.ask("POST", "/api/v1/tasks/etl%2F1/cancel").status_code == 200  # what makes less work is taken


BAD_QUESTIONS = [
    ("tasks?state=sleeping", "state"),
    ("tasks?limit=0", "limit"),
    ("tasks?limit=1001", "limit"),
    ("tasks?limit=ten", "limit"),
    ("tasks?limit=1e2", "limit"),
    ("tasks?limit=%D9%A3", "limit"),  # a digit, but not one of ours
    ("tasks?label=env", "label"),
    ("tasks?" + "&".join(["label=a=b"] * 65), "label"),
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


@pytest.mark.parametrize("path", ["", "/events", "/attempts", "/logs", "/logs?after=3"])
def test_an_unknown_task_is_not_found(server: Server, path: str) -> None:
    assert server.refused("GET", f"tasks/etl%2F1{path}") == (404, "not_found", None)
    story = Story("etl/1")
    story.then(events.TaskSubmitted)
    tell(server.log, story)
    assert server.get(f"tasks/etl%2F1{path}") is not None


def test_the_same_state_over_and_over_is_one(server: Server) -> None:
    some(server.log)
    assert len(server.get("tasks?state=" + ",".join(["failed"] * 4_000))["tasks"]) == 1


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "DELETE"])
def test_other_methods_get_no_content_and_no_leave_for_other_origins(server: Server, method: str) -> None:
    some(server.log)
    filled(server.log, server.path)
    response = server.ask(
        method, "/api/v1/tasks", headers={"origin": "https://evil.example", "access-control-request-method": "POST"}
    )
    assert response.status_code == (200 if method == "HEAD" else 405 if method == "OPTIONS" else 403)
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_paging_is_stable_while_tasks_come(server: Server) -> None:
    for i in range(20):
        task(server.log, f"etl/{i:02d}", at=1_000 + i // 4)  # several at the same moment
    seen: list[str] = []
    cursor: str | None = None
    for page in range(10):
        found = server.get("tasks", params={"limit": 3} | ({"cursor": cursor} if cursor else {}))
        seen += [t["task_id"] for t in found["tasks"]]
        task(server.log, f"etl/new{page}", at=5_000 + page)
        cursor = found["next"]
        if cursor is None:
            break
    assert seen == [f"etl/{i:02d}" for i in range(19, -1, -1)]


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


NO_TASK = "not_found: no task has this id"  # the engine's words
TOO_LARGE = InvalidCommand(
    ValueTooLarge("the command is big"), command="SubmitTask", command_id="", task_id="", reply_to=None
)
ANSWERS: list[tuple[Mapping[str, Any] | Exception, tuple[int, str, str | None]]] = [
    ({"accepted": False, "reason": "not_found", "field": "task_id"}, (404, "not_found", "task_id")),
    ({"accepted": False, "reason": NO_TASK, "field": "task_id"}, (404, "not_found", "task_id")),
    ({"accepted": False, "reason": "the task is COMPLETED", "field": None}, (409, "rejected", None)),
    (CommandRefused("no"), (409, "rejected", None)),
    (InvalidRequest("priority is 11", field="priority"), (400, "invalid_request", "priority")),
    (ValueTooLarge("input is big", field="input"), (413, "value_too_large", "input")),
    (TOO_LARGE, (413, "value_too_large", None)),
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
