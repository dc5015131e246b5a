from __future__ import annotations

import threading
from typing import Any

import pytest

from perdure.reporter import BATCH_REPORTS, Coalescer, Reporter, Reporting, size_of
from perdure.schemas import codec, limits
from perdure.schemas.common import ErrorInfo, Usage
from perdure.schemas.errors import InfrastructureError
from perdure.schemas.reports import (
    AttemptCompleted,
    AttemptStarted,
    ReportBatch,
    ReportCheckpoint,
    ReportEntry,
    ReportMilestone,
    ReportProgress,
    ReportStep,
)
from perdure.session import Lane, Session
from perdure.streams.memory_log import MemoryLog
from tests.unit.perdure.answering import KEYS, Answering

LANE = Lane("w", "process", {"t": 7}, 8)


class Bench:
    """A reporter with a clock and a log in the test's hands."""

    def __init__(self) -> None:
        self.now = 10_000
        self.log = Answering()
        self.reporter = Reporter(self.log, KEYS.newest_worker(), "w", lambda: self.now)
        self.session = self.new_session(0)
        self.acked: list[tuple[str, int]] = []

    def new_session(self, partition: int) -> Session:
        return Session(LANE, partition, f"s-{partition}", ["etl"], 4, 0, heard=self.now, beat_due=self.now)

    def open(self, task_id: str = "etl/1", session: Session | None = None) -> Reporting:
        def acknowledged(number: int) -> None:
            self.acked.append((task_id, number))

        return self.reporter.open(session or self.session, task_id, 1, b"token", acknowledged)

    def end(self, attempt: Reporting) -> None:
        report = AttemptCompleted(seq=0, result=b"1", usage=Usage())
        self.reporter.end(attempt, report)

    def batches(self) -> list[list[tuple[str, list[Any]]]]:
        found = []
        for topic, _, batch in self.log.sent:
            assert topic == "task-commands"
            assert isinstance(batch, ReportBatch)
            found.append([(entry.task_id, list(entry.reports)) for entry in batch.entries])
        return found


@pytest.fixture
def bench() -> Bench:
    return Bench()


def _step(name: str, result: bytes = b"1") -> ReportStep:
    return ReportStep(seq=0, step_id=name, name=name, result=result)


def _names(reports: list[Any]) -> list[tuple[int, str]]:
    return [(r.seq, r.step_id) for r in reports]


def test_a_report_leaves_at_once_and_what_comes_meanwhile_leaves_together(bench: Bench) -> None:
    one, two = bench.open("etl/1"), bench.open("etl/2")
    bench.reporter.add(one, _step("a"), 1)
    assert len(bench.log.sent) == 1
    bench.reporter.add(one, _step("b"), 2)
    bench.reporter.add(two, _step("c"), 1)
    bench.reporter.add(one, _step("d"), 3)
    assert len(bench.log.sent) == 1, "one batch in flight at a time"
    bench.log.answer()
    assert bench.acked == [("etl/1", 1)]
    (_, first), (both_one, both_two) = bench.batches()[0][0], bench.batches()[1]
    assert _names(first) == [(1, "a")]
    assert (both_one[0], _names(both_one[1])) == ("etl/1", [(2, "b"), (3, "d")])
    assert (both_two[0], _names(both_two[1])) == ("etl/2", [(1, "c")])
    bench.log.answer()
    assert bench.acked == [("etl/1", 1), ("etl/1", 3), ("etl/2", 1)], "only the highest number of each"
    assert bench.reporter.flush(0)


def test_sessions_do_not_wait_for_each_other(bench: Bench) -> None:
    other = bench.new_session(5)
    bench.reporter.add(bench.open(), _step("a"), 1)
    bench.reporter.add(bench.open("x/1", other), _step("b"), 1)
    assert [(p, m.session) for _, p, m in bench.log.sent] == [(0, "s-0"), (5, "s-5")]


def test_a_failed_batch_goes_again_unchanged_before_anything_later(bench: Bench) -> None:
    attempt = bench.open()
    bench.reporter.add(attempt, _step("a"), 1)
    bench.reporter.add(attempt, _step("b"), 2)
    bench.log.answer(InfrastructureError("message timed out"))
    assert len(bench.log.sent) == 1
    due = bench.reporter.next_due()
    assert due is not None
    bench.reporter.add(attempt, _step("c"), 3)
    bench.reporter.tick(due - 1)
    assert len(bench.log.sent) == 1, "not before its pause is over"
    bench.now = due
    bench.reporter.tick(due)
    bench.log.answer()
    bench.log.answer()
    assert [_names(batch[0][1]) for batch in bench.batches()] == [[(1, "a")], [(1, "a")], [(2, "b"), (3, "c")]]
    assert bench.acked == [("etl/1", 1), ("etl/1", 3)]


def test_acknowledgements_wait_while_the_lease_is_in_doubt(bench: Bench) -> None:
    attempt = bench.open()
    bench.reporter.add(attempt, _step("a"), 1)
    bench.now += 8_001
    bench.log.answer()
    bench.reporter.add(attempt, _step("b"), 2)
    bench.log.answer()
    assert bench.acked == []
    bench.reporter.release(bench.session)
    assert bench.acked == [], "no beat has come through yet"
    bench.session.heard = bench.now
    bench.reporter.release(bench.session)
    assert bench.acked == [("etl/1", 2)]
    bench.reporter.add(attempt, _step("c"), 3)
    bench.log.answer()
    assert bench.acked == [("etl/1", 2), ("etl/1", 3)]


def test_progress_is_coalesced_to_two_a_second_and_the_newest_wins(bench: Bench) -> None:
    attempt = bench.open()
    for i in range(10):
        bench.reporter.progress(attempt, ReportProgress(seq=0, units_done=i))
        if bench.log.flush(0) is False:
            bench.log.answer()
    assert bench.reporter.next_due() == 10_500
    bench.reporter.tick(10_499)
    bench.reporter.tick(10_500)
    bench.log.answer()
    bench.reporter.tick(11_000)
    sent = [report for batch in bench.batches() for _, reports in batch for report in reports]
    assert [(r.seq, r.units_done) for r in sent] == [(1, 0), (2, 9)]


def test_the_last_progress_goes_before_the_end(bench: Bench) -> None:
    attempt = bench.open()
    bench.reporter.add(attempt, AttemptStarted(seq=0), 1)
    bench.log.answer()
    for i in (1, 2):
        bench.reporter.progress(attempt, ReportProgress(seq=0, units_done=i))
    bench.end(attempt)
    bench.log.answer()
    bench.log.answer()
    sent = [report for batch in bench.batches() for _, reports in batch for report in reports]
    assert [type(r).__name__ for r in sent] == [
        "AttemptStarted",
        "ReportProgress",
        "ReportProgress",
        "AttemptCompleted",
    ]
    assert [r.seq for r in sent] == [1, 2, 3, 4]
    assert sent[2].units_done == 2
    bench.reporter.tick(99_999)
    assert bench.reporter.flush(0)
    assert len(sent) == 4, "nothing follows the end"


def test_progress_that_cannot_leave_does_not_pile_up(bench: Bench) -> None:
    attempt = bench.open()
    bench.reporter.add(attempt, AttemptStarted(seq=0), 1)  # in flight, unanswered: the broker is away
    for i in range(1_000):
        bench.now += 500
        bench.reporter.progress(attempt, ReportProgress(seq=0, units_done=i))
    bench.end(attempt)
    bench.log.answer()
    (_, reports) = bench.batches()[1][0]
    assert [type(r).__name__ for r in reports] == ["ReportProgress", "AttemptCompleted"]
    assert (reports[0].units_done, [r.seq for r in reports]) == (999, [2, 3])


def test_a_report_that_cannot_be_written_ends_its_own_attempt_only(bench: Bench) -> None:
    first, good, bad = bench.open("etl/0"), bench.open("etl/1"), bench.open("etl/2")
    bench.reporter.add(first, _step("a"))
    bench.reporter.add(good, _step("b"))
    bench.reporter.add(bad, ReportMilestone(seq=0, name="half"))
    bench.reporter.progress(bad, ReportProgress(seq=0, units_done=1 << 63))
    bench.reporter.add(good, _step("c"))
    bench.log.answer()
    ((_, of_good), (_, of_bad)) = bench.batches()[-1]
    assert _names(of_good) == [(1, "b"), (2, "c")]
    assert [type(r).__name__ for r in of_bad] == ["ReportMilestone", "AttemptFailed"]
    assert (of_bad[1].seq, of_bad[1].final) == (2, True)
    assert "64 bits" in of_bad[1].message


def test_a_dropped_attempt_says_nothing_more(bench: Bench) -> None:
    attempt, other = bench.open("etl/1"), bench.open("etl/2")
    bench.reporter.add(attempt, _step("a"), 1)
    bench.reporter.add(attempt, _step("b"), 2)
    bench.reporter.progress(attempt, ReportProgress(seq=0))
    bench.reporter.progress(attempt, ReportProgress(seq=0))
    bench.reporter.add(other, _step("c"), 1)
    bench.reporter.drop(attempt)
    bench.end(attempt)
    bench.log.answer()
    bench.log.answer()
    bench.reporter.tick(bench.now + 10_000)
    assert [entry[0] for batch in bench.batches() for entry in batch] == ["etl/1", "etl/2"]
    assert bench.acked == [("etl/2", 1)]


def test_a_closed_session_sends_nothing_more(bench: Bench) -> None:
    attempt = bench.open()
    bench.reporter.add(attempt, _step("a"), 1)
    bench.reporter.add(attempt, _step("b"), 2)
    bench.reporter.drop(attempt)
    bench.reporter.close(bench.session)
    bench.log.answer()
    assert len(bench.log.sent) == 1
    assert bench.acked == []
    assert bench.reporter.flush(0)


def test_batches_stay_within_a_records_limit(bench: Bench) -> None:
    attempt = bench.open()
    bench.reporter.add(attempt, AttemptStarted(seq=0), 1)
    for i in range(7):
        bench.reporter.add(attempt, _step(f"big-{i}", b"x" * limits.VALUE_MAX), i + 2)
    for i in range(BATCH_REPORTS + 100):
        bench.reporter.add(attempt, ReportMilestone(seq=0, name=f"m{i}"), i + 9)
    for _ in range(100):
        if bench.reporter.flush(0):
            break
        bench.log.answer()
    sizes = [len(codec.encode(m)) for _, _, m in bench.log.sent]
    assert max(sizes) <= limits.RECORD_MAX
    sent = [report for batch in bench.batches() for _, reports in batch for report in reports]
    assert [r.seq for r in sent] == list(range(1, 1 + 1 + 7 + BATCH_REPORTS + 100))
    assert max(len(reports) for batch in bench.batches() for _, reports in batch) <= BATCH_REPORTS
    assert len(sizes) < 10, "as few as fit"


LONG = "ü" * 100
HUGE = 1 << 60
REPORTS = [
    AttemptStarted(seq=HUGE, pid=HUGE),
    ReportStep(
        seq=HUGE,
        step_id=LONG,
        name=LONG,
        function=LONG,
        error=ErrorInfo(type=LONG, message=LONG, error_types=[LONG] * 50, traceback=LONG * 9),
        duration_ms=HUGE,
    ),
    ReportCheckpoint(
        seq=1, version=HUGE, uri=LONG, sha256=LONG, size=HUGE, positions={f"{LONG}{i}": HUGE for i in range(256)}
    ),
    ReportProgress(seq=1, fraction=0.5, current_step=LONG, units_done=HUGE, units_total=HUGE),
    AttemptCompleted(
        seq=1,
        result=b"x" * 1_000,
        usage=Usage(exit_code=-1, duration_ms=HUGE, cpu_seconds=1.0, artifacts=[LONG] * 20),
    ),
]


@pytest.mark.parametrize("report", REPORTS, ids=lambda r: type(r).__name__)
def test_the_estimate_is_never_too_small(report: Any) -> None:
    task_id = "etl/" + LONG
    empty = len(codec.encode(ReportBatch(session="s", entries=[])))
    entry = ReportEntry(task_id=task_id, epoch=1 << 60, token=b"x" * 32, reports=[report])
    assert len(codec.encode(ReportBatch(session="s", entries=[entry]))) - empty <= size_of(task_id, report)


def test_a_coalescer_lets_one_through_per_interval() -> None:
    coalescer: Coalescer[str] = Coalescer(500)
    assert coalescer.offer("a", 1_000) == "a"
    assert coalescer.offer("b", 1_001) is None
    assert coalescer.offer("c", 1_499) is None
    assert coalescer.due == 1_500
    assert coalescer.take(1_500) == "c"
    assert coalescer.take(1_501) is None
    assert coalescer.offer("d", 1_999) is None
    assert coalescer.offer("e", 2_000) == "e"


def test_many_threads_report_in_order_over_a_log_that_answers_within_the_append() -> None:
    log = MemoryLog(lambda: 1)
    reporter = Reporter(log.producer(), KEYS.newest_worker(), "w", lambda: 1_000)
    session = Session(LANE, 0, "s", ["etl"], 4, 0, heard=1_000, beat_due=0)
    acked: dict[str, list[int]] = {f"etl/{i}": [] for i in range(4)}
    attempts = [reporter.open(session, task, 1, b"", acked[task].append) for task in acked]

    def report(attempt: Reporting) -> None:
        for number in range(1, 501):
            reporter.add(attempt, _step(str(number)), number)

    threads = [threading.Thread(target=report, args=(attempt,)) for attempt in attempts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found: dict[str, list[int]] = {}
    for record in log.records("task-commands", 0):
        assert record.value is not None
        for entry in codec.decode_as(ReportBatch, record.value).entries:
            found.setdefault(entry.task_id, []).extend(r.seq for r in entry.reports)
    assert found == {task: list(range(1, 501)) for task in acked}
    assert reporter.flush(0)
    assert all(numbers[-1] == 500 for numbers in acked.values())
