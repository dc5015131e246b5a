"""The client's side of the test kit: the real client, over a log on which what it appends is decided at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perdure.handle import Event, Handle
from perdure.schemas.durations import Duration
from perdure.schemas.public import LogLine
from perdure.status import Status
from perdure.streams.log import Log, Member, OnAck, Producer, Reader, Record, TopicPartition, Transactional

if TYPE_CHECKING:
    from perdure.testing import Kit


@dataclass(frozen=True)
class Moment:
    """When something is to die: at the n-th report of a task, counted over all its attempts."""

    task_id: str
    number: int
    after: bool
    """Whether the report is in the log by then."""


class KitHandle(Handle):
    """One task in a test kit. As `perdure.handle.Handle`, but waiting lets virtual time pass."""

    def __init__(self, kit: Kit, task_id: str) -> None:
        super().__init__(kit.client, task_id)
        self._kit = kit

    def wait(self, timeout: Duration | None = None) -> Status:
        """Let virtual time pass until the task has ended, at most `timeout`. See `Kit.run_until` for what it raises."""
        self._kit.run_until(self, within="365d" if timeout is None else timeout)
        return self.status()

    def events(self, *, follow: bool = False) -> Iterator[Event]:
        """The task's history so far; with `follow`, that of the whole task: virtual time passes until its end."""
        if follow:
            self.wait()
        return super().events(follow=False)

    def log_lines(self, last_n: int = 100, *, follow: bool = False) -> Iterator[LogLine]:
        """The newest lines that the task printed or logged; with `follow`, virtual time passes until its end."""
        if follow:
            self.wait()
        return super().log_lines(last_n, follow=False)

    @property
    def reports(self) -> int:
        """How many reports the task's attempts have begun to make: starts, steps, progress, checkpoints, ends."""
        return self._kit.reports(self.id)

    def before_report(self, number: int) -> Moment:
        """When the task is about to make its report `number` (from 1, over all attempts), which is never made then."""
        return Moment(self.id, number, after=False)

    def after_report(self, number: int) -> Moment:
        """When report `number` is in the log and the task's code has not gone on yet."""
        return Moment(self.id, number, after=True)


class ClientLog:
    """The kit's log as its client sees it: `decide` is called after each append, so the answer is there already."""

    def __init__(self, log: Log, decide: Callable[[], None]) -> None:
        self._log, self._decide = log, decide
        self._changed = threading.Condition()
        self._changes = 0
        self._closing = False

    @property
    def partitions(self) -> int:
        return self._log.partitions

    def producer(self) -> Producer:
        return _Producer(self._log.producer(), self._decided)

    def transactional(self, name: str) -> Transactional:
        return self._log.transactional(name)

    def reader(self, *, committed: bool = True, gather_ms: int = 0) -> Reader:
        return _Reader(self._log.reader(committed=committed, gather_ms=gather_ms), self)

    def member(
        self,
        group: str,
        topics: Iterable[str],
        *,
        instance: str | None = None,
        committed: bool = True,
        gather_ms: int = 0,
        on_assigned: Callable[[list[TopicPartition]], None],
        on_revoked: Callable[[list[TopicPartition], bool], None],
    ) -> Member:
        return self._log.member(
            group, topics, instance=instance, committed=committed, gather_ms=gather_ms,
            on_assigned=on_assigned, on_revoked=on_revoked,
        )  # fmt: skip

    def committed(self, group: str, wanted: Iterable[TopicPartition]) -> dict[TopicPartition, int | None]:
        return self._log.committed(group, wanted)

    def topic_id(self, topic: str) -> str:
        return self._log.topic_id(topic)

    def close(self) -> None:
        """Wake whoever waits for records: none will come."""
        self._closing = True
        self._wake()

    @property
    def changes(self) -> int:
        """Counts what may have brought records that the client waits for."""
        return self._changes

    def wait(self, seen: int, timeout_s: float) -> None:
        """Wait until there were more changes than `seen`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._changes > seen, timeout_s)

    def _decided(self) -> None:
        self._decide()
        self._wake()

    def _wake(self) -> None:
        with self._changed:
            self._changes += 1
            self._changed.notify_all()


class _Producer:
    """Has every append decided before it returns."""

    def __init__(self, producer: Producer, decided: Callable[[], None]) -> None:
        self._producer, self._decided = producer, decided

    def append(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, on_ack: OnAck | None = None
    ) -> None:
        self._producer.append(topic, partition, key, value, on_ack)
        self._decided()

    def flush(self, timeout_s: float) -> bool:
        return self._producer.flush(timeout_s)

    def close(self) -> None:
        self._producer.close()


class _Reader:
    """Waits for what the client asked for, not for everything that happens on the log."""

    def __init__(self, reader: Reader, log: ClientLog) -> None:
        self._reader, self._log = reader, log

    def read(self, max_records: int, timeout_s: float) -> list[Record]:
        seen = self._log.changes
        found = self._reader.read(max_records, 0)
        if not found and timeout_s > 0:
            self._log.wait(seen, timeout_s)
            found = self._reader.read(max_records, 0)
        return found

    def assign(self, positions: Mapping[TopicPartition, int]) -> None:
        self._reader.assign(positions)

    def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        return self._reader.bounds(topic, partition)

    def caught_up(self, topic: str, partition: int, target: int) -> bool:
        return self._reader.caught_up(topic, partition, target)

    def close(self) -> None:
        self._reader.close()
