"""An engine and supervisor that the test plays for one task, attempt after attempt, with a clock it sets."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable
from typing import Any

from perdure import channel
from perdure.attempt import Attempt
from perdure.connectors.checkpoints import CheckpointStore, MemoryCheckpoints
from perdure.connectors.large_values import LargeValues
from perdure.schemas import codec, references
from perdure.schemas.common import CheckpointRef, Policy, StepRecord
from perdure.schemas.inbox import RunAttempt, StepPage
from perdure.tasks import Registry, TaskType, task

TASK = "etl/t1"


class Clock:
    """Time that moves only when a test moves it."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def wall_ms(self) -> int:
        return int(self.now)

    def monotonic_ms(self) -> float:
        return self.now

    def cpu_seconds(self) -> float:
        return self.now / 1000


class Killed(BaseException):
    """The process is dead: nothing it says any more is heard."""


class Way:
    """The channel of one attempt."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.attempt: Attempt | None = None
        self.sent: list[channel.Frame] = []
        self.coming: deque[channel.ToChild] = deque()
        self.dead = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self.on_send: Callable[[channel.Frame], None] = lambda frame: None

    def send(self, frame: channel.Frame) -> None:
        if self.dead:
            return
        self.on_send(frame)
        self.sent.append(frame)
        self.coming.extend(self.engine.take(frame))
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self.poll)

    def poll(self) -> None:
        assert self.attempt is not None
        while self.coming:
            self.attempt.receive(self.coming.popleft())

    def wait(self) -> None:
        assert self.coming, "the attempt waits for something that never comes"
        self.poll()

    def of(self, kind: type[Any]) -> list[Any]:
        return [frame for frame in self.sent if isinstance(frame, kind)]

    @property
    def last(self) -> Any:
        return self.sent[-1]


class Engine:
    """What is recorded of the task, by the rules of the contract."""

    def __init__(self, task_type: TaskType, *, page_size: int = 500, store: CheckpointStore | None = None) -> None:
        self.type = task_type
        self.page_size = page_size
        self.store = store or MemoryCheckpoints()
        self.clock = Clock()
        self.large = LargeValues()
        self.policy: Policy = task_type.policy
        self.steps: dict[str, StepRecord] = {}
        self.begun: set[str] = set()
        self.checkpoint: CheckpointRef | None = None
        self.milestones: list[str] = []
        self.epoch = 0
        self.pages_sent = 0
        self.acknowledges = True
        self.accepts = True
        """Whether it says which checkpoints are recorded."""
        self.more: dict[str, Any] = {}

    def attempt(self, value: Any = None, carried: bytes | None = None) -> tuple[Attempt, Way]:
        """The next attempt, not begun. `carried`: what the task's record holds for the input, if it is not `value`."""
        self.epoch += 1
        given = json.dumps(value).encode() if carried is None else carried
        large = references.is_reference(given)
        grant = RunAttempt(
            worker_id="w", session="s", grant=self.epoch, task_id=TASK, type=self.type.name,
            input=None if large else given, input_ref=given.decode() if large else None, policy=self.policy, attempt=1, epoch=self.epoch,
            checkpoint=self.checkpoint, steps_total=len(self.steps), milestones=list(self.milestones),
            begun_steps=sorted(self.begun), **self.more,
        )  # fmt: skip
        way = Way(self)
        way.attempt = Attempt(grant, self.type, way, self.store, self.clock, self.large)
        if self.steps:
            way.coming.append(self._page(""))
        return way.attempt, way

    def run(
        self, value: Any = None, prepare: Callable[[Way], None] = lambda way: None, carried: bytes | None = None
    ) -> Way:
        """Run one attempt to its end."""
        attempt, way = self.attempt(value, carried)
        prepare(way)
        if self.type.is_async:
            asyncio.run(run_async(attempt, way))
        else:
            attempt.run()
        return way

    def take(self, frame: channel.Frame) -> list[channel.ToChild]:
        """Apply what the attempt says; what it is told."""
        told: list[channel.ToChild] = []
        if isinstance(frame, channel.Step):
            self._step(frame)
        elif isinstance(frame, channel.Milestone):
            self.milestones.append(frame.name)
        elif isinstance(frame, channel.Checkpoint):
            self._checkpoint(frame)
            if self.accepts:
                told.append(channel.Accepted(TASK, self.epoch, frame.version))
        elif isinstance(frame, channel.WantSteps):
            told.append(self._page(frame.after))
        if self.acknowledges and hasattr(frame, "number"):
            told.append(channel.Ack(TASK, self.epoch, frame.number))
        return told

    def _step(self, frame: channel.Step) -> None:
        if frame.begun:
            self.begun.add(frame.step_id)
            return
        self.begun.discard(frame.step_id)
        if frame.result is not None:
            self.steps[frame.step_id] = StepRecord(
                step_id=frame.step_id, function=frame.function, code_version=frame.code_version,
                args_hash=frame.args_hash, result=frame.result,
            )  # fmt: skip

    def _checkpoint(self, frame: channel.Checkpoint) -> None:
        assert frame.version == (self.checkpoint.version if self.checkpoint else 0) + 1
        self.checkpoint = CheckpointRef(
            version=frame.version, uri=frame.uri, sha256=frame.sha256, size=frame.size, positions=frame.positions
        )
        for path, done in frame.positions.items():
            for step_id in [s for s in self.steps if f"{path}@" <= s < f"{path}@{done:012d}"]:
                del self.steps[step_id]

    def _page(self, after: str) -> channel.Page:
        self.pages_sent += 1
        rest = sorted(step_id for step_id in self.steps if step_id > after)
        page = StepPage(
            worker_id="w", session="s", task_id=TASK, epoch=self.epoch, after=after,
            steps=[self.steps[step_id] for step_id in rest[: self.page_size]], more=len(rest) > self.page_size,
        )  # fmt: skip
        return channel.Page(TASK, self.epoch, codec.encode(page))


async def run_async(attempt: Attempt, way: Way) -> None:
    """Run an async attempt on the present loop."""
    way.loop = asyncio.get_running_loop()
    await attempt.run_async()


def type_of(function: Callable[..., Any], **options: Any) -> TaskType:
    """The function as a registered type."""
    registry = Registry()
    task(registry=registry, **options)(function)
    registry.stamp("v1")
    (found,) = registry
    return found


def engine_for(function: Callable[..., Any], *, page_size: int = 500, **options: Any) -> Engine:
    """An engine with one task of that function."""
    return Engine(type_of(function, **options), page_size=page_size)


def once(value: Any = None) -> Any:
    """What steps call when it does not matter."""
    return value


class Calls(list[Any]):
    """What steps call when it matters how often: it notes its argument and returns it."""

    def __call__(self, value: Any) -> Any:
        self.append(value)
        return value


def result_of(way: Way) -> Any:
    """What the task returned."""
    assert isinstance(way.last, channel.Completed), way.last
    return json.loads(way.last.result)


def failure_of(way: Way) -> channel.Failed:
    """How the attempt failed."""
    assert isinstance(way.last, channel.Failed), way.last
    return way.last


def stop(way: Way, why: str, *, undo: bool = False) -> None:
    """Tell the attempt to stop, or not to after all; it hears it when it next listens."""
    way.coming.append(channel.Stop(TASK, way.engine.epoch, why, undo=undo))
