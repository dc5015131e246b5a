"""Sessions: how a worker announces itself to each partition that owns one of its queues, and keeps saying it is alive.

A worker process has one session per partition; all begin with the same id. The engine ends a session that it does not
hear (`expired`) or that a newer one of the same worker id replaces (`superseded`); an expired one is followed by a new
session of that partition alone. Times here are milliseconds of a monotonic clock, given as arguments.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from perdure.schemas import codec, ids, limits, signing, topics
from perdure.schemas.commands import SessionRecord, WorkerBeat, WorkerStarted, WorkerStopping
from perdure.schemas.errors import DecodeError, InfrastructureError, Unreachable
from perdure.schemas.inbox import InboxRecord
from perdure.schemas.public import ConfigRecord, Quarantined
from perdure.streams.log import Log, OnAck, Producer, Reader, Record

STALE_MS = limits.LEASE_MS - limits.BEAT_MS
"""Age of the newest acknowledged beat from which the lease may end before the worker hears of it."""
PUBLISH_TIMEOUT_S = 30.0
INBOX_RECORDS = 500

Config = dict[str, tuple[int, Any]]
"""Name -> (version, content) of everything in `config`."""


# Configuration at start ----------------------------------------------------------------------------------------------


def read_config(log: Log) -> Config:
    """All of `config` as it stands now. Blocks while it reads; raises `InfrastructureError`."""
    found: Config = {}
    reader = log.reader()
    try:
        first, end = reader.bounds(topics.CONFIG.name, 0)
        reader.assign({(topics.CONFIG.name, 0): first})  # by number: a consumer takes half a second to look BEGIN up
        while not reader.caught_up(topics.CONFIG.name, 0, end):
            for record in reader.read(1_000, 1.0):
                name = (record.key or b"").decode()
                if record.value is None:
                    found.pop(name, None)
                else:
                    content = codec.decode_as(ConfigRecord, record.value).content
                    found[name] = (record.offset, json.loads(content))
    finally:
        reader.close()
    return found


def publish(log: Log, known: Config, wanted: Mapping[str, Any], issued_by: str, at: int) -> dict[str, int]:
    """Append what of `wanted` (name -> content) is missing or different in `known`; name -> version of all of it.

    Blocks until the appends, if there are any, are acknowledged. Raises `Unreachable` after 30 s.
    """
    versions = {name: known[name][0] for name, content in wanted.items() if name in known and known[name][1] == content}
    missing = wanted.keys() - versions.keys()
    if not missing:
        return versions
    failures: list[InfrastructureError] = []

    def noting(name: str) -> OnAck:
        def note(offset: int, error: InfrastructureError | None) -> None:
            if error is None:
                versions[name] = offset
            else:
                failures.append(error)

        return note

    producer = log.producer()
    try:
        for name in missing:
            content = json.dumps(wanted[name], sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
            record = ConfigRecord(name=name, content=content, issued_by=issued_by, at=at)
            producer.append(topics.CONFIG.name, 0, name.encode(), codec.encode(record), noting(name))
        done = producer.flush(PUBLISH_TIMEOUT_S)
    finally:
        producer.close()
    if failures or not done:
        cause = next(iter(failures), None)
        raise Unreachable("the worker's types could not be written to config; is the broker up?") from cause
    return versions


def routing_by_partition(queues: Iterable[str], config: Config, partitions: int) -> dict[int, list[str]]:
    """Partition -> routing keys of the queues that it owns."""
    found: dict[int, list[str]] = {}
    for queue in sorted(set(queues)):
        _, content = config.get(f"queue/{queue}", (0, {}))
        for routing_key in content.get("routing_keys") or [queue]:
            found.setdefault(ids.partition_of(routing_key, partitions), []).append(routing_key)
    return found


def share_out(slots: int, weights: Mapping[int, int]) -> dict[int, int]:
    """Slots lent to each partition: one at least, the others in proportion to its weight."""
    spare, total = max(0, slots - len(weights)), sum(weights.values())
    exact = {p: spare * w / total for p, w in weights.items()}
    lent = {p: 1 + int(share) for p, share in exact.items()}
    left = spare - sum(int(share) for share in exact.values())
    for p in sorted(weights, key=lambda p: (int(exact[p]) - exact[p], p))[:left]:
        lent[p] += 1
    return lent


# Sessions ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lane:
    """This worker's slots for one executor.

    The engine counts one number of slots for each worker. A process that offers both kinds is two workers to it, so a
    grant always finds the kind of slot that it was counted for.
    """

    worker_id: str
    executor: str
    """process or async."""
    types: dict[str, int]
    """Task type -> version of its configuration."""
    slots: int


@dataclass(eq=False)
class Session:
    """A lane's standing with one partition, as far as the worker knows."""

    lane: Lane
    partition: int
    id: str
    routing_keys: list[str]
    lent: int
    """Slots lent to this partition."""
    inbox_offset: int
    heard: int
    """When the newest beat that is known to be in the log was sent; at first, when the session began."""
    beat_due: int
    grants_seen: int = 0
    running: int = 0
    """Attempts of the session that hold a slot."""
    declined: bool = False
    """Whether a grant was declined: the engine gives no other before the next beat."""
    announced: bool = False

    @property
    def stale_at(self) -> int:
        """When the lease may have ended without the worker's knowledge, if nothing is heard until then."""
        return self.heard + STALE_MS + 1

    def stale(self, now: int) -> bool:
        """Whether the lease may have ended without the worker's knowledge."""
        return now >= self.stale_at

    def orphaned(self, now: int) -> bool:
        """Whether nothing has been heard for so long that the session's tasks are given up."""
        return now - self.heard > limits.ORPHAN_AFTER_MS


class Sessions:
    """All sessions of this process. For the main thread, but `on_heard` is called on the log's threads."""

    def __init__(
        self,
        producer: Producer,
        signer: tuple[str, bytes],
        on_heard: Callable[[Session], None],
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self._producer, self._signer, self._on_heard = producer, signer, on_heard
        self._labels = dict(labels or {})
        self._sessions: dict[tuple[int, str], Session] = {}

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def find(self, partition: int, session_id: str) -> Session | None:
        """The session, if it is one of ours and not over."""
        return self._sessions.get((partition, session_id))

    def begin(
        self, lane: Lane, partition: int, session_id: str, routing_keys: list[str], lent: int, offset: int, now: int
    ) -> Session:
        """A new session, announced to its partition."""
        session = Session(lane, partition, session_id, routing_keys, lent, offset, heard=now, beat_due=now)
        self._sessions[partition, session_id] = session
        self._announce(session, now)
        return session

    def end(self, session: Session) -> None:
        """The session is over."""
        del self._sessions[session.partition, session.id]

    def renew(self, session: Session, now: int) -> Session:
        """End a session and begin the one that follows it. The inbox is being read on, so nothing is missed."""
        self.end(session)
        return self.begin(
            session.lane, session.partition, new_session_id(), session.routing_keys, session.lent,
            session.inbox_offset, now,
        )  # fmt: skip

    def beat(self, now: int, free: Callable[[Session], int]) -> None:
        """Send the beats that are due."""
        for session in self:
            if session.beat_due > now:
                continue
            if not session.announced:
                self._announce(session, now)
            session.beat_due = now + limits.BEAT_MS
            message = WorkerBeat(session=session.id, grants_seen=session.grants_seen, free=free(session))
            self._append(session, message, self._hears(session, now))

    def next_beat(self) -> int | None:
        """When the next beat is due; None: there is no session."""
        return min((session.beat_due for session in self), default=None)

    def beat_after_decline(self, executor: str, now: int) -> None:
        """A slot is free: let the engine know of it at once where it has held back since a grant was declined."""
        for session in self:
            if session.declined and session.lane.executor == executor:
                session.declined = False
                session.beat_due = now

    def stop(self, reason: str) -> None:
        """Tell every partition that this worker takes no more work."""
        for session in self:
            self._append(session, WorkerStopping(session=session.id, reason=reason), None)

    def _announce(self, session: Session, now: int) -> None:
        session.announced = True
        message = WorkerStarted(
            session=session.id, worker_id=session.lane.worker_id, types=session.lane.types,
            queues=session.routing_keys, slots=session.lent, inbox_offset=session.inbox_offset,
            labels=self._labels, host=socket.gethostname(), pid=os.getpid(),
        )  # fmt: skip
        heard = self._hears(session, now)

        def on_ack(offset: int, error: InfrastructureError | None) -> None:
            if error is not None:
                session.announced = False
            heard(offset, error)

        self._append(session, message, on_ack)

    def _hears(self, session: Session, sent: int) -> OnAck:
        """A beat that cannot be appended needs no repeat: the next one says the same and more."""

        def on_ack(_offset: int, error: InfrastructureError | None) -> None:
            if error is None:
                session.heard = max(session.heard, sent)
                self._on_heard(session)

        return on_ack

    def _append(self, session: Session, message: SessionRecord, on_ack: OnAck | None) -> None:
        value = signing.signed(message, *self._signer)
        key = session.lane.worker_id.encode()
        self._producer.append(topics.COMMANDS.name, session.partition, key, value, on_ack)


def new_session_id() -> str:
    """A fresh session id, ordered by time."""
    return ids.new_id("s-")


# The inbox -----------------------------------------------------------------------------------------------------------


class Inbox(threading.Thread):
    """Reads `worker-inbox` and hands over what may be addressed to this worker, on a thread of its own.

    The engine does not know the worker of a session that is over; what it says to such a one has an empty key.
    """

    def __init__(
        self,
        reader: Reader,
        producer: Producer,
        worker_ids: Iterable[str],
        deliver: Callable[[int, InboxRecord], None],
        fail: Callable[[Exception], None],
    ) -> None:
        super().__init__(name="perdure-inbox", daemon=True)
        self._reader, self._producer = reader, producer
        self._keys = {worker_id.encode() for worker_id in worker_ids} | {b""}
        self._deliver, self._fail = deliver, fail
        self._closing = threading.Event()

    def run(self) -> None:
        try:
            while not self._closing.is_set():
                for record in self._reader.read(INBOX_RECORDS, 0.25):
                    if record.key in self._keys and record.value is not None:
                        self._take(record, record.value)
        except Exception as error:  # noqa: BLE001 - raised again by the main thread
            self._fail(error)
        finally:
            self._reader.close()

    def close(self) -> None:
        """Stop reading; waits for the thread, 2 s at the most."""
        self._closing.set()
        self.join(2.0)

    def _take(self, record: Record, value: bytes) -> None:
        try:
            message = codec.decode(value)
        except DecodeError as error:
            self._quarantine(record, value, error)
            return
        self._deliver(record.partition, message)

    def _quarantine(self, record: Record, value: bytes, error: DecodeError) -> None:
        """Nobody can execute the record; a grant in it is given to another worker when its lease ends."""
        note = Quarantined(
            topic=record.topic, partition=record.partition, offset=record.offset, at=record.at, reader="worker",
            cause=error.code, detail=str(error), key=record.key,
            record=value[: limits.QUARANTINE_KEPT], size=len(value),
        )  # fmt: skip
        self._producer.append(topics.QUARANTINE.name, record.partition, None, codec.encode(note))
