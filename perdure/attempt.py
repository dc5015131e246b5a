"""One attempt of a task: its steps, boundaries, checkpoints and end, over an abstract channel.

Nothing here knows of processes, sockets or Kafka, and time comes from a clock it is given, so an attempt also runs
inside a test on the in-memory log. `perdure.exchange` says how it waits.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import logging
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from typing import Any

from perdure import channel, context, exchange, failures, tracks
from perdure.carriage import Carriage
from perdure.checkpoint import NOTHING, Content, TaskCheckpoints, interval_ms
from perdure.clock import Clock
from perdure.connectors import checkpoints
from perdure.connectors.checkpoints import CheckpointStore
from perdure.connectors.large_values import LargeValues
from perdure.context import AsyncContext, Context, State, running_step
from perdure.exchange import Call, Channel, Exchange, Flow
from perdure.failures import AttemptStop, StepOutcomeUnknown
from perdure.schemas import codec, limits, values
from perdure.schemas.common import StepRecord
from perdure.schemas.errors import ConfigurationError, InvalidRequest, PerdureError, StepError, StepMismatch
from perdure.schemas.inbox import RunAttempt, StepPage
from perdure.steps import OpenStep, RecordedSteps, differences, hash_arguments, name_of, unwrapped
from perdure.tasks import TaskType
from perdure.tracks import Sections, has_room

HARD = ("timed_out", "cancelled", "revoked")
"""Stops for good: they end the attempt wherever it calls us. The others wait for a boundary."""
UNSAVED = ("cancelled", "revoked")
"""Stops after which no checkpoint is of use."""
PRECEDENCE = ("drained", "paused", *HARD)

_OURS = (__file__, context.__file__, exchange.__file__, tracks.__file__)
_JSON_ITSELF = (type(None), bool, int, float, str)


class Attempt:
    """One attempt. The supervisor's side calls `receive`, `run` or `run_async`; the rest is for `ctx` and tracks."""

    def __init__(
        self, grant: RunAttempt, task_type: TaskType, way: Channel, store: CheckpointStore, clock: Clock,
        large: LargeValues | None = None,
    ) -> None:  # fmt: skip
        self.grant = grant
        self.log = logging.getLogger(f"perdure.task.{grant.type}")
        self.state = State()
        self.input: Any = None
        self.config: dict[str, Any] = {}
        self.started_at = 0
        self.deadline = grant.deadline
        self._type, self._clock = task_type, clock
        self._checkpoints = TaskCheckpoints(store, grant.task_id, self.log)
        self.exchange = Exchange(way, grant.task_id, grant.epoch)
        self._carriage = Carriage(large or LargeValues(), grant.task_id, self.log, self._poll_and_check, self._final)
        self.sections = Sections(is_async=task_type.is_async)
        self.over = False
        """Whether user code has ended, its deferred calls included."""
        self._stops: set[str] = set()
        self._stop = ""
        self._fatal: PerdureError | None = None
        self._stack: ExitStack | AsyncExitStack = AsyncExitStack() if task_type.is_async else ExitStack()
        # steps
        self._recorded = RecordedSteps(grant.steps_total)
        self._begun = frozenset(grant.begun_steps)
        self._told_code = False
        # what a checkpoint holds, and when the next is due
        self.positions: dict[str, int] = {}
        self._left: set[str] = set()
        self.milestones = list(grant.milestones)
        self._progress: dict[str, Any] = {}
        self._doing = ""
        self._version = self._accepted = grant.checkpoint.version if grant.checkpoint else 0
        self._kept = NOTHING
        self._elapsed_before = 0.0
        self._began = self._saved_at = self._last_save_ms = self._cpu_before = 0.0

    # From the supervisor ----------------------------------------------------------------------------------------------

    def receive(self, frame: channel.ToChild) -> None:
        """Take in a frame; those of other attempts are passed over."""
        if isinstance(frame, (channel.Run, channel.Exit)):
            return
        if (frame.task_id, frame.epoch) != (self.grant.task_id, self.grant.epoch):
            return
        if isinstance(frame, channel.Ack):
            self.exchange.acknowledge(frame.number)
        elif isinstance(frame, channel.Page):
            self._recorded.add(codec.decode_as(StepPage, frame.page))
        elif isinstance(frame, channel.Accepted):
            self._accepted = max(self._accepted, frame.version)
        else:
            self._stops = self._stops - {frame.why} if frame.undo else self._stops | {frame.why}
            self._stop = max(self._stops, key=PRECEDENCE.index, default="")
        self.exchange.received()

    def interrupt(self) -> AttemptStop | None:
        """What a signal handler is to raise in the task's own thread; None: no user code of a stopped attempt runs."""
        self.exchange.poll_interrupting()
        return AttemptStop(self._stop) if not self.over and self._stop in HARD else None

    # The run ----------------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Run to the last frame, which has been sent when this returns. Whether the task function returned."""
        return contextvars.copy_context().run(self._run)

    def _run(self) -> bool:
        assert isinstance(self._stack, ExitStack)
        self.sections.begin()
        try:
            try:
                with self._stack:
                    self.exchange.drive(self._begin())
                    args, kwargs = self._arguments()
                    result = self._type.function(Context(self), *args, **kwargs)
                carried = self.exchange.drive(self._result(result))
            finally:
                self.over = True
        except BaseException as error:  # noqa: BLE001  whatever ends user code ends only the attempt
            return self._ended(error)
        return self._completed(carried)

    async def run_async(self) -> bool:
        """Like `run`, in an asyncio task of its own."""
        assert isinstance(self._stack, AsyncExitStack)
        self.sections.begin()
        try:
            try:
                async with self._stack:
                    await self.exchange.drive_async(self._begin())
                    args, kwargs = self._arguments()
                    result = await self._type.function(AsyncContext(self), *args, **kwargs)
                carried = await self.exchange.drive_async(self._result(result))
            finally:
                self.over = True
        except BaseException as error:  # noqa: BLE001  whatever ends user code ends only the attempt
            return self._ended(error)
        return self._completed(carried)

    def _begin(self) -> Flow[None]:
        """Announce the attempt and restore what the newest checkpoint holds."""
        self.started_at = self._clock.wall_ms()
        self._began = self._saved_at = self._clock.monotonic_ms()
        self._cpu_before = self._clock.cpu_seconds()
        if self.grant.run_timeout_left is not None:
            ends = self.started_at + self.grant.run_timeout_left
            self.deadline = ends if self.deadline is None else min(ends, self.deadline)
        self.exchange.post(channel.Started)
        try:
            self.config = values.loads(self.grant.agent_config) if self.grant.agent_config else {}
        except PerdureError as error:  # a fault of the attempt, not of its process
            raise self._final(error) from None
        if self.grant.policy.checkpoint_storage not in (None, checkpoints.LOCAL):
            raise ConfigurationError(f"there is no checkpoint store {self.grant.policy.checkpoint_storage!r} here; "
                                     f"this worker has: {checkpoints.LOCAL}")  # fmt: skip
        if self.grant.checkpoint is not None:
            self._restore((yield from self._carriage.patiently(self._checkpoints.load, self.grant.checkpoint)))
        # The first page comes unasked. It is read before user code may keep us from reading for hours.
        if not self._recorded.complete:
            yield functools.partial(self._recorded.went_on, "")
        given = self.grant.input
        self.input = yield from self._carriage.value((self.grant.input_ref or "").encode() if given is None else given)

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        try:
            return self._type.bind(self.input)
        except InvalidRequest as error:
            raise self._final(error) from None

    def _result(self, result: Any) -> Flow[bytes]:
        if self._fatal is not None:
            raise self._fatal
        return (yield from self._carriage.carried(self._carriage.text(result, "result")))

    def _completed(self, result: bytes) -> bool:
        self.exchange.close(channel.Completed, result=result, **self._usage())
        return True

    def _ended(self, error: BaseException) -> bool:
        why = failures.stop_in(error, self._stop if self._stop in HARD else "")
        if self._fatal is not None or not why:
            found = self._fatal or error
            kinds, message, trace = failures.describe(found, _OURS)
            self.exchange.close(channel.Failed, error_types=kinds, message=message, traceback=trace,
                                 final=self._fatal is not None, **self._usage())  # fmt: skip
        else:
            self.exchange.close(channel.Stopped, why=why, **self._usage())
        return False

    def _usage(self) -> dict[str, Any]:
        return {
            "duration_ms": round(self._clock.monotonic_ms() - self._began),
            "cpu_seconds": self._clock.cpu_seconds() - self._cpu_before,
        }

    def _final(self, error: PerdureError) -> PerdureError:
        """Mark the attempt as failed for good, even if user code catches the error."""
        self._fatal = self._fatal or error
        return error

    def _poll_and_check(self) -> None:
        self.exchange.poll()
        self._check()

    def _check(self) -> None:
        """Raise what has already ended this attempt."""
        if self._fatal is not None:
            raise self._fatal
        if self._stop in HARD:
            raise AttemptStop(self._stop)

    # Steps ------------------------------------------------------------------------------------------------------------

    def step(
        self,
        name: str,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        key: object,
        at_most_once: bool,
    ) -> Flow[Any]:
        """A step. Its identity is taken now, before the flow is carried on."""
        scope = self.sections.scope
        try:
            base, step_id = scope.step(name, key, self.sections.number())
        except StepError as error:
            return self._refused(self._final(error))
        fn, args, kwargs = unwrapped(fn, args, kwargs)
        step = OpenStep(scope, base, step_id, name, name_of(fn), hash_arguments(args, kwargs), at_most_once)
        return self._step(step, Call(fn, args, kwargs))

    def _refused(self, error: PerdureError) -> Flow[Any]:
        yield from ()
        raise error

    def _step(self, step: OpenStep, call: Call) -> Flow[Any]:
        try:
            self._check()
            if self._stop and not step.scope.path and self.sections.number() == 0 and running_step.get() is None:
                raise AttemptStop(self._stop)  # between two steps of no track: all there is to save is recorded
            record = yield from self._find(step)
            if record is not None:
                return (yield from self._carriage.value(record.result))
            if step.step_id in self._begun:
                raise self._final(StepOutcomeUnknown(
                    f"the step {step.step_id} began in an earlier attempt and its outcome is unknown; find out whether "
                    "it took effect, then redrive the task"))  # fmt: skip
            if step.at_most_once:
                yield self.exchange.acked(self._report(step, begun=True))
            self._tell(current_step=step.name)
            return (yield from self._execute(step, call))
        finally:
            step.scope.ended(step.base)

    def _execute(self, step: OpenStep, call: Call) -> Flow[Any]:
        outer = running_step.get()
        running_step.set(step.step_id)
        began = self._clock.monotonic_ms()
        try:
            result = yield call
        except Exception as error:
            kinds, message, trace = failures.describe(error, _OURS)
            number = self._report(step, began, error_types=kinds, error_message=message, error_traceback=trace)
            yield self.exchange.acked(number)  # who tries again in a loop fills no memory while the broker is away
            raise
        finally:
            running_step.set(outer)
        if inspect.iscoroutine(result):
            result.close()
            raise self._final(
                StepError(f"the step {step.step_id} calls an async function; write the task as async def"))  # fmt: skip
        data = self._carriage.text(result, f"result of step {step.name!r}")
        carried = yield from self._carriage.carried(data)
        yield self.exchange.acked(self._report(step, began, result=carried))
        # What JSON makes of it, so that this attempt and one that finds the record see the same.
        return result if type(result) in _JSON_ITSELF else values.loads(data)

    def _report(self, step: OpenStep, began: float | None = None, **fields: Any) -> int:
        duration = 0 if began is None else round(self._clock.monotonic_ms() - began)
        return self.exchange.post(channel.Step, step_id=step.step_id, name=step.name, function=step.function,
                                   code_version=self._type.code_version, args_hash=step.args_hash,
                                   duration_ms=duration, **fields)  # fmt: skip

    def _find(self, step: OpenStep) -> Flow[StepRecord | None]:
        """The recorded step, if there is one that may be used."""
        while not self._recorded.settled(step.step_id):
            after = self._recorded.last
            if self._recorded.ask(after):
                self.exchange.post(channel.WantSteps, after=after)
            yield functools.partial(self._recorded.went_on, after)
        record = self._recorded.take(step.step_id)
        if record is None:
            return None
        policy = self.grant.policy.step_mismatch
        found = differences(record, step.function, step.args_hash)
        if policy != "warn" and record.code_version != self._type.code_version:
            found.append(f"it was recorded by code version {record.code_version}, this is {self._type.code_version}")
        if found:
            text = f"the recorded step {step.step_id} is another one now: {' and '.join(found)}"
            if policy == "fail":
                raise self._final(StepMismatch(f"{text}; give the new step another name, or roll the task back"))
            again = policy == "rerun"
            self.log.warning("%s; %s", text, "it runs again" if again else "its recorded result is used")
            return None if again else record
        self._compare_code(record.code_version, "steps were")
        return record

    def _compare_code(self, recorded: str, what: str) -> None:
        if recorded != self._type.code_version and not self._told_code:
            self._told_code = True
            self.log.warning("%s recorded by code version %s, this is %s", what, recorded, self._type.code_version)

    # Tracks -----------------------------------------------------------------------------------------------------------

    def open_track(self, name: str) -> tuple[str, int]:
        """(path, items done) of a track that begins here. Only the task's own section has saved positions: state and
        position are saved together, so nothing else may be in the middle of an item.
        """
        section = self.sections.number()
        try:
            self._outside_steps("ctx.track")
            path = self.sections.scope.track(name, section)
            if section == 0 and not has_room(self.positions, path):
                raise StepError(f"track {path[:100]}: more than {limits.POSITIONS_MAX} tracks in one task or item, or "
                                "too long names; go through their common list with a track of its own")  # fmt: skip
        except StepError as error:
            raise self._final(error) from None
        return path, 0 if section else self.positions.get(path, 0)

    def at_item(self, path: str, done: int) -> Flow[None]:
        """Stand between two items of a track: a boundary."""
        if self.sections.number():
            self._check()
            return
        self.positions[path] = done
        inside, open_item = f"{path}@", f"{path}@{done:012d}/"
        for other in [p for p in self.positions if p.startswith(inside) and not p.startswith(open_item)]:
            del self.positions[other]
        self._left = {other for other in self._left if not other.startswith(inside)}
        yield from self.boundary()

    def leave_track(self, path: str) -> None:
        """A loop was left in the middle of an item, which a resume does again. What the item has done to the state
        must not be saved then: nothing is, until the item around it ends or the author asks for it.
        """
        self._left.add(path)

    def idempotency_key(self) -> str:
        """See `Context`."""
        place = running_step.get() or self.sections.scope.path
        return str(uuid.uuid5(uuid.NAMESPACE_OID, f"perdure\0{self.grant.task_id}\0{place}"))

    def _outside_steps(self, what: str) -> None:
        step = running_step.get()
        if step is not None:
            raise StepError(
                f"{what} inside the step {step}: a step is done whole or again, so nothing in it can be saved"
            )

    # Boundaries and checkpoints ---------------------------------------------------------------------------------------

    def boundary(self, *, explicit: bool = False) -> Flow[None]:
        """A place where the attempt may stop and be saved. `explicit`: the user asked for a checkpoint."""
        if explicit:
            self._may_save()
        self.exchange.poll()
        if self._fatal is not None or self._stop in UNSAVED:
            self._check()
        if explicit:
            self._left.clear()
        if self._stop:
            if not self._left:
                yield from self._save()
            if self._stop:  # a pause may have been undone meanwhile
                raise AttemptStop(self._stop)
        elif explicit or (self._is_due() and not self._left):
            yield from self._save(always=explicit)

    def _may_save(self) -> None:
        try:
            self._outside_steps("ctx.checkpoint")
            if self.sections.number():
                raise StepError("ctx.checkpoint in a thread or asyncio task that user code started: the task's own "
                                "section may be in the middle of something; call it there")  # fmt: skip
        except StepError as error:
            raise self._final(error) from None

    def _elapsed_ms(self) -> float:
        return self._elapsed_before + self._clock.monotonic_ms() - self._began

    def _is_due(self) -> bool:
        interval = interval_ms(self.grant.policy.checkpoint_interval, self._elapsed_ms(), self._last_save_ms)
        return self._clock.monotonic_ms() - self._saved_at >= interval

    def _save(self, *, always: bool = False) -> Flow[None]:
        """Save a checkpoint and wait until it is in the log; skipped if nothing is new and not `always`."""
        began = self._clock.monotonic_ms()
        text, digest = self._captured()
        if always or digest != self._kept:
            version = self._version + 1
            saved = yield Call(self._checkpoints.save, (version, text, always), blocking=True)
            self._last_save_ms = self._clock.monotonic_ms() - began
            if saved is not None:
                number = self.exchange.post(
                    channel.Checkpoint, version=version, **saved._asdict(), positions=dict(self.positions)
                )
                yield self.exchange.acked(number)
                self._version, self._kept = version, digest
                yield Call(self._checkpoints.prune, (self._accepted,), blocking=True)
        self._saved_at = self._clock.monotonic_ms()

    def _captured(self) -> tuple[tuple[bytes, ...], bytes]:
        """The checkpoint of this moment, and a digest of what a resume would find changed."""
        content = Content(
            state=self.state,
            positions=self.positions,
            scopes={scope.path: used for scope in self.sections.open_scopes() if (used := scope.repeats())},
            progress=self._progress,
            milestones=self.milestones,
            at=self._clock.wall_ms(),
            elapsed_ms=self._elapsed_ms(),
            code_version=self._type.code_version,
        )
        try:
            return content.text()
        except PerdureError as error:
            raise self._final(error) from None

    def _restore(self, content: Content) -> None:
        self.state = State(content.state)
        self.positions = dict(content.positions)
        self.milestones += [name for name in content.milestones if name not in self.milestones]
        self._elapsed_before = content.elapsed_ms
        self._kept = content.text()[1]
        self._compare_code(content.code_version, "the checkpoint was")
        self._tell(**content.progress)

    # What it says -----------------------------------------------------------------------------------------------------

    def progress(self, fraction: float | None, done: int | None, total: int | None, step: str | None) -> None:
        """See `Context`."""
        self.exchange.poll()
        self._check()
        given = {"fraction": fraction, "units_done": done, "units_total": total, "current_step": step}
        self._doing = step or self._doing
        self._tell(**{name: value for name, value in given.items() if value is not None})

    def report_units(self, done: int, total: int | None) -> None:
        """How far the outermost track is."""
        if self.sections.number() == 0:
            fraction = min(done / total, 1.0) if total else None
            self._tell(units_done=done, units_total=total, fraction=fraction, current_step=self._doing)

    def _tell(self, **progress: Any) -> None:
        self._progress.update(progress)
        self.exchange.tell(channel.Progress, **self._progress)

    def milestone(self, name: str) -> None:
        """See `Context`."""
        self._check()
        if not isinstance(name, str) or not 1 <= len(name.encode(errors="replace")) <= limits.TEXT_MAX:
            raise InvalidRequest(f"{name!r} is no name for a milestone: 1 to {limits.TEXT_MAX} bytes of text",
                                 field="name")  # fmt: skip
        name = name.encode(errors="replace").decode()
        if name in self.milestones:
            return
        named = sum(len(known.encode()) for known in (*self.milestones, name))
        if len(self.milestones) >= limits.MILESTONES_MAX or named > limits.MILESTONES_BYTES:
            most = f"{limits.MILESTONES_MAX:,} milestones with {limits.MILESTONES_BYTES:,} bytes of names"
            raise InvalidRequest(f"a task has at most {most}; use ctx.progress", field="name")
        self.milestones.append(name)
        self.exchange.post(channel.Milestone, name=name)

    def stopping(self) -> bool:
        """Whether the task has been told to stop for good."""
        self.exchange.poll()
        return self._stop in HARD

    def defer(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See `Context`."""
        if isinstance(self._stack, AsyncExitStack):
            self._stack.push_async_callback(_await_if_needed, functools.partial(fn, *args, **kwargs))
        else:
            self._stack.callback(fn, *args, **kwargs)


async def _await_if_needed(fn: Callable[[], Any]) -> None:
    result = fn()
    if inspect.isawaitable(result):
        await result
