"""One input record in, what happens out: the dispatch of every kind of input to its decision."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from perdure.schemas import codec, commands, events, ids, limits, rows
from perdure.schemas.codec import replace
from perdure.schemas.commands import AwaitTask, DescribeTask, FindTasks, SubmitBatch, SubmitTask
from perdure.schemas.errors import DecodeError, InvalidRequest
from perdure.schemas.inbox import CommandReply
from perdure.schemas.json_commands import check
from perdure.schemas.reports import ReportBatch
from perdure.streams import attempts, describe, leases, policies, routing, submit, tables, task_lifecycle, timers
from perdure.streams.decision import (
    Acknowledge,
    Moment,
    Note,
    Outputs,
    Part,
    Quarantine,
    Reply,
    of_partition,
    of_task,
)
from perdure.streams.state import State
from perdure.streams.task_lifecycle import ENDED, Refused


@dataclass(frozen=True)
class Input:
    """A record of task-commands, decoded, with what the shell found out about its origin."""

    message: Any
    authentic: bool = False
    """Session, report and host records: signed with a key of the namespace."""
    tokens: Sequence[bool] = ()
    """Report batches: whether each entry's token is the grant's."""


@dataclass(frozen=True)
class Illegal:
    """A JSON command that could be read but is illegal in itself."""

    command: str
    command_id: str
    task_id: str
    reply_to: str | None
    reason: str
    field: str | None


def decide(s: State, m: Moment, given: Input) -> Outputs:
    """Everything that follows from one input, but for the grants that it makes possible."""
    message = given.message
    match message:
        case commands.Tick():
            yield from timers.tick(s, m, message)
        case ReportBatch():
            yield from _batch(s, m, message, given)
        case commands.WorkerStarted() | commands.WorkerBeat() | commands.WorkerStopping():
            yield from _session(s, m, message, given)
        case commands.ApplyConfig() | commands.Forwarded() | commands.ForwardedAck():
            yield from _host(s, m, message, given)
        case Illegal():
            yield from _refuse_illegal(s, m, message)
        case commands.LookUp():
            yield Quarantine("not_authentic", "LookUp outside of Forwarded")
        case _ if type(message) in _COMMANDS:
            yield from _command(s, m, message, placed=False)
        case _:
            yield Quarantine("undecodable", f"a {type(message).__name__} does not belong on task-commands")


def _batch(s: State, m: Moment, batch: ReportBatch, given: Input) -> Outputs:
    if not given.authentic:
        yield leases.rejected(s, m, "not_authentic", "ReportBatch", batch.session)
        return
    session = s.sessions.get(batch.session)
    if session is None or session.state == "ended":
        yield leases.rejected(s, m, "stale_session", "ReportBatch", batch.session)
        return
    for entry, token_holds in zip(batch.entries, given.tokens, strict=True):
        said = (s, m, batch.session, entry, token_holds)
        yield Part(entry.task_id, attempts.entry(*said), otherwise=attempts.untaken(*said))


def _session(s: State, m: Moment, record: commands.SessionRecord, given: Input) -> Outputs:
    if not given.authentic:
        yield leases.rejected(s, m, "not_authentic", type(record).__name__, record.session)
        return
    match record:
        case commands.WorkerStarted():
            yield from leases.started(s, m, record)
        case commands.WorkerBeat():
            yield from leases.beat(s, m, record)
        case commands.WorkerStopping():
            yield from leases.stopping(s, m, record)


def _host(s: State, m: Moment, record: Any, given: Input) -> Outputs:
    if not given.authentic:
        yield Quarantine("not_authentic", f"{type(record).__name__} without the engine's signature")
        return
    match record:
        case commands.ApplyConfig():
            yield from _apply_config(s, m, record)
        case commands.ForwardedAck():
            if record.source == s.partition:
                yield from routing.acknowledged(s, m, record)
        case commands.Forwarded():
            if record.target != s.partition:
                yield Quarantine("undecodable", f"Forwarded to partition {record.target} in partition {s.partition}")
            elif routing.is_next(s, record):
                yield from routing.taken(s, m, record)
                yield from _forwarded(s, m, record)
            else:
                yield Acknowledge(record.source, s.counter(f"taken/{record.source}"))


def _apply_config(s: State, m: Moment, record: commands.ApplyConfig) -> Outputs:
    known: rows.Config | None = s.get(tables.CONFIG, record.name.encode())
    if known is not None and known.version >= record.version:
        return
    fault = policies.fault(record.name, record.content)
    if fault is not None:
        yield Quarantine("undecodable", f"{record.name}: {fault}")
        return
    yield events.ConfigApplied(**of_partition(s, m), name=record.name, version=record.version, content=record.content)
    kind, _, name = record.name.partition("/")
    if kind == "type":
        yield from timers.bind_tasks(s, m, name)


def _forwarded(s: State, m: Moment, record: commands.Forwarded) -> Outputs:
    try:
        inner = codec.decode(record.record)
    except DecodeError as error:
        yield Quarantine("undecodable", f"inside Forwarded: {error}")
        return
    if isinstance(inner, commands.LookUp):
        command = codec.decode(inner.record)
        yield from _command(s, m, command, placed=True, left=inner.left)
    elif type(inner) in _COMMANDS:
        yield from _command(s, m, inner, placed=True)
    else:
        yield Quarantine("undecodable", f"a {type(inner).__name__} inside Forwarded")


# Commands and queries ------------------------------------------------------------------------------------------------


def _command(s: State, m: Moment, command: Any, *, placed: bool, left: list[int] | None = None) -> Outputs:
    """Complete a command's ids, bring it to its partition, or execute it."""
    if not command.command_id:
        command = replace(command, command_id=ids.derived_command_id(m.cause.partition, m.cause.offset, m.cause.index))
    m = m.of(command.command_id, m.cause.index)
    try:
        check(command)
        if isinstance(command, SubmitBatch):
            for index, one in enumerate(command.tasks):
                one = replace(one, command_id=one.command_id or f"{command.command_id}-{index}")
                one = replace(one, reply_to=one.reply_to or command.reply_to)
                yield from _command(s, m.of(None, index), one, placed=False)
        elif isinstance(command, SubmitTask):
            yield from _submit(s, m, routing.complete_submit(s, m, command, placed=placed))
        elif isinstance(command, FindTasks):
            yield from _find_tasks(s, m, command)
        else:
            yield from _for_one(s, m, command, left)
    except InvalidRequest as error:
        yield from _refuse(s, m, command, str(error), error.field)


def _submit(s: State, m: Moment, command: SubmitTask) -> Outputs:
    target = routing.partition_of(s, command.task_id)
    if target != s.partition:
        yield from routing.forward(s, m, target, codec.encode(command))
        return
    yield from _execute(s, m, command, submit.submit)


def _for_one(s: State, m: Moment, command: routing.ForOneTask, left: list[int] | None) -> Outputs:
    where = routing.find(s, command)
    if isinstance(where, str):
        command = replace(command, task_id=where)
        if isinstance(command, DescribeTask | AwaitTask):
            yield from _query(s, m, command)
        else:
            yield from _execute(s, m, command, _CONTROL[type(command)])
    elif isinstance(where, int) and left is None:
        yield from routing.forward(s, m, where, codec.encode(command))
    else:
        # One that is being looked up keeps to its list: partitions may differ in what they know of the queues.
        rest = where if isinstance(where, list) and left is None else left
        if rest:
            yield from routing.look_up(s, m, command, rest)
        else:
            yield from _not_found(s, m, command)


def _execute(s: State, m: Moment, command: Any, decision: Callable[[State, Moment, Any], Outputs]) -> Outputs:
    """Decide a command once: a repeat gets the stored answer."""
    task_id = command.task_id
    scope, suffix = tables.task(task_id), tables.answer(command.command_id)
    stored: rows.Answer | None = s.get(scope, suffix)
    if stored is None and s.task(task_id) is None and not isinstance(command, SubmitTask):
        yield from _not_found(s, m, command)
        return
    if stored is None:
        try:
            yield from decision(s, m, command)
            yield from _reply(m, command, accepted=True)
        except Refused as refused:
            yield from _refuse(s, m, command, str(refused), None)
        except InvalidRequest as error:
            yield from _refuse(s, m, command, str(error), error.field)
    else:
        yield from _reply(m, command, accepted=stored.accepted, reason=stored.reason, field=stored.field)


def _query(s: State, m: Moment, command: DescribeTask | AwaitTask) -> Outputs:
    task_id = command.task_id
    if s.task(task_id) is None:
        yield from _not_found(s, m, command)
        return
    if command.reply_to is None:
        return
    if isinstance(command, AwaitTask) and s.known(task_id).state not in ENDED:
        expires = s.due(m.at, min(command.timeout, limits.WAITER_MAX_MS))
        waiter = rows.Waiter(client_id=command.reply_to, expires=expires)
        yield Note(tables.waiters(task_id), command.command_id.encode(), waiter)
        timer = rows.Timer(task_id=task_id, kind="waiter")
        yield Note(tables.SOFT_TIMERS, tables.timer(expires, "waiter", task_id), timer)
        return
    yield Reply(describe.status_reply(s, m, task_id, client_id=command.reply_to, command_id=command.command_id))


def _find_tasks(s: State, m: Moment, command: FindTasks) -> Outputs:
    if command.reply_to is not None:
        body = json.dumps({"ids": routing.find_by_prefix(s, command.prefix)}).encode()
        yield from _reply(m, command, accepted=True, body=body)


# Answers -------------------------------------------------------------------------------------------------------------


def _not_found(s: State, m: Moment, command: Any) -> Outputs:
    if isinstance(command, DescribeTask | AwaitTask):
        yield from _reply(m, command, accepted=False, reason="not_found", field="task_id")
    else:
        yield from _refuse(s, m, command, "not_found: no task has this id", "task_id")


def _refuse(s: State, m: Moment, command: Any, reason: str, field: str | None) -> Outputs:
    reason = reason[: limits.TEXT_MAX]
    if s.get(tables.task(command.task_id), tables.answer(command.command_id)) is None:
        yield _rejection(s, m, command.task_id, command.command_id, type(command).__name__, reason, field)
    yield from _reply(m, command, accepted=False, reason=reason, field=field)


def _refuse_illegal(s: State, m: Moment, given: Illegal) -> Outputs:
    command_id = given.command_id or ids.derived_command_id(m.cause.partition, m.cause.offset)
    m = m.of(command_id)
    stored: rows.Answer | None = s.get(tables.task(given.task_id), tables.answer(command_id))
    if stored is None:
        yield _rejection(s, m, given.task_id, command_id, given.command, given.reason, given.field)
        stored = rows.Answer(accepted=False, reason=given.reason, field=given.field, at=m.at)
    if given.reply_to:
        yield Reply(CommandReply(
            client_id=given.reply_to, command_id=command_id, task_id=given.task_id, accepted=stored.accepted,
            reason=stored.reason, field=stored.field, at=m.at,
        ))  # fmt: skip


def _rejection(
    s: State, m: Moment, task_id: str, command_id: str, kind: str, reason: str, field: str | None
) -> events.CommandRejected:
    """An event of the task if it is known here, else of the partition: no state is kept for ids that name nothing."""
    known = bool(task_id) and s.task(task_id) is not None
    of = of_task(s, m, task_id) if known else of_partition(s, m)
    return events.CommandRejected(**of, command_id=command_id, command=kind, reason=reason, field=field)


def _reply(
    m: Moment, command: Any, *, accepted: bool, reason: str = "", field: str | None = None, body: bytes | None = None
) -> Outputs:
    if command.reply_to is not None:
        yield Reply(CommandReply(
            client_id=command.reply_to, command_id=command.command_id, task_id=command.task_id, accepted=accepted,
            reason=reason, field=field, body=body, at=m.at,
        ))  # fmt: skip


_CONTROL: dict[type, Callable[[State, Moment, Any], Outputs]] = {
    commands.PauseTask: task_lifecycle.pause,
    commands.ResumeTask: task_lifecycle.resume,
    commands.CancelTask: task_lifecycle.cancel,
    commands.RetryTask: task_lifecycle.retry,
    commands.DiscardDeadLetter: task_lifecycle.discard,
}
_COMMANDS = {SubmitTask, SubmitBatch, DescribeTask, AwaitTask, FindTasks, *_CONTROL}
