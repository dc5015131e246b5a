"""An engine process: a slot of its host, the runner, and the thread that watches the configuration.

Host id = a random UUID in the state directory; the first free slot, held by a file lock, names the process in the
consumer group, so that a restarted process gets its partitions back without a rebalance.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

from perdure.schemas import codec, topics
from perdure.schemas.errors import ConfigurationError, InfrastructureError, Unreachable
from perdure.schemas.public import ConfigRecord
from perdure.schemas.signing import Keys
from perdure.streams import topology
from perdure.streams.config_view import ConfigView
from perdure.streams.decision import BUILD, FEATURE_LEVEL, LEVEL
from perdure.streams.duties import Duties
from perdure.streams.engine import Engine
from perdure.streams.host_slots import HostSlot, host_id
from perdure.streams.kafka_log import KafkaLog
from perdure.streams.lane import wall_clock
from perdure.streams.local_engine import engine_kind
from perdure.streams.log import Producer
from perdure.streams.processor import Kind
from perdure.streams.runner import Runner
from perdure.streams.schema_lookup import SchemaLookup
from perdure.streams.shard import Shard
from perdure.streams.snapshot_taker import SnapshotTaker
from perdure.streams.standbys import Standbys

ENGINES = "engine/"
"""Names in `config`: instance id of an engine process -> build, and highest feature level that it knows."""
_UPLOAD_S = 5.0
"""How long an engine that ends waits for a snapshot under way; one that is not finished was never there."""


def publish_schemas(producer: Producer, config: ConfigView) -> None:
    """Put the schemas that this build writes into `config`, before it writes with them. Raises `Unreachable`."""
    schemas = codec.unpublished_schemas(config.names)
    refused: list[InfrastructureError] = []

    def heard(_offset: int, error: InfrastructureError | None) -> None:
        if error is not None:
            refused.append(error)

    for name in sorted(schemas):
        record = ConfigRecord(name=name, content=json.dumps(schemas[name], separators=(",", ":")).encode())
        producer.append(topics.CONFIG.name, 0, name.encode(), codec.encode(record), heard)
    if not producer.flush(30.0) or refused:
        raise Unreachable(
            "the schemas of this build could not be written to config, and others could not read what it writes"
        ) from next(iter(refused), None)


def namespace_level(config: ConfigView) -> int:
    """The namespace's feature level. What is no level counts as none said: each partition quarantines it."""
    _, content = config.names.get(LEVEL, (0, None))
    try:
        level = 1 if content is None else json.loads(content)["level"]
    except (ValueError, KeyError, TypeError):
        return 1
    return level if isinstance(level, int) else 1


class EngineHost:
    """One engine process."""

    def __init__(
        self,
        log: KafkaLog,
        keys: Keys,
        state_dir: Path,
        *,
        taker: SnapshotTaker | None = None,
        standbys: bool = False,
        on_ready: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`standbys`: keep warm copies of the partitions that other engine processes have."""
        topology.verify_topics(log)
        self._slot = HostSlot(state_dir, "engine")
        self._log, self._keys, self._taker = log, keys, taker
        self._lookup = SchemaLookup(log)
        self._unlearn = codec.learn_from(self._lookup)
        self._config = ConfigView(log)
        self._config.refresh()
        self._refuse_newer()
        self._producer = log.producer()
        publish_schemas(self._producer, self._config)
        instance = f"{host_id(state_dir)}-{self._slot.number}"
        self._introduce(instance)
        self._stopped = threading.Event()
        kind = engine_kind(log.partitions, keys)
        self._standbys = self._stand_by(kind, state_dir) if standbys else None
        self._runner = Runner(
            log,
            kind,
            state_dir / "partition",
            instance=instance,
            committed=False,
            duties=self._duties,
            taker=taker,
            standbys=self._standbys,
            on_ready=on_ready,
        )

    def _stand_by(self, kind: Kind, state_dir: Path) -> Standbys:
        snapshots = None if self._taker is None else self._taker.snapshots
        return Standbys(self._log, kind, state_dir / "standby" / str(self._slot.number), snapshots, wall_clock)

    def _duties(self, shard: Shard) -> Duties:
        assert isinstance(shard.processor, Engine)
        return Duties(shard.processor, self._keys, self._producer, self._config)

    def run(self) -> None:
        """Block until `stop`. Raises what made the engine fail."""
        watcher = threading.Thread(target=self._watch, name="config", daemon=True)
        watcher.start()
        try:
            self._runner.run()
        finally:
            self._stopped.set()
            if self._standbys is not None:
                self._standbys.close(_UPLOAD_S)
            if self._taker is not None:
                self._taker.close(_UPLOAD_S)
            watcher.join(5.0)
            self._config.close()
            self._unlearn()
            self._lookup.close()
            self._producer.close()
            self._slot.release()

    def _introduce(self, instance: str) -> None:
        """Let others know which build this member of the group is. Kafka keeps what a member's first life said."""
        name, content = ENGINES + instance, json.dumps({"build": BUILD, "level": FEATURE_LEVEL}).encode()
        if self._config.names.get(name, (0, None))[1] != content:
            record = ConfigRecord(name=name, content=content)
            self._producer.append(topics.CONFIG.name, 0, name.encode(), codec.encode(record))
            self._producer.flush(_UPLOAD_S)

    def _refuse_newer(self) -> None:
        """Raise `ConfigurationError` when the namespace was raised to features that this build does not know."""
        level = namespace_level(self._config)
        if level > FEATURE_LEVEL:
            raise ConfigurationError(
                f"the namespace {self._log.prefix!r} is at feature level {level}, and this build ({BUILD}) knows "
                f"levels up to {FEATURE_LEVEL}: run a build that knows it"
            )

    def stop(self) -> None:
        """Finish the transactions under way and end."""
        self._runner.stop()

    def _watch(self) -> None:
        try:
            while not self._stopped.is_set():
                if self._config.refresh(0.2):
                    self._refuse_newer()
                    self._runner.wake()
        except BaseException as error:  # noqa: BLE001 - an engine that no longer hears of configuration must not go on
            self._runner.fail(error)
