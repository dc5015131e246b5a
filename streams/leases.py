"""Sessions of workers: registration, beats, and how silence becomes the loss of a lease.

Silence proves nothing by itself: a late tick restarts every lease once between two beats, and a lease ends only when a
second tick, at least a beat after the first that found it silent, still finds no beat.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from perdure.schemas import events, ids, inbox, limits
from perdure.schemas.codec import replace
from perdure.schemas.commands import WorkerBeat, WorkerStarted, WorkerStopping
from perdure.schemas.rows import Mark, Session
from perdure.streams import tables, task_lifecycle
from perdure.streams.decision import Moment, Note, Outputs, Part, ToWorker, of_partition, of_task
from perdure.streams.state import State

ENDING = b"ending/"
DRAINING = b"draining/"
_ENDS_AT_ONCE = limits.DECISION_KEYS // 10


def started(s: State, m: Moment, record: WorkerStarted) -> Outputs:
    """A worker announces itself; older sessions of its id are over at once.

    It has a session with each partition: what it says to another one would end its session here.
    """
    if record.session in s.sessions:
        return
    elsewhere = [queue for queue in record.queues if ids.partition_of(queue, s.partitions) != s.partition]
    if elsewhere:
        detail = f"{elsewhere[0]} is no queue of this partition"
        yield rejected(s, m, "illegal", "WorkerStarted", record.session, detail)
        return
    for other in sorted(s.sessions.values(), key=lambda w: w.session):
        if other.worker_id == record.worker_id and other.state != "ended":
            if other.session > record.session:
                yield rejected(s, m, "stale_session", "WorkerStarted", record.session)
                yield ToWorker(inbox.EndSession(worker_id=record.worker_id, session=record.session, why="superseded"))
                return
            yield from end(s, m, other, "superseded")
    row = Session(
        session=record.session, worker_id=record.worker_id, types=record.types, queues=record.queues,
        slots=record.slots, labels=record.labels, host=record.host, pid=record.pid, since=m.now, beat=m.now,
    )  # fmt: skip
    yield _note(row)


def beat(s: State, m: Moment, record: WorkerBeat) -> Outputs:
    """A session is alive; grants that it could read for a lease, and has not, are lost.

    Since when it could is not the time of the input that they were given by: an engine that was away, or is behind,
    executes that input later, and the beats that follow it in the log were sent before. See `tell`.
    """
    session = s.sessions.get(record.session)
    if session is None or session.state == "ended":
        yield rejected(s, m, "stale_session", "WorkerBeat", record.session)
        worker_id = session.worker_id if session else ""
        yield ToWorker(inbox.EndSession(worker_id=worker_id, session=record.session, why="expired"))
        return
    state = "live" if session.state == "suspect" else session.state
    seen = max(session.grants_seen, min(record.grants_seen, session.grants))
    gap = m.now - session.beat > 2 * limits.BEAT_MS  # it, or the broker, was away, and what it reads comes back later
    yield _note(replace(
        session, beat=m.now, suspected=0, restarted=False, full=record.free <= 0, state=state, grants_seen=seen,
        slots=record.slots if record.slots > 0 else session.slots,
        telling_since=m.now if gap else session.telling_since,
    ))  # fmt: skip
    if seen < session.grants:
        scope = tables.leases(record.session)
        for grant, lease in list(islice(s.workable(scope, start=tables.number(seen + 1)), limits.CHUNK)):
            if lease.by < session.readable:
                yield Part(lease.task_id, task_lifecycle.lost(s, m, lease.task_id, "unseen"), (scope, grant))


def tell(s: State, m: Moment, executed: int) -> Outputs:
    """A tick says that all inputs before `executed` were committed when it was appended: what they have granted can be
    read from now on at the latest. Twice a lease is long enough to tell a loss from what is on its way.
    """
    for session in sorted(s.sessions.values(), key=lambda w: w.session):
        due = next_telling(session)
        if due is not None and (m.now >= due or session.telling_since > m.now):
            yield _note(replace(
                session, readable=session.telling, telling=min(executed, m.cause.offset), telling_since=m.now
            ))  # fmt: skip


def stopping(s: State, m: Moment, record: WorkerStopping) -> Outputs:
    """A worker shuts down: no more grants, and what it runs hands back at its next boundary."""
    session = s.sessions.get(record.session)
    if session is None or session.state == "ended":
        yield rejected(s, m, "stale_session", "WorkerStopping", record.session)
        return
    yield _note(replace(session, state="stopping", beat=m.now, suspected=0, restarted=False))
    yield from drain(s, m, record.session, after=b"")


def drain(s: State, m: Moment, session_id: str, after: bytes) -> Outputs:
    """Mark the session's running tasks as draining, a chunk at a time."""
    cursor = DRAINING + session_id.encode()
    leases = list(islice(s.scan(tables.leases(session_id), start=after), limits.CHUNK + 1))
    for _, lease in leases[: limits.CHUNK]:
        yield Part(lease.task_id, _drain(s, m.following(), lease.task_id))
    rest = leases[limits.CHUNK :]
    if rest:
        yield Note(tables.MARKS, cursor, Mark(value=int.from_bytes(rest[0][0], "big")))
    elif s.get(tables.MARKS, cursor) is not None:
        yield Note(tables.MARKS, cursor, None)


def _drain(s: State, m: Moment, task_id: str) -> Outputs:
    if s.known(task_id).stopping == "none":
        yield events.DrainRequested(**of_task(s, m, task_id))


def end(s: State, m: Moment, session: Session, why: str) -> Outputs:
    """The session is over: its leases end now, a chunk at a time."""
    yield _note(replace(session, state="ended"))
    told = "superseded" if why == "superseded" else "expired"
    yield ToWorker(inbox.EndSession(worker_id=session.worker_id, session=session.session, why=told))
    yield from end_leases(s, m, session.session, why)


def end_leases(s: State, m: Moment, session_id: str, why: str) -> Outputs:
    """The next chunk of an ended session's leases; with the last one the session is forgotten."""
    cursor, scope = ENDING + session_id.encode(), tables.leases(session_id)
    for grant, lease in list(islice(s.workable(scope), limits.CHUNK)):
        yield Part(lease.task_id, task_lifecycle.lost(s, m.following(), lease.task_id, why), (scope, grant))
    known = s.get(tables.MARKS, cursor) is not None
    if next(s.suffixes(scope), None) is None:
        if known:
            yield Note(tables.MARKS, cursor, None)
        yield Note(tables.SESSIONS, session_id.encode(), None)
    elif not known:
        yield Note(tables.MARKS, cursor, Mark(text=why))


def can_go_on(s: State, cursor: bytes) -> bool:
    """Whether a cursor's next chunk would find work. A session's end may wait for leases that are left out for now."""
    if not cursor.startswith(ENDING):
        return True
    scope = tables.leases(cursor.removeprefix(ENDING).decode())
    return next(s.suffixes(scope), None) is None or next(s.workable(scope), None) is not None


def restart(s: State, m: Moment) -> Outputs:
    """Time passed unheard: every lease gets one more term, once between two beats."""
    for session in list(s.sessions.values()):
        if session.state != "ended" and not session.restarted:
            state = "live" if session.state == "suspect" else session.state
            yield _note(replace(
                session, restarted=True, beat=m.now, suspected=0, state=state, telling_since=m.now
            ))  # fmt: skip


def overdue(s: State, m: Moment) -> bool:
    """Whether a session should have been looked at more than a beat ago: no tick came, or the clock leapt."""
    looks = (next_look(session) for session in _followed(s))
    return any(look is not None and m.now - look > limits.BEAT_MS for look in looks)


def examine(s: State, m: Moment) -> Outputs:
    """Look for silent sessions, and end those that were found silent before: many small ones or a big one."""
    before = s.touched
    for session in _followed(s):
        if session.state == "ended" or m.now < term_ends(session):
            continue
        if not session.suspected:
            state = "suspect" if session.state == "live" else session.state
            yield _note(replace(session, suspected=max(1, m.now), state=state))
        elif m.now >= session.suspected + limits.BEAT_MS:
            row = (tables.SESSIONS, session.session.encode())
            yield Part(f"session {session.session}", end(s, m, session, "session_ended"), row)
            if s.touched - before > _ENDS_AT_ONCE:
                return


def _followed(s: State) -> list[Session]:
    """The sessions that ticks look at, in order; without those whose end has failed just now."""
    present = (w for name, w in s.sessions.items() if not s.is_put_off(tables.SESSIONS, name.encode()))
    return sorted(present, key=lambda w: w.session)


def term_ends(session: Session) -> int:
    """Partition time at which the session's lease is over, if nothing is heard."""
    return session.beat + limits.LEASE_MS


def next_look(session: Session) -> int | None:
    """Partition time at which a tick has something to do about the session."""
    if session.state == "ended":
        return None
    return session.suspected + limits.BEAT_MS if session.suspected else term_ends(session)


def next_telling(session: Session) -> int | None:
    """Partition time from which on a tick has something to say of grants that the session's last beat had not seen."""
    if session.state == "ended" or session.grants_seen >= session.grants:
        return None
    return max(session.telling_since + limits.LEASE_MS, session.beat + limits.BEAT_MS // 2)


def next_looks(s: State) -> Iterator[int]:
    """Partition times at which a tick has something to do about any session."""
    for session in _followed(s):
        for at in (next_look(session), next_telling(session)):
            if at is not None:
                yield at


def rejected(s: State, m: Moment, why: str, report: str, session: str, detail: str = "") -> events.ReportRejected:
    """A session record or batch that changes nothing."""
    return events.ReportRejected(**of_partition(s, m), why=why, report=report, session=session, detail=detail)


def _note(session: Session) -> Note:
    return Note(tables.SESSIONS, session.session.encode(), session)
