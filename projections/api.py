"""The HTTP JSON API, under `/api/v1`. Times are ms since 1970; every error is `{"error": {code, message, field}}`.

A task id is **one** path segment, percent-encoded (`etl/2026-11` is `/api/v1/tasks/etl%2F2026-11`): ids hold slashes,
and only so is `/tasks/a/events` never taken for a task of that name. Paths are therefore matched as they were sent.

| GET | answers |
|---|---|
| `tasks?state=&type=&queue=&label=name=value&limit=&cursor=` | tasks, newest first; `next` is the next page's cursor |
| `tasks/{id}` | one task, with the names of `status --json` |
| `tasks/{id}/events?after=&limit=` | its events behind a `seq` |
| `tasks/{id}/input`, `tasks/{id}/result` | the whole value, also one that is too large for a record, as a download |
| `tasks/{id}/attempts` | what ran where and how it ended |
| `tasks/{id}/logs?n=` or `?after=&limit=` | its last lines, or those behind a `position` |
| `dead-letters?type=&queue=&fingerprint=&limit=&cursor=`, `dead-letters/{id}` | dead letters, newest first |
| `workers`, `queues`, `types` | who works, how many tasks of each state wait where, what can be submitted |
| `health` (also `/health`) | 200, or 503 with the problems |

| POST | does |
|---|---|
| `tasks` | submits: the body is a JSON command, `command` may be left out |
| `tasks/{id}/pause`, `resume`, `cancel` (`reason`), `retry` (`input`) | controls a task |
| `dead-letters/{id}/retry` (`input`), `discard` (`reason`) | sends a dead letter back, or takes it off the list |

A command is answered with its verdict: 200, or 202 with `"decided": false` if the engine has not spoken in time; 404
and 409 carry its refusal.

A value that is too large for a record shows as null, and beside it `result_ref` (`input_ref`) says its size in bytes,
its SHA-256 and how its JSON text begins.
"""

from __future__ import annotations

import base64
import json
import logging
import sqlite3
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from perdure.projections import history, render
from perdure.projections.auth import HEADERS, Access, Answer, Gate, refusal
from perdure.projections.download import Download
from perdure.projections.progress import STATES
from perdure.projections.views import PAGE_MAX, Place, Views
from perdure.schemas import limits
from perdure.schemas.errors import (
    Busy,
    CommandRefused,
    DecodeError,
    InfrastructureError,
    InvalidRequest,
    NotFound,
    PerdureError,
    RetryLater,
    ValueLost,
    ValueTooLarge,
)
from perdure.schemas.json_commands import strict_loads
from perdure.schemas.public import TaskProgress
from perdure.schemas.references import is_reference
from perdure.streams.admission import admit

LOG = logging.getLogger("perdure.server")

Clock = Callable[[], int]
"""Returns the present time in ms."""
Commands = Callable[[dict[str, Any]], Mapping[str, Any]]
"""Carries a JSON command out and returns the engine's answer: `accepted`, `reason`, `field`, `command_id`, `task_id`,
and `decided`, false if there is no verdict yet. Blocks for some seconds at most; raises `PerdureError`."""
Fetch = Callable[[str, bytes], bytes]
"""(task id, recorded value) -> its JSON text, fetched if the record only refers to it. Blocks; raises
`PerdureError`."""
Health = Callable[[], Mapping[str, Any]]
"""Says how the server is; `ok` decides between 200 and 503. Must not block."""

COMMANDS_AT_ONCE = 64
"""Commands that wait for the engine at the same time; queries have threads of their own and never wait behind them."""
DOWNLOADS_AT_ONCE = 4
"""Large values that are on their way at the same time: each may be 64 MiB, and is in memory as a whole."""

_STATUS: dict[type[PerdureError], int] = {
    NotFound: 404,
    ValueLost: 410,
    ValueTooLarge: 413,
    CommandRefused: 409,
    InvalidRequest: 400,
    RetryLater: 503,
    InfrastructureError: 503,
}


def create_app(views: Views, commands: Commands, fetch: Fetch, health: Health, rules: Access, clock: Clock) -> ASGIApp:
    """The API behind its gate."""
    api = _Api(views, commands, fetch, health, clock)
    app = Starlette(
        routes=[Route("/health", api.health), Mount("/api/v1", routes=api.routes())],
        exception_handlers={
            HTTPException: _no_route,
            PerdureError: _failed,
            sqlite3.Error: _no_store,
            Exception: _defect,
        },
    )
    app.router.redirect_slashes = False
    return Gate(_AsSent(app), rules)


class _AsSent:
    """Has paths matched as they were sent, so that an encoded slash is no slash."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, "path": scope["raw_path"].decode("latin-1")}, receive, send)


class _Api:
    """What each route does. Queries block on the disk, so they are plain functions: the server runs them in threads."""

    def __init__(self, views: Views, commands: Commands, fetch: Fetch, health: Health, clock: Clock) -> None:
        self._views, self._commands, self._fetch, self._health, self._clock = views, commands, fetch, health, clock
        self._places, self._downloads = CapacityLimiter(COMMANDS_AT_ONCE), CapacityLimiter(DOWNLOADS_AT_ONCE)

    def routes(self) -> list[Route]:
        """All routes but `/health`."""
        control = [("pause", "PauseTask"), ("resume", "ResumeTask"), ("cancel", "CancelTask"), ("retry", "RetryTask")]
        letters = [("retry", "RetryTask"), ("discard", "DiscardDeadLetter")]
        return [
            Route("/health", self.health),
            Route("/tasks", self.tasks, methods=["GET"]),
            Route("/tasks", self._command("SubmitTask"), methods=["POST"]),
            Route("/tasks/{id}", self.task),
            Route("/tasks/{id}/events", self.events),
            Route("/tasks/{id}/attempts", self.attempts),
            Route("/tasks/{id}/input", self._value("input")),
            Route("/tasks/{id}/result", self._value("result")),
            Route("/tasks/{id}/logs", self.logs),
            Route("/dead-letters", self.dead_letters),
            Route("/dead-letters/{id}", self.dead_letter),
            Route("/workers", self.workers),
            Route("/queues", self.queues),
            Route("/types", self.types),
            *(Route(f"/tasks/{{id}}/{verb}", self._command(name), methods=["POST"]) for verb, name in control),
            *(Route(f"/dead-letters/{{id}}/{verb}", self._command(name), methods=["POST"]) for verb, name in letters),
        ]

    async def health(self, _request: Request) -> Answer:
        state = self._health()
        return Answer(state, 200 if state["ok"] else 503)

    def tasks(self, request: Request) -> Answer:
        ask = _Query(request, "state", "type", "queue", "label", "limit", "cursor")
        page = self._views.tasks(
            states=ask.states(), type=ask.text("type"), queue=ask.text("queue"), labels=ask.labels(),
            limit=ask.number("limit", 100, 1, PAGE_MAX), after=ask.cursor(),
        )  # fmt: skip
        now = self._clock()
        return Answer({"tasks": [render.status(p, now) for p in page.rows], "next": _cursor(page.next)})

    def task(self, request: Request) -> Answer:
        return Answer(render.status(self._known(_task_id(request)), self._clock()))

    def events(self, request: Request) -> Answer:
        ask = _Query(request, "after", "limit")
        task_id = _task_id(request)
        part = self._views.events(task_id, after=ask.number("after", 0), limit=ask.limit())
        if not part.rows:
            self._known(task_id)
        return Answer({"events": [render.event(e) for e in part.rows], "next": part.last, "more": part.more})

    def attempts(self, request: Request) -> Answer:
        task_id = _task_id(request)
        found = history.attempts(self._views.every_event(task_id, history.KINDS))
        if not found:
            self._known(task_id)
        return Answer({"attempts": [render.attempt(a) for a in found]})

    def logs(self, request: Request) -> Answer:
        ask = _Query(request, "n", "after", "limit")
        task_id = _task_id(request)
        if ask.text("after") is None:
            part = self._views.logs(task_id, last=ask.number("n", 100, 1, PAGE_MAX))
        else:
            part = self._views.logs(task_id, after=ask.number("after", -1, -1), limit=ask.limit())
        if not part.rows:
            self._known(task_id)
        return Answer({"lines": [render.line(n) for n in part.rows], "next": part.last, "more": part.more})

    def dead_letters(self, request: Request) -> Answer:
        ask = _Query(request, "type", "queue", "fingerprint", "limit", "cursor")
        page = self._views.dead_letters(
            type=ask.text("type"), queue=ask.text("queue"), fingerprint=ask.text("fingerprint"), limit=ask.limit(),
            after=ask.cursor(),
        )  # fmt: skip
        return Answer({"dead_letters": [render.dead_letter(d) for d in page.rows], "next": _cursor(page.next)})

    def dead_letter(self, request: Request) -> Answer:
        task_id = _task_id(request)
        letter = self._views.dead_letter(task_id)
        if letter is None:
            raise NotFound(f"task {task_id!r} is no dead letter")
        return Answer(render.dead_letter(letter))

    def workers(self, _request: Request) -> Answer:
        now = self._clock()
        return Answer({"workers": [render.worker(w, now) for w in self._views.workers()]})

    def queues(self, _request: Request) -> Answer:
        found = sorted(self._views.queues().items())
        return Answer({"queues": [{"queue": q, "total": sum(n.values()), "states": n} for q, n in found]})

    def types(self, _request: Request) -> Answer:
        return Answer({"types": [render.config(c) for c in self._views.config("type")]})

    def _value(self, name: str) -> Callable[[Request], Any]:
        def recorded(task_id: str) -> bytes:
            self._known(task_id)
            found = history.recorded(self._views.every_event(task_id, history.VALUES), name)
            if found is None:
                raise NotFound(f"no {name} of task {task_id!r} is recorded (yet)")
            return found

        async def handle(request: Request) -> Response:
            task_id = _task_id(request)
            found = await to_thread.run_sync(recorded, task_id)
            places = self._downloads if is_reference(found) else None
            return Download(lambda: self._fetch(task_id, found), f"{name}.json", HEADERS, places)

        return handle

    def _known(self, task_id: str) -> TaskProgress:
        """The task's state. Raises `NotFound`."""
        progress = self._views.status(task_id)
        if progress is None:
            raise NotFound(f"no task {task_id!r} is known here (yet)")
        return progress

    def _command(self, name: str) -> Callable[[Request], Any]:
        async def handle(request: Request) -> Answer:
            task_id = _task_id(request) if request.path_params else None
            try:
                command = _command_body(await request.body(), name, task_id)
                if name == "SubmitTask":
                    admit(self._health()["lag"])
                return _verdict(await to_thread.run_sync(self._commands, command, limiter=self._places))
            except DecodeError as error:
                raise InvalidRequest(f"the body is no command: {error}", field="body") from error

        return handle


class _Query:
    """The query string, each of whose names is known. Methods raise `InvalidRequest` naming the field."""

    def __init__(self, request: Request, *known: str) -> None:
        self._given = request.query_params
        for name in self._given:
            if name not in known:
                raise InvalidRequest(f"{name!r:.100} is no parameter here; there are {', '.join(known)}", field=name)

    def text(self, name: str) -> str | None:
        """The value, or None."""
        return self._given.get(name)

    def number(self, name: str, default: int, least: int = 0, most: int = 2**63 - 1) -> int:
        """A whole number in its bounds."""
        text = self._given.get(name, str(default))
        sign, digits = text[:1] == "-", text.removeprefix("-")
        if not (digits.isascii() and digits.isdecimal() and len(digits) < 20):
            raise InvalidRequest(f"{name} is {text!r:.40}, which is no whole number", field=name)
        value = -int(digits) if sign else int(digits)
        if not least <= value <= most:
            raise InvalidRequest(f"{name} is {value}; it has to be {least} to {most}", field=name)
        return value

    def limit(self) -> int:
        """Rows of the page."""
        return self.number("limit", 100, 1, PAGE_MAX)

    def states(self) -> list[str]:
        """States in any case, repeated or separated by commas."""
        given = [s.strip().upper() for text in self._given.getlist("state") for s in text.split(",") if s.strip()]
        found = ["TIMED_OUT" if s == "TIMEOUT" else s for s in given]
        for state in found:
            if state not in STATES:
                raise InvalidRequest(f"{state!r:.40} is no state; there are {', '.join(STATES)}", field="state")
        return list(dict.fromkeys(found))

    def labels(self) -> list[tuple[str, str]]:
        """Labels as name=value; the parameter may be repeated."""
        pairs = [text.partition("=") for text in self._given.getlist("label")]
        if any(not eq for _, eq, _ in pairs):
            raise InvalidRequest("a label is asked for as label=name=value", field="label")
        if len(pairs) > limits.LABELS_MAX:
            raise InvalidRequest(f"{len(pairs):,} labels; no task has more than {limits.LABELS_MAX}", field="label")
        return [(name, value) for name, _, value in pairs]

    def cursor(self) -> Place | None:
        """Where the page before this one ended."""
        text = self._given.get("cursor")
        if text is None:
            return None
        try:
            at, task_id = json.loads(base64.urlsafe_b64decode(text.encode()))
            if type(at) is int and -(2**63) <= at < 2**63 and type(task_id) is str and task_id.encode():
                return at, task_id
        except (ValueError, TypeError, RecursionError):
            pass  # told below, as for every other text that is no cursor
        raise InvalidRequest("cursor is none that this server gave: take `next` of the page before", field="cursor")


def _cursor(place: Place | None) -> str | None:
    return None if place is None else base64.urlsafe_b64encode(render.to_text(place)).decode()


def _task_id(request: Request) -> str:
    try:
        return unquote(request.path_params["id"], errors="strict")
    except UnicodeDecodeError as error:
        raise InvalidRequest("the task id in the path is no percent-encoded UTF-8", field="task_id") from error


def _command_body(body: bytes, name: str, task_id: str | None) -> dict[str, Any]:
    """The JSON command that a request stands for. Raises `DecodeError` or `InvalidRequest`."""
    content = strict_loads(body) if body.strip() else {}
    if not isinstance(content, dict):
        raise InvalidRequest("the body has to be a JSON object", field="body")
    fixed = {"command": name} if task_id is None else {"command": name, "task_id": task_id}
    for key, value in fixed.items():
        if content.get(key, value) != value:
            raise InvalidRequest(
                f"{key} is {content[key]!r:.100} in the body, but this address is for {value}", field=key
            )
    return content | fixed


def _verdict(reply: Mapping[str, Any]) -> Answer:
    if reply["accepted"]:
        return Answer(dict(reply), 200 if reply.get("decided", True) else 202)
    if reply["reason"].startswith("not_found"):
        return refusal(404, "not_found", "no such task", name=reply.get("field"))
    return refusal(409, "rejected", reply["reason"], name=reply.get("field"))


# Errors: what an exception says is for the one who asked only if it is ours -------------------------------------------


async def _failed(_request: Request, error: Exception) -> Answer:
    code = error.code if isinstance(error, PerdureError) else "error"
    status = next((s for kind, s in _STATUS.items() if isinstance(error, kind) or kind.code == code), 500)
    later = {"Retry_After": str(error.retry_after)} if isinstance(error, Busy) else {}
    return refusal(status, code, str(error), name=getattr(error, "field", None), **later)


async def _no_route(_request: Request, error: Exception) -> Answer:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return refusal(405, "method", f"this address takes {allowed}", allow=allowed)
    message = "no such address; a task id is one percent-encoded path segment: etl%2F2026-11"
    return (
        refusal(404, "not_found", message)
        if error.status_code == 404
        else refusal(error.status_code, "http", error.detail)
    )


async def _no_store(_request: Request, error: Exception) -> Answer:
    LOG.error("the view store cannot be read: %s", error)
    return refusal(503, "infrastructure", "the server's view store cannot be read; its log says why")


async def _defect(_request: Request, _error: Exception) -> Answer:
    return refusal(500, "defect", "the server failed to answer; its log says why")
