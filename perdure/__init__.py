"""Perdure: durable long-running tasks on Kafka.

Layout: `task`, `Retry`, `Context` for authors of tasks; `Client`, `LongRunningTask`, `TaskQueue` for who submits them;
`errors` for both. Names are imported when they are first used: `import perdure` alone costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perdure import errors as errors
    from perdure.client import Client as Client
    from perdure.context import Context as Context
    from perdure.long_running import LongRunningTask as LongRunningTask
    from perdure.long_running import TaskQueue as TaskQueue
    from perdure.tasks import Retry as Retry
    from perdure.tasks import task as task
    from perdure.worker import Worker as Worker

_HOMES = {
    "Client": "perdure.client",
    "Context": "perdure.context",
    "LongRunningTask": "perdure.long_running",
    "Retry": "perdure.tasks",
    "TaskQueue": "perdure.long_running",
    "Worker": "perdure.worker",
    "task": "perdure.tasks",
}
__all__ = ["Client", "Context", "LongRunningTask", "Retry", "TaskQueue", "Worker", "errors", "task"]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("perdure.errors")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'perdure' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
