"""The engine's state made anew from `task-events`, when its changelog is lost: the last way of recovery.

The events hold the durable class: tasks, steps, queue places, timers, epochs, configuration, answers, outboxes. What
they do not hold is begun again: sessions end, so running tasks go back to their queues and workers register again.
The input position is written last. A partition without one is refused by the engine, so a rebuild that is interrupted
is simply done again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from perdure.schemas import codec, topics
from perdure.schemas.errors import InfrastructureError, Unreachable
from perdure.schemas.rows import Mark, Position, Session
from perdure.streams import leases, tables
from perdure.streams.event_fold import EventFold
from perdure.streams.log import Log, time_of
from perdure.streams.store import RocksStore, Store

_READ = 2_000
_FLUSH_S = 60.0
Say = Callable[[str], None]


def fold_partition(log: Log, partition: int, store: Store, say: Say = lambda _: None) -> int:
    """Fold a partition's events into an empty store, as the engine's changelog would hold it; the count of events.

    Raises `EventsIncomplete` when the log does not reach back to the beginning, or `Unreachable`.
    """
    fold = EventFold(store, partition, log.partitions)
    reader = log.reader()
    count, last = 0, Position(offset=0)
    try:
        first, end = reader.bounds(topics.EVENTS.name, partition)
        reader.assign({(topics.EVENTS.name, partition): first})
        while not reader.caught_up(topics.EVENTS.name, partition, end):
            for record in reader.read(_READ, 1.0):
                event = codec.decode(record.value or b"")
                fold.apply(event)
                last = Position(offset=event.cause.offset + 1, at=max(last.at, event.at))
                count += 1
            say(f"partition {partition}: {count:,} of about {end - first:,} events")
    finally:
        reader.close()
    fold.flush()
    fold.require_whole(first)
    store.apply({key: codec.encode(row) for key, row in _sessions_over(store)})
    where = (topics.COMMANDS.name, partition)
    committed = log.committed(topics.ENGINE_GROUP, [where])[where]
    last = Position(offset=max(last.offset, committed or 0), at=last.at)
    if last.offset:
        reader = log.reader(committed=False)
        try:
            # Not only an input that had events: an engine compares, to see that the log is the one it has executed.
            at = time_of(reader, topics.COMMANDS.name, partition, last.offset - 1)
        finally:
            reader.close()
        last = Position(offset=last.offset, at=max(last.at, at or 0))
        store.apply({tables.POSITION: codec.encode(last)})
    return count


def _sessions_over(store: Store) -> Iterator[tuple[bytes, Session | Mark]]:
    """Rows that end every session which still has leases: with its next tick the engine takes the tasks back."""
    over = {tables.session_of_lease(key) for key, _ in store.scan(tables.LEASES)}
    for session in sorted(over):
        row = Session(session=session, worker_id="", types={}, queues=[], slots=0, state="ended")
        yield tables.SESSIONS + session.encode(), row
        yield tables.MARKS + leases.ENDING + session.encode(), Mark(text="session_ended")


def write_changelog(log: Log, partition: int, store: Store) -> int:
    """Append a store's rows to the partition of a new, empty changelog, the input position last; the count of rows.

    Fences every engine that still believes that the partition is its own. Raises `InfrastructureError` if the changelog
    is not empty, or `Unreachable`.
    """
    log.transactional(f"{topics.ENGINE_GROUP}.{partition}").close()
    reader = log.reader()
    _, end = reader.bounds(topics.CHANGELOG.name, partition)
    reader.close()
    if end:
        raise InfrastructureError(f"{topics.CHANGELOG.name}/{partition} is not empty: a rebuild writes to a new topic")
    producer = log.producer()
    failures: list[InfrastructureError] = []
    count, position = 0, store.get(tables.POSITION)

    def append(key: bytes, value: bytes) -> None:
        producer.append(
            topics.CHANGELOG.name, partition, key, value, lambda _, e: None if e is None else failures.append(e)
        )

    def flush() -> None:
        if not producer.flush(_FLUSH_S) or failures:
            raise Unreachable(f"the rows of partition {partition} could not all be appended") from next(
                iter(failures), None
            )

    try:
        for key, value in store.scan(b""):
            if key != tables.POSITION:
                append(key, value)
                count += 1
        flush()
        if position is not None:
            append(tables.POSITION, position)
            flush()
    finally:
        producer.close()
    return count


def _fenced(log: Log) -> list[int]:
    """The ends of task-events, with all transactions on them ended, and every engine fenced that is under way."""
    for partition in range(log.partitions):
        log.transactional(f"{topics.ENGINE_GROUP}.{partition}").close()
    reader = log.reader()
    try:
        return [reader.bounds(topics.EVENTS.name, partition)[1] for partition in range(log.partitions)]
    finally:
        reader.close()


def rebuild(log: Log, folder: Path, replace_changelog: Callable[[], None], say: Say) -> int:
    """Fold all partitions, replace the changelog's topic, write it anew; the count of events. The engine must not run.

    `folder`: an empty one, for what lies in between. Nothing is touched before everything was folded. Raises as
    `fold_partition` and `write_changelog` do, and `InfrastructureError` when an engine wrote meanwhile: one that stood
    still is in no group, and goes on once it wakes up.
    """
    stores = {p: RocksStore(folder / str(p)) for p in range(log.partitions)}
    try:
        before = _fenced(log)
        count = sum(fold_partition(log, p, store, say) for p, store in stores.items())
        if _fenced(log) != before:
            raise InfrastructureError("an engine wrote events while they were folded: stop it, and rebuild again")
        replace_changelog()
        for p, store in stores.items():
            say(f"partition {p}: {write_changelog(log, p, store):,} rows written")
    finally:
        for store in stores.values():
            store.close()
    return count
