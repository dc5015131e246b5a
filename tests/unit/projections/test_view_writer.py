"""The view store is filled from the log, read on, and filled again from nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from perdure.projections import view_writer
from perdure.projections.view_writer import Reading, Retention, ViewWriter
from perdure.projections.views import Views
from perdure.schemas import events, topics
from perdure.schemas.codec import decode_as, encode
from perdure.schemas.errors import ConfigurationError, InfrastructureError
from perdure.schemas.public import Quarantined
from perdure.streams.memory_log import MemoryLog, MemoryProducer
from tests.unit.projections.filling import (
    TABLES,
    content,
    drain,
    everything,
    filled,
    line,
    metrics,
    task,
    tell,
    writing,
)
from tests.unit.projections.story import Clock, Story, append


def test_a_deleted_store_is_filled_again_with_the_same_content(log: MemoryLog, path: Path) -> None:
    everything(log)
    filled(log, path)
    first = content(path)
    assert all(first.values())
    path.unlink()
    filled(log, path)
    assert content(path) == first


def test_reading_on_gives_the_same_as_reading_at_once(log: MemoryLog, path: Path, tmp_path: Path) -> None:
    parts: list[Callable[[], None]] = [
        lambda: everything(log),
        lambda: tell(log, Story("etl/later").running(labels={"env": "prod"}).failing()),
        lambda: append(log, "task-dead-letters", "etl/broken", None),
        lambda: append(log, "config", "type/crunch", None),
    ]
    for more in parts:
        more()
        filled(log, path)
    filled(log, tmp_path / "at-once.db")
    assert content(path) == content(tmp_path / "at-once.db")
    assert Views(path).dead_letter("etl/broken") is None
    assert Views(path).config("type") == []


def test_only_new_records_are_read_after_a_restart(log: MemoryLog, path: Path) -> None:
    task(log, "etl/1")
    filled(log, path)
    task(log, "etl/2")
    with closing(ViewWriter(log, path, clock=log.clock)) as writer:
        assert writer.step(0) == 1
    assert {p.task_id for p in Views(path).tasks().rows} == {"etl/1", "etl/2"}


class Recreated(MemoryLog):
    """A log on which one topic has been deleted and made again."""

    def topic_id(self, topic: str) -> str:
        return "another" if topic == "task-progress" else super().topic_id(topic)


def copy(log: MemoryLog, to: MemoryLog, *, but: str) -> None:
    """All records of all other topics, in their places."""
    for topic in topics.ALL:
        for r in log.records(topic.name) if topic.name != but else ():
            to.producer().append(topic.name, r.partition, r.key, r.value)


def test_a_topic_made_anew_replaces_its_rows_and_no_others(log: MemoryLog, path: Path, clock: Clock) -> None:
    everything(log)
    filled(log, path)
    before = content(path)
    new = Recreated(clock, partitions=2)
    copy(log, new, but="task-progress")
    task(new, "etl/new")
    assert [p.task_id for p in filled(new, path).tasks().rows] == ["etl/new"]
    after = content(path)
    assert after["labels"] == []
    assert {t: after[t] for t in TABLES[2:]} == {t: before[t] for t in TABLES[2:]}


def test_a_shorter_topic_is_read_from_its_beginning(log: MemoryLog, path: Path, clock: Clock) -> None:
    for i in range(3):
        task(log, f"etl/{i}")
    filled(log, path)
    restored = MemoryLog(clock, partitions=2)
    task(restored, "etl/only")
    assert [p.task_id for p in filled(restored, path).tasks().rows] == ["etl/only"]


def test_records_that_retention_took_meanwhile_are_passed_over(log: MemoryLog, path: Path) -> None:
    append(log, "task-logs", "etl/1", line("etl/1", 1))
    filled(log, path)
    for i in (2, 3):
        append(log, "task-logs", "etl/1", line("etl/1", i))
    for p in range(2):
        log.truncate("task-logs", p, 2)
    lines = filled(log, path).logs("etl/1").rows
    assert [n.record.number for n in lines] == [1, 3]


def test_a_letter_that_went_while_nobody_looked_is_gone(log: MemoryLog, path: Path, clock: Clock) -> None:
    """Its tombstone may have been compacted away: the list is read anew at every start."""
    everything(log)
    filled(log, path)
    compacted = MemoryLog(clock, partitions=2)
    copy(log, compacted, but="task-dead-letters")
    for partition in range(2):
        for record in log.records("task-dead-letters", partition):
            compacted.producer().append(record.topic, partition, b"etl/other", None)
    assert filled(compacted, path).dead_letters().rows == []


def test_a_crash_in_a_batch_leaves_neither_rows_nor_positions(
    log: MemoryLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        task(log, f"etl/{i}")
    with monkeypatch.context() as patch, closing(ViewWriter(log, path, clock=log.clock)) as writer:
        full = sqlite3.OperationalError("disk is full")
        patch.setattr(writer, "_prune", lambda _: (_ for _ in ()).throw(full))
        with pytest.raises(Exception, match=r"disk is full.*filled again"):
            writer.step(0)
    assert Views(path).tasks().rows == []
    assert len(filled(log, path).tasks().rows) == 3


@pytest.mark.parametrize("after", [4_096, 10 * 4_096])
def test_a_damaged_store_is_deleted_and_filled_again(log: MemoryLog, path: Path, after: int) -> None:
    """Damaged at its beginning (behind the page that says whose file it is), or among the rows alone."""
    for i in range(200):
        task(log, f"etl/{i}")
    filled(log, path)
    first = content(path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(after)
        file.write(b"\xff" * (size - after))
    for i in range(200):
        task(log, f"etl/{i}")
    with (
        pytest.raises(InfrastructureError, match=r"was damaged .* has been deleted"),
        closing(ViewWriter(log, path, clock=log.clock)) as writer,
    ):
        drain(writer)
    filled(log, path)
    assert content(path) == first


UNREADABLE = [
    ("task-progress", b"nonsense", "undecodable"),
    ("task-progress", encode(line("etl/1", 1)), "undecodable"),
    ("task-events", b"\xc3\x01" + b"\0" * 8, "unknown_schema"),
    ("task-events", encode(Story("etl/1").progress(fraction=0.5)), "undecodable"),
    ("task-logs", None, "undecodable"),
    ("worker-metrics", b"", "undecodable"),
    ("task-dead-letters", b"{}", "undecodable"),
    ("config", b"{}", "undecodable"),
]


@pytest.mark.parametrize(("topic", "value", "cause"), UNREADABLE)
def test_what_cannot_be_read_is_quarantined_and_stops_nothing(
    log: MemoryLog, path: Path, topic: str, value: bytes | None, cause: str
) -> None:
    append(log, topic, "etl/1", value)
    task(log, "etl/2")
    assert filled(log, path).status("etl/2") is not None
    (record,) = log.records("quarantine")
    bad = decode_as(Quarantined, record.value or b"")
    assert (bad.topic, bad.reader, bad.cause, bad.record) == (topic, "views", cause, value or b"")
    filled(log, path)
    if topic != "config" and topic != "task-dead-letters":  # these two are read anew at every start
        assert len(log.records("quarantine")) == 1


class Deaf(MemoryLog):
    """A log whose broker takes no more records."""

    def __init__(self, clock: Clock, answer: InfrastructureError | None) -> None:
        super().__init__(clock, partitions=2)
        self.answer = answer

    def producer(self) -> Any:
        return self

    def append(self, *_: Any) -> None:
        if self.answer is not None:
            _[-1](-1, self.answer)

    def flush(self, timeout_s: float) -> bool:
        return self.answer is not None

    def close(self) -> None:
        pass


@pytest.mark.parametrize("answer", [None, InfrastructureError("the disk is full")])
def test_no_position_moves_past_a_record_that_is_not_in_quarantine(
    path: Path, clock: Clock, answer: InfrastructureError | None
) -> None:
    deaf, good = Deaf(clock, answer), MemoryLog(clock, partitions=2)
    for log in (deaf, good):
        MemoryProducer(log).append("task-logs", 0, None, b"nonsense")
    with closing(ViewWriter(deaf, path, clock=clock)) as writer, pytest.raises(InfrastructureError):
        writer.step(0)
    filled(good, path)
    assert len(good.records("quarantine")) == 1


def test_partition_events_are_no_rows(log: MemoryLog, path: Path) -> None:
    event = events.ForwardTaken(
        seq=1, at=1, cause=Story().then(events.TaskQueued).cause, build="", feature_level=1, source=1, number=1
    )
    append(log, "task-events", "etl/1", event)
    filled(log, path)
    assert content(path)["events"] == []
    assert log.records("quarantine") == []


def test_only_one_server_writes_a_store(log: MemoryLog, path: Path) -> None:
    with writing(log, path), pytest.raises(ConfigurationError, match="in use by another server"):
        ViewWriter(log, path, clock=log.clock)
    filled(log, path)


def test_other_peoples_files_are_left_alone(log: MemoryLog, path: Path) -> None:
    path.parent.mkdir()
    path.write_text("my notes")
    with pytest.raises(ConfigurationError, match="no view store"):
        ViewWriter(log, path, clock=log.clock)
    assert path.read_text() == "my notes"
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE precious (n)")
    with pytest.raises(ConfigurationError, match="another program's database"):
        ViewWriter(log, path, clock=log.clock)


def test_a_store_of_another_version_is_filled_anew(log: MemoryLog, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task(log, "etl/1")
    filled(log, path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("ALTER TABLE tasks RENAME TO works")
    monkeypatch.setattr(view_writer, "VERSION", view_writer.VERSION + 1)
    assert filled(log, path).status("etl/1") is not None


def test_the_store_is_nobody_elses_to_read(log: MemoryLog, path: Path) -> None:
    with writing(log, path):
        for file in path.parent.iterdir():
            assert file.stat().st_mode & 0o077 == 0, file
        assert path.parent.stat().st_mode & 0o077 == 0


# Retention ------------------------------------------------------------------------------------------------------------


def test_only_recent_events_logs_and_workers_are_kept(log: MemoryLog, path: Path, clock: Clock) -> None:
    keep = Retention(events_ms=10_000, logs_ms=5_000, workers_ms=3_000)
    story = Story("etl/1", at=0).running()  # at 1 s, 2 s, 3 s, 4 s
    tell(log, story)
    clock.now = 0
    append(log, "task-logs", "etl/1", line("etl/1", 1))
    append(log, "worker-metrics", "old", metrics("old"))
    views = filled(log, path, retention=keep)
    assert len(views.events("etl/1").rows) == 4
    story.then(events.TaskCompleted, at=12_000)
    append(log, "task-events", "etl/1", story.events[-1])
    clock.now = 5_001
    append(log, "task-logs", "etl/1", line("etl/1", 2))
    append(log, "worker-metrics", "new", metrics("new"))
    clock.now = 12_001
    views = filled(log, path, retention=keep)
    assert [e.at for e in views.events("etl/1").rows] == [2_000, 3_000, 4_000, 12_000]
    assert [n.record.number for n in views.logs("etl/1").rows] == [2]
    assert [w.worker_id for w in views.workers()] == ["new"]
    kept = content(path)
    path.unlink()
    filled(log, path, retention=keep)
    assert content(path) == kept


def test_a_task_that_was_forgotten_goes_after_a_while(log: MemoryLog, path: Path, clock: Clock) -> None:
    keep = Retention(tasks_ms=10_000)
    gone, open_ = Story("etl/gone", at=0).running(labels={"team": "a"}), Story("etl/open", at=0).running()
    gone.then(events.TaskCompleted)
    gone.then(events.TaskRetired, at=6_000)
    for story in (gone, open_):
        tell(log, story)
    clock.now = 16_000
    append(log, "task-events", "etl/open", open_.then(events.StepCompleted, at=16_000))
    assert filled(log, path, retention=keep).status("etl/gone") is not None
    clock.now = 16_001
    append(log, "task-events", "etl/open", open_.then(events.StepCompleted, at=16_001))
    views = filled(log, path, retention=keep)
    assert views.status("etl/gone") is None
    assert views.status("etl/open") is not None
    assert "team" not in str(content(path)["labels"])


def test_a_task_whose_last_record_nobody_has_seen_is_forgotten_by_its_event(
    log: MemoryLog, path: Path, clock: Clock
) -> None:
    """A server that was away for long: record and tombstone are both compacted away, the event is not."""
    gone = Story("etl/gone", at=0).running()
    gone.then(events.TaskCompleted)
    tell(log, gone)
    append(log, "task-events", "etl/gone", gone.then(events.TaskRetired, at=6_000))
    clock.now = 16_001
    append(log, "task-events", "etl/open", Story("etl/open", at=15_001).then(events.TaskSubmitted))
    assert filled(log, path, retention=Retention(tasks_ms=10_000)).status("etl/gone") is None


def test_a_task_whose_record_is_deleted_goes_at_once(log: MemoryLog, path: Path) -> None:
    task(log, "etl/1")
    assert filled(log, path).status("etl/1") is not None
    append(log, "task-progress", "etl/1", None)
    assert filled(log, path).status("etl/1") is None


def test_a_record_of_a_clock_that_leapt_takes_no_others_away(log: MemoryLog, path: Path, clock: Clock) -> None:
    story = Story("etl/1", at=0).running()
    story.then(events.MilestoneReached, at=10**12, name="ahead")
    story.then(events.TaskCompleted, at=6_000)
    tell(log, story)
    clock.now = 7_000
    views = filled(log, path, retention=Retention(events_ms=10_000, logs_ms=1, workers_ms=1))
    assert len(views.events("etl/1").rows) == 6


# How far it is --------------------------------------------------------------------------------------------------------


def test_it_says_when_it_has_caught_up_and_how_far_it_is_behind(
    log: MemoryLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_writer, "BATCH", 2)
    for i in range(5):
        task(log, f"etl/{i}")

    def measured() -> tuple[bool, dict[str, int]]:
        writer.measure()
        return writer.reading.caught_up, {topic: n for topic, n in writer.reading.lag.items() if n}

    with closing(ViewWriter(log, path, clock=log.clock)) as writer:
        assert writer.reading == Reading()
        writer.step(0)
        assert measured() == (False, {"task-progress": 3})
        drain(writer)
        assert measured() == (True, {})
        task(log, "etl/more")
        assert measured() == (True, {"task-progress": 1})


def test_an_empty_log_is_caught_up_at_once(log: MemoryLog, path: Path) -> None:
    with writing(log, path) as writer:
        assert writer.reading.caught_up


def skew(writer: ViewWriter) -> int | None:
    writer.measure()
    return writer.reading.skew_ms


def happen(log: MemoryLog, at: int) -> None:
    """An event at a moment of the log's clock; the record bears the clock of the engine that wrote it."""
    story = Story("etl/1", at=at)
    append(log, "task-events", "etl/1", story.then(events.TaskSubmitted, at=at))


def test_the_clocks_are_compared_on_live_events_only(log: MemoryLog, path: Path, clock: Clock) -> None:
    day = 86_400_000
    here = Clock(clock.now + day)
    happen(log, clock.now)  # a day old: latency, no skew
    with writing(log, path, clock=here) as writer:
        assert skew(writer) is None
        for late in (5_000, 200, 900):
            happen(log, here.now - late)
            drain(writer)
        assert skew(writer) == -200
        happen(log, here.now + 60_000)
        drain(writer)
        assert skew(writer) == 60_000


def test_the_clocks_of_those_who_write_are_not_taken_for_the_logs(log: MemoryLog, path: Path, clock: Clock) -> None:
    """Only task-commands bears the broker's time: a log that is ten minutes behind shows in the events alone."""
    with writing(log, path) as writer:
        for _ in range(10):
            happen(log, clock.now - 600_000)
            task(log, "etl/new")
            append(log, "worker-metrics", "w1", metrics())
            drain(writer)
        assert skew(writer) == -600_000
