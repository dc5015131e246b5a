"""The fold of events into dead letters, and the processor that publishes them."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from perdure.projections import dead_letters
from perdure.projections.dead_letters import DeadLetterProcessor, fingerprint, fold
from perdure.projections.inputs import Fact
from perdure.schemas import events
from perdure.schemas.codec import decode_as, encode
from perdure.schemas.common import ErrorInfo
from perdure.schemas.public import DeadLetter
from tests.unit.projections.story import ERROR, FakeTransaction, Story, on_topic


def folded(facts: Iterable[Fact]) -> DeadLetter | None:
    case: DeadLetter | None = None
    for fact in facts:
        case = fold(case, fact)
    return case


def published(facts: Iterable[Fact]) -> list[DeadLetter | None]:
    """What the processor appended to task-dead-letters for one task; None is a tombstone."""
    tx, processor = FakeTransaction(), DeadLetterProcessor()
    for fact in facts:
        processor.handle(on_topic(encode(fact)), tx)
    assert {(topic, key) for topic, key, _ in tx.emitted} <= {("task-dead-letters", b"etl/1")}
    return [None if value is None else decode_as(DeadLetter, value) for _, _, value in tx.emitted]


def failed() -> Story:
    story = Story().running(input=b'{"path":"x"}', labels={"env": "prod"})
    story.then(events.StepCompleted)
    story.then(events.StepCompleted, step_id="other")
    story.then(events.AttemptFailed)
    story.then(events.RetryScheduled)
    return story.running(epoch=2, attempt=2).failing()


@pytest.mark.parametrize("kind", dead_letters._NOTHING_NEW)
def test_what_is_passed_over_undecoded_changes_no_case(kind: type[Fact]) -> None:
    story = failed()
    case = folded(story.events)
    assert case is not None
    event = story.then(kind)
    assert type(event) is kind
    assert fold(case, event) is case
    assert published([event]) == []


def test_a_letter_says_what_was_asked_and_how_it_went() -> None:
    story = failed()
    assert published(story.events) == [
        DeadLetter(
            task_id="etl/1", type="crunch", queue="etl", state="FAILED", error=ERROR, fingerprint=fingerprint(ERROR),
            attempts=2, failed_at=story.at, submitted_at=story.events[0].at, labels={"env": "prod"},
            input=b'{"path":"x"}', redrives=0, steps_completed=2,
        )
    ]  # fmt: skip


def test_a_timeout_without_a_recorded_error_names_itself() -> None:
    story = Story()
    story.then(events.TaskSubmitted)
    story.then(events.TaskTimedOut, which="queue")
    story.then(events.TaskDeadLettered, state="TIMED_OUT", error=None)
    (letter,) = published(story.events)
    assert letter is not None
    assert (letter.state, letter.attempts) == ("TIMED_OUT", 0)
    assert letter.error is not None
    assert "queue timeout" in letter.error.message


def test_a_redrive_takes_it_off_the_list_and_counts() -> None:
    story = failed()
    story.then(events.TaskRedriven, input=b'{"path":"y"}')
    story.running(epoch=3, attempt=1).failing()
    first, gone, second = published(story.events)
    assert first is not None
    assert gone is None
    assert second is not None
    assert (second.redrives, second.attempts, second.input, second.steps_completed) == (1, 1, b'{"path":"y"}', 2)


def test_a_redrive_without_new_input_keeps_the_old_one() -> None:
    story = failed()
    story.then(events.TaskRedriven)
    story.running(epoch=3).failing()
    last = published(story.events)[-1]
    assert last is not None
    assert last.input == b'{"path":"x"}'


def test_a_redriven_task_that_never_runs_again_made_no_attempt() -> None:
    story = failed()
    story.then(events.TaskRedriven)
    story.then(events.TaskTimedOut, which="queue")
    story.then(events.TaskDeadLettered, state="TIMED_OUT", error=None)
    last = published(story.events)[-1]
    assert last is not None
    assert (last.attempts, last.redrives, last.state) == (0, 1, "TIMED_OUT")


def test_a_discarded_letter_is_off_the_list_once() -> None:
    story = failed()
    story.then(events.DeadLetterDiscarded)
    story.then(events.TaskRetired)
    assert [letter is None for letter in published(story.events)] == [False, True]


@pytest.mark.parametrize("end", [events.TaskCompleted, events.TaskCancelled])
def test_a_task_that_ends_well_leaves_nothing_behind(end: type[events.TaskEvent]) -> None:
    story, tx = Story().running(), FakeTransaction()
    story.then(end)
    for fact in story.events:
        DeadLetterProcessor().handle(on_topic(encode(fact)), tx)
    assert tx.emitted == []
    assert tx.rows == {}


def test_a_letter_that_is_retired_goes() -> None:
    story = failed()
    story.then(events.TaskRetired)
    assert published(story.events)[-1] is None
    assert folded(story.events) is None


def test_what_changes_nothing_is_not_published_again() -> None:
    story = failed()
    rejected = events.CommandRejected(
        task_id="etl/1", seq=99, at=1, cause=story.events[0].cause, build="", feature_level=1, command_id="c",
        command="PauseTask", reason="FAILED",
    )  # fmt: skip
    assert len(published([*story.events, rejected])) == 1


def test_a_big_input_is_left_out() -> None:
    story = Story().running(input=b'"' + b"x" * 70_000 + b'"').failing()
    (letter,) = published(story.events)
    assert letter is not None
    assert letter.input is None


def test_an_id_used_again_begins_a_new_case() -> None:
    old = failed()
    old.then(events.TaskRetired)
    new = Story(at=9_000_000).running(input=b"1").failing()
    last = published(old.events + new.events)[-1]
    assert last is not None
    assert (last.input, last.steps_completed, last.attempts) == (b"1", 0, 1)


def test_what_cannot_be_read_goes_to_quarantine() -> None:
    tx = FakeTransaction()
    DeadLetterProcessor().handle(on_topic(b"\xc3\x01nonsense"), tx)
    assert [cause for cause, _ in tx.quarantined] == ["unknown_schema"]


# Fingerprints ---------------------------------------------------------------------------------------------------------

TRACE = """Traceback (most recent call last):
  File "{home}/app/run.py", line {line}, in main
    load(path)
  File "{home}/app/load.py", line {line}, in {function}
    raise {error}
{error}: {message}
"""


def raised(
    kind: str = "ValueError", *, home: str = "/srv", line: int = 10, function: str = "load", message: str = "7"
) -> str:
    text = TRACE.format(home=home, line=line, function=function, error=kind, message=message)
    return fingerprint(ErrorInfo(type=kind, message=message, traceback=text))


SAME = [
    {"line": 99},  # an edit above
    {"home": "/home/ann/work"},  # another machine
    {"message": "another value"},
]
OTHER = [{"kind": "KeyError"}, {"function": "parse"}]


@pytest.mark.parametrize("change", SAME)
def test_failures_of_one_cause_share_a_fingerprint(change: dict[str, object]) -> None:
    assert raised(**change) == raised()  # type: ignore[arg-type]


@pytest.mark.parametrize("change", OTHER)
def test_failures_of_other_causes_do_not(change: dict[str, object]) -> None:
    assert raised(**change) != raised()  # type: ignore[arg-type]


def test_errors_without_a_traceback_are_told_apart_by_type() -> None:
    kinds = [None, ErrorInfo(type="timeout", message=""), ErrorInfo(type="crash_loop", message="")]
    assert len({fingerprint(error) for error in kinds}) == 3
