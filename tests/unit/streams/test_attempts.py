"""Reports of workers: which count, which are refused, and what each kind does to its task."""

from __future__ import annotations

import json
from typing import Any

import pytest

from perdure.schemas import commands, events, inbox, limits, reports, topics
from perdure.schemas.codec import replace
from perdure.schemas.references import Reference
from perdure.schemas.rows import TaskState
from perdure.schemas.signing import signed
from tests.world import (
    KEYS,
    ScriptedWorker,
    World,
    begun,
    checkpoint,
    completed,
    crashed,
    declined,
    failed,
    failed_step,
    milestone,
    progress,
    step,
    stopped,
)

SEND = reports.SendSteps(seq=0, after="")
KINDS: dict[str, Any] = {
    "AttemptStarted": begun(), "ReportStep": step("a"), "StepFailed": failed_step("a"),
    "StepBegun": replace(step("a", None), begun=True), "ReportProgress": progress(0.5),
    "ReportMilestone": milestone("m"), "ReportCheckpoint": checkpoint(1), "AttemptCompleted": completed(1),
    "AttemptFailed": failed(), "AttemptCrashed": crashed(), "AttemptStopped": stopped("drained"),
    "AttemptDeclined": declined(), "SendSteps": SEND,
}  # fmt: skip
# The last events of the task that each kind brings about when it counts.
BRINGS: dict[str, list[str]] = {
    "AttemptStarted": ["AttemptStarted"], "ReportStep": ["StepCompleted"], "StepFailed": ["StepFailed"],
    "StepBegun": ["StepStarted"], "ReportProgress": [], "ReportMilestone": ["MilestoneReached"],
    "ReportCheckpoint": ["CheckpointRecorded"], "AttemptCompleted": ["TaskCompleted"],
    "AttemptFailed": ["AttemptFailed", "TaskFailed", "TaskDeadLettered"],
    "AttemptCrashed": ["AttemptLost", "TaskQueued"], "AttemptStopped": ["AttemptLost", "TaskQueued"],
    "AttemptDeclined": ["AttemptLost", "TaskQueued"], "SendSteps": [],
}  # fmt: skip


class Scene:
    """A running task, and a spare worker nobody gives work to."""

    def __init__(self, **policy: Any) -> None:
        self.world = World(types={"noop": policy})
        self.worker = ScriptedWorker(self.world, slots=1).start()
        self.task_id = self.world.submit()
        self.grant = self.worker.grant()
        self.where = self.worker.partition

    def report(self, *said: Any, **forged: Any) -> bytes:
        return self.worker.report(self.grant, *said, **forged)

    @property
    def task(self) -> TaskState:
        return self.world.task(self.task_id)

    def kinds(self) -> list[str]:
        return self.world.kinds(self.task_id)

    def rows(self) -> dict[bytes, bytes]:
        """What the task is made of, without its own event count."""
        return {k: v for k, v in self.world.rows(self.where).items() if k[:1] in b"tdDgqW"}

    def why_rejected(self) -> list[str]:
        return [e.why for e in self.world.of_kind(events.ReportRejected)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_under_the_grant_counts_once(kind: str) -> None:
    scene = Scene()
    before = scene.kinds()
    scene.worker.stop()  # nobody takes the task up again
    before = scene.kinds()
    data = scene.report(KINDS[kind])
    assert scene.kinds() == before + BRINGS[kind]
    after = scene.rows()
    scene.world.send(data, scene.where)  # the producer's repeat
    if scene.task.state == "RUNNING":
        assert scene.rows() == after
        assert not scene.why_rejected()
    else:
        assert scene.why_rejected() == ["stale_epoch"]
        assert scene.kinds() == before + BRINGS[kind] + ["ReportRejected"]


@pytest.mark.parametrize(
    ("forged", "why"),
    [
        ({"token": b"x" * 32}, "token"), ({"token": b""}, "token"), ({"epoch": 2}, "token"),
        ({"session": "s-none"}, "stale_session"), ({"key": ("w1", b"x" * 32)}, "not_authentic"),
        ({"key": ("w2", b"w" * 32)}, "not_authentic"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_with_a_false_proof_changes_nothing(kind: str, forged: dict[str, Any], why: str) -> None:
    scene = Scene()
    before, kinds = scene.rows(), scene.kinds()
    scene.report(KINDS[kind], **forged)
    assert scene.why_rejected() == [why]
    assert (scene.rows(), scene.kinds()) == (before, kinds)
    assert not scene.world.quarantined()


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_an_old_epoch_changes_nothing(kind: str) -> None:
    scene = Scene()
    old = scene.grant
    scene.report(stopped("drained"))
    assert scene.task.epoch == 2
    scene.worker.run()
    before, kinds = scene.rows(), scene.kinds()
    scene.worker.report(old, KINDS[kind])
    assert scene.why_rejected() == ["stale_epoch"]
    assert scene.kinds() == [*kinds, "ReportRejected"]
    assert {k for k in before if before[k] != scene.rows()[k]} == {
        k for k in before if k.endswith(b"\0s") and k[:1] == b"t"
    }
    assert replace(scene.task, seq=0) == replace(scene.task, seq=0)
    assert [r.epoch for r in scene.world.inbox(scene.worker.session, inbox.RevokeAttempt)] == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_another_session_changes_nothing(kind: str) -> None:
    scene = Scene()
    other = ScriptedWorker(scene.world, "w2", slots=1).start()
    before = scene.rows()
    other.report(scene.grant, KINDS[kind])
    assert scene.why_rejected() == ["token"]
    assert scene.rows() == before


def test_a_repeat_inside_a_new_batch_is_dropped_and_the_rest_counts() -> None:
    scene = Scene()
    scene.report(begun(), step("a"))
    scene.report(replace(step("a"), seq=2), replace(step("b"), seq=3))
    assert [e.step_id for e in scene.world.of_kind(events.StepCompleted)] == ["/a", "/b"]
    assert not scene.why_rejected()


def test_a_gap_ends_the_epoch_and_what_follows_it_is_lost() -> None:
    scene = Scene()
    scene.report(begun())
    scene.worker.stop()
    scene.report(replace(step("a"), seq=2), replace(step("c"), seq=4), replace(completed(), seq=5))
    assert [e.step_id for e in scene.world.of_kind(events.StepCompleted)] == ["/a"]
    assert scene.why_rejected() == ["gap"]
    assert [e.why for e in scene.world.of_kind(events.AttemptLost)] == ["revoked"]
    assert (scene.task.state, scene.task.sessions_lost, scene.task.crashes) == ("PENDING", 0, 0)
    assert [r.epoch for r in scene.world.inbox(scene.worker.session, inbox.RevokeAttempt)] == [1]


def test_each_report_of_a_batch_is_judged_by_itself() -> None:
    world = World()
    worker = ScriptedWorker(world, slots=2).start()
    tasks = [world.submit(), world.submit()]
    first, second = (worker.grant(t) for t in tasks)
    entries = [
        reports.ReportEntry(task_id=tasks[0], epoch=1, token=b"forged", reports=[replace(completed(), seq=1)]),
        reports.ReportEntry(task_id=tasks[1], epoch=1, token=second.token, reports=[replace(completed(2), seq=1)]),
        reports.ReportEntry(task_id=tasks[0], epoch=1, token=first.token, reports=[]),
    ]
    worker.say(reports.ReportBatch(session=worker.session, entries=entries))
    assert [world.task(t).state for t in tasks] == ["RUNNING", "COMPLETED"]
    assert [e.why for e in world.of_kind(events.ReportRejected)] == ["token"]


def test_a_report_after_the_end_of_its_own_batch_changes_nothing() -> None:
    scene = Scene()
    scene.report(completed(1), step("late"), failed())
    assert scene.task.state == "COMPLETED"
    assert scene.kinds()[-1] == "TaskCompleted"


# Steps ---------------------------------------------------------------------------------------------------------------


def test_a_recorded_step_is_never_recorded_again() -> None:
    scene = Scene()
    scene.report(begun(), step("a", b'"first"'), step("a", b'"second"'))
    assert scene.why_rejected() == ["illegal"]
    scene.report(stopped("drained"))
    scene.worker.report(scene.worker.run(), step("a", b'"third"'))
    assert [e.result for e in scene.world.of_kind(events.StepCompleted)] == [b'"first"']
    assert scene.task.steps_kept == scene.task.steps_completed == 1


@pytest.mark.parametrize("what", [replace(step("a", None), begun=True), failed_step("a")], ids=["begun", "failed"])
def test_a_recorded_step_is_not_begun_or_failed_again(what: reports.ReportStep) -> None:
    scene = Scene()
    scene.report(begun(), step("a", b'"kept"'), what)
    assert scene.why_rejected() == ["illegal"]
    scene.report(stopped("drained"))
    assert [s.result for s in pages(scene.worker, 2)[0].steps] == [b'"kept"']
    assert scene.worker.grant().begun_steps == []


def test_with_the_rerun_policy_a_changed_step_is_recorded_anew_and_an_unchanged_one_is_not() -> None:
    scene = Scene(step_mismatch="rerun")
    scene.report(begun(), step("a", b"1", code_version="1"), step("a", b"2", code_version="1"))
    assert scene.why_rejected() == ["illegal"]
    scene.report(step("a", b"3", code_version="2"))
    assert [e.result for e in scene.world.of_kind(events.StepCompleted)] == [b"1", b"3"]
    assert scene.task.steps_kept == 1
    scene.report(replace(step("a", None, code_version="3"), begun=True))
    assert scene.task.steps_kept == 0
    scene.report(stopped("drained"))
    assert scene.worker.grant().begun_steps == ["/a"]


def test_a_step_that_began_and_never_ended_is_told_to_the_next_attempt() -> None:
    scene = Scene()
    at_most_once = replace(step("pay", None), begun=True)
    scene.report(begun(), at_most_once, step("other"))
    scene.report(crashed())
    grant = scene.worker.grant()
    assert (grant.begun_steps, grant.steps_total) == (["/pay"], 1)
    assert [s.step_id for s in pages(scene.worker, 2)[0].steps] == ["/other"]
    scene.worker.report(grant, begun(), step("pay"))
    scene.worker.report(grant, stopped("drained"))
    assert (scene.worker.grant().begun_steps, scene.worker.grant().steps_total) == ([], 2)


def test_a_step_that_began_and_failed_may_begin_again() -> None:
    scene = Scene()
    scene.report(begun(), replace(step("pay", None), begun=True), failed_step("pay"), stopped("drained"))
    assert scene.worker.grant().begun_steps == []


def pages(worker: ScriptedWorker, epoch: int) -> list[inbox.StepPage]:
    return [p for p in worker.world.inbox(worker.session, inbox.StepPage) if p.epoch == epoch]


def test_five_thousand_steps_come_in_pages_that_fit() -> None:
    scene = Scene()
    scene.report(begun())
    value = json.dumps("v" * 150).encode()
    for first in range(0, 5_000, 500):
        scene.report(*(step(f"s{n:05}", value) for n in range(first, first + 500)))
    scene.report(stopped("drained"))
    grant = scene.worker.run()
    assert grant.steps_total == 5_000
    found: list[str] = []
    while True:
        page = pages(scene.worker, 2)[-1]
        assert page.after == (found[-1] if found else "")
        found += [s.step_id for s in page.steps]
        if not page.more:
            break
        scene.worker.report(grant, reports.SendSteps(seq=0, after=found[-1]))
    assert found == [f"/s{n:05}" for n in range(5_000)]
    assert len(pages(scene.worker, 2)) >= 3
    sizes = [len(r.value or b"") for r in scene.world.log.records("worker-inbox")]
    assert max(sizes) <= limits.INBOX_MAX
    scene.worker.report(grant, reports.SendSteps(seq=0, after=""))
    assert pages(scene.worker, 2)[-1] == pages(scene.worker, 2)[0]


def test_the_largest_step_fits_a_page() -> None:
    scene = Scene()
    value = json.dumps("v" * (limits.VALUE_MAX - 2)).encode()
    scene.report(begun(), step("a", value))
    scene.report(step("b", value), stopped("drained"))
    assert [s.step_id for s in pages(scene.worker, 2)[0].steps] == ["/a"]
    assert pages(scene.worker, 2)[0].more
    assert max(len(r.value or b"") for r in scene.world.log.records("worker-inbox")) <= limits.INBOX_MAX


# Milestones, checkpoints ---------------------------------------------------------------------------------------------


def test_a_milestone_is_reached_once_also_across_attempts() -> None:
    scene = Scene()
    scene.report(begun(), milestone("half"), milestone("half"), milestone("done"), stopped("drained"))
    assert scene.worker.grant().milestones == ["half", "done"]
    scene.worker.report(scene.worker.run(), milestone("half"))
    assert [e.name for e in scene.world.of_kind(events.MilestoneReached)] == ["half", "done"]
    assert not scene.why_rejected()


def test_a_checkpoint_retires_the_steps_of_items_before_it_and_no_others() -> None:
    scene = Scene()
    ids_of = [f"files@{n:012}/check" for n in range(20)]
    kept = ["/root", "files/x", "filesy@000000000001/check", "file@000000000001/check", "/files@1"]
    scene.report(begun(), *(step(i) for i in ids_of), *(step(i) for i in kept))
    scene.report(checkpoint(1, files=10))
    assert scene.task.steps_kept == 10 + len(kept)
    scene.report(stopped("drained"))
    assert {s.step_id for s in pages(scene.worker, 2)[0].steps} == {*ids_of[10:], *kept}
    assert scene.worker.grant().checkpoint is not None
    assert scene.task.steps_completed == 20 + len(kept)
    assert len(scene.world.of_kind(events.StepCompleted)) == 20 + len(kept)


def test_a_checkpoint_retires_any_number_of_steps_in_chunks() -> None:
    scene = Scene()
    scene.report(begun())
    count = 3 * limits.STEPS_CHUNK + 7
    for first in range(0, count, 500):
        scene.report(*(step(f"t@{n:012}/s") for n in range(first, min(count, first + 500))))
    scene.report(checkpoint(1, t=count - 5))
    scene.world.advance(100)
    retired = scene.world.of_kind(events.StepsRetired)
    assert scene.task.steps_kept == 5
    assert sum(e.count for e in retired) == count - 5
    assert max(e.count for e in retired) <= limits.STEPS_CHUNK


def test_a_step_of_an_item_before_the_checkpoint_is_not_recorded_a_second_time() -> None:
    scene = Scene()
    scene.report(begun(), step("t@000000000003/s"), checkpoint(1, t=4), step("t@000000000003/s"))
    assert len(scene.world.of_kind(events.StepCompleted)) == 1
    assert scene.why_rejected() == ["illegal"]


def test_checkpoints_go_forward_only() -> None:
    scene = Scene()
    scene.report(begun(), checkpoint(2), checkpoint(2), checkpoint(1), checkpoint(3))
    assert [e.version for e in scene.world.of_kind(events.CheckpointRecorded)] == [2, 3]
    assert scene.why_rejected() == ["illegal", "illegal"]


@pytest.mark.parametrize("hears", [True, False])
def test_a_worker_that_asks_for_it_is_told_which_checkpoints_are_recorded(hears: bool) -> None:
    world = World(types={"noop": {}})
    worker = ScriptedWorker(world, slots=1)
    worker.labels = {commands.HEARS_CHECKPOINTS: "yes"} if hears else {}
    worker.start()
    task_id = world.submit()
    grant = worker.grant()
    worker.report(grant, begun(), checkpoint(1), checkpoint(1), checkpoint(2))
    told = world.inbox(worker.session, inbox.CheckpointAccepted)
    assert [(t.worker_id, t.task_id, t.epoch, t.version) for t in told] == (
        [("w1", task_id, 1, 1), ("w1", task_id, 1, 2)] if hears else []
    )
    newer = worker.restart()  # the grant is over, and its worker does not know it yet
    worker.report(grant, checkpoint(3))
    assert world.inbox(worker.session, inbox.CheckpointAccepted) == told
    assert newer.grant().checkpoint is not None
    assert newer.grant().checkpoint.version == 2


# Sizes and values that no sound worker sends -------------------------------------------------------------------------


def test_a_thousand_long_milestones_stop_nothing() -> None:
    scene = Scene()
    scene.report(begun())
    names = [f"{n:04}" + "m" * (limits.TEXT_MAX - 4) for n in range(limits.MILESTONES_MAX)]
    for first in range(0, len(names), 200):
        scene.report(*(milestone(name) for name in names[first : first + 200]))
    scene.report(stopped("drained"))
    assert scene.task.state == "RUNNING", "the next grant fits the inbox"
    assert max(len(r.value or b"") for r in scene.world.log.records("worker-inbox")) <= limits.INBOX_MAX
    scene.worker.report(scene.worker.run(), completed())
    assert scene.world.status(scene.task_id)["state"] == "COMPLETED"
    assert not scene.world.quarantined()


@pytest.mark.parametrize(
    "report",
    [
        step("big", b'"' + b"v" * limits.VALUE_MAX + b'"'),
        step("x" * limits.STEP_ID_MAX),
        milestone("m" * (limits.TEXT_MAX + 1)),
        checkpoint(1, **{f"track{n}" + "t" * 1_000: n for n in range(limits.POSITIONS_MAX)}),
        progress(float("nan")),
        progress(float("inf")),
        progress(0.5, units_done=-1),
        progress(0.5, current_step="s" * (limits.TEXT_MAX + 1)),
        step("long", function="f" * (limits.TEXT_MAX + 1)),
    ],
    ids=["step", "step_id", "milestone", "checkpoint", "nan", "inf", "units", "current_step", "function"],
)
def test_values_out_of_bounds_are_refused_and_the_attempt_goes_on(report: Any) -> None:
    scene = Scene()
    scene.report(begun(), report, step("after"))
    assert scene.why_rejected() == ["illegal"]
    assert [e.step_id for e in scene.world.of_kind(events.StepCompleted)] == ["/after"]
    assert json.loads(json.dumps(scene.world.status(scene.task_id), allow_nan=False))["state"] == "RUNNING"


@pytest.mark.parametrize("result", [b"{", b"NaN", b"\xff", b"@{}", b'"' + b"v" * limits.VALUE_MAX + b'"'])
def test_a_result_that_is_no_value_fails_the_task_at_once(result: bytes) -> None:
    scene = Scene(retry={"max_attempts": 5})
    scene.world.send(commands.AwaitTask(command_id="wait", task_id=scene.task_id, reply_to="c"))
    scene.report(begun(), replace(completed(), result=result))
    assert (scene.task.state, scene.task.attempt) == ("FAILED", 1)
    assert scene.world.status(scene.task_id)["result"] is None
    assert len(scene.world.replies("wait")) == 1
    assert not scene.world.quarantined()


def test_a_large_result_is_described_and_never_taken_for_a_value() -> None:
    scene = Scene()
    reference = Reference(day=1, sha256="ab" * 32, size=limits.VALUE_MAX + 1, preview="[1,")
    scene.report(begun(), step("big", reference.encode()), replace(completed(), result=reference.encode()))
    (recorded,) = scene.world.of_kind(events.StepCompleted)
    assert recorded.result == reference.encode()
    shown = scene.world.status(scene.task_id)
    assert (shown["state"], shown["result"], shown["result_ref"]) == ("COMPLETED", None, vars(reference))


def test_a_small_result_has_no_reference_whatever_it_says() -> None:
    scene = Scene()
    posing = Reference(day=1, sha256="ab" * 32, size=limits.VALUE_MAX + 1, preview="").encode().decode()
    scene.report(begun(), completed(posing))
    shown = scene.world.status(scene.task_id)
    assert (shown["state"], shown["result"], shown["result_ref"]) == ("COMPLETED", posing, None)


def test_errors_of_any_size_are_cut_to_their_limits() -> None:
    scene = Scene()
    long = replace(
        failed(*(f"{n}" + "t" * 5_000 for n in range(40)), message="m" * 100_000),
        traceback="head" + "t" * 90_000 + "tail",
    )
    scene.report(begun(), long)
    error = scene.task.error
    assert error is not None
    assert (len(error.message), len(error.traceback)) == (limits.MESSAGE_MAX, limits.TRACEBACK_MAX)
    assert error.traceback.endswith("tail")
    assert len("".join(error.error_types)) <= limits.MESSAGE_MAX
    assert scene.world.status(scene.task_id)["state"] == "FAILED"


def test_progress_is_published_and_shown() -> None:
    scene = Scene()
    scene.report(begun(), progress(0.25, current_step="load", units_done=1, units_total=4), progress(0.5, units_done=2))
    shown = scene.world.status(scene.task_id)
    assert (shown["progress"], shown["current_step"], shown["units_done"], shown["units_total"]) == (0.5, "load", 2, 4)
    assert [p.fraction for p in scene.world.all(topics.TELEMETRY)] == [0.25, 0.5]


def test_a_batch_that_somebody_sends_on_to_another_partition_revokes_nothing() -> None:
    """G4: the partition that owns the task is the only one to say that an epoch is over."""
    world = World()
    home, away = world.partition_of("default/t"), 1 - world.partition_of("default/t")
    worker = ScriptedWorker(world).start()
    elsewhere = next(queue for queue in ("a", "b", "c", "d") if world.partition_of(f"{queue}/") == away)
    world.send(signed(replace(worker.started(), queues=[elsewhere]), *KEYS.newest_worker()), away)
    world.submit(task_id="default/t")
    grant = worker.run()
    batch = worker.batch(grant, step("a"))
    world.send(batch, away)
    assert not world.inbox(worker.session, inbox.RevokeAttempt)
    assert [e.why for e in world.of_kind(events.ReportRejected)] == ["unknown_task"]
    world.send(batch, home)
    worker.report(grant, completed(1))
    assert world.kinds("default/t")[-2:] == ["StepCompleted", "TaskCompleted"]
