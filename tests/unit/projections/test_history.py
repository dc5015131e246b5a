"""A task's attempts, read from its events."""

from __future__ import annotations

from typing import Any

from perdure.projections.history import KINDS, Attempt, attempts
from perdure.schemas import events
from perdure.schemas.common import Usage
from tests.unit.projections.story import ERROR, Story

USAGE = Usage(exit_code=1, duration_ms=5)


def told(found: list[Attempt]) -> list[tuple[int, str, list[tuple[int, str]]]]:
    return [(a.number, a.outcome, [(e.number, e.outcome) for e in a.epochs]) for a in found]


def test_a_task_that_never_ran_has_none() -> None:
    story = Story()
    story.then(events.TaskSubmitted)
    story.then(events.TaskCancelled)
    assert attempts(story.events) == []


def test_every_failed_run_shows_as_such_though_the_task_went_on() -> None:
    story = Story().running()
    first_start = story.at
    story.then(events.AttemptFailed, usage=USAGE)
    first_end = story.at
    story.then(events.RetryScheduled)
    story.running(epoch=2, attempt=2)
    story.then(events.AttemptFailed, epoch=2, attempt=2, outcome="TIMED_OUT")
    story.then(events.RetryScheduled)
    story.running(epoch=3, attempt=3)
    story.then(events.TaskCompleted, usage=USAGE)
    found = attempts(story.events)
    assert told(found) == [
        (1, "FAILED", [(1, "FAILED")]),
        (2, "TIMED_OUT", [(2, "TIMED_OUT")]),
        (3, "COMPLETED", [(3, "COMPLETED")]),
    ]
    assert (found[0].error, found[0].started_at, found[0].ended_at) == (ERROR, first_start, first_end)
    assert found[0].epochs[0].usage == found[2].epochs[0].usage == USAGE
    assert found[2].error is None


def test_lost_and_paused_epochs_belong_to_one_attempt() -> None:
    story = Story().running()
    story.then(events.AttemptLost, why="crashed", detail="signal 9", usage=USAGE)
    story.running(epoch=2)
    story.then(events.TaskPaused, why="shutdown")
    story.running(epoch=3)
    (attempt,) = attempts(story.events)
    assert told([attempt]) == [(1, "RUNNING", [(1, "LOST"), (2, "PAUSED"), (3, "RUNNING")])]
    assert [e.why for e in attempt.epochs] == ["crashed: signal 9", "shutdown", ""]
    assert attempt.ended_at is None
    story.then(events.AttemptLost, why="unseen")
    assert attempts(story.events)[0].outcome == "LOST"


def test_a_crash_loop_fails_the_attempt_and_loses_the_epoch() -> None:
    story = Story().running()
    story.then(events.AttemptLost, why="crashed")
    story.then(events.TaskFailed, why="crash_loop")
    (attempt,) = attempts(story.events)
    assert told([attempt]) == [(1, "FAILED", [(1, "LOST")])]
    assert attempt.error == ERROR


def test_the_end_of_a_paused_task_ends_its_attempt() -> None:
    ends: list[tuple[type[events.TaskEvent], dict[str, Any], str]] = [
        (events.TaskCancelled, {}, "CANCELLED"),
        (events.TaskTimedOut, {"which": "total"}, "TIMED_OUT"),
    ]
    for end, said, outcome in ends:
        story = Story().running()
        story.then(events.TaskPaused)
        story.then(end, **said)
        assert told(attempts(story.events)) == [(1, outcome, [(1, "PAUSED")])]


def test_a_failed_attempt_stays_failed_when_the_task_ends_otherwise() -> None:
    story = Story().running()
    story.then(events.AttemptFailed)
    story.then(events.RetryScheduled)
    story.then(events.TaskCancelled)
    assert told(attempts(story.events)) == [(1, "FAILED", [(1, "FAILED")])]


def test_a_total_timeout_ends_the_running_epoch() -> None:
    story = Story().running()
    story.then(events.TimeoutReached, which="total")
    story.then(events.TaskTimedOut, which="total")
    (attempt,) = attempts(story.events)
    assert told([attempt]) == [(1, "TIMED_OUT", [(1, "TIMED_OUT")])]
    assert attempt.error is not None
    assert attempt.epochs[0].why == "total"


def test_a_redrive_begins_with_attempt_1_again() -> None:
    story = Story().running().failing()
    story.then(events.TaskRedriven)
    story.running(epoch=2, attempt=1)
    story.then(events.TaskCompleted)
    found = attempts(story.events)
    assert [(a.redrive, a.number, a.outcome) for a in found] == [(0, 1, "FAILED"), (1, 1, "COMPLETED")]


def test_the_kinds_it_asks_for_are_all_it_needs() -> None:
    story = Story().running()
    story.then(events.StepCompleted)
    story.then(events.AttemptLost)
    story.running(epoch=2).failing()
    story.then(events.TaskRedriven)
    story.running(epoch=3)
    story.then(events.TaskPaused)
    story.then(events.TaskCancelled)
    assert attempts(e for e in story.events if type(e).__name__ in KINDS) == attempts(story.events)


def test_of_endless_retries_the_newest_are_shown() -> None:
    story = Story()
    for attempt in range(1, 602):
        story.running(epoch=attempt, attempt=attempt)
        story.then(events.AttemptFailed, epoch=attempt, attempt=attempt)
    found = attempts(story.events)
    assert [a.number for a in found] == list(range(102, 602))
    story.running(epoch=602, attempt=602)
    for epoch in range(603, 803):
        story.then(events.AttemptLost, epoch=epoch - 1)
        story.running(epoch=epoch, attempt=602)
    assert [e.number for e in attempts(story.events)[-1].epochs] == list(range(703, 803))
