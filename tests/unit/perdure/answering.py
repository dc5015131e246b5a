"""A log producer whose acknowledgements the test gives, one by one."""

from __future__ import annotations

from typing import Any

from perdure.schemas import codec, signing
from perdure.schemas.errors import InfrastructureError
from perdure.streams.log import OnAck

KEYS = signing.Keys.generate()


class Answering:
    """Records what is appended, verifies its signature, and answers when told."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, int, Any]] = []
        self._waiting: list[OnAck] = []

    def append(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, on_ack: OnAck | None = None
    ) -> None:
        assert value is not None
        message = codec.decode(value)
        assert signing.authentic(value, message, KEYS.worker)
        self.sent.append((topic, partition, message))
        self._waiting.append(on_ack or (lambda _offset, _error: None))

    def answer(self, error: InfrastructureError | None = None) -> None:
        """Acknowledge the oldest unanswered append, or fail it."""
        self._waiting.pop(0)(-1 if error else 0, error)

    def flush(self, timeout_s: float) -> bool:
        return not self._waiting

    def close(self) -> None:
        pass
