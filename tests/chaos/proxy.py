"""A TCP proxy for Kafka that knows its frames: what networks do to a client, done on purpose.

    with proxied_kafka(folder) as (kafka, proxy):
        KafkaLog(proxy.bootstrap)     # every connection of this client goes through the proxy
        KafkaLog(kafka.bootstrap)     # of this one none

Every request and every answer is a length and so many bytes; a request begins with its kind (api key), version and
correlation id, an answer with the correlation id. The proxy's methods may be called from any thread.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from perdure.connectors.embedded_kafka import EmbeddedKafka
from perdure.connectors.kafka_data import HOST, Identity, KafkaData, is_free, new_cluster_id
from perdure.connectors.kafka_jars import kafka_jars

PRODUCE, FETCH, METADATA, FIND_COORDINATOR, JOIN_GROUP, HEARTBEAT = 0, 1, 3, 10, 11, 12
INIT_PRODUCER_ID, ADD_PARTITIONS_TO_TXN, END_TXN = 22, 24, 26
"""Kinds of requests, as Kafka's protocol numbers them."""

_PIECE = 16_384
_CALL_S = 30.0
_WAITING = 256
T = TypeVar("T")


@dataclass
class Held:
    """Requests taken out of the stream, each with the end of its connection."""

    api_key: int
    count: int
    matching: bytes
    answered: bool
    """The broker has the request, and only the answer is lost."""
    frames: list[bytes] = field(default_factory=list)
    _proxy: Proxy | None = None
    _all: threading.Event = field(default_factory=threading.Event)

    def wait(self, timeout_s: float = _CALL_S) -> None:
        """Wait until all of them are caught. Raises AssertionError when they are not."""
        assert self._all.wait(timeout_s), f"{len(self.frames)} of {self.count} requests {self.api_key} came by"

    def release(self) -> list[bytes]:
        """Deliver them to the broker now, on a connection of their own; its answers, from the correlation id on."""
        assert self._proxy is not None
        assert not self.answered, "the broker had them at once"
        return self._proxy.deliver(self.frames)

    def wants(self, frame: bytes) -> bool:
        """Whether this request is one to be taken."""
        return _api_key(frame) == self.api_key and self.matching in frame and len(self.frames) < self.count

    def take(self, frame: bytes) -> None:
        """Here it is."""
        self.frames.append(frame)
        if len(self.frames) == self.count:
            self._all.set()


class Proxy:
    """Passes everything between its own port and a broker's, until it is told to do otherwise."""

    def __init__(self, target: str) -> None:
        """target: `host:port` of the broker's listener that advertises this proxy."""
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self.requests: Counter[int] = Counter()
        """How many requests of each kind have been passed on."""
        self._socket = socket.create_server((HOST, 0))
        self.bootstrap = f"{HOST}:{self._socket.getsockname()[1]}"
        self._links: set[_Link] = set()
        self._holds: list[Held] = []
        self._cut = False
        self._delay_s = 0.0
        self._rate: float | None = None
        self._free_at = 0.0
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server: asyncio.Server = self._run(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_S)
        self._loop.close()

    # Faults ----------------------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """Pass everything again, and what was held back by `blackhole` first. `hold`s stay."""
        self._set(cut=False, flowing=True)

    def blackhole(self) -> None:
        """Connections stay, nothing comes through in either direction; what is sent waits for `heal`."""
        self._set(flowing=False)

    def reset(self) -> None:
        """End every connection with a reset; new ones pass."""
        self._call(self._reset_all)

    def cut(self) -> None:
        """End every connection with a reset, and each new one, until `heal`."""
        self._set(cut=True)
        self.reset()

    def slow(self, *, delay_s: float = 0.0, rate: float | None = None) -> None:
        """What is sent arrives so much later (each way); all links together take `rate` bytes/s. Until `heal`."""
        self._set(delay_s=delay_s, rate=rate)

    def hold(self, api_key: int, count: int = 1, *, matching: bytes = b"") -> Held:
        """Take the next requests of a kind (that contain `matching`) out, and reset their connections.

        `Held.release` delivers them later: as if they had been in the network all the time.
        """
        return self._hold(Held(api_key, count, matching, answered=False, _proxy=self))

    def lose_answer(self, api_key: int, count: int = 1, *, matching: bytes = b"") -> Held:
        """Pass the next requests of a kind, and reset their connections in place of an answer."""
        return self._hold(Held(api_key, count, matching, answered=True, _proxy=self))

    def deliver(self, frames: list[bytes]) -> list[bytes]:
        """Send requests to the broker on a connection of their own; the answers."""
        return self._run(self._deliver(frames))

    # Inside the loop -------------------------------------------------------------------------------------------------

    def _set(
        self, *, cut: bool | None = None, flowing: bool | None = None, delay_s: float = 0.0, rate: float | None = None
    ) -> None:
        def change() -> None:
            self._delay_s, self._rate = delay_s, rate
            if cut is not None:
                self._cut = cut
            if flowing is not None:
                (self._flowing.set if flowing else self._flowing.clear)()

        self._call(change)

    def _hold(self, held: Held) -> Held:
        self._call(lambda: self._holds.append(held))
        return held

    def _call(self, change: Callable[[], object]) -> None:
        async def now() -> None:
            change()

        self._run(now())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_S)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._accept, sock=self._socket)

    async def _close(self) -> None:
        self._server.close()
        self._reset_all()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0)  # what was closed lets go of its socket in the loop's next round

    def _reset_all(self) -> None:
        for link in list(self._links):
            link.reset()

    async def _accept(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        if self._cut:
            _reset(to_client)
            return
        try:
            broker, to_broker = await asyncio.open_connection(*self._target)
        except OSError:
            _reset(to_client)
            return
        except asyncio.CancelledError:
            to_client.close()
            raise
        link = _Link(self, to_client, to_broker)
        self._links.add(link)
        try:
            await link.run(client, broker)
        finally:
            self._links.discard(link)

    async def _deliver(self, frames: list[bytes]) -> list[bytes]:
        broker, to_broker = await asyncio.open_connection(*self._target)
        answers = []
        for frame in frames:
            to_broker.write(_framed(frame))
            answers.append(await _frame(broker))
        to_broker.close()
        return answers

    def wanted(self, frame: bytes) -> Held | None:
        """Who wants a request that is on its way to the broker; for links."""
        for held in self._holds:
            if held.wants(frame):
                return held
        return None

    async def pass_on(self, writer: asyncio.StreamWriter, sent_at: float, frame: bytes) -> None:
        """Write a frame when the network as it is now would deliver it; for links."""
        data = _framed(frame)
        for at in range(0, len(data), _PIECE):
            piece = data[at : at + _PIECE]
            await asyncio.sleep(max(0.0, sent_at + self._delay_s - self._loop.time()))
            if self._rate is not None:
                self._free_at = max(self._free_at, self._loop.time()) + len(piece) / self._rate
                await asyncio.sleep(self._free_at - self._loop.time())
            await self._flowing.wait()
            writer.write(piece)
            await writer.drain()

    def now(self) -> float:
        """The loop's time, s; for links."""
        return self._loop.time()


class _Link:
    """One client's connection and the one to the broker that belongs to it."""

    def __init__(self, proxy: Proxy, to_client: asyncio.StreamWriter, to_broker: asyncio.StreamWriter) -> None:
        self._proxy, self._to_client, self._to_broker = proxy, to_client, to_broker
        self._unanswered: set[bytes] = set()

    async def run(self, client: asyncio.StreamReader, broker: asyncio.StreamReader) -> None:
        """Pass frames both ways until one end closes."""
        there = asyncio.ensure_future(self._pass(client, self._to_broker, self._request))
        back = asyncio.ensure_future(self._pass(broker, self._to_client, self._answer))
        await asyncio.wait((there, back), return_when=asyncio.FIRST_COMPLETED)
        there.cancel()
        back.cancel()
        self._to_client.close()
        self._to_broker.close()

    def reset(self) -> None:
        """End both connections with a reset."""
        _reset(self._to_client)
        _reset(self._to_broker)

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lets_pass: Callable[[bytes], bool]
    ) -> None:
        """One way: frames keep their order, and those sent before the sender's end still arrive after it.

        A delay is one of each frame, and no limit to how many are under way.
        """
        under_way: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue(_WAITING)

        async def read() -> None:
            with suppress(OSError, asyncio.IncompleteReadError):
                while lets_pass(frame := await _frame(reader)):
                    await under_way.put((self._proxy.now(), frame))
                self.reset()
            await under_way.put(None)

        reading = asyncio.ensure_future(read())
        try:
            with suppress(OSError):
                while (next_one := await under_way.get()) is not None:
                    await self._proxy.pass_on(writer, *next_one)
        finally:
            reading.cancel()

    def _request(self, frame: bytes) -> bool:
        held = self._proxy.wanted(frame)
        if held is not None:
            held.take(frame)
            if not held.answered:
                return False
            self._unanswered.add(frame[4:8])
        self._proxy.requests[_api_key(frame)] += 1
        return True

    def _answer(self, frame: bytes) -> bool:
        return frame[:4] not in self._unanswered


async def _frame(reader: asyncio.StreamReader) -> bytes:
    (size,) = struct.unpack(">i", await reader.readexactly(4))
    return await reader.readexactly(size)


def _framed(frame: bytes) -> bytes:
    return struct.pack(">i", len(frame)) + frame


def _api_key(request: bytes) -> int:
    return int(struct.unpack_from(">h", request)[0])


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close at once, with a reset instead of an orderly end."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


# A broker behind it --------------------------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    """Different free loopback ports, below those that outgoing connections take."""
    found: list[int] = []
    for port in random.sample(range(20_000, 32_000), 500):
        if len(found) < count and is_free(port):
            found.append(port)
    assert len(found) == count
    return found


@contextmanager
def proxied_kafka(folder: Path, properties: dict[str, str] | None = None) -> Iterator[tuple[EmbeddedKafka, Proxy]]:
    """A broker with two doors: `kafka.bootstrap` is its own, `proxy.bootstrap` that of the proxy.

    The broker keeps its ports over restarts. What it says to itself (transaction markers) never goes through the proxy.
    """
    own, controller, behind = free_ports(3)
    KafkaData(folder).settle(Identity(kafka_jars().version, new_cluster_id(), own, controller))
    with Proxy(f"{HOST}:{behind}") as proxy:
        settings = {
            "listeners": f"PLAINTEXT://{HOST}:{own},PROXIED://{HOST}:{behind},CONTROLLER://{HOST}:{controller}",
            "advertised.listeners": f"PLAINTEXT://{HOST}:{own},PROXIED://{proxy.bootstrap}",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT",
            "inter.broker.listener.name": "PLAINTEXT",
        }
        with EmbeddedKafka(folder, port=own, properties=settings | (properties or {})) as kafka:
            yield kafka, proxy
