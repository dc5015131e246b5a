"""What workers report about the attempts they run.

A report counts if its entry carries the grant's token, epoch and session, and its number is the next one. A repeat is
dropped; a gap ends the epoch, for what is missing can never be told from what was never done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from perdure.schemas import events, inbox, limits, references, reports
from perdure.schemas.codec import replace
from perdure.schemas.commands import HEARS_CHECKPOINTS
from perdure.schemas.common import ErrorInfo, Usage
from perdure.schemas.errors import DecodeError
from perdure.schemas.events import ProgressReported
from perdure.schemas.reports import Report, ReportEntry
from perdure.schemas.rows import Mark, Step, TaskState
from perdure.streams import ready_queue, routing, tables, task_lifecycle
from perdure.streams.decision import Moment, Note, Outputs, Telemetry, ToWorker, of_partition, of_task
from perdure.streams.state import State

RETIRING = b"retiring/"


def entry(s: State, m: Moment, session: str, e: ReportEntry, token_holds: bool) -> Outputs:
    """The reports of one attempt."""
    t = s.task(e.task_id)
    kind = type(e.reports[0]).__name__ if e.reports else "ReportEntry"
    fault = _fault(t, session, e, token_holds)
    if fault is not None:
        yield _rejected(s, m, e, session, fault, kind)
        here = routing.partition_of(s, e.task_id) == s.partition  # not so: a batch that somebody sent on to here
        if fault in ("stale_epoch", "unknown_task") and here:
            yield ToWorker(
                inbox.RevokeAttempt(worker_id="", session=session, task_id=e.task_id, epoch=e.epoch, why=fault)
            )
        return
    for report in e.reports:
        live = s.live(e.task_id)
        last = live.report_seq if live else 0
        if report.seq <= last:
            continue
        if report.seq > last + 1:
            yield _rejected(s, m, e, session, "gap", type(report).__name__, f"after {last} came {report.seq}")
            yield ToWorker(
                inbox.RevokeAttempt(
                    worker_id="", session=session, task_id=e.task_id, epoch=e.epoch, why="gap in reports"
                )
            )
            yield from task_lifecycle.lost(
                s, m, e.task_id, "revoked", f"reports {last + 1} to {report.seq - 1} are missing"
            )
            return
        assert live is not None
        yield Note(tables.task(e.task_id), tables.LIVE, replace(live, report_seq=report.seq))
        yield from _report(s, m, e.task_id, report)
        after = s.task(e.task_id)
        if after is None or after.epoch != e.epoch or not after.session:
            return


def untaken(s: State, m: Moment, session: str, e: ReportEntry, token_holds: bool) -> Outputs:
    """The engine has a defect with these reports. The attempt ends as if its process had died: its last word may be
    among them, and after five times in a row somebody has to look.
    """
    if _fault(s.task(e.task_id), session, e, token_holds) is None:
        why = "a report of it could not be taken in"
        yield ToWorker(inbox.RevokeAttempt(worker_id="", session=session, task_id=e.task_id, epoch=e.epoch, why=why))
        yield from task_lifecycle.lost(s, m, e.task_id, "crashed", why)


def _fault(t: TaskState | None, session: str, e: ReportEntry, token_holds: bool) -> str | None:
    if not token_holds:
        return "token"
    if t is None:
        return "unknown_task"
    if t.epoch != e.epoch or t.state != "RUNNING" or t.session != session:
        return "stale_epoch"
    return None


def _rejected(
    s: State, m: Moment, e: ReportEntry, session: str, why: str, kind: str, detail: str = ""
) -> events.ReportRejected:
    # A bad token proves no relation to the task: it may not touch the task's own sequence.
    of = of_task(s, m, e.task_id) if why != "token" and s.task(e.task_id) is not None else of_partition(s, m)
    return events.ReportRejected(**of, why=why, report=kind, session=session, epoch=e.epoch, detail=detail)


def _report(s: State, m: Moment, task_id: str, report: Report) -> Outputs:
    fault = _fault_of(s, task_id, report)
    if fault is not None:
        t = s.known(task_id)
        yield events.ReportRejected(
            **of_task(s, m, task_id), why="illegal", report=type(report).__name__, session=t.session, epoch=t.epoch,
            detail=fault,
        )  # fmt: skip
        return
    match report:
        case reports.ReportProgress():
            yield from _progress(s, m, task_id, report)
        case reports.ReportStep():
            yield from _step(s, m, task_id, report)
        case reports.AttemptStarted():
            t = s.known(task_id)
            if not t.started:
                yield events.AttemptStarted(**of_task(s, m, task_id), epoch=t.epoch, attempt=t.attempt)
        case reports.ReportMilestone():
            t = s.known(task_id)
            if report.name not in t.milestones:
                yield events.MilestoneReached(**of_task(s, m, task_id), epoch=t.epoch, name=report.name)
        case reports.ReportCheckpoint():
            yield from _checkpoint(s, m, task_id, report)
        case reports.AttemptCompleted():
            yield from _completed(s, m, task_id, report.result, report.usage)
        case reports.AttemptFailed():
            yield from task_lifecycle.failed(s, m, task_id, _error(report), report.usage, final=report.final)
        case reports.AttemptCrashed():
            how = f"signal {report.signal}" if report.signal is not None else f"exit code {report.exit_code}"
            why = "bystander" if report.innocent else "crashed"
            yield from task_lifecycle.lost(s, m, task_id, why, how, report.usage)
        case reports.AttemptStopped():
            yield from task_lifecycle.lost(s, m, task_id, _stop_word(s, task_id, report.why), report.why, report.usage)
        case reports.AttemptDeclined():
            yield from _declined(s, m, task_id, report)
        case reports.SendSteps():
            yield ToWorker(ready_queue.step_page(s, task_id, after=report.after))


def _fault_of(s: State, task_id: str, report: Report) -> str | None:
    """What makes a report one that no sound worker sends in this place; None if nothing does."""
    t = s.known(task_id)
    match report:
        case reports.ReportStep():
            texts = (report.name, report.function, report.code_version, report.args_hash)
            too_long = len(report.step_id.encode()) > limits.STEP_ID_MAX or any(len(x) > limits.TEXT_MAX for x in texts)
            if too_long or len(report.result or b"") > limits.VALUE_MAX:
                return f"step {report.step_id[:100]!r} is too large"
            return _fault_of_step(s, task_id, t, report)
        case reports.ReportMilestone():
            size = len(report.name.encode())
            room = limits.MILESTONES_BYTES - sum(len(name.encode()) for name in t.milestones)
            known = report.name in t.milestones
            if not known and (size > min(room, limits.TEXT_MAX) or len(t.milestones) >= limits.MILESTONES_MAX):
                return f"milestone {report.name[:100]!r} is too long, or there are too many already"
        case reports.ReportCheckpoint():
            if t.checkpoint is not None and report.version <= t.checkpoint.version:
                return f"checkpoint {report.version} after {t.checkpoint.version}"
            if sum(len(track.encode()) + 9 for track in (*report.positions, report.uri)) > limits.POSITIONS_BYTES:
                return f"checkpoint {report.version} has too many positions"
        case reports.ReportProgress():
            if report.fraction is not None and not math.isfinite(report.fraction):
                return f"progress {report.fraction}"
            if min(report.units_done or 0, report.units_total or 0) < 0:
                return f"{report.units_done} of {report.units_total} units"
            if len(report.current_step or "") > limits.TEXT_MAX:
                return "the name of the current step is too long"
    return None


def _fault_of_step(s: State, task_id: str, t: TaskState, report: reports.ReportStep) -> str | None:
    """A recorded step stays as it is, also one that a checkpoint has made unnecessary."""
    known: Step | None = s.get(tables.task(task_id), tables.step(report.step_id))
    if known is not None and not _may_rerun(s, task_id, known, report):
        return f"step {report.step_id} is recorded already"
    for track, position in t.checkpoint.positions.items() if t.checkpoint is not None else ():
        if f"{track}@" <= report.step_id < f"{track}@{position:012d}":
            return f"step {report.step_id} lies before checkpoint {t.checkpoint.version if t.checkpoint else 0}"
    return None


def _completed(s: State, m: Moment, task_id: str, result: bytes, usage: Usage) -> Outputs:
    """User code returned; what it returned has to be a value."""
    try:
        if len(result) > limits.VALUE_MAX:
            raise ValueError(f"it is {len(result):,} bytes; at most {limits.VALUE_MAX:,} are taken")
        if references.is_reference(result):
            references.parse(result)
        else:
            msgspec.json.decode(result)
    except (ValueError, RecursionError, DecodeError) as error:
        kind = "perdure.schemas.errors.NotSerializable"
        info = ErrorInfo(type=kind, message=f"the result is no value: {error}", error_types=[kind])
        yield from task_lifecycle.failed(s, m, task_id, info, usage, final=True)
        return
    yield from task_lifecycle.completed(s, m, task_id, result, usage)


def _error(report: reports.AttemptFailed) -> ErrorInfo:
    """The reported error, within the limits."""
    kinds, room = [], limits.MESSAGE_MAX
    for kind in report.error_types:
        room -= len(kind)
        if room < 0:
            break
        kinds.append(kind)
    return ErrorInfo(
        type=kinds[0] if kinds else "error", message=report.message[: limits.MESSAGE_MAX], error_types=kinds,
        traceback=report.traceback[-limits.TRACEBACK_MAX :],
    )  # fmt: skip


def _stop_word(s: State, task_id: str, why: str) -> str:
    """How a stopped attempt is counted: a pause that was undone meanwhile just runs again."""
    if why == "paused" and s.known(task_id).stopping != "pausing":
        return "resumed"
    return why


def _declined(s: State, m: Moment, task_id: str, report: reports.AttemptDeclined) -> Outputs:
    session = s.sessions.get(s.known(task_id).session)
    if session is not None:
        yield Note(tables.SESSIONS, session.session.encode(), replace(session, full=True))
    yield from task_lifecycle.lost(s, m, task_id, "declined", report.reason)


def _progress(s: State, m: Moment, task_id: str, report: reports.ReportProgress) -> Outputs:
    t, live = s.known(task_id), s.live(task_id)
    assert live is not None
    changes = {
        name: getattr(report, name)
        for name in ("fraction", "current_step", "units_done", "units_total")
        if getattr(report, name) is not None
    }
    if report.fraction is not None:
        changes["fraction"] = min(max(report.fraction, 0.0), 1.0)
    active = max(m.now, s.due(m.at, 0))  # in a window of doubt, by the later reading, like all else that is a sign
    new = replace(live, active=active, progress_at=m.at, **changes)
    yield Note(tables.task(task_id), tables.LIVE, new)
    yield Telemetry(
        ProgressReported(
            task_id=task_id, at=m.at, cause=m.cause, epoch=t.epoch, attempt=t.attempt, worker_id=t.worker_id,
            fraction=new.fraction, current_step=new.current_step,
            units_done=new.units_done, units_total=new.units_total,
        )
    )  # fmt: skip


def _step(s: State, m: Moment, task_id: str, report: reports.ReportStep) -> Outputs:
    t = s.known(task_id)
    base: dict[str, Any] = {"epoch": t.epoch, "step_id": report.step_id, "name": report.name}
    if report.begun:
        yield events.StepStarted(**of_task(s, m, task_id), **base, function=report.function, args_hash=report.args_hash)
    elif report.error is not None:
        yield events.StepFailed(
            **of_task(s, m, task_id), **base, attempt=t.attempt, error=report.error, duration_ms=report.duration_ms
        )
    else:
        yield events.StepCompleted(
            **of_task(s, m, task_id), **base, attempt=t.attempt, function=report.function,
            code_version=report.code_version, args_hash=report.args_hash,
            result=report.result if report.result is not None else b"null", duration_ms=report.duration_ms,
        )  # fmt: skip


def _may_rerun(s: State, task_id: str, known: Step, report: reports.ReportStep) -> bool:
    """A recorded step is recorded anew only where the type's author asked for it and the step has changed."""
    policy = s.spec(task_id).policy
    changed = any(getattr(known, f) != getattr(report, f) for f in ("function", "code_version", "args_hash"))
    return policy is not None and policy.step_mismatch == "rerun" and changed


def _checkpoint(s: State, m: Moment, task_id: str, report: reports.ReportCheckpoint) -> Outputs:
    t = s.known(task_id)
    before = t.checkpoint
    unfinished = before is None or s.get(tables.MARKS, RETIRING + task_id.encode()) is not None
    yield events.CheckpointRecorded(
        **of_task(s, m, task_id), epoch=t.epoch, version=report.version, uri=report.uri, sha256=report.sha256,
        size=report.size, positions=report.positions,
    )  # fmt: skip
    session = s.sessions.get(t.session)
    if session is not None and HEARS_CHECKPOINTS in session.labels:
        yield ToWorker(inbox.CheckpointAccepted(
            worker_id=t.worker_id, session=t.session, task_id=task_id, epoch=t.epoch, version=report.version
        ))  # fmt: skip
    yield from retire_steps(s, m, task_id, {} if before is None or unfinished else before.positions)


def retire_steps(s: State, m: Moment, task_id: str, since: Mapping[str, int]) -> Outputs:
    """Take steps of items before the checkpoint's positions out of the state, a chunk at a time.

    Items of track `p` before position `n` have ids from `p@` up to `p@<n>`; what is left is marked for the next tick.
    `since`: positions before which every step is gone already. A long task has left so many there that the store would
    look through ever more traces of them.
    """
    t = s.task(task_id)
    cursor = RETIRING + task_id.encode()
    budget = limits.STEPS_CHUNK
    if t is not None and t.checkpoint is not None:
        scope = tables.task(task_id)
        for track, position in sorted(t.checkpoint.positions.items()):
            begin = f"{since[track]:012d}" if track in since else ""
            first, last = tables.step(f"{track}@{begin}"), tables.step(f"{track}@{position:012d}")
            gone: list[str] = []
            for suffix in s.suffixes(scope, start=first, prefix=tables.STEPS):
                if suffix >= last or len(gone) >= budget:
                    break
                gone.append(tables.step_id(suffix))
            if gone:
                budget -= len(gone)
                yield events.StepsRetired(
                    **of_task(s, m, task_id), from_step=gone[0], up_to_step=gone[-1], count=len(gone)
                )
            if budget <= 0:
                yield Note(tables.MARKS, cursor, Mark())
                return
    if s.get(tables.MARKS, cursor) is not None:
        yield Note(tables.MARKS, cursor, None)
