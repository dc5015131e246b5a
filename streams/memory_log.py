"""The log in memory: for simulation, for users' own tests, and as the measure of what the Kafka one has to do.

One process, any number of threads. Time comes from the clock that it is given; records are stamped with it.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from perdure.schemas import limits, topics
from perdure.schemas.errors import Fenced, LogTruncated
from perdure.streams.log import BEGIN, END, Member, OnAck, Record, TopicPartition, TransactionAborted, check_size

Clock = Callable[[], int]
"""Returns the present time in ms."""


@dataclass
class _Entry:
    """A record, and whether a transaction still hides it (open) or has undone it (aborted)."""

    record: Record
    state: str = "committed"


@dataclass
class _Partition:
    entries: list[_Entry] = field(default_factory=list)
    first: int = 0
    """Offset of the first entry kept."""

    @property
    def end(self) -> int:
        return self.first + len(self.entries)


class MemoryLog:
    """A namespace's topics in memory."""

    def __init__(self, clock: Clock, partitions: int = limits.DEFAULT_PARTITIONS) -> None:
        self.clock = clock
        self._partitions = partitions
        self._data: dict[TopicPartition, _Partition] = {
            (t.name, p): _Partition() for t in topics.ALL for p in range(partitions if t.partitioned else 1)
        }
        self._offsets: dict[str, dict[TopicPartition, int]] = {}
        self._epochs: dict[str, int] = {}
        self._open: dict[str, list[_Entry]] = {}
        self._members: dict[str, list[MemoryMember]] = {}
        self._ids = {t.name: str(uuid.uuid5(uuid.NAMESPACE_OID, t.name)) for t in topics.ALL}
        self._changed = threading.Condition(threading.RLock())

    @property
    def partitions(self) -> int:
        return self._partitions

    def producer(self) -> MemoryProducer:
        return MemoryProducer(self)

    def transactional(self, name: str) -> MemoryTransactional:
        with self._changed:
            self._finish(name, "aborted")
            self._epochs[name] = self._epochs.get(name, 0) + 1
            return MemoryTransactional(self, name, self._epochs[name])

    def reader(self, *, committed: bool = True, gather_ms: int = 0) -> MemoryReader:  # noqa: ARG002 - nothing is dear
        return MemoryReader(self, committed)

    def member(
        self,
        group: str,
        topics: Iterable[str],
        *,
        instance: str | None = None,  # noqa: ARG002 - one process has no static members
        committed: bool = True,
        gather_ms: int = 0,  # noqa: ARG002
        on_assigned: Callable[[list[TopicPartition]], None],
        on_revoked: Callable[[list[TopicPartition], bool], None],
    ) -> MemoryMember:
        with self._changed:
            member = MemoryMember(self, group, tuple(topics), committed, on_assigned, on_revoked)
            self._members.setdefault(group, []).append(member)
            self._rebalance(group)
            return member

    def committed(self, group: str, wanted: Iterable[TopicPartition]) -> dict[TopicPartition, int | None]:
        with self._changed:
            known = self._offsets.get(group, {})
            return {where: known.get(where) for where in wanted}

    def topic_id(self, topic: str) -> str:
        return self._ids[topic]

    def records(self, topic: str, partition: int | None = None) -> list[Record]:
        """Every committed record of a topic, by partition and offset: for tests."""
        with self._changed:
            chosen = [p for (t, n), p in sorted(self._data.items()) if t == topic and partition in (None, n)]
            return [e.record for p in chosen for e in p.entries if e.state == "committed"]

    def truncate(self, topic: str, partition: int, first: int) -> None:
        """Delete the records below `first`, as retention does."""
        with self._changed:
            part = self._data[topic, partition]
            del part.entries[: max(0, first - part.first)]
            part.first = max(part.first, first)

    def replace(self, topic: str) -> None:
        """Delete a topic and create it again, empty and with another id."""
        with self._changed:
            for where in [w for w in self._data if w[0] == topic]:
                self._data[where] = _Partition()
            self._ids[topic] = f"{self._ids[topic]}'"

    # What the parts below share ------------------------------------------------------------------------------------

    def _append(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, state: str = "committed"
    ) -> _Entry:
        check_size(topic, key, value)
        part = self._data[topic, partition]
        entry = _Entry(Record(topic, partition, part.end, self.clock(), key, value), state)
        part.entries.append(entry)
        self._changed.notify_all()
        return entry

    def _finish(self, name: str, state: str) -> None:
        for entry in self._open.pop(name, []):
            entry.state = state
        self._changed.notify_all()

    def _slice(self, where: TopicPartition, position: int, most: int, committed: bool) -> tuple[list[Record], int]:
        """Readable records from `position`, and the position behind them; stops before an open transaction."""
        part = self._data[where]
        found: list[Record] = []
        position = max(position, part.first)
        while position < part.end and len(found) < most:
            entry = part.entries[position - part.first]
            if committed and entry.state == "open":
                break
            position += 1
            if not committed or entry.state == "committed":
                found.append(entry.record)
        return found, position

    def _rebalance(self, group: str) -> None:
        members = self._members[group]
        for member in members:
            member.revoke()
        if not members:
            return
        wanted = sorted(where for where in self._data if where[0] in members[0].topics)
        for i, member in enumerate(members):
            member.assign([where for where in wanted if where[1] % len(members) == i])


class MemoryProducer:
    """Appends at once."""

    def __init__(self, log: MemoryLog) -> None:
        self._log = log

    def append(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, on_ack: OnAck | None = None
    ) -> None:
        with self._log._changed:
            entry = self._log._append(topic, partition, key, value)
        if on_ack is not None:
            on_ack(entry.record.offset, None)

    def flush(self, timeout_s: float) -> bool:  # noqa: ARG002 - nothing is ever pending
        return True

    def close(self) -> None:
        pass


class MemoryTransactional:
    """Appends hidden entries and shows them at the commit."""

    def __init__(self, log: MemoryLog, name: str, epoch: int) -> None:
        self._log, self._name, self._epoch = log, name, epoch

    def begin(self) -> None:
        with self._log._changed:
            self._check()
            self._log._open[self._name] = []

    def append(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, on_ack: OnAck | None = None
    ) -> None:
        with self._log._changed:
            self._check()
            entry = self._log._append(topic, partition, key, value, "open")
            self._log._open[self._name].append(entry)
        if on_ack is not None:
            on_ack(entry.record.offset, None)

    def append_all(self, topic: str, partition: int, records: Sequence[tuple[bytes | None, bytes | None]]) -> None:
        for key, value in records:
            self.append(topic, partition, key, value)

    def commit(self, member: Member, offsets: Mapping[TopicPartition, int]) -> None:
        assert isinstance(member, MemoryMember), "the log's own members commit on it"
        with self._log._changed:
            self._check()
            if offsets and member.gone:
                raise TransactionAborted(f"the member of group {member.group} has left")
            self._log._finish(self._name, "committed")
            self._log._offsets.setdefault(member.group, {}).update(offsets)

    def abort(self) -> None:
        with self._log._changed:
            self._check()
            self._log._finish(self._name, "aborted")

    def close(self) -> None:
        pass

    def _check(self) -> None:
        if self._log._epochs[self._name] != self._epoch:
            raise Fenced(f"another producer named {self._name} has taken over")


class _Reading:
    """Positions, and how to read on from them."""

    def __init__(self, log: MemoryLog, committed: bool) -> None:
        self._log, self._committed = log, committed
        self._positions: dict[TopicPartition, int] = {}
        self._paused: set[TopicPartition] = set()

    def read(self, max_records: int, timeout_s: float) -> list[Record]:
        with self._log._changed:
            found = self._take(max_records)
            if not found and timeout_s > 0:
                self._log._changed.wait(timeout_s)
                found = self._take(max_records)
            return found

    def _take(self, most: int) -> list[Record]:
        found: list[Record] = []
        for where in list(self._positions):
            if where in self._paused or len(found) >= most:
                continue
            part = self._log._data[where]
            if not part.first <= self._positions[where] <= part.end:
                side = "below the log's start" if self._positions[where] < part.first else "above the log's end"
                raise LogTruncated(
                    f"offset {self._positions[where]} of {where} is {side}: it holds {part.first} to {part.end}"
                )
            more, self._positions[where] = self._log._slice(
                where, self._positions[where], most - len(found), self._committed
            )
            found += more
        return found

    def _resolve(self, where: TopicPartition, offset: int) -> int:
        part = self._log._data[where]
        return {BEGIN: part.first, END: part.end}.get(offset, offset)

    def close(self) -> None:
        self._positions = {}


class MemoryReader(_Reading):
    """Reads chosen partitions."""

    def assign(self, positions: Mapping[TopicPartition, int]) -> None:
        with self._log._changed:
            self._positions = {where: self._resolve(where, offset) for where, offset in positions.items()}

    def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        with self._log._changed:
            part = self._log._data[topic, partition]
            return part.first, part.end

    def caught_up(self, topic: str, partition: int, target: int) -> bool:
        return self._positions[topic, partition] >= target


class MemoryMember(_Reading):
    """A member of a group; partitions are dealt out anew whenever one joins or leaves."""

    def __init__(
        self,
        log: MemoryLog,
        group: str,
        topics: tuple[str, ...],
        committed: bool,
        on_assigned: Callable[[list[TopicPartition]], None],
        on_revoked: Callable[[list[TopicPartition], bool], None],
    ) -> None:
        super().__init__(log, committed)
        self.group, self.topics = group, topics
        self._on_assigned, self._on_revoked = on_assigned, on_revoked
        self._pending: list[tuple[str, list[TopicPartition]]] = []
        self.gone = False

    def assign(self, mine: list[TopicPartition]) -> None:
        """The group gives this member partitions; it learns of it at its next read."""
        self._pending.append(("assigned", mine))

    def revoke(self, *, lost: bool = False) -> None:
        """The group takes all partitions back, or has given them away (`lost`)."""
        self._pending.append(("lost" if lost else "revoked", []))

    def read(self, max_records: int, timeout_s: float) -> list[Record]:
        self._run_callbacks()
        return super().read(max_records, timeout_s)

    def committed(self, wanted: Iterable[TopicPartition], *, settled: bool = True) -> dict[TopicPartition, int | None]:  # noqa: ARG002 - here they always are
        return self._log.committed(self.group, wanted)

    def tell(self, reached: Mapping[TopicPartition, int]) -> None:
        with self._log._changed:
            if not self.gone:
                self._log._offsets.setdefault(self.group, {}).update(reached)

    def seek(self, topic: str, partition: int, offset: int) -> None:
        with self._log._changed:
            self._positions[topic, partition] = self._resolve((topic, partition), offset)

    def pause(self, wanted: Iterable[TopicPartition]) -> None:
        self._paused |= set(wanted)

    def resume(self, wanted: Iterable[TopicPartition]) -> None:
        self._paused -= set(wanted)

    def close(self) -> None:
        with self._log._changed:
            self._log._members[self.group].remove(self)
            self._log._rebalance(self.group)
        self._positions = {}
        self.gone = True

    def _run_callbacks(self) -> None:
        while self._pending:
            kind, mine = self._pending.pop(0)
            if kind != "assigned":
                gone, self._positions, self._paused = list(self._positions), {}, set()
                if gone:
                    self._on_revoked(gone, kind == "lost")
            else:
                committed = self.committed(mine)
                self._positions = {w: self._resolve(w, BEGIN if committed[w] is None else committed[w]) for w in mine}  # type: ignore[arg-type]
                self._on_assigned(mine)
