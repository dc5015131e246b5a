"""The store that a partition starts with: the nearest one from which its changelog leads to the present.

In this order: the local store, or the warm copy that was kept of another member's, whichever is newer; the newest
snapshot that can be used; an empty store, when the changelog is whole. What is passed over is named in the log, with
the reason. When none will do, recovery is refused: nothing starts half.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from perdure.schemas import topics
from perdure.schemas.errors import InfrastructureError, LogTruncated, NotFound
from perdure.streams.generations import Generations
from perdure.streams.log import Log
from perdure.streams.processor import Kind
from perdure.streams.shard import AS_OF, position_of
from perdure.streams.snapshots import Place, SnapshotRefused, Snapshots
from perdure.streams.store import RocksStore, StoreDamaged

MARGIN_MS = 3_600_000
"""By how much a store has to be younger than the oldest tombstone that may be gone: clocks differ."""
_DELETE_RETENTION_MS = 86_400_000
"""Kafka's default of delete.retention.ms."""
LOG = logging.getLogger("perdure")


@dataclass(frozen=True)
class Span:
    """What a changelog holds now."""

    first: int
    end: int
    oldest: int
    """Wall time, ms. A store that was last written before it may keep rows whose tombstones are gone."""


def open_store(
    log: Log,
    kind: Kind,
    place: Place,
    generations: Generations,
    snapshots: Snapshots | None,
    now: int,
    warm: Path | None = None,
    go_on: Callable[[], bool] = lambda: True,
) -> RocksStore:
    """The store to start with; `now` is wall time in ms. Blocks, for minutes when a large snapshot is fetched.

    warm: the directory of a closed store on the same file system, to be taken if it is the newest there is.

    go_on: asked before each file of a snapshot; raises `GivenUp` when it says no.

    Raises `LogTruncated` when no way leads to the present, `Unreachable`, or another `InfrastructureError`.
    """
    if kind.changelog is None:
        return generations.open() or generations.begin()
    span = _span(log, kind.changelog, place.partition, now)
    store = _newer(_local(generations, span), warm, generations, span)
    store = store or _from_snapshot(generations, snapshots, place, span, go_on)
    if store is None:
        if span.first > 0:
            raise LogTruncated(
                f"{kind.changelog}/{place.partition} begins at {span.first}: rows were deleted from it, and neither a "
                f"local store nor a snapshot reaches that far. Nothing is started half: restore the topic, or rebuild "
                f"the state from task-events by `perdure rebuild --from-events`"
            )
        store = generations.begin()
        store.apply({AS_OF: now.to_bytes(8, "big")})
    generations.tidy(store)
    return store


def _span(log: Log, changelog: str, partition: int, now: int) -> Span:
    reader = log.reader()
    try:
        first, end = reader.bounds(changelog, partition)
    finally:
        reader.close()
    kept = int(topics.BY_NAME[changelog].settings.get("delete.retention.ms", _DELETE_RETENTION_MS))
    return Span(first, end, now - kept + MARGIN_MS)


def _local(generations: Generations, span: Span) -> RocksStore | None:
    store = generations.open()
    if store is None:
        return None
    try:
        why = _unusable(store, span)
    except StoreDamaged as error:
        why = str(error)
    if why is None:
        return store
    LOG.warning("the store %s is not used: %s", store.path, why)
    store.close()
    return None


def _newer(local: RocksStore | None, warm: Path | None, generations: Generations, span: Span) -> RocksStore | None:
    """The local store, or the warm copy as its next generation."""
    if warm is None:
        return local
    try:
        copy = RocksStore(warm)
        try:
            why, position = _unusable(copy, span), position_of(copy)
        finally:
            copy.close()
    except InfrastructureError as error:
        LOG.warning("the warm copy is not used: %s", error)
        return local
    if why is not None:
        LOG.warning("the warm copy %s is not used: %s", warm, why)
        return local
    if local is not None:
        if position_of(local) >= position:
            return local
        local.close()
    LOG.info("the warm copy %s is taken, which stands at %d of %d", warm, position, span.end)
    return generations.adopt(warm)


def _unusable(store: RocksStore, span: Span) -> str | None:
    as_of = store.get(AS_OF)
    if as_of is None:
        return "it does not say as of when it is"
    if int.from_bytes(as_of, "big") < span.oldest:
        return "it is so old that deletions made since may be gone from the changelog"
    offset = position_of(store)
    if offset < span.first:
        return f"it stands at {offset}, but the changelog begins at {span.first}"
    return None


def _from_snapshot(
    generations: Generations, snapshots: Snapshots | None, place: Place, span: Span, go_on: Callable[[], bool]
) -> RocksStore | None:
    disproved = generations.disproved()
    if disproved and span.first == 0:
        # The next one may well have the same file. The changelog's records are under checksums of their own.
        LOG.warning("no snapshot is used: the store that was made of %s was found damaged", ", ".join(disproved))
        return None
    for name in _names(snapshots, place):
        assert snapshots is not None, "it has just named one"
        if name in disproved:
            LOG.warning("the snapshot %s is not used: the store that was made of it was found damaged", name)
            continue
        try:
            manifest = snapshots.read(name, place, first=span.first, end=span.end, oldest=span.oldest)
            LOG.info("partition %s is fetched from %s", place.partition, name)
            draft = generations.draft()
            snapshots.download(manifest, draft, go_on)
            return _checked(generations.adopt(draft, [name, *disproved]), name, manifest.changelog_offset)
        except (InfrastructureError, NotFound) as error:
            LOG.warning("the snapshot is not used: %s", error)
    return None


def _names(snapshots: Snapshots | None, place: Place) -> list[str]:
    """Names of the snapshots there are. A store that cannot be reached has none to give: the changelog will do."""
    try:
        return [] if snapshots is None else snapshots.names(place)
    except InfrastructureError as error:
        LOG.warning("no snapshot is used: %s", error)
        return []


def _checked(store: RocksStore, name: str, offset: int) -> RocksStore:
    """The store, if it is where its manifest says."""
    if position_of(store) != offset:
        store.close()
        raise SnapshotRefused(f"{name} says that it stands at {offset}, and the store in it says otherwise")
    return store
