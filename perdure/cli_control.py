"""Commands that change one task: `pause`, `resume`, `cancel`, `retry`. They wait up to 5 s for the engine's verdict."""

from __future__ import annotations

import click

from perdure.cli_common import Session, read_json, session


@click.command()
@click.argument("task_id", metavar="ID")
@session
def pause(session: Session, task_id: str) -> None:
    """Stop a task at its next boundary, keeping all it has done.

    \b
    perdure pause 0192f3aa
    """
    with session.client() as client:
        handle = session.handle(client, task_id)
        tell(session, handle.id, "pause", handle.pause())


@click.command()
@click.argument("task_id", metavar="ID")
@session
def resume(session: Session, task_id: str) -> None:
    """Go on with a paused task.

    \b
    perdure resume 0192f3aa
    """
    with session.client() as client:
        handle = session.handle(client, task_id)
        tell(session, handle.id, "resume", handle.resume())


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
    with session.client() as client:
        handle = session.handle(client, task_id)
        tell(session, handle.id, "cancel", handle.cancel(reason))


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
    value = None if input_text is None else read_json(input_text, "input")
    with session.client() as client:
        handle = session.handle(client, task_id)
        decided = handle.retry() if input_text is None else handle.retry(value)
        tell(session, handle.id, "retry", decided)


def tell(session: Session, task_id: str, verb: str, decided: bool) -> None:
    """Answer a command that was not refused."""
    text = "accepted" if decided else "accepted, not yet decided: the engine has not answered"
    session.answer(
        {"task_id": task_id, "command": verb, "accepted": True, "decided": decided}, f"{verb} {task_id}: {text}"
    )
