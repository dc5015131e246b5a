"""What a checkpoint holds, and when the next one is due."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from perdure.schemas import limits, values
from perdure.schemas.errors import InfrastructureError

STATE_MAX = 1 << 30
"""Bytes of JSON; what a store is asked to keep, not a record on the log."""


@dataclass(frozen=True)
class Content:
    """A task at a boundary: everything that a resume restores, captured as one."""

    state: dict[str, Any]
    positions: dict[str, int]
    """Track path -> items done."""
    scopes: dict[str, dict[str, int]]
    """Open scope -> name -> uses, of names used more than once there."""
    progress: dict[str, Any]
    milestones: list[str]
    at: int
    """ms since 1970."""
    elapsed_ms: float
    """Running time of the task, earlier attempts included."""
    code_version: str

    def text(self) -> tuple[tuple[bytes, ...], bytes]:
        """(JSON text in parts, digest of what a resume would lose without it). Raises `NotSerializable`.

        In parts, because the state may be large: to put them together takes as long as to compress them.
        """
        state = values.dumps_large(self.state, field="ctx.state", limit=STATE_MAX)
        rest = {k: v for k, v in vars(self).items() if k != "state"}
        end = values.dumps_large(rest, field="checkpoint", limit=STATE_MAX)
        return (b'{"state":', state, b",", end[1:]), _digest(state, self.positions)

    @classmethod
    def of(cls, text: bytes) -> Content:
        """The content in JSON text. Raises `InfrastructureError` for a text of another make."""
        try:
            return cls(**values.loads(text))
        except TypeError as error:
            raise InfrastructureError(f"a checkpoint of a make this build cannot read: {error}") from error


def _digest(state: bytes, positions: dict[str, int]) -> bytes:
    moved = {path: done for path, done in positions.items() if done}
    digest = hashlib.sha256(state)
    digest.update(values.dumps(moved, field="positions"))
    return digest.digest()


NOTHING = _digest(b"{}", {})
"""Digest of a task that has nothing to lose."""


def interval_ms(fixed_ms: int | None, elapsed_ms: float, last_save_ms: float) -> float:
    """Time between two checkpoints: `fixed_ms` if set, else rising with the task's age and with what they cost."""
    if fixed_ms is not None:
        return fixed_ms
    return min(max(min(elapsed_ms / 200, max(10_000, 1_000 * last_save_ms)), 1_000), limits.CHECKPOINT_INTERVAL_MAX)
