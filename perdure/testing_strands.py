"""User code on virtual time: strands that run one at a time, and an event loop whose waiting costs no real time.

A strand is a thread with a baton: it runs only while the kit waits for it, and the kit runs only while every strand
stands. So a task can stand in the middle of a line for thirty virtual hours, nothing ever happens at the same time as
anything else, and every run of a test is the same run.

A strand that is dropped, as by SIGKILL, is never given the baton again: not even its `finally` blocks run. What is left
of it is unwound when the kit is closed.
"""

from __future__ import annotations

import asyncio
import math
import selectors
import threading
from collections.abc import Callable
from typing import Any

from perdure.schemas.errors import InvalidRequest, PerdureError

START_MS = 1_800_000_000_000
"""Where virtual time begins: 15 January 2027, 08:00 UTC."""
UNWIND_S = 2.0
"""Real time that user code gets to end after it was told so."""
LAST_WAITS = 100
"""How often async code may wait after it was told to end."""

_here = threading.local()


class VirtualClock:
    """A clock that stands still until it is told the time. Milliseconds since 1970."""

    def __init__(self, now: int = START_MS) -> None:
        self.now = now

    def __call__(self) -> int:
        """The present time, as a log asks for it."""
        return self.now

    def wall_ms(self) -> int:
        """The present time, as an attempt asks for it."""
        return self.now

    def monotonic_ms(self) -> float:
        """Milliseconds since virtual time began."""
        return self.now - START_MS

    def cpu_seconds(self) -> float:
        """0: virtual time costs none."""
        return 0.0


class Dropped(BaseException):
    """Ends code whose process was killed long ago, when the kit is closed. Never leaves a strand."""


class Strand:
    """User code that runs only between `go` and its next `stand`."""

    def __init__(self, name: str, body: Callable[[], None]) -> None:
        self._body = body
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._asked: Callable[[], object] | None = None
        self._answer: PerdureError | None = None
        self._failure: BaseException | None = None
        self.ended = False
        self.dropped = False
        self.unwinding = False

    @staticmethod
    def current() -> Strand | None:
        """The strand that this code runs on; None: the kit's thread, or one that user code started."""
        found: Strand | None = getattr(_here, "strand", None)
        return found

    def go(self) -> None:
        """Let it run until it stands or ends, and do meanwhile what it asks for. Called by the kit's thread.

        Raises what the strand's body raised, and what was asked for, unless that is the asker's own mistake.
        """
        while True:
            if self._thread.ident is None:
                self._thread.start()
            else:
                self._turn.release()
            self._back.acquire()
            if self._failure is not None:
                raise self._failure
            asked, self._asked = self._asked, None
            if asked is None:
                return
            try:
                asked()
            except PerdureError as error:
                self._answer = error
            if self.dropped:
                return

    def stand(self) -> None:
        """Give the baton back, and wait until it comes again. Called by the strand itself."""
        if self.unwinding:
            raise Dropped
        if Strand.current() is not self:
            raise InvalidRequest("a thread that the task started waits for the engine: in the test kit it cannot")
        self._back.release()
        self._turn.acquire()
        if self.unwinding:
            raise Dropped

    def ask(self, action: Callable[[], object]) -> None:
        """Have the kit's thread call `action`, and go on afterwards. Raises `PerdureError` as `action` does."""
        self._asked = action
        self.stand()
        error, self._answer = self._answer, None
        if error is not None:
            raise error

    def drop(self) -> None:
        """Never run it again."""
        self.dropped = True

    def unwind(self) -> None:
        """End the thread of a strand that will not run again; waits for it, 2 s at the most."""
        self.dropped = self.unwinding = True
        if self._thread.ident is not None and not self.ended:
            self._turn.release()
            self._thread.join(UNWIND_S)

    def _run(self) -> None:
        _here.strand = self
        try:
            self._body()
        except Dropped:
            pass
        except BaseException as error:  # noqa: BLE001  raised again by `go`
            self._failure = error
        self.ended = True
        self._back.release()


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on virtual time, for one async task.

    Where another loop would block, `idle` is called with the milliseconds until the next timer (None: there is none).
    What goes to threads (`asyncio.to_thread`) is called at once instead. Sockets are not waited for.
    """

    def __init__(self, clock: VirtualClock, idle: Callable[[int | None], None]) -> None:
        self._clock, self._idle = clock, idle
        self._skipped = 0.0
        self._waits_left: int | None = None
        super().__init__(_Selector(self._wait))

    def time(self) -> float:
        """Seconds of virtual time."""
        return self._clock.monotonic_ms() / 1000 + self._skipped

    def run_in_executor(self, _executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Call `func` now."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001  whoever awaits the future gets it
            future.set_exception(error)
        return future

    def give_up(self) -> None:
        """From here on no wait lasts, and they are counted: what still runs is to be cancelled, and that silently."""
        self._waits_left = LAST_WAITS
        self.set_exception_handler(lambda *_: None)

    def _wait(self, timeout: float | None) -> None:
        if self._waits_left is None:
            self._idle(None if timeout is None else max(1, math.ceil(timeout * 1000 - 1e-3)))
        elif timeout is None or self._waits_left == 0:
            raise Dropped
        else:
            self._waits_left -= 1
            self._skipped += timeout


class _Selector(selectors.DefaultSelector):
    """Calls `wait` instead of blocking."""

    def __init__(self, wait: Callable[[float | None], None]) -> None:
        super().__init__()
        self._wait = wait

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready now, or after `wait`."""
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        self._wait(timeout)
        return super().select(0)


def run_async(loop: VirtualLoop, begin: Callable[[], Any]) -> None:
    """Run the coroutine that `begin` makes to its end, and the loop to its own."""
    runner = asyncio.Runner(loop_factory=lambda: loop)
    try:
        runner.run(begin())
    except Dropped:
        loop.give_up()
        raise
    finally:
        try:
            runner.close()
        finally:
            loop.close()
