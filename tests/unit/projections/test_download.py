"""A large value on its way: in pieces, in a place of its own, and not for ever."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from anyio import CapacityLimiter

from perdure.projections import download
from perdure.projections.download import PIECE, Download
from perdure.schemas.errors import Busy

CONTENT = bytes(2 * PIECE) + b"and more"


def sent(places: CapacityLimiter, take: Any) -> None:
    async def receive() -> Any:
        raise AssertionError("nothing more is asked")

    async def run() -> None:
        await Download(lambda: CONTENT, "result.json", {}, places)({"type": "http"}, receive, take)

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


def test_who_gets_no_place_is_asked_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "WAIT_S", 0.01)

    async def take(message: Any) -> None:
        raise AssertionError(f"nothing is to be sent: {message}")

    with pytest.raises(Busy, match="on their way"):
        sent(CapacityLimiter(0), take)


def test_a_client_that_has_gone_frees_the_place() -> None:
    places = CapacityLimiter(1)

    async def take(message: Any) -> None:
        raise OSError(message["type"])

    with pytest.raises(OSError, match="start"):
        sent(places, take)
    assert places.borrowed_tokens == 0
