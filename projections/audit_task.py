"""One task as its events tell it: what the rules ask about it, and whether an event keeps them.

A task whose first events are deleted is `partial`: what is known of it grows with what is read. A task that has broken
a rule is `broken`: that is told once, and what would only follow from it is not held against the rest of the log.
"""

from __future__ import annotations

from typing import Any

from perdure.projections.audit_records import digest, text
from perdure.projections.audit_rules import NEW, OF_THE_GRANT, ONLY_REPORTED, TRANSITIONS

Event = dict[str, Any]
Fault = tuple[str, str]
"""(rule, what is wrong)."""


class Task:
    """What the rules ask about a task. Steps are kept by a digest of their identity, answers by their place."""

    __slots__ = (
        "answers", "begun", "broken", "covered", "epoch", "id", "milestones", "report_seq", "row", "seq", "session",
        "spec", "started", "state", "steps",
    )  # fmt: skip

    def __init__(self, task_id: str, seq: int, *, whole: bool) -> None:
        self.id = task_id
        self.seq = seq
        """Of the last event."""
        self.state: str | None = NEW if whole else None
        """None: the events that would tell are gone."""
        self.epoch: int | None = 0 if whole else None
        self.session: str | None = "" if whole else None
        """That holds the grant; empty: none does."""
        self.started = False
        self.report_seq: int | None = None
        """Of the last report that counted; None: unknown."""
        self.steps: dict[str, bytes] = {}
        """Recorded step -> digest of function, code version and arguments."""
        self.begun: set[str] = set()
        """At-most-once steps whose outcome is not known yet."""
        self.covered: dict[str, int] = {}
        """Track -> item before which all steps are retired with the newest checkpoint."""
        self.milestones: set[str] = set()
        self.answers: dict[str, tuple[int, bool]] = {}
        """Command -> (offset at which it was decided, whether it was accepted)."""
        self.broken = False
        self.row: dict[str, Any] | None = None
        """The fold of its row, and below of its specification; None: not to be told from what is there."""
        self.spec: dict[str, Any] | None = None

    @property
    def partial(self) -> bool:
        """Whether the log begins in the middle of the task."""
        return self.row is None and not self.broken

    def give_up(self) -> None:
        """A rule is broken: the task is not followed any more."""
        self.broken, self.row, self.spec = True, None, None

    def fault(self, name: str, e: Event) -> Fault | None:
        """The rule that the task's next event breaks, if it breaks one."""
        if name not in TRANSITIONS:
            return "readable", f"{name} is an event that this build does not know: audit with the newest build in use"
        states, _ = TRANSITIONS[name]
        if self.state is not None and self.state not in states:
            return "legal-transition", f"{name} in state {self.state or 'none'}"
        if name in OF_THE_GRANT and self.epoch is not None and e["epoch"] != self.epoch:
            return "epoch-fence", f"{name} of epoch {e['epoch']} while epoch {self.epoch} is the newest"
        if name == "TaskGranted" and self.epoch is not None and e["epoch"] != self.epoch + 1:
            return "epoch-fence", f"grant {e['epoch']} after {self.epoch}"
        if name in ONLY_REPORTED and self.session == "":
            return "epoch-fence", f"{name} of epoch {e['epoch']} after its end"
        if name in ("StepStarted", "StepCompleted"):
            return self._step_fault(name, e)
        if name == "StepsRetired":
            return self._retired_fault(e)
        return self._answer_fault(name, e)

    def _step_fault(self, name: str, e: Event) -> Fault | None:
        """A recorded step may come again only where the type's author asks for that and the step has changed."""
        step_id = e["step_id"]
        if step_id in self.steps:
            wanted = self.spec is None or (self.spec["policy"] or {}).get("step_mismatch") == "rerun"
            if not wanted or (name == "StepCompleted" and self.steps[step_id] == identity(e)):
                return "step-once", f"{name} of step {step_id}, which is recorded already"
        if any(f"{track}@" <= step_id < f"{track}@{at:012d}" for track, at in self.covered.items()):
            return "step-once", f"step {step_id} is recorded again: it lies before the newest checkpoint"
        return None

    def _retired_fault(self, e: Event) -> Fault | None:
        """Steps leave the state with the task, or because a checkpoint stands for them."""
        first, last, alive = e["from_step"], e["up_to_step"], self.state in ("PENDING", "RUNNING", "PAUSED")
        covers = any(f"{track}@" <= first <= last < f"{track}@{at:012d}" for track, at in self.covered.items())
        if alive and self.row is not None and not covers:
            return "step-once", f"steps {first} to {last} are dropped, and no checkpoint covers them"
        found = sum(first <= step_id <= last for step_id in self.steps)
        if self.row is not None and found != e["count"]:
            return "step-once", f"{e['count']} steps from {first} to {last} are dropped, of {found}"
        return None

    def _answer_fault(self, name: str, e: Event) -> Fault | None:
        command_id, offset = e["cause"]["command_id"], e["cause"]["offset"]
        if command_id is None or command_id not in self.answers:
            return None
        before = self.answers[command_id]
        if before != (offset, name != "CommandRejected") or name == "CommandRejected":
            word = "accepted" if before[1] else "rejected"
            return "decided-once", f"{name} by command {command_id}, which was {word} at offset {before[0]} already"
        return None

    def follow(self, name: str, e: Event) -> None:
        """Take in an event that keeps the rules."""
        after = TRANSITIONS[name][1]
        self.state = self.state if after is None else after
        cause = e["cause"]
        if cause["command_id"] is not None:
            self.answers.setdefault(cause["command_id"], (cause["offset"], name != "CommandRejected"))
        match name:
            case "TaskGranted":
                self.epoch, self.session, self.started, self.report_seq = e["epoch"], e["session"], False, 0
            case "AttemptStarted":
                self.started = True
            case "StepCompleted":
                self.begun.discard(e["step_id"])
                self.steps[e["step_id"]] = identity(e)
            case "StepFailed":
                self.begun.discard(e["step_id"])
            case "StepStarted":
                self.begun.add(e["step_id"])
                self.steps.pop(e["step_id"], None)
            case "TaskRedriven":
                self.begun.clear()
            case "StepsRetired":
                for step_id in [s for s in self.steps if e["from_step"] <= s <= e["up_to_step"]]:
                    del self.steps[step_id]
            case "CheckpointRecorded":
                self.covered = e["positions"]
            case "MilestoneReached":
                self.milestones.add(e["name"])
            case "AttemptFailed" | "AttemptLost" | "TaskPaused" | "TaskCancelled" | "TaskFailed" | "TaskTimedOut":
                self.session = ""
            case "TaskCompleted":
                self.session = ""
            case "AnswersForgotten":
                for command_id in self.first_answers(e["count"]):
                    del self.answers[command_id]

    def first_answers(self, count: int) -> list[str]:
        """The answers that are forgotten first: in the order of the ids' bytes."""
        return sorted(self.answers, key=text)[:count]


def identity(e: Event) -> bytes:
    """What tells a step that has changed from the recorded one."""
    return digest([e["function"], e["code_version"], e["args_hash"]])
