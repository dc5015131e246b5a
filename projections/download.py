"""A large value as a file: sent in pieces, so that a slow line takes as long as it needs, and a dead one does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from anyio import CapacityLimiter, fail_after, to_thread
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PIECE = 256 * 1024
"""Bytes."""
PATIENCE_S = 30.0
"""Within which a client has to take a piece."""


class Download(Response):
    """A file, not to be shown in the browser. It holds a place from its fetching until its last piece is taken.

    find: the content; runs in a thread. What it raises is answered as any error is, for nothing has been sent by then.
    name: plain ASCII. Raises `TimeoutError` where a client does not take a piece in time, which ends the connection.
    """

    media_type = "application/json"

    def __init__(
        self, find: Callable[[], bytes], name: str, places: CapacityLimiter, headers: Mapping[str, str]
    ) -> None:
        self._find, self._places = find, places
        super().__init__(headers={**headers, "content-disposition": f'attachment; filename="{name}"'})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  ASGI's signature
        """See ASGI."""
        async with self._places:
            content = memoryview(await to_thread.run_sync(self._find))
            self.headers["content-length"] = str(len(content))
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            for at in range(0, len(content), PIECE):
                with fail_after(PATIENCE_S):
                    piece = bytes(content[at : at + PIECE])
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
