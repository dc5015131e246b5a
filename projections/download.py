"""A value as a file: sent in pieces, so that a slow line takes as long as it needs, and memory is bounded by places."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from anyio import CapacityLimiter, fail_after, to_thread
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from perdure.schemas.errors import Busy

PIECE = 256 * 1024
"""Bytes."""
WAIT_S = 10.0
"""For a place, until the client is asked to come again."""


class Download(Response):
    """A file, not to be shown in the browser.

    find: the content; runs in a thread. What it raises is answered as any error is, for nothing has been sent by then.
    name: plain ASCII. places: it holds one from its fetching until its last piece is taken, and raises `Busy` if there
    is none for `WAIT_S`; None: it is small. Of a client that takes nothing the connection is ended by
    `projections/server.py`.
    """

    media_type = "application/json"

    def __init__(
        self, find: Callable[[], bytes], name: str, headers: Mapping[str, str], places: CapacityLimiter | None
    ) -> None:
        self._find, self._places = find, places
        super().__init__(headers={**headers, "content-disposition": f'attachment; filename="{name}"'})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  ASGI's signature
        """See ASGI."""
        async with _place(self._places):
            content = memoryview(await to_thread.run_sync(self._find))
            self.headers["content-length"] = str(len(content))
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            for at in range(0, len(content), PIECE):
                piece = bytes(content[at : at + PIECE])
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


@asynccontextmanager
async def _place(places: CapacityLimiter | None) -> AsyncIterator[None]:
    if places is None:
        yield
        return
    try:
        with fail_after(WAIT_S):
            await places.acquire()
    except TimeoutError as error:
        raise Busy("as many large values as the server sends at once are on their way", retry_after=5) from error
    try:
        yield
    finally:
        places.release()
