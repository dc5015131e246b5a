"""The read side as a process: `perdure server`: projections, views and the HTTP API."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perdure.engine_main import state_directory
from perdure.projections import server
from perdure.projections.processors import DEAD_LETTERS, PROGRESS
from perdure.replies import Replies
from perdure.schemas import codec, ids, json_commands, limits, topics
from perdure.schemas.codec import replace
from perdure.schemas.errors import InfrastructureError, Unreachable
from perdure.streams.host_slots import HostSlot, host_id
from perdure.streams.kafka_log import KafkaLog
from perdure.streams.log import Log
from perdure.streams.processor import Kind
from perdure.streams.runner import Runner

if TYPE_CHECKING:
    from perdure.settings import Settings

_ACK_S = 15.0


def main(
    settings: Settings, *, host: str = "127.0.0.1", port: int = 0, ready: Callable[[str], None] = lambda _: None
) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code. Blocks. `ready` gets the address once it answers.

    Raises `ConfigurationError` or `Unreachable`.
    """
    log = KafkaLog(settings.require_bootstrap(), settings.namespace, options=settings.kafka)
    state = state_directory(settings)
    slot = HostSlot(state, "server")
    instance = f"{host_id(state)}-{slot.number}"
    commands = Commands(log)
    try:
        return server.main(
            log, host=host, port=port, token=settings.api_token, db_path=state / f"views-{slot.number}.sqlite",
            commands=commands, ready=ready,
            background=[_running(log, kind, state / "partition", instance) for kind in (PROGRESS, DEAD_LETTERS)],
        )  # fmt: skip
    finally:
        commands.close()
        slot.release()


def _running(log: Log, kind: Kind, directory: Path, instance: str) -> server.Work:
    """A projection, run until the server stops."""

    def work(stop: threading.Event) -> None:
        runner = Runner(log, kind, directory, instance=instance)
        threading.Thread(target=_stop_with, args=(stop, runner), daemon=True).start()
        runner.run()

    work.__name__ = kind.name
    return work


def _stop_with(stop: threading.Event, runner: Runner) -> None:
    stop.wait()
    runner.stop()


class Commands:
    """Carries JSON commands out: into the log, wherever it lands (the engine routes), and back with the answer."""

    def __init__(self, log: Log) -> None:
        self._id = ids.new_id("api-")
        self._log = log
        self._producer = log.producer()
        self._replies = Replies(log, self._id)

    def __call__(self, body: dict[str, Any]) -> Mapping[str, Any]:
        """The engine's answer. Blocks up to 20 s. Raises `InvalidRequest`, `DecodeError` or `Unreachable`."""
        command = json_commands.parse(json.dumps(body).encode())
        command = replace(command, command_id=command.command_id or ids.new_id(), reply_to=self._id)
        expected = self._replies.expect(command.command_id)
        self._append(codec.encode(command))
        reply = expected.next(limits.VERDICT_MS / 1000)
        if reply is None:
            return {"accepted": True, "decided": False, "command_id": command.command_id, "task_id": command.task_id}
        return {
            "accepted": reply.accepted, "decided": True, "reason": reply.reason, "field": reply.field,
            "command_id": reply.command_id, "task_id": reply.task_id,
        }  # fmt: skip

    def _append(self, record: bytes) -> None:
        done = threading.Event()
        failed: list[InfrastructureError] = []

        def acknowledged(_: int, error: InfrastructureError | None) -> None:
            if error is not None:
                failed.append(error)
            done.set()

        home = ids.partition_of(limits.DEFAULT_QUEUE, self._log.partitions)
        self._producer.append(topics.COMMANDS.name, home, None, record, acknowledged)
        if not done.wait(_ACK_S):
            raise Unreachable(f"Kafka has not acknowledged the command within {_ACK_S:g} s; it may still arrive")
        if failed:
            raise failed[0]

    def close(self) -> None:
        """Let go of the log."""
        self._replies.close()
        self._producer.close()
