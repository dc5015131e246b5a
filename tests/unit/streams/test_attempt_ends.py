"""How attempts end: completions, failures and retries, crashes, lost workers, drains, declines; alone and while stopping."""

from __future__ import annotations

from typing import Any

import pytest

from perdure.schemas import commands, events, limits
from perdure.schemas.codec import replace
from perdure.schemas.common import ErrorInfo, Retry, Usage
from perdure.streams.task_lifecycle import backoff, retryable
from tests.world import (
    HOUR,
    MINUTE,
    SECOND,
    ScriptedWorker,
    World,
    begun,
    checkpoint,
    completed,
    crashed,
    declined,
    failed,
    step,
    stopped,
)

LIMIT = 20 * SECOND
RETRY = {"max_attempts": 3, "delay": MINUTE, "backoff": "fixed", "jitter": False}


class Scene:
    """A running task on a worker of one slot."""

    def __init__(self, **policy: Any) -> None:
        self.world = World(types={"noop": policy})
        self.worker = ScriptedWorker(self.world, slots=1).start()
        self.task_id = self.world.submit()
        self.worker.run()

    def end(self, report: Any) -> None:
        self.worker.report(self.worker.grant(), report)

    def bring_to(self, stopping: str) -> None:
        """Have the attempt stopped for a reason."""
        match stopping:
            case "pausing":
                self.world.do(commands.PauseTask, self.task_id)
            case "cancelling":
                self.world.do(commands.CancelTask, self.task_id, reason="enough")
            case "draining":
                self.worker.stop()
            case "timing_out":
                self.worker.beating = True
                self.world.advance(LIMIT + SECOND)
        assert self.world.task(self.task_id).stopping == stopping

    def lose(self, how: str) -> None:
        """End the attempt in one of the ways that no report of its worker brings about."""
        self.worker.beating = False
        if how == "superseded":
            self.worker = self.worker.restart()
        else:
            self.world.advance(limits.LEASE_MS + 3 * SECOND)

    @property
    def stands(self) -> str:
        t = self.world.task(self.task_id)
        return f"{t.state} {t.reason}".strip()


# Stopping -> how the attempt ends -> state and reason after it.
ENDS: dict[str, Any] = {
    "completed": completed(1), "failed": failed(), "failed for good": failed(final=True), "crashed": crashed(),
    "declined": declined(), "drained": stopped("drained"), "revoked": stopped("revoked"),
}  # fmt: skip
AFTER = {
    "none": {
        "completed": "COMPLETED", "failed": "PENDING retry_backoff", "failed for good": "FAILED",
        "crashed": "PENDING queued", "declined": "PENDING queued", "drained": "PENDING drained",
        "revoked": "PENDING queued", "lost": "PENDING queued", "superseded": "PENDING queued",
    },
    "draining": {
        "completed": "COMPLETED", "failed": "PENDING retry_backoff", "failed for good": "FAILED",
        "crashed": "PENDING queued", "declined": "PENDING queued", "drained": "PENDING drained",
        "revoked": "PENDING queued", "lost": "PENDING queued", "superseded": "PENDING queued",
    },
    "pausing": {
        "completed": "COMPLETED", "failed": "PAUSED", "failed for good": "FAILED", "crashed": "PAUSED",
        "declined": "PAUSED", "drained": "PAUSED", "revoked": "PAUSED", "lost": "PAUSED", "superseded": "PAUSED",
    },
    "cancelling": dict.fromkeys(
        ("failed", "failed for good", "crashed", "declined", "drained", "revoked", "lost", "superseded"), "CANCELLED"
    ) | {"completed": "COMPLETED"},
    "timing_out": dict.fromkeys(
        ("failed", "failed for good", "crashed", "declined", "drained", "revoked", "lost", "superseded"),
        "PENDING retry_backoff",
    ) | {"completed": "COMPLETED"},
}  # fmt: skip
CASES = [(stopping, how) for stopping, ends in AFTER.items() for how in ends]


@pytest.mark.parametrize(("stopping", "how"), CASES)
def test_each_end_of_an_attempt_in_each_way_of_stopping(stopping: str, how: str) -> None:
    scene = Scene(retry=RETRY, run_timeout=LIMIT)
    if stopping != "none":
        scene.bring_to(stopping)
    queued = [scene.world.submit(priority=9), scene.world.submit(priority=9)]  # takes the slot before the task could
    if how in ("lost", "superseded"):
        scene.lose(how)
    else:
        scene.end(ENDS[how])
    assert scene.stands == AFTER[stopping][how]
    t = scene.world.task(scene.task_id)
    assert (t.session, t.started, t.stopping) == ("", False, "none")
    assert set(t.timers) <= {"retain", "due"}
    assert (t.due is not None) == (t.reason == "retry_backoff" or (stopping, how) == ("pausing", "failed"))
    assert not scene.world.quarantined()
    assert queued


def test_a_completion_earlier_in_the_log_wins_over_a_cancel() -> None:
    scene = Scene()
    scene.world.append(scene.worker.batch(scene.worker.grant(), completed(1)), scene.worker.partition)
    reply = scene.world.do(commands.CancelTask, scene.task_id)
    assert scene.stands == "COMPLETED"
    assert not reply.accepted


def test_a_cancel_earlier_in_the_log_still_lets_the_completion_win() -> None:
    scene = Scene()
    scene.bring_to("cancelling")
    scene.end(completed(1))
    assert scene.stands == "COMPLETED"


def test_a_pause_that_is_undone_before_the_attempt_stopped_runs_it_again() -> None:
    scene = Scene()
    scene.bring_to("pausing")
    scene.world.do(commands.ResumeTask, scene.task_id)
    scene.end(stopped("paused"))
    assert [e.why for e in scene.world.of_kind(events.AttemptLost)] == ["resumed"]
    assert scene.worker.grant().epoch == 2
    assert scene.worker.grant().attempt == 1


def test_drain_hands_back_and_the_task_runs_elsewhere_by_itself() -> None:
    scene = Scene()
    scene.bring_to("draining")
    scene.end(stopped("drained"))
    assert scene.stands == "PENDING drained"
    assert "paused by shutdown" in scene.world.status(scene.task_id)["why"]
    other = ScriptedWorker(scene.world, "w2").start()
    assert (other.grant().epoch, other.grant().attempt) == (2, 1)


def test_drain_with_on_shutdown_pause_pauses_until_resumed() -> None:
    scene = Scene(on_shutdown="pause")
    scene.bring_to("draining")
    scene.end(stopped("drained"))
    assert scene.stands == "PAUSED shutdown"
    assert "paused by shutdown" in scene.world.status(scene.task_id)["why"]
    other = ScriptedWorker(scene.world, "w2").start()
    assert not other.grants()
    scene.world.do(commands.ResumeTask, scene.task_id)
    assert (other.grant().epoch, other.grant().attempt) == (2, 1)


# Caps ----------------------------------------------------------------------------------------------------------------


def test_five_crashes_in_a_row_are_a_crash_loop_and_spend_no_retry() -> None:
    scene = Scene(retry=RETRY)
    for n in range(limits.CRASHES_MAX):
        assert scene.stands == "RUNNING"
        assert (scene.worker.grant().attempt, scene.worker.grant().epoch) == (1, n + 1)
        scene.worker.report(scene.worker.grant(), begun(), crashed())
    assert scene.stands == "FAILED"
    assert [(e.why, e.error.type) for e in scene.world.of_kind(events.TaskFailed)] == [("crash_loop", "crash_loop")]


@pytest.mark.parametrize("sign", ["step", "checkpoint"])
def test_a_new_step_or_checkpoint_breaks_a_crash_loop(sign: str) -> None:
    scene = Scene()
    for n in range(3 * limits.CRASHES_MAX):
        new = step(f"s{n}") if sign == "step" else checkpoint(n + 1)
        scene.worker.report(scene.worker.grant(), begun(), *([new] if n % 4 == 0 else []), crashed())
    assert scene.stands == "RUNNING"


def test_innocent_crashes_declines_drains_and_revokes_never_count() -> None:
    scene = Scene(retry={"max_attempts": 1})
    ends = [crashed(innocent=True), stopped("drained"), stopped("revoked"), declined()]
    for n in range(3 * limits.SESSIONS_LOST_MAX):
        scene.end(ends[n % len(ends)])
        scene.worker.beat()
    t = scene.world.task(scene.task_id)
    assert (t.state, t.attempt, t.crashes, t.sessions_lost) == ("RUNNING", 1, 0, 0)
    assert t.epoch == 3 * limits.SESSIONS_LOST_MAX + 1


def test_twenty_lost_sessions_are_the_cap() -> None:
    scene = Scene(retry={"max_attempts": 1})
    for _ in range(limits.SESSIONS_LOST_MAX - 1):
        scene.lose("superseded")
        assert scene.stands == "RUNNING"
    scene.lose("superseded")
    assert scene.stands == "FAILED"
    assert scene.world.of_kind(events.TaskFailed)[0].why == "lost_sessions"


@pytest.mark.parametrize("sign", ["step", "checkpoint"])
def test_a_new_step_or_checkpoint_resets_the_lost_sessions(sign: str) -> None:
    scene = Scene()
    for n in range(2 * limits.SESSIONS_LOST_MAX):
        if n % 10 == 0:
            scene.worker.report(scene.worker.grant(), step(f"s{n}") if sign == "step" else checkpoint(n + 1))
        scene.lose("superseded")
    assert scene.stands == "RUNNING"


def test_a_lost_lease_spends_no_retry() -> None:
    scene = Scene(retry={"max_attempts": 1})
    scene.lose("lost")
    other = ScriptedWorker(scene.world, "w2").start()
    assert (other.grant().epoch, other.grant().attempt) == (2, 1)
    other.report(other.grant(), begun(), failed())
    assert scene.stands == "FAILED"


# Retries -------------------------------------------------------------------------------------------------------------


def test_attempts_are_retried_up_to_the_maximum_each_after_its_pause() -> None:
    scene = Scene(retry=RETRY)
    for attempt in (1, 2):
        assert scene.worker.grant().attempt == attempt
        scene.end(failed())
        scene.worker.beating = True
        assert scene.world.task(scene.task_id).reason == "retry_backoff"
        scene.world.advance(MINUTE - SECOND)
        assert scene.stands == "PENDING retry_backoff"
        scene.world.advance(2 * SECOND)
        assert scene.stands == "RUNNING"
    scene.end(failed())
    assert scene.stands == "FAILED"
    assert [e.attempt for e in scene.world.of_kind(events.AttemptFailed)] == [1, 2, 3]
    assert [e.delay for e in scene.world.of_kind(events.RetryScheduled)] == [MINUTE, MINUTE]
    assert scene.world.of_kind(events.TaskFailed)[0].why == "attempts"
    assert scene.world.task(scene.task_id).dead_letter


def test_without_a_policy_a_task_has_one_attempt() -> None:
    scene = Scene()
    scene.end(failed())
    assert scene.stands == "FAILED"


def test_a_redrive_begins_to_count_anew() -> None:
    scene = Scene(retry={"max_attempts": 2, "delay": 0})
    for _ in range(2):
        scene.end(failed())
        scene.worker.beating = True
        scene.world.advance(SECOND)
    assert scene.stands == "FAILED"
    scene.world.do(commands.RetryTask, scene.task_id)
    assert (scene.worker.grant().attempt, scene.worker.grant().epoch) == (1, 3)
    scene.end(failed())
    scene.world.advance(SECOND)
    assert scene.stands == "RUNNING"


@pytest.mark.parametrize(
    ("report", "why"),
    [
        (failed("app.Bad", "builtins.Exception"), "not_retryable"),
        (failed(final=True), "not_retryable"),
        (failed("perdure.errors.OutcomeUnknown", "builtins.Exception", final=True), "outcome_unknown"),
        (replace(failed(), error_types=[]), "not_retryable"),
    ],
    ids=["never_on", "final", "outcome", "unnamed"],
)
def test_what_is_never_retried_dies_at_once(report: Any, why: str) -> None:
    scene = Scene(retry=RETRY | {"never_on": ["Bad"], "retry_on": ["Exception", "ValueError"]})
    scene.end(report)
    assert scene.stands == "FAILED"
    assert scene.world.of_kind(events.TaskFailed)[0].why == why
    assert scene.world.task(scene.task_id).attempt == 1


NET = ErrorInfo(
    type="app.net.NetworkError",
    message="",
    error_types=["app.net.NetworkError", "builtins.OSError", "builtins.Exception"],
)


@pytest.mark.parametrize(
    ("retry_on", "never_on", "retried"),
    [
        (None, None, True), (["NetworkError"], None, True), (["app.net.NetworkError"], None, True),
        (["OSError"], None, True), (["builtins.OSError"], None, True), (["other.NetworkError"], None, False),
        (["net.NetworkError"], None, False), (["TimeoutError"], None, False), ([], None, False),
        (None, ["NetworkError"], False), (None, ["app.net.NetworkError"], False), (None, ["Exception"], False),
        (["NetworkError"], ["OSError"], False), (["NetworkError"], ["TimeoutError"], True), (["OSErr"], None, False),
    ],
)  # fmt: skip
def test_retry_on_and_never_on_match_bare_or_dotted_names_along_the_mro(
    retry_on: list[str] | None, never_on: list[str] | None, retried: bool
) -> None:
    assert retryable(Retry(retry_on=retry_on, never_on=never_on), NET) is retried


def test_exponential_pauses_double_up_to_their_bound() -> None:
    retry = Retry(delay=1_000, max_delay=10_000, jitter=False)
    assert [backoff(retry, n, "t") for n in (1, 2, 3, 4, 5, 1_000_000)] == [1_000, 2_000, 4_000, 8_000, 10_000, 10_000]


def test_fixed_pauses_stay() -> None:
    retry = Retry(backoff="fixed", delay=1_000, jitter=False)
    assert {backoff(retry, n, "t") for n in (1, 2, 50)} == {1_000}


def test_jitter_lies_in_the_upper_half_and_is_drawn_from_task_and_attempt() -> None:
    retry = Retry(backoff="fixed", delay=10_000)
    drawn = [backoff(retry, attempt, f"t{n}") for n in range(50) for attempt in (1, 2)]
    assert all(5_000 <= pause <= 10_000 for pause in drawn)
    assert len(set(drawn)) > 80
    assert drawn == [backoff(retry, attempt, f"t{n}") for n in range(50) for attempt in (1, 2)]


def test_a_resumed_attempt_is_the_same_attempt() -> None:
    scene = Scene(retry=RETRY)
    scene.bring_to("pausing")
    scene.end(stopped("paused"))
    scene.world.advance(HOUR)
    scene.world.do(commands.ResumeTask, scene.task_id)
    other = ScriptedWorker(scene.world, "w2").start()
    assert (other.grant().attempt, other.grant().epoch) == (1, 2)


def test_a_retry_that_waits_while_paused_goes_on_waiting_after_the_resume() -> None:
    scene = Scene(retry=RETRY)
    scene.bring_to("pausing")
    scene.end(failed())
    assert scene.stands == "PAUSED"
    scene.world.do(commands.ResumeTask, scene.task_id)
    assert scene.stands == "PENDING retry_backoff"
    scene.world.advance(2 * MINUTE)
    assert scene.world.task(scene.task_id).ready


@pytest.mark.parametrize("which", ["run", "total"])
def test_a_stopped_attempt_has_an_end_of_its_own_with_what_it_used(which: str) -> None:
    scene = Scene(**{f"{which}_timeout": LIMIT})
    scene.bring_to("timing_out")
    scene.end(replace(stopped("timed_out"), usage=Usage(duration_ms=7, cpu_seconds=0.5)))
    assert scene.world.kinds(scene.task_id)[-3:] == ["AttemptFailed", "TaskTimedOut", "TaskDeadLettered"]
    (end,) = scene.world.of_kind(events.AttemptFailed, scene.task_id)
    assert (end.outcome, end.usage.duration_ms) == ("TIMED_OUT", 7)
    assert scene.world.status(scene.task_id)["usage"]["cpu_seconds"] == 0.5
