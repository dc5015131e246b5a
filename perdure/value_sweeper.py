"""The duty of deleting large values of no task: what retired tasks leave behind, and submits that never came.

Part of the server. Several servers may do it at the same time, and each may be killed over it: it is a look at the
store and at the engine, with nothing to remember.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from perdure.connectors.large_values import SLICES, LargeValues
from perdure.schemas.errors import InfrastructureError, Unreachable

LOG = logging.getLogger("perdure.server")

EVERY_S = 24 * 3600 / SLICES
"""Between two slices: all of them in a day."""


class Sweeper:
    """`commands` carries a JSON command to the engine, and back comes its answer."""

    def __init__(
        self,
        large: LargeValues,
        commands: Callable[[dict[str, Any]], Mapping[str, Any]],
        *,
        every_s: float = EVERY_S,
    ) -> None:
        self._large, self._commands, self._every_s = large, commands, every_s

    def run(self, stop: threading.Event) -> None:
        """Take one slice after another until `stop`, from any one on: a server that often restarts reaches them all.

        What cannot be done now, because the store or the engine is away, is done when the slice's turn comes again.
        """
        for part in count(random.randrange(SLICES)):
            if stop.wait(self._every_s):
                return
            try:
                deleted = self._large.sweep(part % SLICES, self.known)
            except InfrastructureError as error:
                LOG.error("slice %d of the large values is not swept today: %s", part % SLICES, error)
            else:
                if deleted:
                    LOG.info("%d large values of tasks that are no more are deleted", deleted)

    def known(self, task_id: str) -> bool:
        """Whether the engine knows a task. The question goes through the log, behind all submits before it.

        An answer about another task, of this name within its queue, counts as yes. Raises `Unreachable` without one.
        """
        answer = self._commands({"command": "DescribeTask", "task_id": task_id})
        if answer["decided"] and (answer["accepted"] or answer["reason"].startswith("not_found")):
            return bool(answer["accepted"])
        raise Unreachable(
            f"the engine does not say whether it knows task {task_id}: {answer.get('reason') or 'silence'}"
        )
