"""How an attempt ends other than by returning."""

from __future__ import annotations

import asyncio
import traceback
from types import TracebackType

from perdure.schemas import limits
from perdure.schemas.errors import StepError


class AttemptStop(BaseException):
    """Ends an attempt that was asked to stop. No `Exception`, so that user code which catches those lets it pass."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class StepOutcomeUnknown(StepError):
    """An at-most-once step began in an earlier attempt and nobody knows how it ended; a person has to look."""

    code = "outcome_unknown"


def stop_in(error: BaseException, hard: str) -> str:
    """Why the attempt stopped, if `error` is a stop and nothing else. `hard`: the stop for good that was asked for; it
    also comes as the cancellation of an asyncio task.
    """
    if isinstance(error, AttemptStop):
        return error.why
    if isinstance(error, asyncio.CancelledError):
        return hard
    if isinstance(error, BaseExceptionGroup):
        stops, rest = error.split((AttemptStop, asyncio.CancelledError))
        return stop_in(stops.exceptions[0], hard) if stops is not None and rest is None else ""
    return ""


def describe(error: BaseException, ours: tuple[str, ...]) -> tuple[list[str], str, str]:
    """(dotted class names along the MRO, message, traceback) of what user code raised, within their limits.

    The traceback begins behind the frames of the source files `ours`, and is cut from the front.
    """
    kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__]
    root = "builtins.Exception" if isinstance(error, Exception) else "builtins.BaseException"
    frames = "".join(traceback.format_exception(type(error), error, _users(error.__traceback__, ours)))
    return kinds[: kinds.index(root) + 1], _text(error), _last(frames, limits.TRACEBACK_MAX)


def _users(found: TracebackType | None, ours: tuple[str, ...]) -> TracebackType | None:
    first = found
    while first is not None and first.tb_frame.f_code.co_filename in ours:
        first = first.tb_next
    return first or found


def _text(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception as broken:  # noqa: BLE001  a user's __str__ may raise anything
        text = f"(its text cannot be made: {type(broken).__name__})"
    return text.encode("utf-8", "replace")[: limits.MESSAGE_MAX].decode("utf-8", "ignore")


def _last(text: str, size: int) -> str:
    return text.encode("utf-8", "replace")[-size:].decode("utf-8", "ignore")
