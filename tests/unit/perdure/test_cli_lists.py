"""The commands that ask the server: what they ask, what they print, and how its refusals end."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner

from perdure import cli


class Api(http.server.BaseHTTPRequestHandler):
    """A server by script: answers everything with `code` and `body`, and notes what was asked."""

    code: ClassVar[int]
    body: ClassVar[bytes]
    asked: ClassVar[list[tuple[str, str | None]]]

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Authorization")))
        self.send_response(self.code)
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Api]]:
    Api.code, Api.body, Api.asked = 200, b"{}", []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PERDURE_API", f"http://127.0.0.1:{server.server_address[1]}/")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        try:
            yield Api
        finally:
            server.shutdown()
            thread.join()


def run(*args: str) -> Any:
    return CliRunner().invoke(cli.main, args)


ASKED: list[tuple[list[str], str]] = [
    (["list"], "/api/v1/tasks?limit=50"),
    (
        ["list", "--state", "failed", "--type", "t&u", "--queue", "etl", "--limit", "5", "--cursor", "a=b"],
        "/api/v1/tasks?state=failed&type=t%26u&queue=etl&limit=5&cursor=a%3Db",
    ),
    (["workers"], "/api/v1/workers"),
    (["queues"], "/api/v1/queues"),
    (["dlq", "list", "--type", "t"], "/api/v1/dead-letters?type=t&limit=50"),
    (["dlq", "show", "etl/2026 11/ü"], "/api/v1/dead-letters/etl%2F2026%2011%2F%C3%BC"),
]


@pytest.mark.parametrize(("args", "asked"), ASKED, ids=[" ".join(row[0]) for row in ASKED])
def test_what_is_asked(api: type[Api], args: list[str], asked: str) -> None:
    assert run(*args, "--json").exit_code == 0
    path, _, query = api.asked[0][0].partition("?")
    wanted_path, _, wanted_query = asked.partition("?")
    assert path == wanted_path
    assert sorted(query.split("&")) == sorted(wanted_query.split("&"))


def test_the_token_goes_with_it(api: type[Api], monkeypatch: pytest.MonkeyPatch) -> None:
    run("queues")
    monkeypatch.setenv("PERDURE_API_TOKEN", "hush")
    run("queues")
    assert [token for _, token in api.asked] == [None, "Bearer hush"]


def test_a_page_for_people_and_for_programs(api: type[Api]) -> None:
    task = {
        "task_id": "etl/1", "type": "t", "state": "RUNNING", "progress": 0.25, "current_step": "a\x1b[2Jb",
        "attempt": 1, "submitted_at": 1_800_000_000_000,
    }  # fmt: skip
    api.body = json.dumps({"tasks": [task, task | {"task_id": "etl/2", "progress": None}], "next": "abc"}).encode()
    assert json.loads(run("list", "--json").stdout) == json.loads(api.body)
    header, first, second, more = run("list").stdout.splitlines()
    assert header.split()[:3] == ["task_id", "type", "state"]
    assert first.split()[:5] == ["etl/1", "t", "RUNNING", "25.0", "%"]
    assert second.split()[:4] == ["etl/2", "t", "RUNNING", "-"]
    assert more == "more: --cursor abc"
    assert "\x1b" not in first


def test_no_rows(api: type[Api]) -> None:
    api.body = b'{"dead_letters": [], "next": null}'
    assert run("dlq", "list").stdout.split()[:2] == ["task_id", "type"]


def test_a_dead_letter(api: type[Api]) -> None:
    letter = {"task_id": "etl/1", "state": "FAILED", "error": {"type": "E", "message": "m"}, "input": {"a": 1}}
    api.body = json.dumps(letter).encode()
    lines = run("dlq", "show", "etl/1").stdout.splitlines()
    assert lines == ["task_id  etl/1", "state    FAILED", "error    E: m", 'input    {"a": 1}']
    letter["error"] = {"type": "E", "message": "m", "traceback": "Traceback:\n  at\x1b[2J\n"}
    api.body = json.dumps(letter).encode()
    assert run("dlq", "show", "etl/1").stdout.splitlines() == [*lines, "Traceback:", "  at\\x1b[2J"]


def test_numbers_are_for_people(api: type[Api]) -> None:
    api.body = json.dumps({"queues": [{"queue": "etl", "total": 3, "states": {"FAILED": 1, "PENDING": 2}}]}).encode()
    assert "FAILED 1, PENDING 2" in run("queues").stdout
    api.body = json.dumps({"workers": [{"worker_id": "w", "cpu_percent": 0.1995012468827932}]}).encode()
    assert run("workers").stdout.split()[-1] == "0.2"


def refusal(code: str) -> bytes:
    return json.dumps({"error": {"code": code, "message": "so it is", "field": "state"}}).encode()


REFUSALS: list[tuple[int, bytes, int, str, str]] = [
    (404, refusal("not_found"), 3, "not_found", "so it is"),
    (400, refusal("invalid_request"), 2, "invalid_request", "so it is"),
    (401, refusal("unauthorized"), 1, "unauthorized", "PERDURE_API_TOKEN"),
    (503, refusal("infrastructure"), 4, "unreachable", "so it is"),
    (404, b"<html>nginx", 4, "unreachable", "no Perdure server"),
    (302, b"", 4, "unreachable", "no Perdure server"),
    (200, b"<html>hello", 4, "unreachable", "perdure server"),
    (200, b"[]", 4, "unreachable", "no Perdure server"),
]


@pytest.mark.parametrize(("code", "body", "exit_code", "told", "words"), REFUSALS)
def test_how_a_refusal_ends(api: type[Api], code: int, body: bytes, exit_code: int, told: str, words: str) -> None:
    api.code, api.body = code, body
    result = run("list", "--json")
    assert result.exit_code == exit_code
    error = json.loads(result.stdout)["error"]
    assert error["code"] == told
    assert words in error["message"]
    assert len(api.asked) == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://127.0.0.1:1"])
def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("workers", "--api", url)
    assert (result.exit_code, result.stdout) == (4, "")
    assert "perdure server" in result.stderr


def test_an_address_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("workers", "--api", "file:///etc/passwd")
    assert result.exit_code == 1
    assert "http://" in result.stderr
