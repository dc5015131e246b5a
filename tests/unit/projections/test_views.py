"""What the view store can be asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perdure.projections.progress import fold
from perdure.projections.views import PAGE_MAX, Views, alive
from perdure.schemas import events
from perdure.schemas.public import ConfigRecord, DeadLetter
from perdure.streams.memory_log import MemoryLog
from tests.unit.projections.filling import drain, filled, line, metrics, some, task, tell, writing
from tests.unit.projections.story import Story, append


def test_status(log: MemoryLog, path: Path) -> None:
    story = Story("etl/a/b%2F ü").running()
    tell(log, story)
    views = filled(log, path)
    expected = None
    for event in story.events:
        expected = fold(expected, event)
    assert views.status("etl/a/b%2F ü") == expected
    assert views.status("etl/a") is None


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
