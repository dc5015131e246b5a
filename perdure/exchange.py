"""How an attempt waits: flows, the frames it has sent, and the acknowledgements it gets.

A *flow* is what happens between two points where an attempt has to wait, written once as a generator: it yields a
condition on what has been received, or something it wants called. `drive` carries a flow through by blocking,
`drive_async` by awaiting.

In a synchronous attempt nobody reads the channel but whoever waits: the first thread that has to wait reads for all.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, Protocol, TypeVar

from perdure.channel import Frame
from perdure.schemas.errors import StepError

T = TypeVar("T")


class Channel(Protocol):
    """The way to the supervisor. What comes in is handed to `Attempt.receive`."""

    def send(self, frame: Frame) -> None:
        """Hand a frame over; thread-safe; blocks while the way is full."""

    def poll(self) -> None:
        """Deliver what has come in. Does not block. Called by one thread at a time, like `wait`."""

    def wait(self) -> None:
        """Deliver what comes in, at least one frame; blocks. Only synchronous attempts call it."""


class Call(NamedTuple):
    """What a flow wants called; it gets the result back. `blocking`: an async attempt does it in a thread."""

    fn: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012  never changed
    blocking: bool = False


Condition = Callable[[], bool]
Flow = Generator[Condition | Call, Any, T]


class Exchange:
    """One attempt's frames out and acknowledgements in."""

    def __init__(self, channel: Channel, task_id: str, epoch: int) -> None:
        self._channel, self._task_id, self._epoch = channel, task_id, epoch
        self._number = 0
        self._acked = 0
        self._over = False
        self._order = threading.Lock()
        self._changed = threading.Condition()
        self._reader = 0
        self._futures: list[asyncio.Future[None]] = []

    def post(self, kind: Callable[..., Frame], **fields: Any) -> int:
        """Send a frame that will be acknowledged; its number. Raises `StepError` when the attempt is over."""
        with self._order:
            self._check_open()
            self._number += 1
            self._channel.send(kind(self._task_id, self._epoch, self._number, **fields))
            return self._number

    def tell(self, kind: Callable[..., Frame], **fields: Any) -> None:
        """Send a frame that needs no acknowledgement."""
        with self._order:
            self._check_open()
            self._channel.send(kind(self._task_id, self._epoch, **fields))

    def close(self, kind: Callable[..., Frame], **fields: Any) -> None:
        """Send the attempt's last frame."""
        self.post(kind, **fields)
        self._over = True

    def acked(self, number: int) -> Condition:
        """The condition that frame `number` is in the log."""
        return lambda: self._acked >= number

    def acknowledge(self, number: int) -> None:
        """Frames up to `number` are in the log."""
        self._acked = max(self._acked, number)

    def received(self) -> None:
        """Something came in: let those who await look at their conditions again."""
        waiting, self._futures = self._futures, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def poll(self) -> None:
        """Take in what has arrived, unless another thread is reading anyway. Does not block."""
        with self._changed:
            if self._reader:
                return
            self._reader = threading.get_ident()
        self._read(self._channel.poll)

    def poll_interrupting(self) -> None:
        """`poll` for a signal handler: it may have interrupted this thread's own wait, which must not go on then."""
        if self._reader in (0, threading.get_ident()):
            self._channel.poll()

    def drive(self, flow: Flow[T]) -> T:
        """Carry a flow through, blocking. Raises what the flow raises."""
        try:
            wanted = next(flow)
            while True:
                try:
                    if isinstance(wanted, Call):
                        result = wanted.fn(*wanted.args, **wanted.kwargs)
                    else:
                        result = self._until(wanted)
                except BaseException as error:  # noqa: BLE001  the flow decides
                    wanted = flow.throw(error)
                else:
                    wanted = flow.send(result)
        except StopIteration as end:
            found: T = end.value
            return found

    async def drive_async(self, flow: Flow[T]) -> T:
        """Carry a flow through, awaiting. Raises what the flow raises."""
        try:
            wanted = next(flow)
            while True:
                try:
                    result = await (self._called(wanted) if isinstance(wanted, Call) else self._arrived(wanted))
                except BaseException as error:  # noqa: BLE001  the flow decides
                    wanted = flow.throw(error)
                else:
                    wanted = flow.send(result)
        except StopIteration as end:
            found: T = end.value
            return found

    def _until(self, ready: Condition) -> Any:
        while not ready():
            with self._changed:
                while self._reader and not ready():
                    self._changed.wait()
                if ready():
                    return
                self._reader = threading.get_ident()
            self._read(self._channel.wait)

    def _read(self, read: Callable[[], None]) -> None:
        try:
            read()
        finally:
            with self._changed:
                self._reader = 0
                self._changed.notify_all()

    async def _arrived(self, ready: Condition) -> None:
        while not ready():
            future = asyncio.get_running_loop().create_future()
            self._futures.append(future)
            await future

    async def _called(self, wanted: Call) -> Any:
        if wanted.blocking:
            return await asyncio.to_thread(wanted.fn, *wanted.args, **wanted.kwargs)
        result = wanted.fn(*wanted.args, **wanted.kwargs)
        return await result if inspect.isawaitable(result) else result

    def _check_open(self) -> None:
        if self._over:
            raise StepError("this attempt has ended; a thread or asyncio task that it left behind still uses its ctx")
