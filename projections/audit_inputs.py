"""What each record of task-commands has to lead to: an effect, a refusal in one place, or rightly nothing.

The events of an input are looked at before they are followed: a repeat is one of what was known when it came.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from perdure.projections.audit_fold import Fold, local_id_of
from perdure.projections.audit_records import Decoder, Told, Unreadable
from perdure.projections.audit_rules import COMMANDS, ENDS, QUERIES, REPORTED, SILENT
from perdure.projections.audit_task import Fault, Task

_AFTERWARDS = frozenset({"defect", "too_large"})
"""Causes of quarantine that may concern what an input made possible, its own effects standing."""
_OF_TIME = frozenset({"ClockAdjusted", "ForwardTaken"})
"""Events that an input may have although it is quarantined."""


@dataclass(slots=True)
class Input:
    """A record of task-commands with everything that names it as its cause."""

    partition: int
    offset: int
    at: int
    value: bytes | None
    events: list[Told] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)
    """Causes."""
    kinds: set[str] = field(default_factory=set)
    """What it is, and what a forwarded one holds."""
    message: dict[str, Any] | None = None
    """The decoded record."""

    def of(self, *names: str) -> list[Told]:
        """Its events of these kinds."""
        return [e for e in self.events if e.name in names]

    def decided(self, command_id: str) -> list[Told]:
        """Its events that say that they answer a command."""
        return [e for e in self.events if e.fields["cause"]["command_id"] == command_id]


@dataclass(slots=True)
class Answer:
    """A reply that is due: to whom the command asked it to be sent, and what it has to say."""

    command_id: str
    accepted: bool | None
    """None: as it was decided before, which is not known here."""


class Inputs:
    """Judges the inputs of a partition one after another, by what is known before each."""

    def __init__(self, decoder: Decoder, tasks: Mapping[str, Task], fold: Fold, partition: int) -> None:
        self._decoder, self._tasks, self._fold, self._partition = decoder, tasks, fold, partition
        self.by_local: dict[str, str] = {}
        """Local id -> task."""
        self.by_key: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        """(type, idempotency key) -> task."""
        self.configured: dict[str, int] = {}
        """Name -> applied version."""
        self.queues: set[str] = set()
        self.taken: dict[int, int] = {}
        """Source -> the last number taken from it."""
        self.taken_at: dict[int, int] = {}
        """Source -> offset of the event that says so."""
        self.sent: dict[int, int] = {}
        """Target -> the last number sent to it."""
        self.commands = 0

    def judge(self, given: Input) -> tuple[list[Fault], list[Answer]]:
        """What is wrong with the effects of an input, and the replies that are due."""
        faults = list(_refusals(given))
        if given.quarantined:
            return faults, self._standing(given) if given.quarantined[0] in _AFTERWARDS else []
        try:
            told = self._decoder.read_input(given.value or b"")
        except Unreadable as error:
            return [*faults, ("input-accounted", f"it cannot be read ({error}), and is not in quarantine")], []
        kind = told.name.partition(".")[2]
        given.kinds.add(kind)
        given.message = told.fields
        answers: list[Answer] = []
        faults += self._account(given, kind, told.fields, answers)
        return faults, answers

    def _standing(self, given: Input) -> list[Answer]:
        """The replies that an input in quarantine may have led to: a part of it may have failed, or what came after it.

        Which of a batch's reports count is not known.
        """
        try:
            told = self._decoder.read_input(given.value or b"")
        except Unreadable:
            return []
        kind = told.name.partition(".")[2]
        answers: list[Answer] = []
        if kind != "ReportBatch":
            for _ in self._account(replace(given, kinds=set()), kind, told.fields, answers):
                pass  # what has no effect has failed
            return answers
        for entry in told.fields["entries"]:
            if entry["task_id"] in self._tasks:
                self._tasks[entry["task_id"]].report_seq = None
        return answers

    def _account(self, given: Input, kind: str, m: dict[str, Any], answers: list[Answer]) -> Iterator[Fault]:
        match kind:
            case _ if kind in COMMANDS:
                yield from self._command(given, kind, m, answers)
            case "ReportBatch":
                yield from self._batch(given, m)
            case "ApplyConfig":
                done = any(e.fields["name"] == m["name"] for e in given.of("ConfigApplied"))
                if not done and self._fold.whole and m["version"] > self.configured.get(m["name"], -1):
                    yield "input-accounted", f"version {m['version']} of {m['name']} is newer, and was not applied"
            case "Forwarded":
                yield from self._forwarded(given, m, answers)
            case "ForwardedAck":
                open_from = self._fold.unacknowledged.get(m["target"])
                ours = m["source"] == self._partition and m["up_to"] <= self.sent.get(m["target"], 0)
                if ours and open_from is not None and open_from <= m["up_to"] and not given.of("ForwardAcknowledged"):
                    yield "input-accounted", f"numbers up to {m['up_to']} were taken, and their rows stay"
            case _ if kind not in SILENT:
                yield "input-accounted", f"a {kind or 'record of no kind'} that nobody refused"

    def _forwarded(self, given: Input, m: dict[str, Any], answers: list[Answer]) -> Iterator[Fault]:
        if not given.of("ForwardTaken"):
            if self._fold.whole and m["number"] == self.taken.get(m["source"], 0) + 1:
                yield (
                    "input-accounted",
                    f"number {m['number']} of partition {m['source']} is the next, and was not taken",
                )
            return
        try:
            inner = self._decoder.read(m["record"])
            if inner.name == "hosts.LookUp":
                inner = self._decoder.read(inner.fields["record"])
        except Unreadable as error:
            yield "input-accounted", f"what was forwarded cannot be read ({error}), and is not in quarantine"
            return
        kind = inner.name.partition(".")[2]
        given.kinds.add(kind)
        yield from self._command(given, kind, inner.fields, answers)

    # Commands --------------------------------------------------------------------------------------------------------

    def _command(self, given: Input, kind: str, m: dict[str, Any], answers: list[Answer]) -> Iterator[Fault]:
        self.commands += 1
        command_id = m.get("command_id") or f"log-{given.partition}-{given.offset}"
        found = given.decided(command_id)
        names = {e.name for e in found}
        if "ForwardQueued" in names:
            return
        if kind == "SubmitBatch" and not names:
            yield from self._tasks_of(given, command_id, m, answers)
            return
        accepted: bool | None = "CommandRejected" not in names
        if not names:
            if kind in QUERIES:
                return
            accepted, fault = self._repeat(kind, m, command_id)
            if fault is not None:
                yield "input-accounted", fault
                return
        if m.get("reply_to") is not None:
            answers.append(Answer(command_id, accepted))

    def _tasks_of(self, given: Input, batch_id: str, m: dict[str, Any], answers: list[Answer]) -> Iterator[Fault]:
        tasks = m.get("tasks")
        for index, one in enumerate(tasks if isinstance(tasks, list) else ()):
            named = {
                "command_id": one.get("command_id") or f"{batch_id}-{index}",
                "reply_to": one.get("reply_to") or m.get("reply_to"),
            }
            yield from self._command(given, "SubmitTask", one | named, answers)

    def _repeat(self, kind: str, m: dict[str, Any], command_id: str) -> tuple[bool | None, str | None]:
        """(what was decided before, None) of a command that has been decided before, or (None, what is wrong)."""
        meant = [self._tasks[t] for t in self._meant(kind, m, command_id) if t in self._tasks]
        before = [task.answers[command_id] for task in meant if command_id in task.answers]
        if before:
            return before[0][1], None
        if any(task.broken or task.partial for task in meant) or not (meant or self._fold.whole):
            return None, None
        if kind == "SubmitTask" and meant:
            return True, None  # the same task again, under another command
        return None, f"{kind} {command_id} has no effect and no refusal, and is no repeat"

    def _meant(self, kind: str, m: dict[str, Any], command_id: str) -> list[str]:
        """The tasks that a command without effect may have been for."""
        named = str(m.get("task_id") or "")
        if named:
            local = [named, named.partition("/")[2]]
        elif kind == "SubmitTask" and m.get("key") is not None:
            return sorted(self.by_key.get((str(m.get("type")), str(m["key"])), ()))
        elif kind == "SubmitTask":
            local = [local_id_of(queue, str(m.get("type")), "\x00" + command_id) for queue in sorted(self.queues)]
        else:
            return []
        return [named, *(self.by_local[x] for x in local if x in self.by_local)]

    # Reports ---------------------------------------------------------------------------------------------------------

    def _batch(self, given: Input, m: dict[str, Any]) -> Iterator[Fault]:
        refused = given.of("ReportRejected")
        if any(e.fields["report"] == "ReportBatch" for e in refused):
            return
        for entry in m["entries"]:
            task = self._tasks.get(entry["task_id"])
            if task is not None and (task.broken or task.partial):
                continue
            if any(_concerns(e, entry) and e.fields["why"] != "illegal" for e in refused):
                continue  # as a whole, or from a gap on
            current = (m["session"], entry["epoch"])
            if task is None or (task.session, task.epoch) != current or task.state != "RUNNING":
                if self._fold.whole:
                    speaks = f"session {m['session']} speaks for epoch {entry['epoch']} of {entry['task_id']}"
                    yield "input-accounted", f"{speaks}, which it does not hold, and is not refused"
                continue
            yield from _reports(given, task, entry)


def _concerns(rejected: Told, entry: dict[str, Any]) -> bool:
    """Whether a refusal is one of this entry. A bad token's does not name the task: it proves nothing about one."""
    e = rejected.fields
    return e["epoch"] == entry["epoch"] and e["task_id"] in (None, entry["task_id"])


def _reports(given: Input, task: Task, entry: dict[str, Any]) -> Iterator[Fault]:
    """Each new report of the attempt that holds the grant has its event, in order."""
    shown = iter([e for e in given.events if e.fields.get("task_id") == task.id])
    milestones, started = set(task.milestones), task.started
    for name, report in entry["reports"]:
        kind = name.rpartition(".")[2]
        if task.report_seq is None or report["seq"] <= task.report_seq:
            continue
        task.report_seq = report["seq"]
        known = (kind == "ReportMilestone" and report["name"] in milestones) or (kind == "AttemptStarted" and started)
        counts = kind in REPORTED and not known
        if counts and not any(e.name in REPORTED[kind] or e.fields.get("report") == kind for e in shown):
            yield "input-accounted", f"report {report['seq']} ({kind}) of {task.id} counts, and has no event"
            return
        started |= kind == "AttemptStarted"
        if kind == "ReportMilestone":
            milestones.add(report["name"])
        if kind in ENDS:
            return


def _refusals(given: Input) -> Iterator[Fault]:
    """Each refusal stands in one place."""
    places = given.quarantined
    refused = [e for e in given.events if e.name in ("CommandRejected", "ReportRejected")]
    if len(places) > 1:
        yield "one-refusal", f"it is in quarantine {len(places)} times"
    elif places and refused and places[0] not in _AFTERWARDS:
        yield "one-refusal", f"it is in quarantine ({places[0]}), and refused by {refused[0].name} as well"
    elif places and places[0] not in _AFTERWARDS:
        for e in given.events:
            if e.name not in _OF_TIME:
                yield "one-refusal", f"it is in quarantine ({places[0]}), and brought {e.name} about"
                return
