"""What a supervisor and its children say to each other, over a local stream socket.

A frame is a 4-byte big-endian length and a msgpack array of one of the structs below. A child never sees Kafka; the
supervisor never runs user code. One connection carries one child, which runs one task at a time (process executor) or
many (async executor); every frame but `Hello`, `Exit` and `Idle` names its task and epoch.
"""

from __future__ import annotations

import socket
import threading

import msgspec

from perdure.schemas.errors import InfrastructureError

FRAME_MAX = 8 * 1024 * 1024
READ_BYTES = 64 * 1024


class Frame(msgspec.Struct, tag=True, array_like=True):
    """Root of all frames."""


# Supervisor to child -------------------------------------------------------------------------------------------------


class Run(Frame, tag=True):
    """Run an attempt. `grant` is the encoded `RunAttempt` record, its token removed."""

    task_id: str
    epoch: int
    grant: bytes


class Page(Frame, tag=True):
    """A page of recorded steps: an encoded `StepPage` record."""

    task_id: str
    epoch: int
    page: bytes


class Ack(Frame, tag=True):
    """Every frame of this attempt up to `number` is in the log."""

    task_id: str
    epoch: int
    number: int


class Accepted(Frame, tag=True):
    """A checkpoint of this attempt is recorded: a resume needs no older one."""

    task_id: str
    epoch: int
    version: int


class Stop(Frame, tag=True):
    """Stop at the next boundary. `why`: paused, cancelled, timed_out or drained. `undo`: it does not hold any more."""

    task_id: str
    epoch: int
    why: str
    reason: str = ""
    undo: bool = False


class Exit(Frame, tag=True):
    """Nothing more to do: end the process."""


# Child to supervisor -------------------------------------------------------------------------------------------------


class Hello(Frame, tag=True):
    """The first frame of a connection. `secret` is what the supervisor handed the fork server for this child."""

    child: str
    pid: int
    secret: str
    code_version: str


class Started(Frame, tag=True):
    """User code is about to run."""

    task_id: str
    epoch: int
    number: int


class Step(Frame, tag=True):
    """A step has begun (at-most-once only), has a result, or has failed. `result` is JSON text."""

    task_id: str
    epoch: int
    number: int
    step_id: str
    name: str
    function: str
    code_version: str
    args_hash: str
    duration_ms: int = 0
    result: bytes | None = None
    error_types: list[str] | None = None
    error_message: str = ""
    error_traceback: str = ""
    begun: bool = False


class Progress(Frame, tag=True):
    """Where the attempt stands; the supervisor coalesces. Needs no acknowledgement, so it has no number."""

    task_id: str
    epoch: int
    fraction: float | None = None
    current_step: str | None = None
    units_done: int | None = None
    units_total: int | None = None


class Milestone(Frame, tag=True):
    """A named point has been passed."""

    task_id: str
    epoch: int
    number: int
    name: str


class Checkpoint(Frame, tag=True):
    """A checkpoint is in its store, whole and synced."""

    task_id: str
    epoch: int
    number: int
    version: int
    uri: str
    sha256: str
    size: int
    positions: dict[str, int]


class WantSteps(Frame, tag=True):
    """Send the next page of recorded steps."""

    task_id: str
    epoch: int
    number: int
    after: str


class Completed(Frame, tag=True):
    """User code returned. The last frame of an attempt. `result` is JSON text."""

    task_id: str
    epoch: int
    number: int
    result: bytes
    duration_ms: int
    cpu_seconds: float


class Failed(Frame, tag=True):
    """User code raised. The last frame of an attempt. `final`: never to be retried."""

    task_id: str
    epoch: int
    number: int
    error_types: list[str]
    message: str
    traceback: str
    duration_ms: int
    cpu_seconds: float
    final: bool = False


class Stopped(Frame, tag=True):
    """The attempt has stopped as it was asked to. The last frame of an attempt."""

    task_id: str
    epoch: int
    number: int
    why: str
    duration_ms: int
    cpu_seconds: float


class Line(Frame, tag=True):
    """A log line of an attempt (async tasks' output, and `logging` records of all tasks)."""

    task_id: str
    epoch: int
    at: int
    stream: str
    level: str
    text: str


class Idle(Frame, tag=True):
    """The child is ready for another attempt."""


ToChild = Run | Page | Ack | Accepted | Stop | Exit
FromChild = (
    Hello | Started | Step | Progress | Milestone | Checkpoint | WantSteps | Completed | Failed | Stopped | Line | Idle
)

_encoder = msgspec.msgpack.Encoder()
_to_child: msgspec.msgpack.Decoder[ToChild] = msgspec.msgpack.Decoder(ToChild)
_from_child: msgspec.msgpack.Decoder[FromChild] = msgspec.msgpack.Decoder(FromChild)


def pack(frame: Frame) -> bytes:
    """A frame as it goes over the socket."""
    body = _encoder.encode(frame)
    return len(body).to_bytes(4, "big") + body


class Unpacker:
    """Bytes in, frames out."""

    def __init__(self, *, child: bool) -> None:
        self._decode = _to_child.decode if child else _from_child.decode
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[ToChild | FromChild]:
        """The frames that `data` completes. Raises `InfrastructureError` for bytes that are no frame."""
        buffer = self._buffer
        buffer += data
        frames: list[ToChild | FromChild] = []
        begin = 0
        while len(buffer) >= begin + 4:
            size = int.from_bytes(buffer[begin : begin + 4], "big")
            if size > FRAME_MAX:
                raise InfrastructureError(f"a frame of {size:,} bytes on a worker's socket; at most {FRAME_MAX:,}")
            end = begin + 4 + size
            if len(buffer) < end:
                break
            try:
                frames.append(self._decode(buffer[begin + 4 : end]))
            except msgspec.MsgspecError as error:
                raise InfrastructureError(f"no frame on the worker's local socket: {error}") from error
            begin = end
        del buffer[:begin]
        return frames


class Connection:
    """One end of a channel. `send` is thread-safe; `receive` is for one thread."""

    def __init__(self, sock: socket.socket, *, child: bool) -> None:
        self._socket = sock
        self._lock = threading.Lock()
        self._unpacker = Unpacker(child=child)

    def fileno(self) -> int:
        """The socket's descriptor, for selectors."""
        return self._socket.fileno()

    def send(self, frame: Frame) -> None:
        """Write a frame. Blocks while the socket's buffer is full. Raises `OSError` when the other end is gone."""
        data = pack(frame)
        with self._lock:
            self._socket.sendall(data)

    def receive(self) -> list[ToChild | FromChild] | None:
        """The next frames, at least one read; None when the other end has closed. Blocks."""
        data = self._socket.recv(READ_BYTES)
        return self._unpacker.feed(data) if data else None

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
