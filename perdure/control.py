"""What a supervisor and its fork server say to each other: packets on a SOCK_SEQPACKET socket pair."""

from __future__ import annotations

from typing import Any

import msgspec

from perdure.connectors.large_values import Place

PACKET_MAX = 128 * 1024
"""Bytes of a control packet; a socket's buffer holds more."""


class TypeLoaded(msgspec.Struct, tag=True, array_like=True):
    """A task type and the content of its `config/type/<name>`."""

    name: str
    content: dict[str, Any]


class AllLoaded(msgspec.Struct, tag=True, array_like=True):
    """All modules are imported, all types have been told."""

    code_version: str


class Refused(msgspec.Struct, tag=True, array_like=True):
    """The modules cannot be used; the fork server ends."""

    message: str


class Spawn(msgspec.Struct, tag=True, array_like=True):
    """Make a child; its end of the channel comes along."""

    name: str
    kind: str
    checkpoints: str
    large: Place | None


class Kill(msgspec.Struct, tag=True, array_like=True):
    """Send a signal to a child's process group."""

    name: str
    signum: int


class Spawned(msgspec.Struct, tag=True, array_like=True):
    """A child has been made."""

    name: str
    pid: int


class Exited(msgspec.Struct, tag=True, array_like=True):
    """A child has ended, or could not be made (pid 0)."""

    name: str
    pid: int
    exit_code: int | None = None
    signal: int | None = None
    cpu_seconds: float = 0.0
    peak_rss: int = 0
    detail: str = ""


FromServer = TypeLoaded | AllLoaded | Refused | Spawned | Exited
encode = msgspec.msgpack.Encoder().encode
to_server = msgspec.msgpack.Decoder(Spawn | Kill)
from_server = msgspec.msgpack.Decoder(FromServer)


class Plan(msgspec.Struct, frozen=True):
    """What the fork server is started with."""

    modules: list[str]
    start_method: str
    max_tasks: int
