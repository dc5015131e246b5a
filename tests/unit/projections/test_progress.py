"""The fold of events and telemetry into a task's latest public state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.projections.inputs import Fact
from perdure.projections.progress import KEPT_MS, ProgressProcessor, fold
from perdure.schemas import events, topics
from perdure.schemas.codec import decode_as, encode, replace
from perdure.schemas.common import Cause
from perdure.schemas.public import TaskProgress
from perdure.streams.store import META
from tests.unit.projections.story import ERROR, FakeTransaction, Story, on_topic
from tests.unit.schemas.building import records


def folded(facts: Iterable[Fact]) -> TaskProgress:
    progress: TaskProgress | None = None
    for fact in facts:
        progress = fold(progress, fact)
    assert progress is not None
    return progress


def shows(progress: TaskProgress, /, **expected: Any) -> None:
    assert {name: getattr(progress, name) for name in expected} == expected


def test_a_task_from_submit_to_result() -> None:
    story = Story()
    story.then(events.TaskSubmitted, at=1_000, priority=7, labels={"env": "prod"}, user="ann", not_before=9_000)
    shows(
        folded(story.events),
        state="PENDING",
        priority=7,
        labels={"env": "prod"},
        user="ann",
        submitted_at=1_000,
        due=9_000,
    )
    story.then(events.TaskQueued, reason="delayed", due=9_000)
    shows(folded(story.events), state="PENDING", reason="delayed", due=9_000)
    story.then(events.TaskQueued)
    shows(folded(story.events), state="PENDING", reason="queued", due=None)
    story.then(events.TaskGranted, at=10_000)
    shows(folded(story.events), state="RUNNING", reason="", epoch=1, attempt=1, worker_id="w1", started_at=None)
    story.then(events.AttemptStarted, at=11_000)
    shows(folded(story.events), state="RUNNING", started_at=11_000, running_since=11_000)
    story.then(events.StepCompleted)
    story.then(events.StepCompleted, step_id="other")
    story.then(events.MilestoneReached, name="half")
    story.then(events.CheckpointRecorded, version=4, at=15_000)
    shows(folded(story.events), steps_completed=2, milestones=["half"], checkpoint_version=4, checkpoint_at=15_000)
    story.then(events.TaskCompleted, at=20_000, result=b'{"n":1}')
    shows(
        folded(story.events), state="COMPLETED", finished_at=20_000, progress=1.0, result=b'{"n":1}', error=None,
        running_ms=9_000, running_since=None, eta_at=None, seq=10, updated_at=20_000, retired=False,
    )  # fmt: skip
    story.then(events.TaskRetired)
    shows(folded(story.events), state="COMPLETED", retired=True)


STOPS = [
    # what was asked for, what the task shows while it stops
    ([events.PauseRequested], "pausing"),
    ([events.CancelRequested], "cancelling"),
    ([events.DrainRequested], "draining"),
    ([events.PauseRequested, events.CancelRequested], "cancelling"),
    ([events.DrainRequested, events.PauseRequested], "pausing"),
    ([events.PauseRequested, events.TaskResumed], "none"),
]


@pytest.mark.parametrize(("asked", "stopping"), STOPS)
def test_what_a_running_task_is_on_its_way_to(asked: list[type[events.TaskEvent]], stopping: str) -> None:
    story = Story().running()
    for kind in asked:
        story.then(kind)
    shows(folded(story.events), state="RUNNING", stopping=stopping)


def test_a_timeout_does_not_take_the_place_of_a_cancel() -> None:
    story = Story().running()
    story.then(events.TimeoutReached, which="run")
    shows(folded(story.events), stopping="timing_out")
    story.then(events.CancelRequested)
    story.then(events.TimeoutReached, which="total")
    shows(folded(story.events), stopping="cancelling")


def test_pause_and_resume() -> None:
    story = Story().running()
    story.then(events.PauseRequested)
    story.then(events.TaskPaused)
    shows(folded(story.events), state="PAUSED", reason="", stopping="none", running_since=None, eta_at=None)
    story.then(events.TaskResumed)
    story.then(events.TaskQueued)
    shows(folded(story.events), state="PENDING", reason="queued", due=None)


def test_what_a_task_waits_for_is_shown_in_log_time() -> None:
    """The engine counts in partition time, here a day ahead; readers hold `due` against the time of day."""
    day = 86_400_000
    story = Story()
    story.then(events.TaskSubmitted, not_before=9_000)
    story.then(events.TaskQueued, reason="delayed", due=9_000 + day)
    shows(folded(story.events), due=9_000)
    story.running()
    story.then(events.AttemptFailed)
    story.then(events.RetryScheduled, at=50_000, delay=5_000, due=55_000 + day)
    shows(folded(story.events), due=55_000)
    story.then(events.TaskPaused, due=55_000 + day)
    shows(folded(story.events), state="PAUSED", due=55_000)
    story.then(events.TaskResumed)
    story.then(events.TaskQueued, reason="retry_backoff", due=55_000 + day)
    shows(folded(story.events), state="PENDING", due=55_000)
    story.then(events.TaskQueued)
    shows(folded(story.events), due=None)


def test_a_pause_by_shutdown_says_so() -> None:
    story = Story().running()
    story.then(events.TaskPaused, why="shutdown")
    shows(folded(story.events), state="PAUSED", reason="shutdown")


def test_a_lost_attempt_waits_again_and_keeps_its_running_time() -> None:
    story = Story().running()
    story.then(events.AttemptLost, at=story.at + 4_000)
    shows(folded(story.events), state="PENDING", running_ms=4_000, running_since=None, worker_id="w1")
    story.then(events.TaskQueued, reason="drained")
    shows(folded(story.events), reason="drained")
    story.running(epoch=2, attempt=1)
    story.then(events.AttemptLost, at=story.at + 2_000, epoch=2)
    shows(folded(story.events), epoch=2, attempt=1, running_ms=6_000)


def test_time_without_user_code_is_no_running_time() -> None:
    story = Story()
    story.then(events.TaskSubmitted)
    story.then(events.TaskGranted)
    story.then(events.AttemptLost, at=story.at + 60_000, why="not_started")
    shows(folded(story.events), running_ms=0)


def test_a_failed_attempt_backs_off_then_runs_again() -> None:
    story = Story().running()
    story.then(events.AttemptFailed)
    story.then(events.RetryScheduled, delay=7_000)
    due = story.at + 7_000
    shows(folded(story.events), state="PENDING", reason="retry_backoff", due=due, error=ERROR, running_since=None)
    story.running(epoch=2, attempt=2)
    shows(folded(story.events), state="RUNNING", attempt=2, epoch=2, due=None)
    story.then(events.TaskCompleted)
    shows(folded(story.events), state="COMPLETED", error=None)


def test_a_dead_letter_and_its_redrive() -> None:
    story = Story().running()
    story.then(events.StepCompleted)
    story.failing()
    shows(
        folded(story.events), state="FAILED", dead_letter=True, error=ERROR, finished_at=story.events[-2].at, attempt=1
    )
    story.then(events.TaskRedriven)
    story.then(events.TaskQueued)
    shows(
        folded(story.events),
        state="PENDING",
        dead_letter=False,
        attempt=0,
        epoch=1,
        finished_at=None,
        steps_completed=1,
    )


def test_a_timeout_names_itself_and_a_discarded_letter_is_none_any_more() -> None:
    story = Story()
    story.then(events.TaskSubmitted)
    story.then(events.TaskTimedOut, which="no_progress")
    story.then(events.TaskDeadLettered, state="TIMED_OUT", error=None)
    progress = folded(story.events)
    shows(progress, state="TIMED_OUT", dead_letter=True)
    assert progress.error is not None
    assert "no-progress" in progress.error.message
    story.then(events.DeadLetterDiscarded)
    shows(folded(story.events), state="TIMED_OUT", dead_letter=False)


def test_a_cancelled_task_has_ended() -> None:
    story = Story()
    story.then(events.TaskSubmitted, estimated_duration=60_000)
    story.then(events.TaskCancelled, reason="no longer needed")
    shows(folded(story.events), state="CANCELLED", finished_at=story.at, due=None, eta_at=None)


def test_a_big_result_is_left_out() -> None:
    story = Story().running()
    story.then(events.TaskCompleted, result=b'"' + b"x" * 65_534 + b'"')
    assert folded(story.events).result is not None
    story.then(events.TaskCompleted, result=b'"' + b"x" * 65_535 + b'"')
    shows(folded(story.events), state="COMPLETED", result=None)


def test_milestones_are_shown_until_they_are_too_much_for_a_record() -> None:
    story = Story().running()
    for i in range(200):
        story.then(events.MilestoneReached, name=f"{i:04d}" + "ä" * 500)
    shown = folded(story.events).milestones
    assert shown[-1].startswith("0199")
    assert len(shown) == 65  # 1,004 bytes each


def test_an_event_that_says_nothing_of_the_state_moves_only_sequence_and_time() -> None:
    story = Story().running()
    before = folded(story.events)
    bound = story.then(events.TaskPolicyBound, policy=None, policy_version=1)
    assert folded(story.events) == replace(before, seq=before.seq + 1, updated_at=bound.at)


def test_events_of_no_task_change_nothing() -> None:
    of_partition: dict[str, Any] = {
        "seq": 99,
        "at": 1,
        "cause": Cause(partition=0, offset=0),
        "build": "",
        "feature_level": 1,
    }
    nobody = events.CommandRejected(**of_partition, command_id="c", command="PauseTask", reason="unknown")
    progress = folded(Story().running().events)
    for event in (events.ForwardTaken(**of_partition, source=1, number=1), nobody):
        assert fold(None, event) is None
        assert fold(progress, event) is progress


def test_events_of_a_task_whose_submit_was_not_seen_are_passed_over() -> None:
    story = Story().running()
    assert fold(None, story.then(events.TaskCompleted)) is None
    assert fold(None, story.progress(fraction=0.5)) is None


@given(st.data())
def test_repeats_change_nothing(data: st.DataObject) -> None:
    story = Story().running()
    story.then(events.StepCompleted)
    story.then(events.AttemptLost)
    story.running(epoch=2)
    story.then(events.StepCompleted)
    story.failing()
    story.then(events.TaskRedriven)
    told: list[Any] = []
    for i, event in enumerate(story.events):
        told += [event, *data.draw(st.lists(st.sampled_from(story.events[: i + 1]), max_size=3))]
    assert folded(told) == folded(story.events)


def test_an_id_is_free_again_when_its_task_is_retired() -> None:
    old = Story().running()
    old.then(events.TaskCompleted)
    again = Story(at=9_000_000)
    again.then(events.TaskSubmitted, type="other")
    assert folded(old.events + again.events).type == "crunch"
    old.then(events.TaskRetired)
    shows(folded(old.events + again.events), type="other", state="PENDING", seq=1, result=None, retired=False)
    assert folded(old.events + old.events[:1]).retired  # the old submit, told once more, brings nothing back


@pytest.mark.parametrize("kind", events.TaskEvent.__subclasses__())
@settings(max_examples=20)
@given(data=st.data())
def test_every_kind_of_event_has_a_place(kind: type[events.TaskEvent], data: st.DataObject) -> None:
    fold(folded(Story().running().events), data.draw(records(kind)))


# Telemetry and the estimated end --------------------------------------------------------------------------------------


def test_telemetry_sets_progress_and_keeps_what_it_does_not_say() -> None:
    story = Story().running()
    first = story.progress(fraction=0.25, current_step="read", units_done=5, units_total=20)
    shows(
        folded([*story.events, first]),
        progress=0.25,
        current_step="read",
        units_done=5,
        units_total=20,
        updated_at=first.at,
    )
    second = story.progress(units_done=6)
    shows(folded([*story.events, first, second]), progress=0.25, current_step="read", units_done=6)


def test_the_fraction_follows_from_units() -> None:
    story = Story().running()
    shows(folded([*story.events, story.progress(units_done=5, units_total=20)]), progress=0.25)


@pytest.mark.parametrize(("said", "shown"), [(1.5, 1.0), (-1.0, 0.0), (float("nan"), None), (float("inf"), 1.0)])
def test_a_fraction_stays_within_its_bounds(said: float, shown: float | None) -> None:
    story = Story().running()
    assert folded([*story.events, story.progress(fraction=said)]).progress == shown


def test_telemetry_told_twice_changes_nothing() -> None:
    story = Story().running()
    new = story.progress(fraction=0.5)
    known = folded([*story.events, new])
    assert fold(known, new) is known


def test_the_row_does_not_depend_on_which_topic_came_first() -> None:
    story = Story().running()
    first = story.progress(fraction=0.3, current_step="read")
    story.then(events.StepCompleted)
    story.then(events.AttemptLost)
    story.running(epoch=2)
    second = story.progress(fraction=0.6, epoch=2, current_step="count")
    story.then(events.AttemptLost, epoch=2)
    expected = folded([*story.events[:6], first, *story.events[6:], second])
    shows(expected, state="PENDING", progress=0.6, current_step="count")
    for split in range(1, len(story.events) + 1):
        told = [*story.events[:split], first, second, *story.events[split:]]
        assert folded(told) == expected, split


def test_telemetry_that_comes_before_the_submit_waits_for_it() -> None:
    story, tx, processor = Story().running(), FakeTransaction(), ProgressProcessor()
    early = [story.progress(fraction=0.3), story.progress(fraction=0.4, units_done=4, units_total=10)]
    for fact in early:
        processor.handle(on_topic(encode(fact)), tx)
    assert [key for key in tx.rows if not key.startswith(META)] == []  # nothing public yet
    for fact in story.events:
        processor.handle(on_topic(encode(fact)), tx)
    assert list(tx.rows) == [b"etl/1"]
    assert decode_as(TaskProgress, tx.rows[b"etl/1"]) == folded([*story.events, *early])


def test_progress_may_go_back_when_a_task_finds_more_work() -> None:
    story = Story().running()
    facts = [*story.events, story.progress(fraction=0.5), story.progress(fraction=0.3)]
    shows(folded(facts), progress=0.3)


def test_an_ended_task_shows_how_far_it_came() -> None:
    """As the engine does; a completed one is complete, whatever it reported last."""
    story = Story().running()
    last = story.progress(fraction=0.9, current_step="almost", units_done=9)
    done = story.then(events.TaskCompleted)
    for facts in ([*story.events, last], [*story.events[:-1], last, done]):
        shows(folded(facts), progress=1.0, current_step="almost", units_done=9, state="COMPLETED")
    broken = Story().running()
    half = broken.progress(fraction=0.5)
    broken.failing()
    shows(folded([*broken.events, half]), state="FAILED", progress=0.5)


def test_the_end_is_estimated_from_the_pace() -> None:
    story = Story().running()
    begun = story.at
    quarter = story.progress(fraction=0.25, at=begun + 10_000)
    assert folded([*story.events, quarter]).eta_at == begun + 40_000


def test_the_pace_counts_all_epochs_and_no_pauses() -> None:
    story = Story().running()
    facts: list[Any] = [*story.events, story.progress(fraction=0.5, at=story.at + 50_000)]
    facts.append(story.then(events.TaskPaused))
    assert folded(facts).eta_at is None
    facts += [story.then(events.TaskQueued, at=story.at + 3_600_000), story.then(events.TaskGranted, epoch=2)]
    facts.append(story.then(events.AttemptStarted, epoch=2))
    begun = story.at
    facts.append(story.progress(fraction=0.5, at=begun + 9_000, epoch=2))
    spent = 51_000 + 9_000
    assert folded(facts).eta_at == begun + 9_000 + spent


def test_the_submitters_estimate_comes_before_any_pace() -> None:
    story = Story()
    story.then(events.TaskSubmitted, at=1_000, estimated_duration=60_000)
    assert folded(story.events).eta_at == 61_000
    story = Story()
    story.then(events.TaskSubmitted, at=1_000, estimated_duration=60_000, not_before=100_000)
    story.then(events.TaskQueued, at=2_000, reason="delayed", due=100_000)
    assert folded(story.events).eta_at == 160_000
    story.then(events.TaskGranted, at=100_000)
    story.then(events.AttemptStarted, at=100_000)
    story.then(events.StepCompleted, at=120_000)
    assert folded(story.events).eta_at == 160_000
    assert folded([*story.events, story.progress(fraction=0.5, at=130_000)]).eta_at == 160_000
    late = story.progress(current_step="still", at=500_000)
    assert folded([*story.events, late]).eta_at == 500_000


def test_no_estimate_where_there_is_nothing_to_go_by() -> None:
    story = Story().running()
    assert folded(story.events).eta_at is None
    assert folded([*story.events, story.progress(fraction=1e-300)]).eta_at is None


# The processor --------------------------------------------------------------------------------------------------------


def test_the_processor_keeps_the_topic_as_its_store() -> None:
    story, tx, processor = Story().running(), FakeTransaction(), ProgressProcessor()
    reported = story.progress(fraction=0.5)
    for fact in [*story.events, reported, reported]:
        processor.handle(on_topic(encode(fact)), tx)
    assert decode_as(TaskProgress, tx.rows[b"etl/1"]) == folded([*story.events, reported])
    assert tx.puts == [b"etl/1"] * 5  # the repeat was not worth a record
    assert tx.emitted == []
    assert tx.quarantined == []
    assert processor.changelog == "task-progress"
    assert processor.inputs == ("task-events", "task-telemetry")


def test_what_the_engine_has_forgotten_for_long_is_deleted_a_few_rows_at_a_time() -> None:
    tx = FakeTransaction()

    def told(story: Story) -> None:
        for event in story.events:
            ProgressProcessor().handle(on_topic(encode(event)), tx)  # a new one: a pass outlasts restarts

    def forgotten(name: str, at: int) -> Story:
        story = Story(name, at=at).running()
        story.then(events.TaskCompleted)
        story.then(events.TaskRetired)
        return story

    for n in range(6):
        told(forgotten(f"etl/old{n}", 0))
    told(Story("etl/open", at=0).running())
    told(forgotten("etl/young", KEPT_MS))
    late = encode(Story("etl/old3").progress(fraction=0.5))
    ProgressProcessor().handle(on_topic(late, topics.TELEMETRY.name), tx)
    tx.rows[b"etl/nobody-can-read"] = b"\xc3\x01nothing of ours"
    new = [f"etl/new{n:02}" for n in range(20)]
    for name in new:  # each looks at two rows, of eight and those that have come meanwhile
        told(forgotten(name, KEPT_MS + 10_000))
    left = [key for key in sorted(tx.rows) if not key.startswith(META + b"swept")]
    assert left == [*map(str.encode, new), b"etl/nobody-can-read", b"etl/open", b"etl/young"]
    assert tx.quarantined == []


BAD = [
    (None, "undecodable"),
    (b"", "undecodable"),
    (b"{}", "undecodable"),
    (b"\xc3\x01" + b"\0" * 8, "unknown_schema"),
    (encode(Story().then(events.TaskQueued))[:-1], "undecodable"),
    (encode(folded(Story().running().events)), "undecodable"),  # a record, and no event
]


@pytest.mark.parametrize(("value", "cause"), BAD)
def test_what_cannot_be_read_goes_to_quarantine_and_stops_nothing(value: bytes | None, cause: str) -> None:
    tx, processor = FakeTransaction(), ProgressProcessor()
    processor.handle(on_topic(value, topics.TELEMETRY.name), tx)
    assert [c for c, _ in tx.quarantined] == [cause]
    assert tx.quarantined[0][1]
    processor.handle(on_topic(encode(Story().then(events.TaskSubmitted))), tx)
    assert list(tx.rows) == [b"etl/1"]


def test_partition_events_leave_no_row() -> None:
    tx = FakeTransaction()
    event = events.ForwardTaken(
        seq=1, at=1, cause=Cause(partition=0, offset=0), build="", feature_level=1, source=1, number=1
    )
    ProgressProcessor().handle(on_topic(encode(event)), tx)
    assert tx.rows == {}
    assert tx.quarantined == []
