"""The gate in front of the HTTP API: who gets no answer."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from starlette.types import ASGIApp, Message

from perdure.projections import auth
from perdure.projections.api import _Api
from perdure.projections.auth import BODY_MAX, access, is_loopback
from perdure.projections.views import Views
from perdure.schemas.errors import (
    ConfigurationError,
)
from tests.unit.projections.serving import Server

TOKEN = "correct horse battery staple"

METHODS = ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE", "QUERY"]


def addresses() -> list[str]:
    """Every route with an id filled in, and some that are none."""
    nothing = Views(Path("none"))
    api = _Api(nothing, lambda c: c, lambda _, carried: carried, dict, lambda: 0)
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
