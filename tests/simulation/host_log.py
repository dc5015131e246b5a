"""The log and the disk as one engine process meets them: every call is a point at which something may happen to it.

What happens is the simulator's to say (`Points`): the process dies, its transaction is aborted, the outcome of a commit
stays unknown, another process takes over, an append arrives late, or not at all, or is never acknowledged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from perdure.schemas.errors import Unreachable
from perdure.streams.log import Member, OnAck, OutcomeUnknown, Reader, TopicPartition, TransactionAborted, Transactional
from perdure.streams.memory_log import MemoryLog
from tests.world import HistoryStore

Append = tuple[str, int, bytes | None, bytes | None]


class Points(Protocol):
    """What the simulator does at the points of a process."""

    def at(self, point: str) -> str:
        """A fault that the caller has to bring about, or "". Raises `Crash` where the process dies."""

    def slice_of(self, most: int) -> int:
        """How many records a read brings at the most."""

    def carry(self, append: Callable[[], None], partition: int) -> None:
        """Bring a record to the log at some time, in the order of its partition."""


class HostLog:
    """A log with points. `topics`, offsets and time are those of the one log that all share."""

    def __init__(self, log: MemoryLog, points: Points) -> None:
        self._log, self._points = log, points
        self.partitions = log.partitions
        self.topic_id = log.topic_id

    def producer(self) -> HostProducer:
        return HostProducer(self._log, self._points)

    def transactional(self, name: str) -> HostTransactional:
        self._points.at("open")
        return HostTransactional(self._log.transactional(name), self._points)

    def reader(self, *, committed: bool = True, gather_ms: int = 0) -> HostReader:
        return HostReader(self._log.reader(committed=committed, gather_ms=gather_ms), self._points)

    def member(self, group: str, topics: Iterable[str], **more: Any) -> Member:
        return self._log.member(group, topics, **more)


class HostProducer:
    """Appends outside of transactions: ticks, configuration, what is forwarded."""

    def __init__(self, log: MemoryLog, points: Points) -> None:
        self._plain, self._points = log.producer(), points

    def append(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, on_ack: OnAck | None = None
    ) -> None:
        fault = self._points.at("send")
        if fault == "lost":
            if on_ack is not None:
                on_ack(-1, Unreachable("told to"))
            return
        told = None if fault == "never acknowledged" else on_ack
        self._points.carry(lambda: self._plain.append(topic, partition, key, value, told), partition)
        self._points.at("sent")

    def flush(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        pass


class HostTransactional:
    """A transaction that may be aborted, orphaned or left in doubt at any of its calls."""

    def __init__(self, plain: Transactional, points: Points) -> None:
        self._plain, self._points = plain, points

    def begin(self) -> None:
        self._points.at("begin")
        self._plain.begin()

    def append(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, on_ack: OnAck | None = None
    ) -> None:
        self._plain.append(topic, partition, key, value, on_ack)

    def append_all(self, topic: str, partition: int, records: Sequence[tuple[bytes | None, bytes | None]]) -> None:
        half = len(records) // 2
        self._plain.append_all(topic, partition, records[:half])
        if self._points.at("append") == "aborted":
            raise TransactionAborted("told to")
        self._plain.append_all(topic, partition, records[half:])

    def commit(self, member: Member, offsets: Mapping[TopicPartition, int]) -> None:
        fault = self._points.at("commit")
        if fault == "aborted":
            raise TransactionAborted("told to")
        if fault == "unknown":
            self._plain.abort()
            raise OutcomeUnknown("told to")
        self._plain.commit(member, offsets)
        if self._points.at("committed") == "unknown":
            raise OutcomeUnknown("told to")

    def abort(self) -> None:
        self._points.at("abort")
        self._plain.abort()

    def close(self) -> None:
        self._plain.close()


class HostReader:
    """Reads in slices of any size: restoring is interrupted in the middle."""

    def __init__(self, plain: Reader, points: Points) -> None:
        self._plain, self._points = plain, points
        self.assign, self.bounds, self.caught_up, self.close = plain.assign, plain.bounds, plain.caught_up, plain.close

    def read(self, max_records: int, timeout_s: float) -> Any:
        self._points.at("read")
        return self._plain.read(self._points.slice_of(max_records), 0)


class HostStore(HistoryStore):
    """A disk. What it has of a batch after a crash is all or nothing."""

    def __init__(self, points: Points) -> None:
        super().__init__()
        self.points = points

    def apply(self, writes: Mapping[bytes, bytes | None]) -> None:
        self.points.at("store")
        super().apply(writes)
        self.points.at("stored")

    def without_last(self, batches: int) -> HistoryStore:
        """A disk that lacks the last batches."""
        older = HostStore(self.points)
        for writes in self.batches[: max(0, len(self.batches) - batches)]:
            HistoryStore.apply(older, writes)
        return older
