"""Commands that change one task: `pause`, `resume`, `cancel`, `retry`. They wait up to 5 s for the engine's verdict."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from perdure.cli_common import Session, read_json, session
from perdure.schemas.errors import NotFound

if TYPE_CHECKING:
    from perdure.handle import Handle


@click.command()
@click.argument("task_id", metavar="ID")
@session
def pause(session: Session, task_id: str) -> None:
    """Stop a task at its next boundary, keeping all it has done.

    \b
    perdure pause 0192f3aa
    """
    control(session, task_id, "pause", lambda handle: handle.pause())


@click.command()
@click.argument("task_id", metavar="ID")
@session
def resume(session: Session, task_id: str) -> None:
    """Go on with a paused task.

    \b
    perdure resume 0192f3aa
    """
    control(session, task_id, "resume", lambda handle: handle.resume())


@click.command()
@click.argument("task_id", metavar="ID")
@click.option("--reason", default="", help="Why, for people to read.")
@session
def cancel(session: Session, task_id: str, reason: str) -> None:
    """End a task without a result.

    A running one is asked to stop first.

    \b
    perdure cancel 0192f3aa --reason "wrong file"
    """
    control(session, task_id, "cancel", lambda handle: handle.cancel(reason))


@click.command()
@click.argument("task_id", metavar="ID")
@click.option("--input", "input_text", metavar="JSON", help="New input: JSON, @FILE, or - for stdin.")
@session
def retry(session: Session, task_id: str, input_text: str | None) -> None:
    """Send a failed or timed-out task back to work.

    Completed steps and the checkpoint are kept.

    \b
    perdure retry 0192f3aa
    """
    redrive(session, task_id, input_text)


def redrive(session: Session, task_id: str, input_text: str | None) -> None:
    """Retry a task, with new input if there is one."""
    if input_text is None:
        control(session, task_id, "retry", lambda handle: handle.retry())
    else:
        value = read_json(input_text, "input")
        control(session, task_id, "retry", lambda handle: handle.retry(value))


def control(session: Session, text: str, verb: str, act: Callable[[Handle], bool]) -> None:
    """Carry out a verb and answer with its verdict. A whole id is not looked up: an engine that is away decides later.

    Raises `CommandRefused`, `NotFound`, `AmbiguousId` or `Unreachable`.
    """
    with session.client() as client:
        handle = client.get(text)
        try:
            decided = act(handle)
        except NotFound:
            handle = client.get(client.resolve(text))  # it was the beginning of an id, with its routing key
            decided = act(handle)
    told = "accepted" if decided else "accepted, not yet decided: the engine has not answered"
    session.answer(
        {"task_id": handle.id, "command": verb, "accepted": True, "decided": decided}, f"{verb} {handle.id}: {told}"
    )
