"""The read side as a process: `perdure server`: projections, views and the HTTP API."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from confluent_kafka import Consumer, KafkaException, TopicPartition

from perdure.engine_main import state_directory
from perdure.process import collect_seldom
from perdure.projections import server
from perdure.projections.processors import DEAD_LETTERS, PROGRESS
from perdure.replies import Replies
from perdure.schemas import codec, ids, json_commands, limits, topics
from perdure.schemas.codec import replace
from perdure.schemas.errors import InfrastructureError, Unreachable
from perdure.session import publish, read_config
from perdure.standstill import Standstill
from perdure.streams.host_slots import HostSlot, host_id
from perdure.streams.kafka_connection import quiet
from perdure.streams.kafka_log import KafkaLog
from perdure.streams.log import Log
from perdure.streams.log import TopicPartition as Where
from perdure.streams.processor import Kind
from perdure.streams.runner import Runner
from perdure.streams.schema_lookup import SchemaLookup
from perdure.value_sweeper import Sweeper

if TYPE_CHECKING:
    from perdure.settings import Settings

_ACK_S = 15.0
_ANSWER_S = 3.0
MEASURE_EVERY_S = 5.0
UNKNOWN_S = 30.0
"""So long may nothing be known of a group before health says so."""


def main(
    settings: Settings, *, host: str = "127.0.0.1", port: int = 0, ready: Callable[[str], None] = lambda _: None
) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code. Blocks. `ready` gets the address once it answers.

    The API answers to addresses, to `host`, and to the name in the address that clients are given (`settings.api`).
    Raises `ConfigurationError` or `Unreachable`.
    """
    collect_seldom()
    log = KafkaLog(settings.require_bootstrap(), settings.namespace, options=settings.kafka)
    state = state_directory(settings)
    slot = HostSlot(state, "server")
    instance = f"{host_id(state)}-{slot.number}"
    lookup = SchemaLookup(log)
    unlearn = codec.learn_from(lookup)
    known = read_config(log)
    schemas = codec.unpublished_schemas(known)  # others have to be able to read what it writes
    publish(log, known, schemas, instance, time.time_ns() // 1_000_000)
    commands = Commands(log)
    large = settings.large_values(log.topic_id)
    projections = [Projection(log, kind, state / "partition", instance) for kind in (PROGRESS, DEAD_LETTERS)]
    sweeping = {"large values": Sweeper(large, commands).run} if settings.blobs is not None else {}
    engine = Lag(log, topics.ENGINE_GROUP, (topics.COMMANDS.name,), committed=False)
    name = urlsplit(settings.api or "").hostname
    try:
        return server.main(
            log, host=host, port=port, token=settings.api_token, db_path=state / f"views-{slot.number}.sqlite",
            commands=commands, fetch=large.fetched, ready=ready,
            background={p.name: p.run for p in projections} | {"engine-lag": engine.watch} | sweeping,
            lags=lambda: {p.name: p.lag for p in (engine, *projections)},
            problems=lambda: [problem for p in (engine, *projections) for problem in p.problems()],
            names=[name] if name else [],
        )  # fmt: skip
    finally:
        commands.close()
        unlearn()
        lookup.close()
        slot.release()


class Lag:
    """How far a consumer group is behind its inputs."""

    def __init__(self, log: KafkaLog, group: str, inputs: Sequence[str], *, committed: bool = True) -> None:
        self.name = group
        self.lag: Mapping[str, int] = {}
        """Topic -> records that the group, in all processes together, has still to read; as last measured."""
        self._log, self._inputs = log, inputs
        self._standstill = Standstill(log, committed=committed)
        self._stands: list[str] = []
        self._measured_at = time.monotonic()
        self._why = "the broker has not answered yet"

    def problems(self) -> list[str]:
        """What is wrong with the group, in words."""
        unknown = time.monotonic() - self._measured_at
        if unknown > UNKNOWN_S:
            return [f"{self.name}: how far it is behind could not be measured for {unknown:.0f} s: {self._why}"]
        return [f"{self.name}: {text}" for text in self._stands]

    def watch(self, stop: threading.Event) -> None:
        """Measure now and then until `stop` is set."""
        # A consumer that never joins its group. An admin client asks for a group's offsets too, but where the broker
        # does not answer in time librdkafka may end the process (its issue 4605).
        # What is not committed yet counts too: it is what a transaction that hangs keeps from its readers.
        own = {"group.id": self._log.prefix + self.name, "isolation.level": "read_uncommitted", "error_cb": quiet}
        with closing(Consumer(self._log.config(own))) as consumer:
            while not stop.wait(MEASURE_EVERY_S):
                try:
                    self._measure(consumer)
                except (KafkaException, InfrastructureError) as error:  # if it stays so, `problems` says that
                    # The text of an error that is not ours may hold anything.
                    self._why = str(error) if isinstance(error, InfrastructureError) else type(error).__name__

    def _measure(self, consumer: Consumer) -> None:
        lag: dict[str, int] = {}
        places: dict[Where, tuple[int, int, int]] = {}
        for topic in self._inputs:
            wheres = [TopicPartition(self._log.prefix + topic, p) for p in range(self._log.partitions)]
            lag[topic] = 0
            for where in consumer.committed(wheres, _ANSWER_S):
                if where.error is not None:
                    raise KafkaException(where.error)
                first, end = consumer.get_watermark_offsets(where, _ANSWER_S)
                places[topic, where.partition] = max(0, where.offset), first, end
                # The engine writes in transactions: last in a partition comes the marker of one, which is no record.
                lag[topic] += max(0, end - 1 - max(first, where.offset))
        self.lag = lag
        self._stands = self._standstill.found(places)
        self._measured_at = time.monotonic()


class Projection(Lag):
    """A projection in this process, which shares its partitions with the other servers of the namespace."""

    def __init__(self, log: KafkaLog, kind: Kind, directory: Path, instance: str | None = None) -> None:
        super().__init__(log, kind.name, kind.inputs)
        self._kind, self._directory, self._instance = kind, directory, instance
        self._runner: Runner | None = None

    def problems(self) -> list[str]:
        """With each partition of this process that is refused, and why."""
        refused = {} if self._runner is None else self._runner.refused()
        return [
            *super().problems(),
            *(f"{self.name}/{number} is refused: {error}" for number, error in refused.items()),
        ]

    def run(self, stop: threading.Event) -> None:
        """Fold until `stop` is set. Raises what makes the runner fail."""
        self._runner = runner = Runner(self._log, self._kind, self._directory, instance=self._instance)
        threading.Thread(target=self._watch, args=(stop, runner), name=f"{self.name}-lag", daemon=True).start()
        runner.run()

    def _watch(self, stop: threading.Event, runner: Runner) -> None:
        """Measure, and end the runner when `stop` is set."""
        try:
            self.watch(stop)
        finally:
            runner.stop()


class Commands:
    """Carries JSON commands out: into the log, wherever it lands (the engine routes), and back with the answer."""

    def __init__(self, log: Log) -> None:
        """Blocks until Kafka has answered, ≤ 10 s. Raises `Unreachable`."""
        self._id = ids.new_id("api-")
        self._log = log
        self._producer = log.producer()
        self._replies = Replies(log, self._id)
        self._replies.expect(self._id)  # begins to read now: later, commands would wait for that one after another

    def __call__(self, body: dict[str, Any]) -> Mapping[str, Any]:
        """The engine's answer. Blocks up to 20 s. Raises `InvalidRequest`, `DecodeError` or `Unreachable`."""
        # As short as it came: escapes for other letters than ASCII could make a command too large that is not.
        command = json_commands.parse(json.dumps(body, ensure_ascii=False).encode(errors="surrogatepass"))
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
