"""Questions to the HTTP API, by the standard library alone."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from perdure.schemas.errors import ConfigurationError, InvalidRequest, NotFound, PerdureError, Unreachable

if TYPE_CHECKING:
    from perdure.settings import Settings

_TIMEOUT_S = 10.0
_ANSWER_MAX = 64 * 1024 * 1024


class ApiClient:
    """Asks a `perdure server`; every method blocks for at most some seconds."""

    def __init__(self, settings: Settings) -> None:
        self._base = settings.require_api()
        self._token = settings.api_token
        if not self._base.startswith(("http://", "https://")):
            raise ConfigurationError(f"the HTTP API's address {self._base!r} has to begin with http:// or https://")
        try:
            host = urllib.parse.urlsplit(self._base).hostname or ""
        except ValueError as error:
            raise ConfigurationError(f"the HTTP API's address {self._base!r} is none: {error}") from error
        local = host == "localhost" or host == "::1" or host.startswith("127.")
        proxies = urllib.request.ProxyHandler({} if local else None)
        self._opener = urllib.request.build_opener(proxies, _NoRedirect)

    def get(self, path: str, query: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
        """The answer at `/api/v1/<path>[/<name>]`; query parameters that are None are left out.

        Raises `Unreachable`, `NotFound`, `InvalidRequest`, or `PerdureError` with the server's own words.
        """
        url = f"{self._base}/api/v1/{path}{_encoded(name, query)}"
        try:
            request = urllib.request.Request(url)  # noqa: S310
            if self._token:
                request.add_header("Authorization", f"Bearer {self._token}")
            with self._opener.open(request, timeout=_TIMEOUT_S) as answer:
                content = json.loads(answer.read(_ANSWER_MAX))
        except urllib.error.HTTPError as error:
            raise _told(error) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            # Only what the system says is shown: a ValueError may quote the header that holds the token.
            why = error if isinstance(error, OSError) else type(error).__name__
            raise Unreachable(
                f"no Perdure server answers at {self._base} ({why}): this command needs one; "
                "start it with `perdure server`, or all at once with `perdure dev`"
            ) from error
        if not isinstance(content, dict):
            raise Unreachable(f"what answers at {self._base} is no Perdure server")
        return content


def _encoded(name: str | None, query: Mapping[str, Any]) -> str:
    """The end of a URL. Raises `InvalidRequest` for what is no text."""
    given = {key: value for key, value in query.items() if value is not None}
    try:
        path = "" if name is None else "/" + urllib.parse.quote(name, safe="")
        return path + (f"?{urllib.parse.urlencode(given)}" if given else "")
    except UnicodeEncodeError as error:
        raise InvalidRequest("an argument holds bytes that are no text") from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The API never redirects, and a token is for the server that it was set for."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """None: the redirect stays an HTTP error."""


def _told(error: urllib.error.HTTPError) -> PerdureError:
    """The server's refusal as an error of ours."""
    try:
        told = json.loads(error.read(_ANSWER_MAX))["error"]
        code, message, field = str(told["code"]), str(told["message"]), told.get("field")
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return Unreachable(f"what answers at {error.url} is no Perdure server: HTTP {error.code}")
    if error.code == 404:
        return NotFound(message)
    if error.code == 400:
        return InvalidRequest(message, field=field)
    if error.code >= 500:
        return Unreachable(f"the server cannot answer: {message}")
    refusal = PerdureError(f"{message}; set PERDURE_API_TOKEN" if error.code == 401 else message)
    refusal.code = code
    return refusal
