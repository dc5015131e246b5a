"""What a checkpoint holds, and when the next one is due."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

from perdure.connectors import checkpoints
from perdure.connectors.checkpoints import CheckpointStore, Saved
from perdure.schemas import limits, values
from perdure.schemas.common import CheckpointRef
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


class TaskCheckpoints:
    """The checkpoints of one task in its store. All methods block."""

    def __init__(self, store: CheckpointStore, task_id: str, log: logging.Logger) -> None:
        self._store, self._task_id, self._log = store, task_id, log

    def save(self, version: int, text: tuple[bytes, ...], must: bool) -> Saved | None:
        """Keep a content's text. None: it could not be kept, which is said: it costs time at the next resume, never the
        attempt. `must`: then raise the `InfrastructureError`.
        """
        try:
            return self._store.save(self._task_id, version, checkpoints.pack(*text))
        except InfrastructureError as error:
            if must:
                raise
            self._log.warning("%s. It is tried again; until then a resume begins at an older checkpoint", error)
            return None

    def load(self, ref: CheckpointRef) -> Content:
        """What was saved. Raises `NotFound` or another `InfrastructureError`."""
        return Content.of(checkpoints.unpack(self._store.load(ref.uri, ref.sha256)))

    def prune(self, recorded: int) -> None:
        """Delete what version `recorded` has made unnecessary; what cannot be deleted stays until the next time."""
        try:
            checkpoints.prune(self._store, self._task_id, recorded)
        except (InfrastructureError, OSError) as error:
            self._log.warning("older checkpoints are not deleted: %s", error)


NOTHING = _digest(b"{}", {})
"""Digest of a task that has nothing to lose."""


def interval_ms(fixed_ms: int | None, elapsed_ms: float, last_save_ms: float) -> float:
    """Time between two checkpoints: `fixed_ms` if set, else rising with the task's age and with what they cost."""
    if fixed_ms is not None:
        return fixed_ms
    return min(max(min(elapsed_ms / 200, max(10_000, 1_000 * last_save_ms)), 1_000), limits.CHECKPOINT_INTERVAL_MAX)
