"""The server process: the HTTP API with its views, the projections that fill public topics, and a client for commands."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from perdure.client import Client
from perdure.host import HostSlot, default_state_dir, host_id
from perdure.projections import server
from perdure.projections.dead_letters import DeadLetterProcessor
from perdure.projections.progress import ProgressProcessor
from perdure.settings import Settings
from perdure.streams.kafka_log import KafkaLog
from perdure.streams.log import Record
from perdure.streams.processor import Kind, Table, Transaction
from perdure.streams.runner import Runner


class Projection(Protocol):
    """A fold of records into rows; see `perdure.projections`."""

    name: str
    inputs: tuple[str, ...]
    changelog: str | None

    def handle(self, record: Record, tx: Transaction) -> None:
        """Fold one record."""


def main(settings: Settings, *, host: str, port: int, ready: Callable[[str], None]) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code. `ready` gets the address once it answers.

    Raises `Unreachable`, or `ConfigurationError` (no token beyond loopback, address or state directory in use).
    """
    log = KafkaLog(settings.require_bootstrap(), settings.namespace, options=settings.kafka)
    state_dir = settings.state_dir or default_state_dir()
    slot = HostSlot(state_dir, "server")
    instance = f"{host_id(state_dir)}-server-{slot.number}"
    folder = state_dir / f"server-{slot.number}"
    folder.mkdir(exist_ok=True)
    try:
        with Client(log) as client:
            return server.main(
                log,
                host=host,
                port=port,
                token=settings.api_token,
                db_path=folder / "views.sqlite",
                commands=client.carry_out,
                ready=ready,
                background=[
                    Background(log, projection, folder, instance)
                    for projection in (ProgressProcessor(), DeadLetterProcessor())
                ],
            )
    finally:
        slot.release()


class Background:
    """A projection that runs beside the API until it is told to stop."""

    def __init__(self, log: KafkaLog, projection: Projection, folder: Path, instance: str) -> None:
        self.__qualname__ = projection.name
        self._projection = projection
        self._runner = lambda: Runner(log, kind_of(projection), folder, instance=f"{instance}-{projection.name}")

    def __call__(self, stop: threading.Event) -> None:
        """Run until `stop` is set. Raises what the projection failed with."""
        runner = self._runner()
        stopper = threading.Thread(target=lambda: (stop.wait(), runner.stop()), daemon=True)
        stopper.start()
        runner.run()


def kind_of(projection: Projection) -> Kind:
    """The projection as a runner sees it."""
    return Kind(
        name=projection.name,
        inputs=projection.inputs,
        changelog=projection.changelog,
        open=lambda store, _: Table(projection.name, store, projection.handle, projection.inputs),
        plain_changelog=projection.changelog is not None,
    )
