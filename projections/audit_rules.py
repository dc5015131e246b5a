"""What the audit holds a log to: each rule with the guarantee it proves, and the table of legal transitions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that has to hold."""

    name: str
    guarantee: str
    """Its number in DESIGN section 4."""
    says: str


RULES = (
    Rule("input-accounted", "G1", "Every record of task-commands has its effect, its refusal, or may be silent."),
    Rule("one-refusal", "G1", "A record is refused in one place: quarantine, CommandRejected or ReportRejected."),
    Rule("decided-once", "G1", "A command is decided at one offset, and there either accepted or rejected."),
    Rule("reply-once", "G1", "A command that asks for an answer gets one, and it says what the events say."),
    Rule("forward-order", "G1", "Records between partitions are numbered without gaps, and none is taken unsent."),
    Rule("position-grows", "G1", "The position in task-commands only grows."),
    Rule("readable", "G2", "Every record of the engine can be read by the shipped or published schemas."),
    Rule("task-sequence", "G2", "A task's events are numbered from 1 without gaps, the first being TaskSubmitted."),
    Rule("partition-sequence", "G2", "A partition's own events are numbered from 1 without gaps."),
    Rule("legal-transition", "G2", "Each event comes in a state that it may come in, by the auditor's own table."),
    Rule("cause", "G2", "Each event names, in order, an input of its partition that may bring it about."),
    Rule("step-once", "G3", "A step is recorded once, and kept until a checkpoint or the task's end covers it."),
    Rule("epoch-fence", "G4", "Grants count up by one, and no event of an older epoch follows a newer grant."),
    Rule("report-backed", "G4", "What only reports bring about was reported by the grant's own session and epoch."),
    Rule("changelog-fold", "G5", "Each durable row of the changelog is what the events before its position make."),
    Rule("next-wake-up", "G6", "Each open task has a place, a live lease, a timer or a cursor, and its row."),
    Rule("stray-row", "G6", "Each place, lease and timer is one that its task names."),
)  # fmt: skip
BY_NAME = {rule.name: rule for rule in RULES}


@dataclass(frozen=True, slots=True)
class Violation:
    """A place in the log where a rule does not hold."""

    rule: str
    topic: str
    partition: int
    offset: int
    text: str
    task_id: str = ""

    def line(self) -> str:
        """For people."""
        of = f" ({self.task_id})" if self.task_id else ""
        return f"{self.rule}: {self.topic}/{self.partition} offset {self.offset}: {self.text}{of}"


# Transitions ---------------------------------------------------------------------------------------------------------

NEW = ""
"""The state before a task's first event and after its last."""
_WAITS = frozenset({"PENDING", "PAUSED"})
_OPEN = _WAITS | {"RUNNING"}
_DEAD = frozenset({"FAILED", "TIMED_OUT"})
_ENDED = _DEAD | {"COMPLETED", "CANCELLED"}
_RUNNING, _PENDING = frozenset({"RUNNING"}), frozenset({"PENDING"})
_ANY = _OPEN | _ENDED

TRANSITIONS: dict[str, tuple[frozenset[str], str | None]] = {
    "TaskSubmitted": (frozenset({NEW}), "PENDING"),
    "TaskPolicyBound": (_WAITS, None),
    "TaskQueued": (_WAITS, "PENDING"),
    "TaskGranted": (_PENDING, "RUNNING"),
    "AttemptStarted": (_RUNNING, None),
    "StepStarted": (_RUNNING, None),
    "StepCompleted": (_RUNNING, None),
    "StepFailed": (_RUNNING, None),
    "MilestoneReached": (_RUNNING, None),
    "CheckpointRecorded": (_RUNNING, None),
    "StepsRetired": (_ANY, None),
    "PauseRequested": (_RUNNING, None),
    "CancelRequested": (_RUNNING, None),
    "TimeoutReached": (_RUNNING, None),
    "DrainRequested": (_RUNNING, None),
    "TaskResumed": (_RUNNING | {"PAUSED"}, None),
    "TaskPaused": (_RUNNING | _PENDING, "PAUSED"),
    "AttemptLost": (_RUNNING, "PENDING"),
    "AttemptFailed": (_RUNNING, None),
    "RetryScheduled": (_RUNNING, "PENDING"),
    "TaskCompleted": (_RUNNING, "COMPLETED"),
    "TaskFailed": (_RUNNING | _PENDING, "FAILED"),
    "TaskTimedOut": (_OPEN, "TIMED_OUT"),
    "TaskCancelled": (_OPEN, "CANCELLED"),
    "TaskDeadLettered": (_DEAD, None),
    "TaskRedriven": (_DEAD, "PENDING"),
    "DeadLetterDiscarded": (_DEAD, None),
    "AnswersForgotten": (_ENDED, None),
    "TaskRetired": (_ENDED, NEW),
    "CommandRejected": (_ANY, None),
    "ReportRejected": (_ANY, None),
}
"""Event of a task -> states it may come in, and the state it leads to (None: the same)."""

REPORTED = {
    "AttemptStarted": ("AttemptStarted",),
    "ReportStep": ("StepStarted", "StepCompleted", "StepFailed"),
    "ReportMilestone": ("MilestoneReached",),
    "ReportCheckpoint": ("CheckpointRecorded",),
    "AttemptCompleted": ("TaskCompleted", "AttemptFailed"),
    "AttemptFailed": ("AttemptFailed",),
    "AttemptCrashed": ("AttemptLost", "AttemptFailed", "TaskCancelled"),
    "AttemptStopped": ("AttemptLost", "AttemptFailed", "TaskCancelled", "TaskPaused"),
    "AttemptDeclined": ("AttemptLost", "AttemptFailed", "TaskCancelled"),
}
"""Report -> the event that shows that it counted."""
ENDS = frozenset({"AttemptCompleted", "AttemptFailed", "AttemptCrashed", "AttemptStopped", "AttemptDeclined"})
"""Reports after which nothing of the attempt counts."""
ONLY_REPORTED = frozenset({
    "AttemptStarted", "StepStarted", "StepCompleted", "StepFailed", "MilestoneReached", "CheckpointRecorded",
    "TaskCompleted",
})  # fmt: skip
"""Events that nothing but an accepted report brings about."""
OF_THE_GRANT = ONLY_REPORTED | {"AttemptLost", "AttemptFailed"}
"""Events that name the epoch they belong to."""

CAUSES: dict[str, frozenset[str]] = {
    "TaskSubmitted": frozenset({"SubmitTask", "SubmitBatch"}),
    "PauseRequested": frozenset({"PauseTask"}),
    "TaskResumed": frozenset({"ResumeTask"}),
    "CancelRequested": frozenset({"CancelTask"}),
    "TaskRedriven": frozenset({"RetryTask"}),
    "DeadLetterDiscarded": frozenset({"DiscardDeadLetter"}),
    "TimeoutReached": frozenset({"Tick"}),
    "DrainRequested": frozenset({"WorkerStopping", "Tick"}),
    "StepsRetired": frozenset({"ReportBatch", "Tick"}),
    "AnswersForgotten": frozenset({"Tick"}),
    "TaskRetired": frozenset({"Tick"}),
    "ConfigApplied": frozenset({"ApplyConfig"}),
    "ForwardAcknowledged": frozenset({"ForwardedAck", "Tick"}),
    "ForwardTaken": frozenset({"Forwarded"}),
} | dict.fromkeys(ONLY_REPORTED, frozenset({"ReportBatch"}))  # fmt: skip
"""Event -> inputs that may bring it about, forwarded or not. Of others any may: grants follow from whatever comes."""

SILENT: dict[str, str] = {
    "DescribeTask": "a query: it leaves no trace but its reply",
    "AwaitTask": "a query: its waiter is of the session class",
    "FindTasks": "a query: it leaves no trace but its reply",
    "Tick": "time may have passed without anything being due",
    "WorkerStarted": "sessions are of the session class",
    "WorkerBeat": "beats are of the session class",
    "WorkerStopping": "sessions are of the session class; what they run is asked to drain where it runs",
    "ReportProgress": "progress is telemetry, no event",
    "SendSteps": "a page of steps is for the worker alone",
}
"""Inputs and reports that may be without effect, and why. All others may only where they are repeats."""
COMMANDS = frozenset({
    "SubmitTask", "SubmitBatch", "PauseTask", "ResumeTask", "CancelTask", "RetryTask", "DiscardDeadLetter",
    "DescribeTask", "AwaitTask", "FindTasks",
})  # fmt: skip
QUERIES = frozenset({"DescribeTask", "AwaitTask", "FindTasks"})
