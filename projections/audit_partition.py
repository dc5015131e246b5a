"""The audit of one partition: its inputs in order, with the events, refusals and replies that each of them has.

Records are fed as they are read, each topic in its own order; `settle` works through the inputs whose effects are all
there, `check` compares what has come about with the rows of the changelog.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from perdure.projections.audit_fold import Fold
from perdure.projections.audit_inputs import Input, Inputs
from perdure.projections.audit_records import Decoder, LogRecord, Told, Unreadable
from perdure.projections.audit_rows import Rows
from perdure.projections.audit_rules import CAUSES, ONLY_REPORTED, REPORTED, Violation
from perdure.projections.audit_task import Fault, Task
from perdure.schemas import topics

COMMANDS, EVENTS = topics.COMMANDS.name, topics.EVENTS.name
REPLIES, QUARANTINE, CHANGELOG = topics.REPLIES.name, topics.QUARANTINE.name, topics.CHANGELOG.name
READ = (CHANGELOG, COMMANDS, EVENTS, QUARANTINE, REPLIES)
"""The topics that are audited."""


_SAME = ("step_id", "name", "args_hash", "version", "uri", "sha256", "positions")
"""Fields that a report and its event have in common."""


@dataclass(slots=True)
class _Due:
    """Replies to a command that are still to come."""

    offset: int
    at: int
    wanted: list[bool | None] = field(default_factory=list)


class Partition:
    """All that is known of one partition."""

    def __init__(
        self, number: int, decoder: Decoder, starts: Mapping[str, int], violated: Callable[[Violation], None]
    ) -> None:
        self.number = number
        self._decoder, self._starts, self._violated = decoder, starts, violated
        self.tasks: dict[str, Task] = {}
        self.fold = Fold(whole=not starts.get(EVENTS))
        self.rows = Rows(decoder, self._report)
        self.inputs = Inputs(decoder, self.tasks, self.fold, number)
        self.partial: set[str] = set()
        """Tasks whose first events are deleted."""
        self.seen = 0
        """Tasks that the events speak of."""
        self._given: deque[LogRecord] = deque()
        self._events: deque[tuple[int, Told]] = deque()
        self._quarantined: deque[tuple[int, str]] = deque()
        self._replies: deque[tuple[int, dict[str, Any]]] = deque()
        self._early: list[tuple[int, dict[str, Any]]] = []
        """Replies that no command was known for at the last check."""
        self._due: dict[str, _Due] = {}
        self._seq: int | None = 0 if self.fold.whole else None
        self._last_cause = -1
        self._last_quarantined = -1
        self._told_of_start = False
        self._first_reply: int | None = None
        """Log time of the first reply that is kept."""

    def _report(self, rule: str, topic: str, offset: int, text: str, task_id: str = "") -> None:
        self._violated(Violation(rule, topic, self.number, offset, text, task_id))

    # Reading ---------------------------------------------------------------------------------------------------------

    def feed(self, record: LogRecord) -> None:
        """Take in a record of one of the audited topics."""
        match record.topic:
            case topics.CHANGELOG.name:
                self.rows.feed(record)
            case topics.COMMANDS.name:
                self._given.append(record)
            case topics.EVENTS.name:
                self._feed_event(record)
            case topics.QUARANTINE.name:
                told = self._read(record)
                if told is not None and (told.fields["topic"], told.fields["reader"]) == (COMMANDS, "engine"):
                    self._last_quarantined = told.fields["offset"]
                    self._quarantined.append((self._last_quarantined, told.fields["cause"]))
            case topics.REPLIES.name:
                told = self._read(record)
                if told is not None:
                    self._first_reply = told.fields["at"] if self._first_reply is None else self._first_reply
                    self._replies.append((record.offset, told.fields))

    def _read(self, record: LogRecord) -> Told | None:
        try:
            return self._decoder.read(record.value or b"")
        except Unreadable as error:
            self._report("readable", record.topic, record.offset, str(error))
            return None

    def _feed_event(self, record: LogRecord) -> None:
        told = self._read(record)
        if told is None:
            return
        cause = told.fields["cause"]
        told.name = told.name.partition(".")[2]
        if cause["partition"] != self.number or cause["offset"] < self._last_cause:
            text = (
                f"{told.name} by offset {cause['offset']} of partition {cause['partition']}, after {self._last_cause}"
            )
            self._report("cause", EVENTS, record.offset, text, told.fields.get("task_id") or "")
            cause["offset"] = max(self._last_cause, cause["offset"])
        self._last_cause = cause["offset"]
        self._events.append((record.offset, told))

    def backlog(self, topic: str) -> int:
        """Records of a topic that wait for those of others."""
        waiting: dict[str, int] = {COMMANDS: len(self._given), EVENTS: len(self._events)}
        return waiting.get(topic, 0)

    # Settling --------------------------------------------------------------------------------------------------------

    def settle(self, unread: Container[str] = ()) -> None:
        """Judge the inputs below the changelog's position whose effects are all there; `unread`: topics of which more
        is to come. The changelog and the replies have to be read before.
        """
        end = self.rows.position
        if end is None:
            return
        if EVENTS in unread:
            end = min(end, self._last_cause)
        if QUARANTINE in unread:
            end = min(end, self._last_quarantined)
        if COMMANDS in unread:
            end = min(end, self._given[-1].offset + 1 if self._given else 0)
        while self._given and self._given[0].offset < end:
            record = self._given.popleft()
            self._orphans(record.offset)
            given = Input(self.number, record.offset, record.at, record.value)
            placed: list[tuple[int, Told]] = []
            while self._events and self._events[0][1].fields["cause"]["offset"] == record.offset:
                placed.append(self._events.popleft())
            while self._quarantined and self._quarantined[0][0] == record.offset:
                given.quarantined.append(self._quarantined.popleft()[1])
            given.events = [told for _, told in placed]
            self._settle(given, placed)
        self._orphans(end)

    def _orphans(self, before: int) -> None:
        """Events of inputs that are not in the log: deleted ones, or ones that never were."""
        while self._quarantined and self._quarantined[0][0] < before:
            self._quarantined.popleft()
        while self._events and (cause := self._events[0][1].fields["cause"]["offset"]) < before:
            offset, told = self._events.popleft()
            if cause >= self._starts.get(COMMANDS, 0):
                text = f"{told.name} by offset {cause}, which is no record of {COMMANDS}"
                self._report("cause", EVENTS, offset, text, told.fields.get("task_id") or "")
            self._number(offset, told)
            self._follow(offset, told, None)

    def _settle(self, given: Input, placed: list[tuple[int, Told]]) -> None:
        for offset, told in placed:
            self._number(offset, told)
        faults, answers = self.inputs.judge(given)
        for rule, text in faults:
            self._report(rule, COMMANDS, given.offset, text)
        for answer in answers if self._reply_kept(given.at) else ():
            due = self._due.setdefault(answer.command_id, _Due(given.offset, given.at))
            due.wanted.append(answer.accepted)
        for offset, told in placed:
            self._follow(offset, told, given)

    # Sequences -------------------------------------------------------------------------------------------------------

    def _number(self, offset: int, told: Told) -> None:
        """The event's number; `seq` of a task runs ahead of what is followed, by the events of one input."""
        e, task_id = told.fields, told.fields.get("task_id")
        if task_id is None:
            if self._seq is not None and e["seq"] != self._seq + 1:
                text = f"{told.name} has number {e['seq']}, after {self._seq}"
                self._report("partition-sequence", EVENTS, offset, text)
                self.fold.give_up()
            self._seq = e["seq"]
            return
        task = self.tasks.get(task_id)
        if task is None:
            task = self._first(offset, told, task_id)
        elif e["seq"] != task.seq + 1 and not task.broken:
            text = f"{told.name} has number {e['seq']}, after {task.seq}"
            self._report("task-sequence", EVENTS, offset, text, task_id)
            task.give_up()
        task.seq = e["seq"]

    def _first(self, offset: int, told: Told, task_id: str) -> Task:
        whole = told.name == "TaskSubmitted" and told.fields["seq"] == 1
        task = self.tasks[task_id] = Task(task_id, told.fields["seq"], whole=whole)
        self.inputs.by_local[task_id.partition("/")[2]] = task_id
        self.inputs.queues.add(task_id.partition("/")[0])
        self.seen += 1
        if whole:
            self.partial.discard(task_id)
        elif self.fold.whole:
            text = f"{told.name} with number {told.fields['seq']} is the first event of the task"
            self._report("task-sequence", EVENTS, offset, text, task_id)
            task.give_up()
        else:
            self.partial.add(task_id)
        return task

    # Following -------------------------------------------------------------------------------------------------------

    def _follow(self, offset: int, told: Told, given: Input | None) -> None:
        """Hold an event to the rules, and take it in."""
        name, e, task_id = told.name, told.fields, told.fields.get("task_id")
        task = None if task_id is None else self.tasks.get(task_id)
        fault = self._fault(told, task, given)
        if fault is not None:
            self._report(fault[0], EVENTS, offset, fault[1], task_id or "")
            if task is not None:
                task.give_up()
        if task_id is None:
            self._follow_partition(offset, name, e)
        elif task is not None and not task.broken:
            if name == "TaskSubmitted" and e["key"] is not None:
                self.inputs.by_key[e["type"], e["key"]].add(task.id)
            if name == "TaskRetired":
                self._forget(task)
            self.fold.task_event(task, name, e)
            task.follow(name, e)

    def _fault(self, told: Told, task: Task | None, given: Input | None) -> Fault | None:
        """The rule that an event breaks, if it breaks one."""
        if task is not None and task.broken:
            return None
        fault = None if task is None else task.fault(told.name, told.fields)
        if fault is None and given is not None and given.kinds and not self._may_cause(given, told, task):
            rule = "report-backed" if told.name in ONLY_REPORTED else "cause"
            what = " with a ".join(sorted(given.kinds))
            return rule, f"{told.name} by a {what} at offset {given.offset}, which has no part in it"
        return fault

    def _may_cause(self, given: Input, told: Told, task: Task | None) -> bool:
        wanted = CAUSES.get(told.name)
        if wanted is not None and not wanted & given.kinds:
            return False
        if told.name not in ONLY_REPORTED or task is None or task.session is None or given.message is None:
            return True
        return given.message["session"] == task.session and any(
            told.name in REPORTED.get(kind.rpartition(".")[2], ()) and _tells(report, told.fields)
            for entry in given.message["entries"]
            if (entry["task_id"], entry["epoch"]) == (task.id, told.fields["epoch"])
            for kind, report in entry["reports"]
        )

    def _follow_partition(self, offset: int, name: str, e: dict[str, Any]) -> None:
        match name:
            case "ConfigApplied":
                self.inputs.configured[e["name"]] = e["version"]
            case "ForwardQueued":
                self._count(offset, self.inputs.sent, e["target"], e["number"], "sent to")
            case "ForwardTaken":
                self._count(offset, self.inputs.taken, e["source"], e["number"], "taken from")
                self.inputs.taken_at[e["source"]] = offset
        self.fold.partition_event(name, e)

    def _count(self, offset: int, numbers: dict[int, int], other: int, number: int, doing: str) -> None:
        before = numbers.get(other, 0 if self.fold.whole else number - 1)
        if number != before + 1:
            text = f"number {number} is {doing} partition {other} after {before}"
            self._report("forward-order", EVENTS, offset, text)
            self.fold.give_up()
        numbers[other] = number

    def _forget(self, task: Task) -> None:
        del self.tasks[task.id]
        local = task.id.partition("/")[2]
        if self.inputs.by_local.get(local) == task.id:
            del self.inputs.by_local[local]
        if task.spec is not None and task.spec["key"] is not None:
            same = self.inputs.by_key[task.spec["type"], task.spec["key"]]
            same.discard(task.id)
            if not same:
                del self.inputs.by_key[task.spec["type"], task.spec["key"]]

    # Replies ---------------------------------------------------------------------------------------------------------

    def _check_replies(self) -> None:
        """Every command that asked for it was answered once, and as it was decided.

        A reply may have been read before the changelog has come to its command: that is asked at the next check.
        """
        early, self._early = self._early, []
        for offset, reply in early:
            if not self._match(offset, reply) and self.fold.whole and not self._starts.get(COMMANDS):
                text = f"command {reply['command_id']} is answered again, or never asked"
                self._report("reply-once", REPLIES, offset, text, reply["task_id"])
        while self._replies:
            offset, reply = self._replies.popleft()
            of_query = reply["body"] is not None or reply["reason"] == "not_found"
            if not of_query and not self._match(offset, reply):
                self._early.append((offset, reply))
        for command_id, due in list(self._due.items()):
            if due.offset < (self.rows.position or 0):
                self._report("reply-once", COMMANDS, due.offset, f"command {command_id} has no reply")
                del self._due[command_id]

    def _match(self, offset: int, reply: dict[str, Any]) -> bool:
        """Whether a command waits for the reply; it has to say what was decided."""
        due = self._due.get(reply["command_id"])
        if due is None:
            return False
        wanted = due.wanted.pop(0)
        if wanted not in (None, reply["accepted"]):
            said = "accepted" if reply["accepted"] else "refused"
            text = f"command {reply['command_id']} of offset {due.offset} is told it is {said}, and is not"
            self._report("reply-once", REPLIES, offset, text, reply["task_id"])
        if not due.wanted:
            del self._due[reply["command_id"]]
        return True

    def _reply_kept(self, at: int) -> bool:
        """Replies are kept for an hour: what is older than the first one kept was answered, or not, unseen."""
        return not self._starts.get(REPLIES) or (self._first_reply is not None and at > self._first_reply)

    def _unasked(self, offset: int, reply: dict[str, Any]) -> None:
        if not self._starts.get(COMMANDS) and self.fold.whole:
            text = f"command {reply['command_id']} is answered again, or never asked"
            self._report("reply-once", REPLIES, offset, text, reply["task_id"])

    # Checking --------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Everything below the changelog's position was fed: settle it, and compare the rows with it."""
        self._check_start()
        self.settle()
        self._check_replies()
        self.rows.check(self.fold, self.tasks)

    def _check_start(self) -> None:
        """Nothing was deleted before it was executed."""
        start, position = self._starts.get(COMMANDS, 0), self.rows.position or 0
        if position < start and not self._told_of_start:
            text = f"the records from {position} on were deleted before they were executed"
            self._report("input-accounted", COMMANDS, start, text)
            self._told_of_start = True

    @property
    def unknown_tasks(self) -> set[str]:
        """Tasks whose events are not all there."""
        return self.partial | (self.rows.tasks - self.tasks.keys() if not self.fold.whole else set())


def _tells(report: dict[str, Any], e: dict[str, Any]) -> bool:
    """Whether an event says what the report said. A step without a result has the result null."""
    same = all(report[name] == e[name] for name in _SAME if name in report and name in e)
    return same and e.get("result", b"") in (report.get("result") or b"null", b"")
