"""Questions to the HTTP API that go wrong: each is an error that says so, and none shows the token."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from perdure.api_client import ApiClient
from perdure.schemas.errors import ConfigurationError, InvalidRequest, PerdureError, Unreachable
from perdure.settings import Settings

TOKEN = "s3cret"


@pytest.fixture
def other() -> Iterator[str]:
    """The address of a server that does not speak HTTP."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.settimeout(30.0)

    def greet() -> None:
        peer, _ = listening.accept()
        with peer:
            peer.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            peer.recv(10_000)

    thread = threading.Thread(target=greet)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    thread.join()
    listening.close()


def ask(api: str, token: str = TOKEN, name: str = "a") -> None:
    ApiClient(Settings(api=api, api_token=token)).get("tasks", {}, name)


def test_what_speaks_no_http_is_no_server(other: str) -> None:
    with pytest.raises(Unreachable, match="no Perdure server answers"):
        ask(other)


@pytest.mark.parametrize("api", ["http://[", "http://localhost:8765x", "http://a b", "ftp://x"])
def test_an_address_that_is_none_is_said_to_be(api: str) -> None:
    with pytest.raises((ConfigurationError, Unreachable)):
        ask(api)


def test_an_argument_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no text"):
        ask("http://127.0.0.1:9", name="\udcff")


def test_no_error_shows_the_token() -> None:
    with pytest.raises(PerdureError) as caught:
        ask("http://127.0.0.1:9", token=f"{TOKEN}\n")
    assert TOKEN not in str(caught.value)
