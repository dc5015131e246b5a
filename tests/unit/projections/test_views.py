"""The view store: filled from the log, asked by queries, filled again from nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from perdure.projections import view_writer
from perdure.projections.dead_letters import DeadLetterProcessor
from perdure.projections.progress import ProgressProcessor, fold
from perdure.projections.view_writer import Reading, Retention, ViewWriter
from perdure.projections.views import PAGE_MAX, Views, alive
from perdure.schemas import events, topics
from perdure.schemas.codec import decode_as, encode
from perdure.schemas.errors import ConfigurationError
from perdure.schemas.public import ConfigRecord, DeadLetter, LogLine, Quarantined, TaskProgress, WorkerMetrics
from perdure.streams.memory_log import MemoryLog
from tests.unit.projections.story import Clock, FakeTransaction, Story, append, on_topic

TABLES = ("tasks", "labels", "events", "logs", "dead_letters", "workers", "config")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock) -> MemoryLog:
    return MemoryLog(clock, partitions=2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "views" / "views.db"


@contextmanager
def writing(log: MemoryLog, path: Path, **said: Any) -> Iterator[ViewWriter]:
    """A writer that has read all there is."""
    with closing(ViewWriter(log, path, **{"clock": log.clock} | said)) as writer:
        drain(writer)
        yield writer


def drain(writer: ViewWriter) -> None:
    while writer.step(0):
        pass


def filled(log: MemoryLog, path: Path, **said: Any) -> Views:
    """The views, with all there is in them."""
    with writing(log, path, **said):
        return Views(path)


def content(path: Path) -> dict[str, list[Any]]:
    with closing(sqlite3.connect(path)) as db:
        return {t: sorted(db.execute(f"SELECT * FROM {t}").fetchall(), key=repr) for t in TABLES}


def tell(log: MemoryLog, story: Story) -> None:
    """All that the engine and the two projections would write for a story."""
    tx = FakeTransaction()
    for event in story.events:
        append(log, "task-events", story.task_id, event)
        ProgressProcessor().handle(on_topic(encode(event)), tx)
        append(log, "task-progress", story.task_id, tx.rows[story.task_id.encode()])
    letters = FakeTransaction()
    for event in story.events:
        DeadLetterProcessor().handle(on_topic(encode(event)), letters)
    for topic, _, value in letters.emitted:
        append(log, topic, story.task_id, value)


def task(log: MemoryLog, task_id: str, at: int = 1_000, **said: Any) -> None:
    """A task's row, without its events."""
    usual: dict[str, Any] = {
        "type": "crunch",
        "queue": task_id.split("/")[0],
        "state": "PENDING",
        "submitted_at": at,
        "seq": 1,
    }
    append(log, "task-progress", task_id, TaskProgress(task_id=task_id, **usual | said))


def line(task_id: str, number: int, text: str = "hello") -> LogLine:
    return LogLine(
        task_id=task_id, epoch=1, attempt=1, worker_id="w1", number=number, at=number, stream="stdout", text=text
    )


def metrics(worker_id: str = "w1", at: int = 0, **said: Any) -> WorkerMetrics:
    usual: dict[str, Any] = {
        "session": "s", "host": "h", "pid": 1, "queues": ["etl"], "slots": 1, "running": [], "cpu_percent": 0.0,
        "rss": 0, "load": 0.0, "memory_available": 0, "disk_free": 0,
    }  # fmt: skip
    return WorkerMetrics(worker_id=worker_id, at=at, **usual | said)


def everything(log: MemoryLog) -> None:
    """Something on every topic."""
    done = Story("etl/done").running(labels={"env": "prod"})
    done.then(events.TaskCompleted)
    tell(log, done)
    tell(log, Story("etl/broken").running(labels={"env": "dev"}).failing())
    mended = Story("mail/mended").running().failing()
    mended.then(events.TaskRedriven)
    tell(log, mended)
    for i in range(3):
        append(log, "task-logs", "etl/done", line("etl/done", i))
    append(log, "worker-metrics", "w1", metrics(at=1))
    append(log, "worker-metrics", "w1", metrics(at=2))
    append(log, "config", "type/crunch", ConfigRecord(name="type/crunch", content=b'{"queue":"etl"}'))
    append(log, "config", "queue/etl", ConfigRecord(name="queue/etl", content=b"{}"))
    append(log, "config", "queue/etl", None)


# Filling --------------------------------------------------------------------------------------------------------------


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
    assert filled(compacted, path).dead_letters().rows == []


def test_a_crash_in_a_batch_leaves_neither_rows_nor_positions(
    log: MemoryLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        task(log, f"etl/{i}")
    with monkeypatch.context() as patch, closing(ViewWriter(log, path, clock=log.clock)) as writer:
        patch.setattr(writer, "_prune", lambda _: (_ for _ in ()).throw(sqlite3.OperationalError("disk is full")))
        with pytest.raises(Exception, match=r"disk is full.*filled again"):
            writer.step(0)
    assert Views(path).tasks().rows == []
    assert len(filled(log, path).tasks().rows) == 3


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
    monkeypatch.setattr(view_writer, "VERSION", 2)
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
    views = filled(log, path, retention=keep)
    assert [e.at for e in views.events("etl/1").rows] == [2_000, 3_000, 4_000, 12_000]
    assert [n.record.number for n in views.logs("etl/1").rows] == [2]
    assert [w.worker_id for w in views.workers()] == ["new"]
    kept = content(path)
    path.unlink()
    filled(log, path, retention=keep)
    assert content(path) == kept


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


def test_the_clocks_are_compared_on_live_records_only(log: MemoryLog, path: Path, clock: Clock) -> None:
    here = Clock(clock.now + 86_400_000)
    task(log, "etl/old")  # a day old: latency, no skew
    with writing(log, path, clock=here) as writer:
        assert skew(writer) is None
        here.now = clock.now
        for late in (5_000, 200, 900):
            here.now = clock.now + late
            task(log, "etl/new")
            drain(writer)
        assert skew(writer) == -200
        here.now = clock.now - 60_000
        task(log, "etl/new")
        drain(writer)
        assert skew(writer) == 60_000


# Queries --------------------------------------------------------------------------------------------------------------


def test_status(log: MemoryLog, path: Path) -> None:
    story = Story("etl/a/b%2F ü").running()
    tell(log, story)
    views = filled(log, path)
    expected = None
    for event in story.events:
        expected = fold(expected, event)
    assert views.status("etl/a/b%2F ü") == expected
    assert views.status("etl/a") is None


def some(log: MemoryLog) -> None:
    task(log, "etl/1", at=10, state="RUNNING", labels={"env": "prod", "team": "a"})
    task(log, "etl/2", at=20, state="FAILED", labels={"env": "prod"})
    task(log, "mail/3", at=20, state="RUNNING", type="send", labels={"env": "dev"})
    task(log, "etl/4", at=30, state="PENDING")


FILTERS: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["etl/4", "mail/3", "etl/2", "etl/1"]),
    ({"states": ["RUNNING"]}, ["mail/3", "etl/1"]),
    ({"states": ["RUNNING", "FAILED"]}, ["mail/3", "etl/2", "etl/1"]),
    ({"type": "send"}, ["mail/3"]),
    ({"queue": "etl"}, ["etl/4", "etl/2", "etl/1"]),
    ({"queue": "etl", "states": ["RUNNING"]}, ["etl/1"]),
    ({"labels": [("env", "prod")]}, ["etl/2", "etl/1"]),
    ({"labels": [("env", "prod"), ("team", "a")]}, ["etl/1"]),
    ({"labels": [("env", "prod")], "states": ["COMPLETED"]}, []),
    ({"type": "send' OR 1=1 --"}, []),
]


@pytest.mark.parametrize(("asked", "expected"), FILTERS)
def test_tasks_newest_first_and_filtered(
    log: MemoryLog, path: Path, asked: dict[str, Any], expected: list[str]
) -> None:
    some(log)
    page = filled(log, path).tasks(**asked)
    assert [p.task_id for p in page.rows] == expected
    assert page.next is None


def test_labels_follow_the_task(log: MemoryLog, path: Path) -> None:
    task(log, "etl/1", labels={"env": "dev"})
    task(log, "etl/1", labels={"env": "prod"})
    views = filled(log, path)
    assert views.tasks(labels=[("env", "dev")]).rows == []
    assert len(views.tasks(labels=[("env", "prod")]).rows) == 1


@pytest.mark.parametrize("asked", [{}, {"states": ["PENDING"]}, {"queue": "etl"}, {"labels": [("env", "prod")]}])
def test_pages_stay_in_step_while_tasks_come_and_change(log: MemoryLog, path: Path, asked: dict[str, Any]) -> None:
    for i in range(25):
        task(log, f"etl/{i:02d}", at=1_000 + i // 5, labels={"env": "prod"})
    with writing(log, path) as writer:
        views, seen, after = Views(path), list[str](), None
        while True:
            page = views.tasks(limit=4, after=after, **asked)
            seen += [p.task_id for p in page.rows]
            after = page.next
            if after is None:
                break
            task(log, f"etl/new{len(seen)}", at=9_000 + len(seen), labels={"env": "prod"})
            task(log, "etl/24", at=1_004, seq=len(seen), labels={"env": "prod"})
            drain(writer)
    assert seen == [f"etl/{i:02d}" for i in reversed(range(25))]


def test_a_page_ends_before_it_is_too_big(log: MemoryLog, path: Path) -> None:
    for i in range(100):
        task(log, f"etl/{i:03d}", result=b'"' + b"x" * 60_000 + b'"')
    views = filled(log, path)
    page = views.tasks(limit=PAGE_MAX)
    assert 60 < len(page.rows) < 75
    assert page.next is not None
    rest = views.tasks(limit=PAGE_MAX, after=page.next)
    assert len(page.rows) + len(rest.rows) == 100


def test_events_in_order_and_by_kind(log: MemoryLog, path: Path) -> None:
    story = Story("etl/1").running()
    tell(log, story)
    tell(log, Story("etl/2").running())
    views = filled(log, path)
    assert views.events("etl/1").rows == story.events
    part = views.events("etl/1", after=1, limit=2)
    assert (part.rows, part.last, part.more) == (story.events[1:3], 3, True)
    part = views.events("etl/1", after=part.last)
    assert (part.rows, part.last, part.more) == (story.events[3:], 4, False)
    assert views.events("etl/1", after=4).last == 4
    assert list(views.every_event("etl/1", ["TaskGranted"])) == story.events[2:3]
    assert views.events("etl/none").rows == []


def test_an_id_used_again_has_only_its_own_events(log: MemoryLog, path: Path) -> None:
    old = Story("etl/1").running()
    old.then(events.TaskCompleted)
    old.then(events.TaskRetired)
    tell(log, old)
    new = Story("etl/1", at=9_000_000)
    new.then(events.TaskSubmitted)
    append(log, "task-events", "etl/1", new.events[0])
    assert filled(log, path).events("etl/1").rows == new.events


def test_log_lines_from_the_end_or_behind_a_place(log: MemoryLog, path: Path) -> None:
    for i in range(10):
        append(log, "task-logs", "etl/1", line("etl/1", i))
        append(log, "task-logs", "etl/2", line("etl/2", i))
    views = filled(log, path)
    assert [n.record.number for n in views.logs("etl/1", last=3).rows] == [7, 8, 9]
    part = views.logs("etl/1", limit=4)
    assert ([n.record.number for n in part.rows], part.more) == ([0, 1, 2, 3], True)
    rest = views.logs("etl/1", after=part.last)
    assert ([n.record.number for n in rest.rows], rest.more) == ([4, 5, 6, 7, 8, 9], False)
    assert views.logs("etl/1", after=rest.last).last == rest.last
    assert views.logs("etl/none", last=5).rows == []


def test_dead_letters(log: MemoryLog, path: Path) -> None:
    for i in range(5):
        letter = DeadLetter(
            task_id=f"etl/{i}", type="crunch" if i % 2 else "send", queue="etl", state="FAILED", failed_at=i // 2,
            fingerprint=f"f{i % 2}",
        )  # fmt: skip
        append(log, "task-dead-letters", f"etl/{i}", letter)
    append(log, "task-dead-letters", "etl/3", None)
    views = filled(log, path)
    first = views.dead_letters(limit=2)
    assert [d.task_id for d in first.rows] == ["etl/4", "etl/2"]
    assert [d.task_id for d in views.dead_letters(after=first.next).rows] == ["etl/1", "etl/0"]
    assert [d.task_id for d in views.dead_letters(type="crunch", queue="etl").rows] == ["etl/1"]
    assert [d.task_id for d in views.dead_letters(fingerprint="f0").rows] == ["etl/4", "etl/2", "etl/0"]
    assert views.dead_letter("etl/1") is not None
    assert views.dead_letter("etl/3") is None


def test_workers_as_they_spoke_last(log: MemoryLog, path: Path) -> None:
    append(log, "worker-metrics", "w1", metrics("w1", at=100))
    append(log, "worker-metrics", "w1", metrics("w1", at=200, slots=9))
    append(log, "worker-metrics", "w2", metrics("w2", at=200, state="stopped"))
    first, second = filled(log, path).workers()
    assert (first.worker_id, first.at, first.slots) == ("w1", 200, 9)
    assert alive(first, now=200 + 29_999)
    assert not alive(first, now=200 + 30_000)
    assert not alive(second, now=200)


def test_queues_count_their_tasks_by_state(log: MemoryLog, path: Path) -> None:
    some(log)
    assert filled(log, path).queues() == {
        "etl": {"RUNNING": 1, "FAILED": 1, "PENDING": 1},
        "mail": {"RUNNING": 1},
    }


def test_configuration_by_kind(log: MemoryLog, path: Path) -> None:
    for name in ("type/a", "type/b", "types/c", "queue/etl", "type/a"):
        append(log, "config", name, ConfigRecord(name=name, content=b"{}"))
    found = filled(log, path).config("type")
    assert [(c.record.name, c.number) for c in found] == [("type/a", 4), ("type/b", 1)]
