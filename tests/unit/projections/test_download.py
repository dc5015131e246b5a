"""A large value on its way: in pieces, in a place of its own, and not for ever."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from anyio import CapacityLimiter

from perdure.projections import download
from perdure.projections.download import PIECE, Download

CONTENT = bytes(2 * PIECE) + b"and more"


def sent(places: CapacityLimiter, take: Any) -> None:
    async def receive() -> Any:
        raise AssertionError("nothing more is asked")

    async def run() -> None:
        await Download(lambda: CONTENT, "result.json", places, {})({"type": "http"}, receive, take)

    anyio.run(run)


def test_a_value_goes_in_pieces_and_keeps_its_place_until_the_last_is_taken() -> None:
    places = CapacityLimiter(1)
    messages = []

    async def take(message: Any) -> None:
        assert places.borrowed_tokens == 1
        messages.append(message)

    sent(places, take)
    assert places.borrowed_tokens == 0
    assert (b"content-length", str(len(CONTENT)).encode()) in messages[0]["headers"]
    assert [len(m["body"]) for m in messages[1:]] == [PIECE, PIECE, len(b"and more"), 0]
    assert b"".join(m["body"] for m in messages[1:]) == CONTENT
    assert [m["more_body"] for m in messages[1:]] == [True, True, True, False]


def test_a_client_that_takes_nothing_loses_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PATIENCE_S", 0.01)
    places = CapacityLimiter(1)

    async def take(message: Any) -> None:
        if message["type"] == "http.response.body":
            await anyio.sleep_forever()

    with pytest.raises(TimeoutError):
        sent(places, take)
    assert places.borrowed_tokens == 0
