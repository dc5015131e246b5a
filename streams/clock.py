"""Partition time: log time that only adds forward differences, and does not believe jumps before a tick confirms them.

Partition time is log time plus the clock row's offset. A forward jump of more than `CLOCK_AGREES_MS` is taken out by
the offset and kept as unconfirmed; an agreeing tick puts it back, a backward jump cancels it. Timers set in between are
counted from the later reading, and moved back if the jump turns out to have been none.
"""

from __future__ import annotations

from perdure.schemas import events, limits
from perdure.schemas.commands import Tick
from perdure.streams.decision import Moment, Outputs, of_partition
from perdure.streams.state import State


def now(s: State, at: int) -> int:
    """Partition time at a log time, never before the last one."""
    last = s.position
    if last is None or is_back(at, last.at):  # the offset has taken a step back out already
        return at + s.clock.offset
    return max(at, last.at) + s.clock.offset


def is_back(at: int, last: int) -> bool:
    """Whether the log's clock was set back, and did not just waver."""
    return at - last < -limits.CLOCK_BACK_MS


def agrees(tick: Tick, at: int) -> bool:
    """Whether the log's clock and the host's say the same."""
    return abs(tick.host_clock - at) <= limits.CLOCK_AGREES_MS


def adjust(s: State, m: Moment, tick: Tick | None) -> Outputs:
    """What an input's log time means for the clock. `tick`: the input, if it is one."""
    if s.position is None:
        return
    step, clock = m.at - s.position.at, s.clock
    agreeing = tick is not None and agrees(tick, m.at)
    if step > limits.CLOCK_AGREES_MS and not agreeing:
        yield events.ClockAdjusted(
            **of_partition(s, m), offset=clock.offset - step, unconfirmed=clock.unconfirmed + step, shift=clock.shift
        )
    elif is_back(m.at, s.position.at):
        back = min(clock.unconfirmed, -step)
        yield events.ClockAdjusted(
            **of_partition(s, m),
            offset=clock.offset - step,
            unconfirmed=clock.unconfirmed - back,
            shift=clock.shift + back,
        )
    elif agreeing and clock.unconfirmed:
        yield events.ClockAdjusted(
            **of_partition(s, m), offset=clock.offset + clock.unconfirmed, unconfirmed=0, shift=clock.shift
        )


def settle(s: State, m: Moment, pending: bool) -> Outputs:
    """Go on with the timers of a closed window, a few with each tick."""
    clock = s.clock
    if pending:
        yield events.ClockAdjusted(**of_partition(s, m), offset=clock.offset, unconfirmed=0, shift=clock.shift)
    elif clock.shift and not clock.unconfirmed:
        yield events.ClockAdjusted(**of_partition(s, m), offset=clock.offset, unconfirmed=0, shift=0)
