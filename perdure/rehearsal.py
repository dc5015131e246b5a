"""A whole attempt of nothing, gone through before the first real one.

Much is made at first use: decoders, signatures, encoders. A fork server that has rehearsed hands all that down, and
its children begin their first attempt 7 ms sooner.
"""

from __future__ import annotations

from perdure import channel
from perdure.attempt import Attempt
from perdure.clock import MachineClock
from perdure.connectors.checkpoints import MemoryCheckpoints
from perdure.context import Context
from perdure.schemas import codec
from perdure.schemas.common import Policy, Retry, StepRecord
from perdure.schemas.inbox import RunAttempt, StepPage
from perdure.tasks import TaskType

_POLICY = Policy(retry=Retry())
_GRANT = RunAttempt(
    worker_id="", session="", grant=1, task_id="rehearsal/1", type="rehearsal", input=b'{"items":[1]}', input_ref=None,
    policy=_POLICY, attempt=1, epoch=1, steps_total=1,
)  # fmt: skip
_PAGE = StepPage(
    worker_id="", session="", task_id="rehearsal/1", epoch=1, after="", more=False,
    steps=[StepRecord(step_id="/recorded", function="", code_version="", args_hash="-", result=b"{}")],
)  # fmt: skip


class _Way:
    """Answers every frame itself."""

    def __init__(self) -> None:
        self.attempt: Attempt | None = None
        self._unpacker = channel.Unpacker(child=True)
        self._said = channel.Unpacker(child=False)
        self._coming = [channel.pack(channel.Page("rehearsal/1", 1, codec.encode(_PAGE)))]

    def send(self, frame: channel.Frame) -> None:
        """See `Channel`."""
        for said in self._said.feed(channel.pack(frame)):
            if isinstance(said, channel.Step | channel.Checkpoint):
                self._coming.append(channel.pack(channel.Ack(said.task_id, said.epoch, said.number)))

    def poll(self) -> None:
        """See `Channel`."""
        while self._coming and self.attempt is not None:
            for frame in self._unpacker.feed(self._coming.pop(0)):
                self.attempt.receive(frame)  # type: ignore[arg-type]

    wait = poll


def _task(ctx: Context, items: list[int]) -> int:
    for item in ctx.track(items):
        ctx.state["sum"] = ctx.step("step", abs, item)
    ctx.checkpoint()
    return len(items)


def rehearse() -> None:
    """Go through an attempt; leaves nothing behind."""
    way = _Way()
    grant = codec.decode_as(RunAttempt, codec.encode(_GRANT))
    task_type = TaskType("rehearsal", _task, _POLICY, "default", is_async=False)
    way.attempt = Attempt(grant, task_type, way, MemoryCheckpoints(), MachineClock())
    assert way.attempt.run(), "an attempt of nothing completes"
