"""The engine of one partition: input records in, output records and state changes out. No I/O of its own.

For each record: read it and judge its origin, decide, evolve each event before the decision goes on, grant what has
become possible. A record that cannot be executed changes nothing but the input position, and is quarantined with its
cause; the next one is not concerned.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from typing import Any

from perdure.schemas import codec, commands, ids, limits, topics
from perdure.schemas.codec import UnknownSchema, replace
from perdure.schemas.common import Cause
from perdure.schemas.errors import ConfigurationError, DecodeError, InfrastructureError, ValueTooLarge
from perdure.schemas.inbox import RunAttempt
from perdure.schemas.json_commands import InvalidCommand, JsonNotAllowed, parse
from perdure.schemas.public import Quarantined
from perdure.schemas.reports import ReportBatch
from perdure.schemas.rows import Position
from perdure.schemas.signing import Keys, authentic
from perdure.streams import clock, ready_queue, routing, tables, timers
from perdure.streams.decide import Illegal, Input, decide
from perdure.streams.decision import (
    BUILD,
    FEATURE_LEVEL,
    Acknowledge,
    Moment,
    Note,
    Output,
    Outputs,
    Part,
    Quarantine,
    Reply,
    Telemetry,
    ToWorker,
    feature_level,
)
from perdure.streams.evolve import HANDLED, evolve
from perdure.streams.log import Record
from perdure.streams.processor import Out
from perdure.streams.state import State
from perdure.streams.store import Store

GRANTS_AT_ONCE = 100
_TOLD = 8
"""Failures of one record that are told in full."""
_ADDRESS = re.compile(" at 0x[0-9a-f]+")
_SIGNED_BY_WORKER = (ReportBatch, commands.WorkerStarted, commands.WorkerBeat, commands.WorkerStopping)
_SIGNED_BY_ENGINE = (commands.ApplyConfig, commands.Forwarded, commands.ForwardedAck)


class Engine:
    """Executes the records of one partition, in order, each exactly once."""

    def __init__(self, store: Store, partition: int, partitions: int, keys: Keys) -> None:
        self.state = State(store, partition, partitions)
        self._keys = keys
        self._out: list[Out] = []
        self._after: list[Acknowledge] = []
        self._careful = False
        self._ticking = False
        self._failed: list[tuple[str | None, str, str]] = []
        self.failing = False
        """Whether the last tick or grant was set aside for what no single row is to blame for: it is all still due."""
        self._refuse_newer()

    def _refuse_newer(self) -> None:
        """Raise `ConfigurationError` for the state of a newer build: this one would not do what it stands for."""
        level = feature_level(self.state)
        if level > FEATURE_LEVEL:
            raise ConfigurationError(
                f"the state of partition {self.state.partition} is at feature level {level}, and this build ({BUILD}) "
                f"knows levels up to {FEATURE_LEVEL}: run a build that knows it"
            )

    def execute(self, record: Record, *, careful: bool = False) -> None:
        """Execute one record. Never raises for what the record holds or brings about."""
        s = self.state
        self._careful, self._ticking, self._failed = careful, False, []
        s.mark()
        ran = self._attempt(None, lambda: self._run(record, self._read(record)))
        if not ran:
            self._pass_over(record)
        s.mark()
        granted = ran and self._attempt(None, lambda: self._grant(record))
        if not granted:
            s.grantable = True
        if ran or self._ticking:
            self.failing = not granted or (self.failing and not self._ticking)
        if self._failed:
            self._quarantine(record, *_told(self._failed))

    def _attempt(self, part: str | None, work: Callable[[], object]) -> bool:
        """Do a part of the work on a record whole, or leave nothing of it behind but the cause. None: all of it."""
        s = self.state
        begun, kept_out, kept_after = s.changes, len(self._out), len(self._after)
        try:
            work()
            if self._careful:
                s.check_rows(begun)
            return True
        except (InfrastructureError, MemoryError):
            raise  # of the store or the machine: no record is to blame, and none may be passed over
        except Exception as error:  # noqa: BLE001 - whatever a record brings about, the next ones are executed
            s.undo(begun)
            del self._out[kept_out:], self._after[kept_after:]
            cause, detail = _cause_of(error)
            cause = cause if part is None or cause == "too_large" else "defect"  # the record itself could be read
            self._failed.append((part, cause, detail))
            return False

    def set_aside_unread(self, record: Record, detail: str) -> None:
        """Pass over a record that has killed the process before, without touching it."""
        self.state.mark()
        self._pass(record)
        self._quarantine(record, "killer", detail, keep=False)

    def _run(self, record: Record, given: Input) -> None:
        s = self.state
        tick = given.message if isinstance(given.message, commands.Tick) else None
        self._ticking = tick is not None
        self._take(record, clock.adjust(s, self._moment(record), tick))
        self._take(record, decide(s, self._moment(record), given))
        self._advance(record)
        if tick is not None:
            s.look_for_timers()

    def _grant(self, record: Record) -> None:
        """Grant what has become possible."""
        moment = self._moment(record)
        size = 0
        for _ in range(GRANTS_AT_ONCE):
            if not self.state.grantable or size > limits.OUTPUT_MAX or len(self._failed) > _TOLD:
                return
            begin = len(self._out)
            self.state.grantable = False
            self.state.grantable = self._take(record, ready_queue.next_grant(self.state, moment))
            size += sum(len(o.value or b"") for o in self._out[begin:])

    def _moment(self, record: Record) -> Moment:
        cause = Cause(partition=record.partition, offset=record.offset)
        return Moment(record.at, clock.now(self.state, record.at), cause)

    def _pass(self, record: Record) -> None:
        """Of a record that is not executed, only its time counts."""
        if self.state.position is None or self.state.position.offset <= record.offset:
            self._take(record, clock.adjust(self.state, self._moment(record), None))
            self._advance(record)

    def _advance(self, record: Record) -> None:
        last = self.state.position
        back = last is not None and record.at - last.at < -limits.CLOCK_BACK_MS
        at = record.at if last is None or back else max(last.at, record.at)
        self.state.put(tables.POSITION, b"", Position(offset=record.offset + 1, at=at))

    # Reading ---------------------------------------------------------------------------------------------------------

    def _read(self, record: Record) -> Input:
        data = record.value
        if data is None:
            raise DecodeError("a record without a value")
        if len(data) > limits.RECORD_MAX:
            raise ValueTooLarge(f"a record of {len(data):,} bytes")
        if data[:1] == b"{":
            return self._read_json(data)
        message = codec.decode(data)
        if isinstance(message, _SIGNED_BY_WORKER):
            holds = authentic(data, message, self._keys.worker)
            tokens = (
                [self._token_holds(message.session, e) for e in message.entries]
                if holds and isinstance(message, ReportBatch)
                else ()
            )
            return Input(message, holds, tokens)
        if isinstance(message, _SIGNED_BY_ENGINE):
            return Input(message, authentic(data, message, self._keys.engine))
        return Input(message)

    def _read_json(self, data: bytes) -> Input:
        try:
            return Input(parse(data))
        except InvalidCommand as error:
            return Input(Illegal(
                command=error.command, command_id=error.command_id, task_id=error.task_id, reply_to=error.reply_to,
                reason=str(error), field=error.field,
            ))  # fmt: skip

    def _token_holds(self, session: str, entry: Any) -> bool:
        return any(
            ids.tokens_equal(entry.token, ids.grant_token(key, entry.task_id, entry.epoch, session))
            for key in reversed(self._keys.engine.values())
        )

    # Taking outputs --------------------------------------------------------------------------------------------------

    def _take(self, record: Record, outputs: Outputs) -> bool:
        """Evolve, note and collect what a decision yields, as it yields it. Says whether there was anything."""
        any_at_all = False
        for output in outputs:
            any_at_all = True
            if type(output) in HANDLED:
                self._emit(topics.EVENTS.name, getattr(output, "task_id", None), output)
                evolve(self.state, output)
            else:
                self._take_effect(record, output)
        return any_at_all

    def _take_effect(self, record: Record, output: Output) -> None:
        match output:
            case Note():
                self.state.put(output.scope, output.suffix, output.row)
            case Part():
                self._take_part(record, output)
            case ToWorker():
                self._to_worker(output)
            case Telemetry():
                self._emit(topics.TELEMETRY.name, output.record.task_id, output.record)
            case Reply():
                self._emit(topics.REPLIES.name, output.reply.client_id, output.reply)
            case Acknowledge():
                self._after.append(output)
            case Quarantine():
                self._failed.append((None, output.cause, output.detail))
            case _:
                raise TypeError(f"nothing is known to do with a {type(output).__name__}")

    def _take_part(self, record: Record, part: Part) -> None:
        if self._attempt(part.of, lambda: self._take(record, part.work)):
            return
        if part.row is not None:
            self.state.put_off(part.row, self._moment(record).now)
        instead = part.otherwise
        if instead is not None:
            self._attempt(part.of, lambda: self._take(record, instead))

    def _to_worker(self, output: ToWorker) -> None:
        message = output.record
        if isinstance(message, RunAttempt):
            _, key = self._keys.newest_engine()
            message = replace(message, token=ids.grant_token(key, message.task_id, message.epoch, message.session))
        self._emit(topics.INBOX.name, message.worker_id, message)

    def _emit(self, topic: str, key: str | None, message: object) -> None:
        value = codec.encode(message)
        if len(value) > limits.OUTPUT_MAX:
            raise ValueTooLarge(f"a {type(message).__name__} of {len(value):,} bytes does not fit into {topic}")
        self._out.append(Out(topic, None if key is None else key.encode(), value))

    # Setting aside ---------------------------------------------------------------------------------------------------

    def _pass_over(self, record: Record) -> None:
        """Do without a record; one that was forwarded counts as taken, or its source would send it for ever."""
        self._pass(record)
        given = self._forwarded(record)
        if given is not None and routing.is_next(self.state, given):
            self._take(record, routing.taken(self.state, self._moment(record), given))

    def _forwarded(self, record: Record) -> commands.Forwarded | None:
        try:
            message = codec.decode(record.value or b"")
        except DecodeError:
            return None
        if isinstance(message, commands.Forwarded) and message.target == self.state.partition:
            return message if authentic(record.value or b"", message, self._keys.engine) else None
        return None

    def _quarantine(self, record: Record, cause: str, detail: str, *, keep: bool = True) -> None:
        data = record.value or b""
        self._emit(
            topics.QUARANTINE.name,
            None,
            Quarantined(
                topic=record.topic, partition=record.partition, offset=record.offset, at=record.at, reader="engine",
                cause=cause, detail=detail[: limits.TRACEBACK_MAX], key=(record.key or b"")[: limits.TEXT_MAX] or None,
                record=data[: limits.QUARANTINE_KEPT] if keep else None, size=len(data),
            ),
        )  # fmt: skip

    # Around transactions ---------------------------------------------------------------------------------------------

    def take_out(self) -> list[Out]:
        """Records to write for what was executed since the last call."""
        out, self._out = self._out, []
        return out

    def take_after(self) -> list[Acknowledge]:
        """What is to be done once the transaction is committed."""
        after, self._after = self._after, []
        return after

    def writes(self) -> dict[bytes, bytes | None]:
        """Every change of state since the last commit."""
        return self.state.writes()

    def positions(self) -> dict[str, int]:
        """Next offset of task-commands; nothing before the first record."""
        last = self.state.position
        return {} if last is None else {topics.COMMANDS.name: last.offset}

    def latest(self) -> int | None:
        """Log time of the newest input that was executed."""
        return None if self.state.position is None else self.state.position.at

    def committed(self) -> None:
        """The store has the changes."""
        self.state.committed()

    def rolled_back(self) -> None:
        """The transaction was aborted: as after the last commit."""
        self._out, self._after = [], []
        self.state.rolled_back()
        self._refuse_newer()

    def next_tick(self) -> int | None:
        """Log time at which a tick has something to do; None: never, as things stand."""
        return timers.AT_ONCE if self.state.grantable else timers.next_tick(self.state)


def _told(failed: list[tuple[str | None, str, str]]) -> tuple[str, str]:
    """(cause, detail) of all that failed of one record, which is set aside once; what stopped the whole comes first."""
    first = sorted(failed, key=lambda f: f[0] is not None)[:_TOLD]
    room = limits.TRACEBACK_MAX // len(first) - limits.TEXT_MAX
    texts = []
    for of, _, detail in first:
        detail = _ADDRESS.sub("", detail)[-room:]  # of an object in this process: a replay has to say the same
        texts.append(detail if of is None else f"{of}: {detail}")
    if len(failed) > _TOLD:
        texts.append(f"and {len(failed) - _TOLD} more")
    causes = [cause for _, cause, _ in failed]
    return "defect" if "defect" in causes else causes[0], "\n".join(texts)


def _cause_of(error: Exception) -> tuple[str, str]:
    match error:
        case UnknownSchema():
            return "unknown_schema", str(error)
        case JsonNotAllowed():
            return "json_not_allowed", str(error)
        case DecodeError():
            return "undecodable", str(error)
        case ValueTooLarge():
            return "too_large", str(error)
        case _:
            return "defect", "".join(traceback.format_exception(error))
