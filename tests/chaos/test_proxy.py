"""The proxy does to a connection what it is told, and nothing else."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from confluent_kafka import Producer

from perdure.connectors.kafka_data import HOST
from perdure.schemas import topics
from perdure.streams.kafka_log import KafkaLog
from perdure.streams.log import BEGIN
from perdure.streams.topology import create_topics
from tests.chaos.proxy import END_TXN, FETCH, METADATA, Proxy, free_ports, proxied_kafka
from tests.conformance.test_log import take

SILENCE_S = 0.3
LONG_S = 30.0


def request(correlation: int, api_key: int = METADATA, body: bytes = b"") -> bytes:
    return struct.pack(">hhi", api_key, 1, correlation) + body


def answer(correlation: int, body: bytes = b"") -> bytes:
    return struct.pack(">i", correlation) + body


class Broker:
    """Answers every frame with its correlation id and its body, and notes what it was sent."""

    def __init__(self) -> None:
        self._server = socket.create_server((HOST, 0))
        self.address = f"{HOST}:{self._server.getsockname()[1]}"
        self.got: list[bytes] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._serve, daemon=True).start()

    def has(self, *frames: bytes) -> bool:
        """Whether these frames and no others come, and soon."""
        with self._changed:
            return self._changed.wait_for(lambda: sorted(self.got) == sorted(frames), LONG_S)

    def close(self) -> None:
        self._server.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with suppress(OSError), closing(connection):
            while (frame := _read(connection)) is not None:
                with self._changed:
                    self.got.append(frame)
                    self._changed.notify_all()
                _write(connection, answer(*struct.unpack_from(">i", frame, 4), frame[8:]))


class Client:
    """One connection."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), LONG_S)

    def send(self, frame: bytes) -> None:
        _write(self._socket, frame)

    def read(self, timeout_s: float = LONG_S) -> bytes | None:
        """The next frame; None at an orderly end. Raises ConnectionResetError or TimeoutError."""
        self._socket.settimeout(timeout_s)
        return _read(self._socket)

    def hears_nothing(self) -> bool:
        with suppress(TimeoutError):
            self.read(SILENCE_S)
            return False
        return True

    def close(self) -> None:
        self._socket.close()


def refused(proxy: Proxy) -> bool:
    """Whether a new connection is reset; that may be seen while it is made, or later."""
    try:
        with closing(Client(proxy.bootstrap)) as client:
            client.read()
    except ConnectionResetError:
        return True
    return False


def _read(connection: socket.socket) -> bytes | None:
    head = _exactly(connection, 4)
    return _exactly(connection, struct.unpack(">i", head)[0]) if head else None


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := connection.recv(size - len(data))):
        data += more
    return data


def _write(connection: socket.socket, frame: bytes) -> None:
    connection.sendall(struct.pack(">i", len(frame)) + frame)


@pytest.fixture
def broker() -> Iterator[Broker]:
    with closing(Broker()) as made:
        yield made


@pytest.fixture
def proxy(broker: Broker) -> Iterator[Proxy]:
    with Proxy(broker.address) as made:
        yield made


@pytest.fixture
def client(proxy: Proxy) -> Iterator[Client]:
    with closing(Client(proxy.bootstrap)) as made:
        yield made


def test_everything_passes_both_ways_in_order(proxy: Proxy, broker: Broker, client: Client) -> None:
    large = bytes(300_000)
    for number in range(50):
        client.send(request(number, body=large if number == 25 else b"x"))
    assert [client.read() for _ in range(50)] == [answer(n, large if n == 25 else b"x") for n in range(50)]
    assert proxy.requests == {METADATA: 50}


def test_a_black_hole_delivers_late_and_loses_nothing(proxy: Proxy, broker: Broker, client: Client) -> None:
    proxy.blackhole()
    client.send(request(1))
    late = Client(proxy.bootstrap)
    late.send(request(2))
    late.close()  # what it has sent is in the network
    assert client.hears_nothing()
    assert broker.got == []
    proxy.heal()
    assert client.read() == answer(1)
    assert broker.has(request(1), request(2))


def test_a_reset_ends_connections_and_lets_new_ones_pass(proxy: Proxy, client: Client) -> None:
    client.send(request(1))
    assert client.read() == answer(1)
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        client.read()
    with closing(Client(proxy.bootstrap)) as anew:
        anew.send(request(2))
        assert anew.read() == answer(2)


def test_a_cut_lasts_until_it_is_healed(proxy: Proxy, client: Client) -> None:
    client.send(request(1))
    assert client.read() == answer(1)
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        client.read()
    assert refused(proxy)
    proxy.heal()
    with closing(Client(proxy.bootstrap)) as anew:
        anew.send(request(2))
        assert anew.read() == answer(2)


def test_a_delay_is_one_of_each_frame_and_a_rate_one_of_all(proxy: Proxy, client: Client) -> None:
    proxy.slow(delay_s=0.4)
    began = time.monotonic()
    for number in range(20):
        client.send(request(number))
    assert [client.read() for _ in range(20)] == [answer(n) for n in range(20)]
    assert time.monotonic() - began >= 0.8, "each way"
    proxy.slow(rate=1_000_000)
    began = time.monotonic()
    client.send(request(20, body=bytes(200_000)))
    assert client.read() == answer(20, bytes(200_000))
    assert time.monotonic() - began >= 0.4
    proxy.heal()
    client.send(request(21))
    assert client.read() == answer(21)


def test_a_request_is_held_and_delivered_on_another_connection(proxy: Proxy, broker: Broker, client: Client) -> None:
    held = proxy.hold(END_TXN, matching=b"engine.3")
    client.send(request(1, END_TXN, b"engine.2"))
    assert client.read() == answer(1, b"engine.2"), "another producer's"
    client.send(request(2, FETCH))
    client.send(request(3, END_TXN, b"engine.3"))
    held.wait()
    with suppress(ConnectionResetError):
        assert client.read() == answer(2), "a reset may overtake an answer"
        client.read()
    with closing(Client(proxy.bootstrap)) as again:
        again.send(request(1, END_TXN, b"engine.3"))
        assert again.read() == answer(1, b"engine.3"), "only one of them was to be held"
    assert request(3, END_TXN, b"engine.3") not in broker.got
    assert held.release() == [answer(3, b"engine.3")]
    assert broker.got[-1] == request(3, END_TXN, b"engine.3")


def test_an_answer_is_lost_although_the_broker_has_the_request(proxy: Proxy, broker: Broker, client: Client) -> None:
    lost = proxy.lose_answer(END_TXN)
    client.send(request(1, END_TXN))
    with pytest.raises(ConnectionResetError):
        client.read()
    lost.wait()
    assert broker.has(request(1, END_TXN))


def test_a_broker_that_is_away_is_a_reset() -> None:
    (nobody,) = free_ports(1)
    with Proxy(f"{HOST}:{nobody}") as proxy:
        assert refused(proxy)


@pytest.mark.kafka
def test_clients_of_a_broker_stay_behind_the_proxy_that_they_came_through(tmp_path: Path) -> None:
    with proxied_kafka(tmp_path / "kafka") as (kafka, proxy):
        create_topics(kafka.bootstrap, partitions=1)
        log, direct = KafkaLog(proxy.bootstrap), KafkaLog(kafka.bootstrap)
        passed = sum(proxy.requests.values())
        for number, where in enumerate((direct, log)):
            producer = where.producer()
            producer.append(topics.EVENTS.name, 0, None, b"%d" % number)
            assert producer.flush(LONG_S)
            producer.close()
            assert (sum(proxy.requests.values()) > passed) == (where is log)
        held = proxy.hold(END_TXN, matching=b"perdure.engine.0")
        late = Producer({"bootstrap.servers": proxy.bootstrap, "transactional.id": "perdure.engine.0", "log_level": 0})
        late.init_transactions(LONG_S)
        late.begin_transaction()
        late.produce(topics.EVENTS.on("perdure."), b"2", partition=0)
        late.commit_transaction(LONG_S)  # the client library sends it again
        held.wait()
        reader = direct.reader()
        reader.assign({(topics.EVENTS.name, 0): BEGIN})
        assert [record.value for record in take(reader, 3)] == [b"0", b"1", b"2"]
        (answered,) = held.release()
        assert struct.unpack_from(">iih", answered)[2] == 0, "a repetition of what is done already is no error"
        reader.close()
