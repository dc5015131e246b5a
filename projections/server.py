"""The read side as a process: the HTTP API, the thread that fills the views, and what else runs beside them.

Whatever part fails ends the server: health says so at once (503), and some seconds later, when those who watch it have
seen it, the process stops with an exit code of its own. Nothing goes on half dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from perdure.projections.api import Commands, Fetch, create_app
from perdure.projections.auth import access
from perdure.projections.view_writer import Reading, Retention, ViewWriter
from perdure.projections.views import Views
from perdure.schemas import limits
from perdure.schemas.errors import ConfigurationError, PerdureError
from perdure.streams.log import Log

LOG = logging.getLogger("perdure.server")

Work = Callable[[threading.Event], None]
"""Runs until the event is set; to return earlier is to fail."""
Lags = Callable[[], Mapping[str, Mapping[str, int]]]
"""Engine or projection -> topic -> records that it has still to read. Must not block."""

FAILED = 1
LAG_MAX = 10_000
"""Records behind which the views are no longer fit to be asked."""
LINGER_S = 5.0
"""How long a server that has lost a part goes on saying so."""
PATIENCE_S = 30.0
"""How long a client may take to send a request's head, or to take an answer."""
STOP_S = 30.0


def main(
    log: Log,
    *,
    host: str,
    port: int,
    token: str | None,
    db_path: Path,
    commands: Commands,
    fetch: Fetch,
    ready: Callable[[str], None],
    background: Mapping[str, Work] | None = None,
    lags: Lags = dict,
    problems: Callable[[], Iterable[str]] = list,
    names: Iterable[str] = (),
    retention: Retention | None = None,
    stop: threading.Event | None = None,
    linger_s: float = LINGER_S,
) -> int:
    """Serve until SIGTERM, SIGINT or `stop`; returns the exit code: 0, or 1 if a part failed. Blocks.

    `ready` gets the address once it answers; port 0 takes a free one. `names`: host names that the API is known by.
    `background`: what else runs until the server stops, by the names that health shows. `problems`: what is wrong
    with it beyond its lags, in words; must not block.
    Raises `ConfigurationError` (no token beyond loopback, address or view store in use) or `Unreachable`.
    """
    rules = access(host, token, names)
    stop = stop or threading.Event()
    with contextlib.ExitStack() as held:
        listener = held.enter_context(_listening(host, port))
        writer = held.enter_context(contextlib.closing(ViewWriter(log, db_path, clock=_now, retention=retention)))
        crew = _Crew(stop, linger_s)

        def health() -> Mapping[str, Any]:
            return health_of(writer.reading, crew.state(), lags(), problems())

        app = create_app(Views(db_path), commands, fetch, health, rules, _now)
        crew.start({"views": writer.run} | dict(background or {}))
        try:
            asyncio.run(_serve(app, listener, ready, stop))
        finally:
            stop.set()
            crew.join()
        return FAILED if crew.failed else 0


def health_of(
    reading: Reading, parts: Mapping[str, str], lags: Mapping[str, Mapping[str, int]], found: Iterable[str] = ()
) -> dict[str, Any]:
    """How the server is: `ok`, and if not the problems in words, with those that others have found."""
    everything = {"views": reading.lag, **lags}
    problems = [f"{name} {state}" for name, state in parts.items() if state != "runs"]
    if reading.problem is not None:
        problems.append(reading.problem)
    if not reading.caught_up:
        problems.append("the views are still being filled")
    problems += found
    for name, topics in everything.items():
        problems += [f"{name}: {n:,} records behind in {topic}" for topic, n in topics.items() if n > LAG_MAX]
    if reading.skew_ms is not None and reading.skew_ms > limits.CLOCK_AGREES_MS:
        problems.append(f"the log's clock is {reading.skew_ms / 1000:.1f} s ahead of this machine's")
    if reading.skew_ms is not None and reading.skew_ms < -limits.CLOCK_AGREES_MS:
        late = f"events come {-reading.skew_ms / 1000:.1f} s late"
        problems.append(f"{late}: the log's clock is behind this machine's, or the engine behind its commands")
    return {
        "ok": not problems, "problems": problems, "caught_up": reading.caught_up, "skew_ms": reading.skew_ms,
        "lag": everything, "parts": dict(parts),
    }  # fmt: skip


class _Crew:
    """Threads that work until the server stops, and what has become of each."""

    def __init__(self, stop: threading.Event, linger_s: float) -> None:
        self._stop, self._linger_s = stop, linger_s
        self._threads: dict[str, threading.Thread] = {}
        self.failed: dict[str, str] = {}

    def start(self, parts: Mapping[str, Work]) -> None:
        """Run each in a thread of its own."""
        for name, work in parts.items():
            # Daemons: a part that does not heed the event may not keep the process alive.
            self._threads[name] = threading.Thread(target=self._run, args=(name, work), name=name, daemon=True)
        for thread in self._threads.values():
            thread.start()

    def state(self) -> dict[str, str]:
        """Each part's name and state."""
        return {name: self.failed.get(name, "runs") for name in self._threads}

    def join(self) -> None:
        """Wait until all have ended; one that takes too long counts as failed."""
        deadline = time.monotonic() + STOP_S
        for name, thread in self._threads.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                LOG.error("%s did not stop within %.0f s", name, STOP_S)
                self.failed[name] = "did not stop"

    def _run(self, name: str, work: Work) -> None:
        try:
            work(self._stop)
            if self._stop.is_set():
                return
            LOG.error("%s ended by itself", name)
            self.failed[name] = "ended by itself"
        except Exception as error:  # whatever it is, it ends the server, and the exit code says so
            LOG.exception("%s failed", name)
            # The text of an error that is not ours may hold anything; it stays in the log.
            self.failed[name] = f"failed: {error if isinstance(error, PerdureError) else type(error).__name__}"
        self._stop.wait(self._linger_s)
        self._stop.set()


class _Impatient(H11Protocol):
    """A connection that ends when its next request, or the taking of an answer, lasts too long: places are few."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a request."""
        super().connection_made(transport)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing more."""
        self._expect(nothing=True)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """See whether a request has begun; how long its body may take the gate says."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._expect(nothing=True)

    def on_response_complete(self) -> None:
        """Expect the next request."""
        self._expect()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Expect the client to take some of what lies here."""
        super().pause_writing()
        self._expect()

    def resume_writing(self) -> None:
        """See whether more is to come; else the next request is expected already."""
        super().resume_writing()
        if self.cycle is not None and not self.cycle.response_complete:
            self._expect(nothing=True)

    def _expect(self, *, nothing: bool = False) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if nothing else self.loop.call_later(PATIENCE_S, self.transport.abort)


class _Server(uvicorn.Server):
    """Leaves signals to `_serve`, and tells when it answers."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: uvicorn would kill the process with the signal again after a clean stop."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then tell."""
        await super().startup(sockets)
        self._ready()


async def _serve(app: Any, listener: socket.socket, ready: Callable[[str], None], stop: threading.Event) -> None:
    config = uvicorn.Config(
        app, http=_Impatient, ws="none", lifespan="off", log_config=None, access_log=False, proxy_headers=False,
        server_header=False, limit_concurrency=512, timeout_graceful_shutdown=5,
    )  # fmt: skip
    server = _Server(config, lambda: ready(_url(listener)))
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(asyncio.to_thread(stop.wait))
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop.set()
        server.should_exit = True
        await serving
        await stopping


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    with listener:
        yield listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{here}]:{port}" if ":" in here else f"http://{here}:{port}"


def _now() -> int:
    return time.time_ns() // 1_000_000
