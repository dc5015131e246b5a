"""`perdure dlq`: dead letters, the tasks that ended FAILED or TIMED_OUT and wait for a person."""

from __future__ import annotations

import click

from perdure.cli_common import Session, session
from perdure.cli_control import control, redrive
from perdure.schemas.errors import NotFound


@click.group()
def dlq() -> None:
    """Dead letters: list, show, retry or discard them.

    \b
    perdure dlq list
    perdure dlq retry 0192f3aa
    """


@dlq.command("list")
@click.option("--type", help="Only of this task type.")
@click.option("--queue", help="Only of this queue.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="At most so many.")
@click.option("--cursor", help="Go on behind a page: its `next`.")
@session
def list_(session: Session, **filters: str | int | None) -> None:
    """List dead letters. Needs the server.

    \b
    perdure dlq list --type process_large_dataset
    """
    from perdure.api_client import ApiClient
    from perdure.cli_text import table

    page = ApiClient(session.settings()).get("dead-letters", filters)
    session.answer(page, table(page, ("task_id", "type", "state", "failed_at", "attempts", "error")))


@dlq.command()
@click.argument("task_id", metavar="ID")
@session
def show(session: Session, task_id: str) -> None:
    """Show a dead letter with its error and input. Needs the server.

    \b
    perdure dlq show 0192f3aa
    """
    from perdure.api_client import ApiClient
    from perdure.cli_text import letter_text

    settings = session.settings()
    api = ApiClient(settings)
    try:
        letter = api.get("dead-letters", {}, task_id)
    except NotFound:
        if settings.bootstrap is None:
            raise
        with session.client() as client:  # the server knows whole ids only
            letter = api.get("dead-letters", {}, session.handle(client, task_id).id)
    session.answer(letter, letter_text(letter))


@dlq.command()
@click.argument("task_id", metavar="ID")
@click.option("--input", "input_text", metavar="JSON", help="New input: JSON, @FILE, or - for stdin.")
@session
def retry(session: Session, task_id: str, input_text: str | None) -> None:
    """Send a dead letter back to its queue, as `perdure retry` does.

    \b
    perdure dlq retry 0192f3aa
    """
    redrive(session, task_id, input_text)


@dlq.command()
@click.argument("task_id", metavar="ID")
@click.option("--reason", default="", help="Why, for people to read.")
@session
def discard(session: Session, task_id: str, reason: str) -> None:
    """Take a dead letter off the list for good.

    \b
    perdure dlq discard 0192f3aa --reason "input was wrong"
    """
    control(session, task_id, "discard", lambda handle: handle.discard(reason))
