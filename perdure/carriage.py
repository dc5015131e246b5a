"""How an attempt's values get into records and out of them: as they are, or through the store of large values.

A store that is away costs time, never an attempt: it is asked again until it answers or the attempt is stopped. In an
async attempt none of that happens on the event loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from perdure.connectors.large_values import LargeValues
from perdure.exchange import Call, Flow
from perdure.schemas import limits, references, values
from perdure.schemas.errors import DecodeError, PerdureError, Unreachable, ValueLost

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0


class Carriage:
    """Of one attempt. `check` raises what has ended it; `final` marks an error as one that no retry can mend."""

    def __init__(
        self,
        large: LargeValues,
        task_id: str,
        log: logging.Logger,
        check: Callable[[], None],
        final: Callable[[PerdureError], PerdureError],
    ) -> None:
        self._large, self._task_id, self._log, self._check, self._final = large, task_id, log, check, final

    def text(self, value: Any, field: str) -> bytes:
        """A value's JSON text. A value that cannot be carried fails the attempt for good."""
        try:
            return self._large.text(value, field)
        except PerdureError as error:
            raise self._final(error) from None

    def carried(self, text: bytes) -> Flow[bytes]:
        """What a report carries for the text."""
        if len(text) <= limits.VALUE_MAX:
            return text
        found: bytes = yield from self.patiently(self._large.carried, self._task_id, text)
        return found

    def value(self, carried: bytes) -> Flow[Any]:
        """The value that a record of this task carries. One that is lost fails the attempt for good."""
        if not references.is_reference(carried):
            return values.loads(carried)
        try:
            return (yield from self.patiently(self._fetched, self._task_id, carried))
        except (ValueLost, DecodeError) as error:
            raise self._final(error) from None

    def _fetched(self, task_id: str, carried: bytes) -> Any:
        return values.loads(self._large.fetched(task_id, carried))

    def patiently(self, fn: Callable[..., Any], *args: object) -> Flow[Any]:
        """What `fn` returns, which asks a store: again, for as long as that is `Unreachable`."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return (yield Call(fn, args, blocking=True))
            except Unreachable as error:
                self._log.warning("%s; next try in %g s", error, pause_s)
            yield Call(time.sleep, (pause_s,), blocking=True)
            self._check()
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
