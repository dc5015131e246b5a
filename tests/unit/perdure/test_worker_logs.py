from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perdure.schemas import codec, ids, limits
from perdure.schemas.common import Policy, Retry
from perdure.schemas.inbox import RunAttempt
from perdure.schemas.public import LogLine, WorkerMetrics
from perdure.streams.memory_log import MemoryLog
from perdure.worker_logs import Activity, AttemptLog, Lines, LogWriter, Machine, RateCap
from tests.integration.stack import until

GRANT = RunAttempt(
    worker_id="w", session="s", grant=1, task_id="etl/1", type="t", input=b"{}", policy=Policy(retry=Retry()),
    attempt=2, epoch=3,
)  # fmt: skip


class Offers:
    """Takes lines, or refuses them."""

    def __init__(self) -> None:
        self.lines: list[LogLine] = []
        self.open = True

    def __call__(self, partition: int, line: LogLine) -> bool:
        assert partition == 5
        if self.open:
            self.lines.append(line)
        return self.open


@pytest.fixture
def offers() -> Offers:
    return Offers()


@pytest.fixture
def log(offers: Offers) -> AttemptLog:
    return AttemptLog(offers, GRANT, 5)


@pytest.mark.parametrize(
    ("chunks", "lines", "rest"),
    [
        ([b"one\ntwo\n"], [b"one", b"two"], []),
        ([b"o", b"ne\ntw", b"o"], [b"one"], [b"two"]),
        ([b"one\r", b"\ntwo\r\n"], [b"one", b"two"], []),  # a line end that two reads share
        ([b"\r10%\r20%", b"\r30%"], [b"", b"10%", b"20%"], [b"30%"]),  # a progress bar
        ([b"\n\n"], [b"", b""], []),
        ([b"x" * 70_000, b"y\nz\n"], [b"x" * limits.LINE_MAX, b"z"], []),  # cut, and the rest of the line left out
        ([b"end\r"], [], [b"end"]),
    ],
)
def test_pipes_are_split_into_lines(chunks: list[bytes], lines: list[bytes], rest: list[bytes]) -> None:
    splitter = Lines()
    assert [line for chunk in chunks for line in splitter.feed(chunk)] == lines
    assert splitter.rest() == rest
    assert splitter.rest() == []


def test_the_cap_fills_up_again() -> None:
    cap = RateCap(per_s=1_000, burst=3)
    assert [cap.take(1, 10) for _ in range(4)] == [True, True, True, False]
    assert cap.take(1, 11)
    assert not cap.take(1, 11)
    assert not cap.take(1, 5), "a clock that steps back gives nothing"
    assert [cap.take(1, 10_000) for _ in range(4)] == [True, True, True, False]


def test_lines_carry_attempt_and_number(log: AttemptLog, offers: Offers) -> None:
    log.write("stdout", b"a\nb", 1_000)
    log.write("stderr", b"bad\n", 1_001)
    log.line("log", "INFO", "hello", 990, 1_002)
    log.close(1_003)
    got = [(line.number, line.stream, line.level, line.text, line.at) for line in offers.lines]
    assert got == [
        (1, "stdout", "", "a", 1_000),
        (2, "stderr", "", "bad", 1_001),
        (3, "log", "INFO", "hello", 990),
        (4, "stdout", "", "b", 1_003),
    ]
    first = offers.lines[0]
    assert (first.task_id, first.epoch, first.attempt, first.worker_id) == ("etl/1", 3, 2, "w")


def test_lines_above_the_cap_are_counted_in_the_next_one(log: AttemptLog, offers: Offers) -> None:
    log.write("stdout", b"x\n" * 6_000, 1_000)
    assert len(offers.lines) == 5_000
    log.write("stdout", b"later\n", 2_000)
    assert (offers.lines[-1].text, offers.lines[-1].dropped, offers.lines[-1].number) == ("later", 1_000, 6_001)
    assert [line.dropped for line in offers.lines[:-1]] == [0] * 5_000


def test_long_lines_use_up_the_cap_sooner(log: AttemptLog, offers: Offers) -> None:
    log.write("stdout", (b"y" * 65_000 + b"\n") * 100, 1_000)
    assert len(offers.lines) == 5_000 // (1 + 65_000 // 1_024)


def test_what_is_left_out_last_is_said_at_the_end(log: AttemptLog, offers: Offers) -> None:
    offers.open = False
    log.write("stdout", b"lost\nlost too\n", 1_000)
    offers.open = True
    log.close(1_001)
    (line,) = offers.lines
    assert (line.stream, line.dropped, line.number) == ("perdure", 2, 3)
    assert "2 lines were left out" in line.text


def test_text_is_cut_to_its_limit_in_bytes_and_bad_bytes_are_replaced(log: AttemptLog, offers: Offers) -> None:
    log.line("log", "", "ü" * limits.LINE_MAX, 1, 1)
    log.write("stdout", b"\xff\xfe\n", 1)
    assert offers.lines[0].text == "ü" * (limits.LINE_MAX // 2)
    assert offers.lines[1].text == "��"


def _fail(error: Exception) -> None:
    raise error


def test_the_writer_appends_lines_to_the_tasks_partition_and_metrics_to_the_workers(tmp_path: Path) -> None:
    log = MemoryLog(lambda: 1)
    writer = LogWriter(log.producer(), Machine("w", tmp_path, "store", 8), _fail)
    writer.start()
    line = LogLine(task_id="etl/1", epoch=1, attempt=1, worker_id="w", number=1, at=1, stream="stdout", text="hi")
    assert writer.offer(5, line)
    writer.measure(Activity("s", ["etl"], 3, ["etl/1"], "running"), 10_000)
    writer.close(10)
    (record,) = log.records("task-logs", 5)
    assert record.key == b"etl/1"
    assert record.value is not None
    assert codec.decode(record.value) == line
    (measured,) = log.records("worker-metrics", ids.partition_of("w", 8))
    assert measured.value is not None
    metrics = codec.decode_as(WorkerMetrics, measured.value)
    assert (metrics.worker_id, metrics.session, metrics.running, metrics.slots) == ("w", "s", ["etl/1"], 3)
    assert metrics.rss > 1_000_000
    assert metrics.disk_free > 0
    assert metrics.memory_available > 0


def test_a_broker_that_takes_nothing_costs_lines_and_no_waiting(tmp_path: Path) -> None:
    log = MemoryLog(lambda: 1)
    writer = LogWriter(log.producer(), Machine("w", tmp_path, "store", 8), _fail)  # its thread is not running
    line = LogLine(
        task_id="etl/1", epoch=1, attempt=1, worker_id="w", number=1, at=1, stream="stdout", text="x" * 60_000
    )
    taken = [writer.offer(5, line) for _ in range(1_000)]
    assert 200 < sum(taken) < 300
    assert not taken[-1]
    writer.start()
    writer.close(10)
    assert len(log.records("task-logs", 5)) == sum(taken)


def test_cpu_is_measured_between_two_samples(tmp_path: Path) -> None:
    machine = Machine("w", tmp_path, "store", 8)
    activity = Activity("s", [], 1, [], "running")
    assert machine.metrics(activity, 10_000).cpu_percent == 0
    total = 0
    for i in range(3_000_000):
        total += i
    assert machine.metrics(activity, 11_000).cpu_percent > 0


def test_lines_that_the_producer_holds_count_until_the_broker_has_them(tmp_path: Path) -> None:
    """In an outage they gather there, for a day if need be."""
    held: list[Callable[[int, None], None]] = []
    producer: Any = SimpleNamespace(append=lambda *given: held.append(given[-1]), close=lambda: None)
    writer = LogWriter(producer, Machine("w", tmp_path, "store", 8), _fail)
    writer.start()
    line = LogLine(
        task_id="etl/1", epoch=1, attempt=1, worker_id="w", number=1, at=1, stream="stdout", text="x" * 60_000
    )
    taken = sum(writer.offer(5, line) for _ in range(1_000))
    assert 200 < taken < 300
    until("all of them are with the producer", lambda: len(held) == taken)
    assert not writer.offer(5, line)
    held[0](1, None)
    assert writer.offer(5, line)
    writer.close(10)


def test_figures_that_cannot_be_had_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = MemoryLog(lambda: 1)
    writer = LogWriter(log.producer(), Machine("w", tmp_path / "gone", "store", 8), _fail)
    writer.start()
    writer.measure(Activity("s", ["etl"], 3, [], "running"), 10_000)
    writer.close(10)
    assert not log.records("worker-metrics")
    assert "no metrics" in caplog.text
