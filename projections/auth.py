"""Who may talk to the HTTP API: the gate in front of every route, known or not.

Without a token only loopback is served, and a browser is the way in: a page of another site may try to send commands
(so the origin of whatever changes state has to be our own) or have its name resolve to loopback (so the name that was
asked for has to be ours). With a token, every request has to carry it.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perdure.projections.render import to_text
from perdure.schemas import limits
from perdure.schemas.errors import ConfigurationError

BODY_MAX = limits.COMMAND_MAX
BODY_SECONDS = 10.0
"""A body that takes longer to arrive is refused: nobody holds connections open for nothing."""
_SAFE = ("GET", "HEAD", "OPTIONS")
HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
}


@dataclass(frozen=True)
class Access:
    """What a request has to bring."""

    token: str | None = field(default=None, repr=False)
    """Asked for as `Authorization: Bearer <token>`; None: not asked for."""
    names: frozenset[str] = frozenset()
    """Host names served beside localhost. Addresses always are: they are no names that could be made to point here."""


class Answer(Response):
    """A JSON answer."""

    media_type = "application/json"

    def __init__(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(to_text(content), status, headers=HEADERS | (headers or {}))


def refusal(status: int, code: str, message: str, *, name: str | None = None, **headers: str) -> Answer:
    """An error in the one form that all errors have; `name` is the field that is wrong."""
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return Answer({"error": {"code": code, "message": message, "field": name}}, status, named)


def access(host: str, token: str | None, names: Iterable[str] = ()) -> Access:
    """The rules for a server that listens on `host`. Raises `ConfigurationError` beyond loopback without a token."""
    if not token and not is_loopback(host):
        raise ConfigurationError(
            f"the HTTP API may not listen on {host}, beyond loopback, without a token: set one, or listen on 127.0.0.1"
        )
    return Access(token or None, frozenset(n.lower() for n in names) | ({host.lower()} if host else frozenset()))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; names other than localhost count as not."""
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


class Gate:
    """Lets through what keeps the rules, with its body read to the end."""

    def __init__(self, app: ASGIApp, rules: Access) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse one request."""
        if scope["type"] != "http":
            raise ValueError(f"this server speaks HTTP only, not {scope['type']}")
        refused = self._refused(scope["method"], Headers(scope=scope))
        if refused is None and scope["method"] not in _SAFE:
            body = await _body(receive)
            if isinstance(body, bytes):
                receive = _with_body(body, receive)
            else:
                refused = body
        await (self._app if refused is None else refused)(scope, receive, send)

    def _refused(self, method: str, headers: Headers) -> Response | None:
        hosts, tokens = headers.getlist("host"), headers.getlist("authorization")
        if len(hosts) != 1 or not self._ours(hosts[0]):
            return refusal(403, "host", "this server is not known by the name that was asked for; use its address")
        if self._rules.token is not None and not self._token_holds(tokens):
            message = "this server asks for its token: send it as 'Authorization: Bearer <token>'"
            return refusal(401, "unauthorized", message, www_authenticate="Bearer")
        if method not in _SAFE:
            return _foreign(headers, hosts[0])
        return None

    def _ours(self, host: str) -> bool:
        name = _hostname(host)
        return name is not None and (name in {"localhost", *self._rules.names} or _address(name) is not None)

    def _token_holds(self, given: list[str]) -> bool:
        scheme, _, token = (given[0] if len(given) == 1 else "").partition(" ")
        wanted = (self._rules.token or "").encode()
        same = hmac.compare_digest(token.strip().encode("latin-1"), wanted)
        return same and scheme.lower() == "bearer"


def _foreign(headers: Headers, host: str) -> Response | None:
    """Refuses what a page of another site makes a browser send."""
    origins = headers.getlist("origin")
    if any(urlsplit(origin).netloc.lower() != host.lower() for origin in origins):
        return refusal(403, "origin", "pages of other origins may not change anything here")
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return refusal(403, "origin", "pages of other sites may not change anything here")
    kind = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        return refusal(415, "media_type", "send JSON, as application/json", name="content-type")
    size = headers.get("content-length", "0")
    if not size.isdecimal() or int(size) > BODY_MAX:
        return _too_large()
    return None


async def _body(receive: Receive) -> bytes | Response:
    """The whole body, or why it is refused."""
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return refusal(400, "incomplete", "the request ended before its body did")
                part: bytes = message.get("body", b"")
                size += len(part)
                if size > BODY_MAX:
                    return _too_large()
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        return refusal(408, "timeout", f"the body did not arrive within {BODY_SECONDS:.0f} s", connection="close")


def _with_body(body: bytes, receive: Receive) -> Receive:
    """The receive of a request whose body has been read already."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def given() -> Message:
        return first.pop() if first else await receive()

    return given


def _too_large() -> Response:
    message = f"a request's body is at most {BODY_MAX:,} bytes"
    return refusal(413, "value_too_large", message, name="body", connection="close")


def _hostname(host: str) -> str | None:
    """The name in a Host header, without port and brackets; None for what is no host."""
    try:
        parts = urlsplit(f"//{host}")
        plain = parts.netloc == host and parts.username is None and (parts.port is None or parts.port > 0)
    except ValueError:  # a port or a bracket that is none
        return None
    return parts.hostname if plain else None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
