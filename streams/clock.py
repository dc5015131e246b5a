"""Partition time: log time that only adds forward differences, and does not believe jumps before a tick confirms them.

Partition time is log time plus the clock row's offset. A jump is taken out by the offset and kept as unconfirmed: ahead
(positive), if it went forward by more than `CLOCK_AGREES_MS`, behind (negative), if it went backward; a jump the other
way cancels it. Once a tick agrees, what is ahead is put back (that time has passed) and what is behind is forgotten.
Timers set while the log is ahead are counted from the later reading, and moved back if the jump turns out to be none.
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
    doubt = clock.unconfirmed
    leap = step > limits.CLOCK_AGREES_MS
    if is_back(m.at, s.position.at):
        taken_back = min(max(doubt, 0), -step)
        yield _adjusted(s, m, offset=clock.offset - step, unconfirmed=doubt + step, shift=clock.shift + taken_back)
    elif tick is None or not agrees(tick, m.at):
        if leap:
            yield _adjusted(s, m, offset=clock.offset - step, unconfirmed=doubt + step, shift=clock.shift)
    elif doubt > 0:
        yield _adjusted(s, m, offset=clock.offset + doubt, unconfirmed=0, shift=clock.shift)
    elif doubt < 0:  # what a leap only makes up for is no time that has passed
        made_up = min(-doubt, step) if leap else 0
        yield _adjusted(s, m, offset=clock.offset - made_up, unconfirmed=0, shift=clock.shift)


def settle(s: State, m: Moment, pending: bool) -> Outputs:
    """Go on with the timers of a closed window, a few with each tick."""
    clock = s.clock
    if clock.unconfirmed:
        return
    if pending:
        yield _adjusted(s, m, offset=clock.offset, unconfirmed=0, shift=clock.shift)
    elif clock.shift:
        yield _adjusted(s, m, offset=clock.offset, unconfirmed=0, shift=0)


def _adjusted(s: State, m: Moment, *, offset: int, unconfirmed: int, shift: int) -> events.ClockAdjusted:
    return events.ClockAdjusted(**of_partition(s, m), offset=offset, unconfirmed=unconfirmed, shift=shift)
