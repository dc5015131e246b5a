"""`perdure asof`: a task or the whole fleet as it was, folded from the log."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from perdure.cli_common import Session, dumps, session, talk
from perdure.schemas.errors import AmbiguousId, NotFound

if TYPE_CHECKING:
    from perdure.points import Place
    from perdure.streams.log import Log
    from perdure.streams.past import Past

_ORDER = ("RUNNING", "PAUSED", "PENDING", "FAILED", "TIMED_OUT", "CANCELLED", "COMPLETED")
_OPEN = frozenset(_ORDER[:3])
_SHOWN_IDS = 5


@click.command()
@click.argument("when", metavar="TIME|OFFSETS")
@click.argument("task_id", metavar="[ID]", required=False)
@click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="At most so many tasks.")
@click.option("--all", "ended", is_flag=True, help="List ended tasks too, not only open ones.")
@session
def asof(session: Session, when: str, task_id: str | None, limit: int, ended: bool) -> None:
    """Show a task, or all of them, as they were.

    TIME is a date, an age or ms since 1970. OFFSETS are PARTITION:OFFSET of task-commands, or events/PARTITION:OFFSET
    of task-events, separated by commas; partitions that are not named are shown at the same log time. The state is
    folded from task-events and needs no engine; the larger the log, the longer it takes.

    \b
    perdure asof "2h ago"
    perdure asof "2026-11-21 14:00" 0192f3aa
    perdure asof 3:120441 etl/nightly --json
    """
    from perdure.points import parse_place

    with session.client() as client:
        place = parse_place(when, present(), client.log.partitions, "when")
        if task_id is None:
            _fleet(session, look_back(client.log, place), limit, _ORDER if ended else tuple(_OPEN))
        else:
            _one(session, client.log, place, task_id)


def present() -> int:
    """This machine's clock, ms."""
    return int(time.time() * 1000)


def look_back(log: Log, place: Place) -> list[Past]:
    """Every partition at a place; those that it does not name, at the latest log time of those that it does."""
    from perdure.streams.past import Past, Point

    named = {p: Past(log, p, point) for p in range(log.partitions) if (point := place.of(p)) is not None}
    at = max(past.at for past in named.values())
    return [named.get(p) or Past(log, p, Point(at=at)) for p in range(log.partitions)]


# One task ------------------------------------------------------------------------------------------------------------


def _one(session: Session, log: Log, place: Place, text: str) -> None:
    past, task_id = _find(log, place, text)
    past.recall_progress(task_id)
    status = past.status(task_id)
    if session.json:
        session.answer({"as_of": _as_of([past]), "task": status})
        return
    from perdure.cli_text import status_text
    from perdure.status import parse_status

    click.echo(f"{_heading([past])}\n{status_text(parse_status(dumps(status).encode()))}")
    _warn([past])


def _find(log: Log, place: Place, text: str) -> tuple[Past, str]:
    """The task that a person means, in the partition of its id if it is whole, else in any. Raises `NotFound`."""
    from perdure.schemas import ids
    from perdure.streams.past import Past

    home = ids.partition_of(ids.split(text)[0], log.partitions)
    point = place.of(home)
    if ids.split(text)[0] and point is not None:
        past = Past(log, home, point)
        if past.state.task(text) is not None:
            return past, text
    pasts = look_back(log, place)
    exact, begun = [], []
    for past in pasts:
        for task_id, _ in past.tasks():
            local = ids.split(task_id)[1]
            if text in (task_id, local):
                exact.append((past, task_id))
            elif task_id.startswith(text) or local.startswith(text):
                begun.append((past, task_id))
    found = exact or begun
    if not found:
        lost = " (its beginning is no longer in task-events)" if any(text in p.headless for p in pasts) else ""
        raise NotFound(f"no task has, or begins with, the id {text!r} {_heading(pasts)}{lost}")
    if len(found) > 1:
        shown = ", ".join(t for _, t in found[:_SHOWN_IDS]) + (" ..." if len(found) > _SHOWN_IDS else "")
        raise AmbiguousId(f"{text!r} means {len(found)} tasks: {shown}", field="task_id")
    return found[0]


# All of them ---------------------------------------------------------------------------------------------------------


def _fleet(session: Session, pasts: list[Past], limit: int, states: tuple[str, ...]) -> None:
    from perdure.cli_text import table

    queues = _queues(pasts)
    known = [(past, task_id, t) for past in pasts for task_id, t in past.tasks() if t.state in states]
    known.sort(key=lambda found: (_ORDER.index(found[2].state), -found[2].updated_at, found[1]))
    shown = [past.status(task_id) for past, task_id, _ in known[:limit]]
    workers = _workers(pasts)
    more = len(known) - len(shown)
    answer = {"as_of": _as_of(pasts), "queues": queues, "workers": workers, "tasks": shown, "more": more}
    if session.json:
        session.answer(answer)
        return
    click.echo(_heading(pasts))
    click.echo("\n" + (table({"queues": queues}, ("queue", "total", "states")) if queues else "no tasks"))
    if workers:
        click.echo("\n" + table({"workers": workers}, ("worker_id", "state", "host", "queues", "slots", "running")))
    if shown:
        click.echo("\n" + table({"tasks": shown}, ("task_id", "type", "state", "attempt", "worker_id", "why")))
    if more:
        click.echo(f"and {more:,} more: --limit")
    _warn(pasts)


def _queues(pasts: list[Past]) -> list[dict[str, Any]]:
    counted: dict[str, Counter[str]] = {}
    for past in pasts:
        for task_id, t in past.tasks():
            counted.setdefault(past.state.spec(task_id).queue, Counter())[t.state] += 1
    return [
        {"queue": queue, "total": states.total(), "states": {s: states[s] for s in _ORDER if states[s]}}
        for queue, states in sorted(counted.items())
    ]


def _workers(pasts: list[Past]) -> list[dict[str, Any]]:
    """A line for each session; what it lends and runs is summed up over partitions."""
    found: dict[str, dict[str, Any]] = {}
    for past in pasts:
        for w in past.workers:
            row = found.setdefault(w.session, {
                "worker_id": w.worker_id, "session": w.session, "state": w.state, "host": w.host, "pid": w.pid,
                "queues": [], "slots": 0, "running": 0,
            })  # fmt: skip
            row |= {"slots": row["slots"] + w.slots, "running": row["running"] + w.running}
            row["queues"] = sorted({*row["queues"], *w.queues})
    return sorted(found.values(), key=lambda row: str(row["worker_id"]))


# Around them ---------------------------------------------------------------------------------------------------------


def _as_of(pasts: list[Past]) -> dict[str, Any]:
    return {
        "at": max(past.at for past in pasts),
        "partitions": [
            {"partition": p.partition, "command": p.command, "event": p.event, "left_out": sorted(p.headless)}
            for p in pasts
        ],
    }


def _heading(pasts: list[Past]) -> str:
    from perdure.cli_text import time_text

    at = f"as of {time_text(max(past.at for past in pasts))}"
    if len(pasts) > 1:
        return at
    (past,) = pasts
    return f"{at}, partition {past.partition} up to command {_offset(past.command)} and event {_offset(past.event)}"


def _offset(offset: int | None) -> str:
    return "none" if offset is None else str(offset)


def _warn(pasts: list[Past]) -> None:
    """What could not be seen, on stderr."""
    lost = sum(len(past.headless) for past in pasts)
    if lost:
        talk(f"left out: {lost:,} task(s) whose first events are no longer in task-events")
    unknown = sum(past.unknown_workers for past in pasts)
    if unknown:
        talk(
            f"not known: what {unknown} worker(s) served that started before task-commands begins; a task that "
            "waits may seem to have no worker"
        )
