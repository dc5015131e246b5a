"""`perdure watch`: a live view of one task."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from perdure.cli_common import REFUSED, Session, session

if TYPE_CHECKING:
    from perdure.handle import Handle
    from perdure.status import Status

_EVERY_S = 0.3


@click.command()
@click.argument("task_id", metavar="ID")
@session
def watch(session: Session, task_id: str) -> int:
    """Follow a task until its end.

    Exit 0 when it completed, 1 otherwise.
    On a terminal a bar with percent, time to go, step and state; elsewhere a line for each change, with --json the
    whole status.

    \b
    perdure watch 0192f3aa
    """
    from perdure.cli_text import outcome_text

    live = not session.json and sys.stdout.isatty()
    with session.client() as client:
        handle = session.handle(client, task_id)
        last = _show_live(handle) if live else _print_changes(session, handle)
    if not session.json:
        click.echo(outcome_text(last))
    return 0 if last.state == "COMPLETED" else REFUSED


def _statuses(handle: Handle) -> Iterator[Status]:
    """The task's status, some times a second, until its end."""
    while True:
        status = handle.status()
        yield status
        if status.ended:
            return
        time.sleep(_EVERY_S)


def _print_changes(session: Session, handle: Handle) -> Status:
    from perdure.cli_text import shown

    before = ""
    for status in _statuses(handle):
        line = "  ".join(_words(status))
        if line != before:
            session.answer(status.raw, shown(line, 200))
        before = line
    return status


def _show_live(handle: Handle) -> Status:
    from rich.progress import BarColumn, Progress, TextColumn

    from perdure.cli_text import clean

    columns = (
        TextColumn("{task.fields[state]}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[words]}", markup=False),
    )
    with Progress(*columns) as bar:
        shown = bar.add_task("", total=None, state="", words="")
        for status in _statuses(handle):
            state, *words = _words(status)
            total = None if status.progress is None else 1.0
            bar.update(shown, total=total, completed=status.progress or 0, state=state, words=clean("  ".join(words)))
    return status


def _words(status: Status) -> list[str]:
    """State, progress and step."""
    from perdure.cli_text import progress_text

    state = status.state if status.stopping == "none" else f"{status.state} ({status.stopping})"
    waits = status.state in ("PENDING", "PAUSED")
    found = [state, progress_text(status), status.current_step, status.why if waits else None]
    return [word for word in found if word]
