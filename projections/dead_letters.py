"""Tasks that ended FAILED or TIMED_OUT and wait for a person: a fold of each task's events.

A letter has to say what the task was asked to do, how often it tried and how far it came, so a case is kept for every
task from its submit on. It is the letter itself, with an empty `state` while the task is no dead letter.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from perdure.projections.inputs import Fact, Transaction, read_as, readable, task_of, written
from perdure.projections.progress import shown, timeout_error
from perdure.schemas import events, topics
from perdure.schemas.codec import class_of, replace
from perdure.schemas.common import ErrorInfo
from perdure.schemas.public import DeadLetter
from perdure.streams.log import Record

_NOTHING_NEW = (events.TaskQueued, events.AttemptStarted, events.CheckpointRecorded)
"""Events that come with nearly every task and change no case: they are passed over undecoded."""
_FRAME = re.compile(r'File "([^"\n]+)", line \d+(?:, in ([^\n]+))?')


class DeadLetterProcessor:
    """Keeps `task-dead-letters`: a record for each dead letter, a tombstone when it is one no more.

    The cases of all open tasks are no public record, so the store has no changelog: a lost one is filled by reading the
    input from its beginning. What was written before, as far as the group's position tells, is not written again.
    """

    name = "dead_letters"
    inputs = (topics.EVENTS.name,)
    changelog = None

    def handle(self, record: Record, tx: Transaction) -> None:
        """Fold one record into its task's case, and publish the letter if it changed. Bad records are quarantined."""
        if record.value is not None and class_of(record.value) in _NOTHING_NEW:
            return
        found = readable(record, tx)
        task_id = None if found is None else task_of(found)
        if found is None or task_id is None:
            return
        key = task_id.encode()
        row = tx.get(key)
        before = None if row is None else read_as(DeadLetter, row)
        after = fold(before, found)
        if after is before:
            return
        data = None if after is None else written(after)
        tx.put(key, data)
        if after is not None and after.state:
            tx.emit(topics.DEAD_LETTERS.name, key, data)
        elif before is not None and before.state:
            tx.emit(topics.DEAD_LETTERS.name, key, None)


def fold(case: DeadLetter | None, event: Fact) -> DeadLetter | None:
    """The case after one more event; the same object if it changes nothing, None when nothing can follow.

    It is a dead letter while its `state` is not empty.
    """
    if isinstance(event, events.TaskSubmitted) and case is None:
        return DeadLetter(
            task_id=event.task_id, type=event.type, queue=event.queue, state="", submitted_at=event.at,
            labels=event.labels, input=shown(event.input),
        )  # fmt: skip
    if case is None or isinstance(event, events.TaskCompleted | events.TaskCancelled | events.TaskRetired):
        return None
    changes = _changes(case, event)
    return replace(case, **changes) if changes else case


def _changes(case: DeadLetter, event: Fact) -> dict[str, Any]:
    match event:
        case events.TaskGranted():
            return {} if event.attempt == case.attempts else {"attempts": event.attempt}
        case events.StepCompleted():
            return {"steps_completed": case.steps_completed + 1}
        case events.AttemptFailed() | events.TaskFailed():
            return {"error": event.error}
        case events.TaskTimedOut():
            return {"error": timeout_error(event.which)}
        case events.TaskDeadLettered():
            error = event.error or case.error
            return {"state": event.state, "error": error, "failed_at": event.at, "fingerprint": fingerprint(error)}
        case events.TaskRedriven():
            changed = {} if event.input is None else {"input": shown(event.input)}
            return {"state": "", "redrives": case.redrives + 1, "attempts": 0, **changed}
        case events.DeadLetterDiscarded():
            return {"state": ""}
        case _:
            return {}


def fingerprint(error: ErrorInfo | None) -> str:
    """Digest of the error's type and the innermost place in its traceback: equal for failures of one cause.

    A place is the file's last two parts and the function: line numbers move with every edit, folders with every host.
    """
    kind = "" if error is None else error.type
    frames = _FRAME.findall("" if error is None else error.traceback)
    path, function = frames[-1] if frames else ("", "")
    place = "/".join(re.split(r"[\\/]", path)[-2:])
    return hashlib.sha256(f"{kind}\x00{place}\x00{function.strip()}".encode()).hexdigest()[:16]
