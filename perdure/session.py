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

from perdure.lending import Use, wanted_slots
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
_LOOK_MS = 200
"""How often slots may move while a partition is hungry."""
_UNLANDED = 3
"""Beats that may wait in the producer. In an outage of hours the next one says all that they say."""

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
                name = (record.key or b"").decode(errors="replace")
                if record.value is None:
                    found.pop(name, None)
                    continue
                try:
                    content = json.loads(codec.decode_as(ConfigRecord, record.value).content)
                except (DecodeError, ValueError, RecursionError):
                    continue  # nobody's: the version before it stays in force, here as in the engine
                found[name] = (record.offset, content)
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
        raise Unreachable("what this process works with could not be written to config; is the broker up?") from cause
    return versions


def routing_by_partition(queues: Iterable[str], config: Config, partitions: int) -> dict[int, list[str]]:
    """Partition -> routing keys of the queues that it owns."""
    found: dict[int, list[str]] = {}
    for queue in sorted(set(queues)):
        _, content = config.get(f"queue/{queue}", (0, {}))
        for routing_key in content.get("routing_keys") or [queue]:
            found.setdefault(ids.partition_of(routing_key, partitions), []).append(routing_key)
    return found


# Sessions ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
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
    """Slots lent to this partition, as the newest beat has said or will say."""
    inbox_offset: int
    heard: int
    """When the newest beat that is known to be in the log was sent; at first, when the session began."""
    beat_due: int
    grants_seen: int = 0
    running: int = 0
    """Attempts of the session that hold a slot."""
    held: int = 0
    """Slots lent by the newest word that is known to be in the log."""
    pressed: bool = False
    """Whether a grant has taken the last of the slots: there may be more work than they can do."""
    declined: bool = False
    """Whether a grant was declined: the engine gives no other before the next beat."""
    announced: bool = False
    sent: int = 0
    """Beats handed to the producer."""
    landed: int = 0
    """Those that the log has, or has refused; counted on the log's thread."""

    def take_slot(self) -> None:
        """Another attempt of the session runs."""
        self.running += 1
        self.pressed = self.running >= self.lent

    def free_slot(self) -> None:
        """An attempt of the session has ended."""
        self.running -= 1

    @property
    def hungry(self) -> bool:
        """Whether the partition uses all that it is lent, and may have use for more."""
        return self.pressed and self.running >= self.lent

    @property
    def bound(self) -> int:
        """Slots that nobody else can be lent: the engine may count on them, or they are in use."""
        return max(self.lent, self.held, self.running)

    @property
    def stale_at(self) -> int:
        """When the lease may have ended without the worker's knowledge, if nothing is heard until then."""
        return self.heard + STALE_MS + 1

    def stale(self, now: int) -> bool:
        """Whether the lease may have ended without the worker's knowledge."""
        return now >= self.stale_at

    def orphaned(self, now: int) -> bool:
        """Whether nothing has been heard for so long that the session's tasks are given up.

        One that runs nothing has none. To begin another each ten minutes of an outage would have the engine supersede
        them one after the other when it is over, each with the tasks that it has just been granted.
        """
        return self.running > 0 and now - self.heard > limits.ORPHAN_AFTER_MS


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
        self._look_at, self._moving = 0, False

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def find(self, partition: int, session_id: str) -> Session | None:
        """The session, if it is one of ours and not over."""
        return self._sessions.get((partition, session_id))

    def begin(
        self, lane: Lane, partition: int, session_id: str, routing_keys: list[str], lent: int, offset: int, now: int
    ) -> Session:
        """A new session, announced to its partition."""
        session = Session(lane, partition, session_id, routing_keys, lent, offset, heard=now, beat_due=now, held=lent)
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
        """Send the beats that are due, and those by which slots move to where all are in use."""
        self._look(now)
        for session in self:
            if session.beat_due > now:
                continue
            if not session.announced:
                self._announce(session, now)
            if session.sent - session.landed >= _UNLANDED:
                session.beat_due = now + _LOOK_MS
                continue
            session.beat_due = now + limits.BEAT_MS
            lent = self._lend(session)
            session.pressed = session.hungry  # not by what it gives up now
            session.lent = lent
            offered = free(session)
            session.declined = session.declined and not offered
            message = WorkerBeat(session=session.id, grants_seen=session.grants_seen, free=offered, slots=session.lent)
            session.sent += 1
            self._append(session, message, self._lands(session, self._hears(session, now, lent)))

    def next_beat(self) -> int | None:
        """When the next beat is due, or slots go on moving; None: there is no session."""
        due = min((session.beat_due for session in self), default=None)
        return min(due, self._look_at) if due is not None and self._moving else due

    def _look(self, now: int) -> None:
        """Where a partition is hungry, do not wait for the next beats to move slots."""
        if now < self._look_at:
            return
        self._moving = False
        hungry = {session.lane for session in self if session.hungry}
        if not hungry:
            return
        self._look_at = now + _LOOK_MS
        for session in self:
            if session.lane not in hungry:
                continue
            if self._lend(session) != session.lent:
                session.beat_due, self._moving = now, True
            elif session.held != session.lent:  # others wait for what it has given up
                self._moving = True

    def _lend(self, session: Session) -> int:
        """Slots to lend to the session's partition: fewer at once, more only when others have given them up."""
        lane = [s for s in self if s.lane is session.lane]
        uses = {s.partition: Use(len(s.routing_keys), s.lent, s.running, s.hungry) for s in lane}
        wanted = wanted_slots(session.lane.slots, uses)[session.partition]
        spare = session.lane.slots - sum(s.bound for s in lane)
        return min(wanted, session.lent + max(0, spare))

    def beat_after_decline(self, executor: str, free: int, now: int) -> None:
        """Slots are free: let the engine know at once where it has held back since a grant was declined.

        As many partitions as there are slots, those first that have waited longest: were all told of the same slot, all
        but one would grant in vain. The next beats tell the others.
        """
        declined = [s for s in self if s.declined and s.lane.executor == executor and s.running < s.lent]
        for session in sorted(declined, key=lambda s: s.beat_due)[:free]:
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
        heard = self._hears(session, now, session.lent)

        def on_ack(offset: int, error: InfrastructureError | None) -> None:
            if error is not None:
                session.announced = False
            heard(offset, error)

        self._append(session, message, on_ack)

    def _hears(self, session: Session, sent: int, lent: int) -> OnAck:
        """A beat that cannot be appended needs no repeat: the next one says the same and more."""

        def on_ack(_offset: int, error: InfrastructureError | None) -> None:
            if error is None:
                session.heard = max(session.heard, sent)
                session.held = lent
                self._on_heard(session)

        return on_ack

    def _lands(self, session: Session, hears: OnAck) -> OnAck:
        def on_ack(offset: int, error: InfrastructureError | None) -> None:
            session.landed += 1
            hears(offset, error)

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
