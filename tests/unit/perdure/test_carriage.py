"""Large values of an attempt: through a store that may be slow, away, or have lost them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from perdure import carriage, channel
from perdure.connectors.blobs import MemoryBlobs
from perdure.connectors.large_values import LargeValues
from perdure.context import AsyncContext, Context
from perdure.schemas import limits, references, values
from perdure.schemas.errors import NotFound, Unreachable
from perdure.testing import Kit
from tests.unit.perdure.attempting import TASK, Engine, type_of

LARGE = "v" * limits.VALUE_MAX


class Blobs(MemoryBlobs):
    """Away for the next `away` calls; `on_call` is told of each."""

    def __init__(self) -> None:
        super().__init__()
        self.away = 0
        self.on_call: Callable[[], None] = lambda: None

    def put(self, name: str, data: bytes) -> None:
        self._called()
        super().put(name, data)

    def get(self, name: str) -> bytes:
        self._called()
        return super().get(name)

    def _called(self) -> None:
        self.on_call()
        if self.away:
            self.away -= 1
            raise Unreachable("the store is away")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carriage, "FIRST_PAUSE_S", 0.0)


def engine_of(function: Callable[..., Any], blobs: MemoryBlobs) -> Engine:
    engine = Engine(type_of(function))
    engine.large = LargeValues(lambda: (blobs, "home"), day=lambda: 1)
    return engine


def given(engine: Engine) -> bytes:
    """The reference to a large input."""
    return engine.large.carried(TASK, engine.large.text({"data": LARGE}, "input"))


def text(engine: Engine, carried: bytes) -> Any:
    assert references.is_reference(carried)
    return values.loads(engine.large.fetched(TASK, carried))


def echo(ctx: Context, data: str) -> str:
    return str(ctx.step("step", str.upper, data))


async def echo_async(ctx: AsyncContext, data: str) -> str:
    async def upper() -> str:
        return data.upper()

    return str(await ctx.step("step", upper))


@pytest.mark.parametrize("function", [echo, echo_async])
def test_a_store_that_is_away_for_a_while_costs_no_attempt(function: Callable[..., Any]) -> None:
    blobs = Blobs()
    engine = engine_of(function, blobs)
    reference = given(engine)
    calls: list[str] = []

    def called() -> None:
        calls.append(threading.current_thread().name)
        if len(calls) in (1, 4, 7):
            blobs.away = 2

    blobs.on_call = called
    way = engine.run(carried=reference)
    assert isinstance(way.last, channel.Completed), way.last
    assert len(calls) == 9, "input, step and result: two refusals each"
    assert ("MainThread" in calls) == (function is echo), "in an async task nothing of it is on the event loop"
    assert text(engine, way.last.result) == LARGE.upper()
    assert text(engine, engine.steps["/step"].result) == LARGE.upper()


@pytest.mark.parametrize("function", [echo, echo_async])
def test_a_large_step_that_was_recorded_is_not_run_again(function: Callable[..., Any]) -> None:
    engine = engine_of(function, Blobs())
    engine.run(carried=given(engine))
    way = engine.run(carried=given(engine))
    assert not way.of(channel.Step)
    assert text(engine, way.last.result) == LARGE.upper()


@pytest.mark.parametrize("function", [echo, echo_async])
@pytest.mark.parametrize("lost", ["input", "step"])
def test_a_value_that_is_lost_fails_the_task_for_good(function: Callable[..., Any], lost: str) -> None:
    blobs = Blobs()
    engine = engine_of(function, blobs)
    reference = given(engine)
    first = engine.run(carried=reference)
    assert isinstance(first.last, channel.Completed)
    upper = LARGE.upper().encode()
    (gone,) = (b.name for b in blobs.list("values") if (upper in MemoryBlobs.get(blobs, b.name)) == (lost == "step"))
    blobs.delete(gone)
    way = engine.run(carried=reference)
    assert isinstance(way.last, channel.Failed)
    assert way.last.final
    assert way.last.error_types[0] == "perdure.schemas.errors.ValueLost"
    with pytest.raises(NotFound):
        blobs.get(gone)


def test_a_stop_for_good_ends_the_waiting_for_a_store() -> None:
    blobs = Blobs()
    engine = engine_of(echo, blobs)
    attempt, way = engine.attempt(carried=given(engine))
    blobs.away = 10**9
    calls = []

    def called() -> None:
        calls.append(1)
        if len(calls) == 3:
            way.coming.append(channel.Stop(TASK, engine.epoch, "cancelled"))

    blobs.on_call = called
    attempt.run()
    assert isinstance(way.last, channel.Stopped)
    assert way.last.why == "cancelled"
    assert len(calls) == 3


def test_without_a_store_a_large_value_fails_the_task_and_says_what_to_set() -> None:
    engine = Engine(type_of(echo))
    way = engine.run({"data": "x"})
    assert isinstance(way.last, channel.Completed)

    def grow(ctx: Context) -> str:
        return LARGE

    way = Engine(type_of(grow)).run()
    assert isinstance(way.last, channel.Failed)
    assert way.last.final
    assert "PERDURE_BLOBS" in way.last.message


def test_the_loop_goes_on_while_a_large_value_is_read() -> None:
    """The store answers only once another asyncio task has run."""
    ran = threading.Event()
    blobs = Blobs()
    engine = engine_of(echo_async, blobs)
    attempt, way = engine.attempt(carried=given(engine))

    def called() -> None:
        assert ran.wait(30), "the loop stands still"

    blobs.on_call = called

    async def both() -> None:
        way.loop = asyncio.get_running_loop()
        asyncio.get_running_loop().call_later(0, lambda: asyncio.get_running_loop().call_soon(ran.set))
        await attempt.run_async()

    asyncio.run(both())
    assert isinstance(way.last, channel.Completed)


def test_the_test_kit_has_a_store_too() -> None:
    with Kit([echo]) as kit:
        handle = kit.submit(echo, LARGE)
        assert handle.result() == LARGE.upper()
