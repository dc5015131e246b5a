"""Long tasks as objects: described, submitted to a queue, then asked about and steered by the same object."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Unpack

from perdure.client import Client, default_client
from perdure.handle import Handle
from perdure.schemas.durations import Duration
from perdure.schemas.errors import CommandRefused, NotSubmitted
from perdure.status import Status
from perdure.submission import MoreOptions, SubmitOptions
from perdure.tasks import Retry

_GOES_ON = frozenset({"PENDING", "RUNNING"})
_DEAD = frozenset({"FAILED", "TIMED_OUT"})


@dataclass(frozen=True)
class TaskStatus:
    """Where a task stands, for people."""

    state: str
    """PENDING, RUNNING, PAUSED, COMPLETED, FAILED, TIMED_OUT or CANCELLED."""
    progress: float
    """Percent, 0 to 100; 0 while nothing was reported."""
    current_step: str | None
    elapsed_time: dt.timedelta
    """Since the first start; nothing before it."""
    estimated_completion: dt.datetime | None
    """UTC; the end itself once the task has ended, None while nothing can be said."""


class _Resume:
    """`t.resume()` goes on with a bound task; `LongRunningTask.resume(task_id)` binds one and goes on with it."""

    def __get__(self, task: LongRunningTask | None, owner: type[LongRunningTask]) -> Callable[..., LongRunningTask]:
        def resume(task_id: str | None = None, *, client: Client | None = None) -> LongRunningTask:
            if task is None and task_id is None:
                raise TypeError("LongRunningTask.resume() needs a task id")
            bound = owner.get(task_id, client=client) if task_id is not None else task
            assert bound is not None
            _go_on(bound.handle)
            return bound

        return resume


class LongRunningTask:
    """A task type, its input and how to run it; after its submit (or from `get`) also the task itself.

    retry_policy: `Retry` or a mapping of its names. timeout: running time of one attempt. estimated_duration: the first
    ETA. on_failure: `task:TYPE`, `notify:TARGET`, or a bare name of either. options: those of `MoreOptions`.
    """

    resume = _Resume()

    def __init__(
        self,
        name: str,
        input_data: Any = None,
        agent_config: Mapping[str, Any] | None = None,
        estimated_duration: Duration | None = None,
        retry_policy: Retry | Mapping[str, Any] | None = None,
        on_failure: str | None = None,
        timeout: Duration | None = None,
        **options: Unpack[MoreOptions],
    ) -> None:
        self.name = name
        self.input_data = input_data
        self.options: SubmitOptions = {
            **options,
            "agent_config": agent_config,
            "estimated_duration": estimated_duration,
            "retry": retry_policy,
            "on_failure": on_failure,
            "timeout": timeout,
        }
        self._handle: Handle | None = None

    def __repr__(self) -> str:
        return f"LongRunningTask({self.name!r}, {self._handle.id if self._handle else 'not submitted'!r})"

    @classmethod
    def get(cls, task_id: str, *, client: Client | None = None) -> LongRunningTask:
        """The task of an id, as an object to work with. Raises `NotFound`, `AmbiguousId` or `Unreachable`."""
        handle = (client or default_client()).get(task_id)
        task = cls(handle.status().type)
        task._handle = handle
        return task

    @property
    def handle(self) -> Handle:
        """What this object stands on. Raises `NotSubmitted`."""
        if self._handle is None:
            raise NotSubmitted(
                f"the task {self.name!r} has not been submitted; do that first: TaskQueue().submit(task)"
            )
        return self._handle

    @property
    def task_id(self) -> str:
        """The task's id. Raises `NotSubmitted`."""
        return self.handle.id

    def bind(self, handle: Handle) -> None:
        """Make this object stand for a submitted task."""
        self._handle = handle

    def get_status(self) -> TaskStatus:
        """Where the task stands now. Raises `NotSubmitted`, `NotFound` or `Unreachable`."""
        return _for_people(self.handle.status())

    def pause(self) -> bool:
        """Stop at the next boundary. As `Handle.pause`."""
        return self.handle.pause()

    def cancel(self, reason: str = "") -> bool:
        """End without a result. As `Handle.cancel`."""
        return self.handle.cancel(reason)

    def get_logs(self, last_n: int = 100) -> list[str]:
        """The newest lines that the task printed or logged, oldest first."""
        return [line.text for line in self.handle.logs(last_n)]

    def result(self, timeout: Duration | None = None) -> Any:
        """Wait for the end and return the result. As `Handle.result`."""
        return self.handle.result(timeout)


class TaskQueue:
    """Where long tasks are handed in."""

    def __init__(self, client: Client | None = None) -> None:
        self._client = client

    def submit(self, task: LongRunningTask) -> str:
        """Submit, bind the object to the task, and return the task's id. Raises what `Client.submit` raises."""
        client = self._client or default_client()
        task.bind(client.submit(task.name, task.input_data, **task.options))
        return task.task_id


def _go_on(handle: Handle) -> None:
    """Bring a task back to work from wherever it stands: the one meaning of "resume" that people have.

    Raises `CommandRefused` for a task that is COMPLETED or CANCELLED.
    """
    while True:
        status = handle.status()
        if status.state in _GOES_ON and status.stopping != "pausing":
            return
        try:
            if status.state in _DEAD:
                handle.retry()
            else:
                handle.resume()
            return
        except CommandRefused:
            if handle.status().state == status.state:
                raise  # it did not move meanwhile: the refusal is meant


def _for_people(status: Status) -> TaskStatus:
    completion = None
    if status.finished_at is not None:
        completion = dt.datetime.fromtimestamp(status.finished_at / 1000, dt.UTC)
    elif status.eta_seconds is not None:
        completion = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=status.eta_seconds)
    return TaskStatus(
        state=status.state,
        progress=100 * (status.progress or 0.0),
        current_step=status.current_step,
        elapsed_time=dt.timedelta(seconds=status.elapsed_seconds or 0),
        estimated_completion=completion,
    )
