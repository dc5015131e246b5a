"""An engine behind a bad network: requests and answers are lost, late and slow, and each command is executed once (G2)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from perdure.connectors.embedded_kafka import EmbeddedKafka
from tests.chaos.proxy import (
    ADD_PARTITIONS_TO_TXN,
    END_TXN,
    INIT_PRODUCER_ID,
    PRODUCE,
    Proxy,
    proxied_kafka,
)
from tests.integration.stack import Process, Stack, stack_on
from tests.integration.traffic import Traffic, traffic_on

pytestmark = pytest.mark.kafka


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EmbeddedKafka, Proxy]]:
    with proxied_kafka(tmp_path_factory.mktemp("proxied")) as made:
        yield made


@pytest.fixture
def proxy(broker: tuple[EmbeddedKafka, Proxy]) -> Proxy:
    return broker[1]


@pytest.fixture
def stack(broker: tuple[EmbeddedKafka, Proxy], topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    with stack_on(broker[0].bootstrap, topic_prefix, tmp_path, partitions=2) as made:
        yield made


def behind(stack: Stack, proxy: Proxy) -> Process:
    """An engine whose every connection goes through the proxy; the traffic's do not."""
    engine = stack.process("engine", "-m", "perdure.cli", "engine", bootstrap=proxy.bootstrap).start()
    stack.await_engine(engine)
    return engine


def test_lost_and_late_requests_of_transactions(stack: Stack, proxy: Proxy) -> None:
    engine = behind(stack, proxy)
    with traffic_on(stack, engine) as traffic:
        for kind in (END_TXN, ADD_PARTITIONS_TO_TXN, PRODUCE):
            traffic.flows()
            proxy.lose_answer(kind, 2, matching=_producers(stack)).wait()
            traffic.flows()
            late = proxy.hold(kind, matching=_producers(stack))
            late.wait()
            late.release()
        recreated = proxy.lose_answer(INIT_PRODUCER_ID)
        proxy.reset()
        recreated.wait()
        _through(stack, traffic, engine)


def _producers(stack: Stack) -> bytes:
    """What is in each request of the engine's transactions."""
    return f"{stack.prefix}engine.".encode()


def test_cuts_and_black_holes(stack: Stack, proxy: Proxy) -> None:
    engine = behind(stack, proxy)
    with traffic_on(stack, engine) as traffic:
        for fault in (proxy.blackhole, proxy.cut, lambda: proxy.slow(delay_s=0.2, rate=200_000)):
            traffic.flows()
            fault()
            time.sleep(3.0)  # the fault itself
            proxy.heal()
        _through(stack, traffic, engine)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["blackhole", "cut"])
@pytest.mark.parametrize("seconds", [12.0, 40.0], ids=["longer than a session", "longer than a transaction"])
def test_a_link_that_is_down_for_long(stack: Stack, proxy: Proxy, fault: str, seconds: float) -> None:
    engine = behind(stack, proxy)
    with traffic_on(stack, engine) as traffic:
        traffic.flows()
        getattr(proxy, fault)()
        time.sleep(seconds)  # the fault itself
        proxy.heal()
        _through(stack, traffic, engine)


@pytest.mark.slow
@pytest.mark.parametrize("arrives", [False, True], ids=["never arrives", "is never answered"])
def test_a_commit_whose_outcome_stays_unknown(stack: Stack, proxy: Proxy, arrives: bool) -> None:
    """Every repetition is lost for 70 s, until the engine gives up and asks what has become of it."""
    engine = behind(stack, proxy)
    with traffic_on(stack, engine) as traffic:
        traffic.flows()
        lose = proxy.lose_answer if arrives else proxy.hold
        lost = lose(END_TXN, 100_000, matching=_producers(stack))
        time.sleep(70.0)  # the fault itself
        lost.count = 0
        _through(stack, traffic, engine)


def _through(stack: Stack, traffic: Traffic, engine: Process) -> None:
    traffic.flows()
    traffic.stop()
    stack.check_store(engine)
