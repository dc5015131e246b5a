"""All partitions of the engine in one thread, over any log: for simulation and for users' own tests.

`pump` does what a host's threads do, in a fixed order, and returns when nothing more is to be done at this moment.
"""

from __future__ import annotations

from collections.abc import Callable

from perdure.schemas import topics
from perdure.schemas.signing import Keys
from perdure.streams.config_view import ConfigView
from perdure.streams.duties import Duties
from perdure.streams.engine import Engine
from perdure.streams.log import Log
from perdure.streams.processor import Kind
from perdure.streams.shard import Shard
from perdure.streams.store import MemoryStore, Store


def engine_kind(partitions: int, keys: Keys) -> Kind:
    """The engine as a runner sees it."""
    return Kind(
        name="engine",
        inputs=(topics.COMMANDS.name,),
        changelog=topics.CHANGELOG.name,
        open=lambda store, partition: Engine(store, partition, partitions, keys),
    )


class LocalEngine:
    """The engine, run by hand. `stores` survive a crash when they are handed to the next instance."""

    def __init__(
        self, log: Log, keys: Keys, clock: Callable[[], int], stores: dict[int, Store] | None = None, batch: int = 100
    ) -> None:
        self._log, self._keys, self._clock, self._batch = log, keys, clock, batch
        self.stores: dict[int, Store] = {} if stores is None else stores
        self.shards: dict[int, Shard] = {}
        self.duties: dict[int, Duties] = {}
        self._config = ConfigView(log)
        self._config.refresh()
        self._producer = log.producer()
        self._member = log.member(
            topics.ENGINE_GROUP, [topics.COMMANDS.name], on_assigned=lambda _: None, on_revoked=lambda *_: None
        )
        self._member.read(0, 0)
        for partition in range(log.partitions):
            self._open(partition)

    def _open(self, partition: int) -> None:
        shard = Shard(
            engine_kind(self._log.partitions, self._keys), partition, log=self._log, member=self._member,
            store=self.stores.setdefault(partition, MemoryStore()), transactional_id=f"engine.{partition}",
        )  # fmt: skip
        while not shard.restore_some():
            pass
        offset = shard.start_positions()[topics.COMMANDS.name]
        self._member.seek(topics.COMMANDS.name, partition, 0 if offset is None else offset)
        self.shards[partition] = shard
        self.duties[partition] = Duties(self.engine(partition), self._keys, self._producer, self._config)

    def engine(self, partition: int) -> Engine:
        """The processor of a partition."""
        processor = self.shards[partition].processor
        assert isinstance(processor, Engine)
        return processor

    def step(self) -> bool:
        """Read and execute one round of records, or see to duties; False if there was nothing to do."""
        worked = [self.step_partition(partition) for partition in self.shards]
        return any(worked)

    def step_partition(self, partition: int, still_mine: Callable[[], bool] = lambda: True) -> bool:
        """Do what `step` does, for one partition; the others stand still. `still_mine`: see `Shard.run_batch`."""
        self._config.refresh()
        others = [(topics.COMMANDS.name, p) for p in self.shards if p != partition]
        self._member.pause(others)
        records = self._member.read(self._batch, 0)
        self._member.resume(others)
        if not records:
            self.duties[partition].perform(self._clock())
        elif self.shards[partition].run_batch(records, still_mine):
            self._member.tell(self.shards[partition].reached)
            self.duties[partition].after_commit(self._clock())
        return bool(records)

    def pump(self, rounds: int = 10_000) -> None:
        """Step until nothing more happens at this moment."""
        for _ in range(rounds):
            if not self.step() and not self.step():
                return
        raise AssertionError(f"the engine still has work after {rounds} rounds")

    def next_due(self) -> int | None:
        """Host time in ms of the next timer anywhere; None: nothing waits for time."""
        ticks = [t for p in self.shards if (t := self.engine(p).next_tick()) is not None]
        return min(ticks, default=None)

    def close(self) -> None:
        """Stop, as a crash would: nothing is finished first."""
        self._config.close()
        self._member.close()
