"""The limits hold together: what one allows, the next one must be able to carry."""

from __future__ import annotations

import ast
from pathlib import Path

from perdure.schemas import limits
from perdure.schemas.codec import encode
from perdure.schemas.commands import AwaitTask, Forwarded, SubmitTask
from perdure.schemas.common import Cause, ErrorInfo, Policy, Retry, StepRecord
from perdure.schemas.events import StepCompleted, StepFailed, TaskSubmitted
from perdure.schemas.inbox import RunAttempt, StepPage
from perdure.schemas.public import Quarantined
from perdure.schemas.reports import ReportBatch, ReportEntry, ReportStep
from perdure.schemas.signing import signed

ID = "r" * limits.ROUTING_KEY_MAX + "/" + "i" * limits.LOCAL_ID_MAX
TEXT = "t" * limits.TEXT_MAX
VALUE = b"v" * limits.VALUE_MAX
CAUSE = Cause(partition=1, offset=2**62, index=1, command_id=TEXT)


def test_a_submit_with_the_largest_values_is_a_command() -> None:
    command = SubmitTask(
        command_id=TEXT,
        task_id=ID,
        issued_by=TEXT,
        reply_to=TEXT,
        type=TEXT,
        input=VALUE,
        agent_config=b"v" * (limits.COMMAND_MAX - limits.VALUE_MAX - 150_000),
        labels={f"{n:04}" + TEXT[:1000]: TEXT for n in range(limits.LABELS_MAX)},
        retry=Retry(),
    )
    assert len(encode(command)) <= limits.COMMAND_MAX


def test_the_largest_command_can_be_forwarded() -> None:
    forwarded = Forwarded(source=2**31, target=2**31, number=2**62, record=b"c" * limits.COMMAND_MAX)
    assert len(signed(forwarded, "e1", b"k" * 32)) <= limits.RECORD_MAX


def test_the_largest_step_fits_a_report_and_its_event() -> None:
    step = ReportStep(seq=1, step_id="s" * limits.STEP_ID_MAX, name=TEXT, function=TEXT, args_hash=TEXT, result=VALUE)
    batch = ReportBatch(session=TEXT, entries=[ReportEntry(task_id=ID, epoch=1, token=b"t" * 32, reports=[step])])
    assert len(encode(batch)) <= limits.RECORD_MAX
    event = StepCompleted(
        task_id=ID, seq=1, at=1, cause=CAUSE, build=TEXT, feature_level=1, epoch=1, attempt=1, step_id=step.step_id,
        name=TEXT, function=TEXT, code_version=TEXT, args_hash=TEXT, result=VALUE, duration_ms=1,
    )  # fmt: skip
    assert len(encode(event)) <= limits.OUTPUT_MAX


def test_the_largest_submit_fits_its_event() -> None:
    event = TaskSubmitted(
        task_id=ID, seq=1, at=1, cause=CAUSE, build=TEXT, feature_level=1, type=TEXT, queue=TEXT, order=1,
        content_hash=TEXT, input_hash=TEXT, input=VALUE, agent_config=b"v" * (limits.COMMAND_MAX - limits.VALUE_MAX),
        policy=Policy(retry=Retry()), overrides=b"v" * 64 * 1024,
    )  # fmt: skip
    assert len(encode(event)) <= limits.OUTPUT_MAX


def test_the_largest_input_and_the_largest_step_fit_the_inbox() -> None:
    """A grant is at most 256 kB, and a page carries at least one step."""
    address = {"worker_id": TEXT, "session": TEXT, "task_id": ID, "epoch": 1}
    grant = RunAttempt(**address, grant=1, type=TEXT, input=VALUE, policy=Policy(retry=Retry()), attempt=1)  # type: ignore[arg-type]
    assert len(encode(grant)) <= limits.INBOX_MAX
    step = StepRecord(step_id="s" * limits.STEP_ID_MAX, function=TEXT, code_version=TEXT, args_hash=TEXT, result=VALUE)
    assert len(encode(StepPage(**address, after=TEXT, steps=[step], more=True))) <= limits.INBOX_MAX  # type: ignore[arg-type]


def test_a_failure_with_the_longest_traceback_fits_its_event() -> None:
    error = ErrorInfo(
        type=TEXT,
        message="m" * limits.MESSAGE_MAX,
        error_types=[TEXT] * 20,
        traceback="t" * limits.TRACEBACK_MAX,
    )
    event = StepFailed(
        task_id=ID, seq=1, at=1, cause=CAUSE, build=TEXT, feature_level=1, epoch=1, attempt=1, step_id=TEXT, name=TEXT,
        error=error, duration_ms=1,
    )  # fmt: skip
    assert len(encode(event)) <= limits.OUTPUT_MAX


def test_what_is_quarantined_always_fits() -> None:
    kept = b"\xff" * limits.QUARANTINE_KEPT
    record = Quarantined(
        topic=TEXT, partition=1, offset=2**62, at=2**62, reader=TEXT, cause=TEXT,
        detail="d" * (limits.TRACEBACK_MAX + limits.MESSAGE_MAX), key=kept, record=kept, size=2**62,
    )  # fmt: skip
    assert len(encode(record)) <= limits.OUTPUT_MAX


def test_what_the_engine_writes_fits_its_topics() -> None:
    assert limits.OUTPUT_MAX + 16 * 1024 < limits.TOPIC_RECORD_MAX  # the rest is key, framing and batch header
    assert limits.COMMAND_MAX < limits.RECORD_MAX < limits.TOPIC_RECORD_MAX


def test_defaults_in_records_are_those_of_the_limits() -> None:
    """Records do not import the limits, so that a schema never changes with one: here they are held together."""
    assert SubmitTask(command_id="c", type="t").priority == limits.DEFAULT_PRIORITY
    assert AwaitTask(command_id="c", task_id="t").timeout == limits.WAITER_MAX_MS


def test_a_beat_can_be_missed_before_a_lease_ends() -> None:
    assert limits.LEASE_MS >= 3 * limits.BEAT_MS
    assert limits.START_DEADLINE_MS > limits.LEASE_MS
    assert limits.ORPHAN_AFTER_MS > limits.LEASE_MS
    assert limits.RETAIN_MS >= 24 * 3600 * 1000


def test_every_limit_is_a_positive_number() -> None:
    values = {name: value for name, value in vars(limits).items() if name.isupper() and name != "DEFAULT_QUEUE"}
    assert all(isinstance(value, int) and value > 0 for value in values.values())


def test_every_limit_is_used() -> None:
    """A limit that nobody enforces only looks like one."""
    root = Path(__file__).parents[3]
    folders = ("schemas", "streams", "projections", "connectors", "perdure")
    files = [f for folder in folders for f in (root / folder).glob("*.py") if f.name != "limits.py"]
    used = {
        node.attr
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "limits"
    }
    unused = {name for name in vars(limits) if name.isupper() and not name.startswith("DEFAULT_")} - used
    assert not unused
