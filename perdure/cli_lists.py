"""Commands that ask the server, not the engine: `list`, `workers`, `queues`."""

from __future__ import annotations

import click

from perdure.cli_common import Session, session


@click.command("list")
@click.option("--state", help="Only tasks in this state.")
@click.option("--type", help="Only tasks of this type.")
@click.option("--queue", help="Only tasks of this queue.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="At most so many.")
@click.option("--cursor", help="Go on behind a page: its `next`.")
@session
def list_(session: Session, **filters: str | int | None) -> None:
    """List tasks, newest first. Needs the server.

    \b
    perdure list --state failed --type process_large_dataset
    """
    _show(
        session, "tasks", filters, ("task_id", "type", "state", "progress", "current_step", "attempt", "submitted_at")
    )


@click.command()
@session
def workers(session: Session) -> None:
    """List workers and what they run. Needs the server.

    \b
    perdure workers
    """
    _show(
        session,
        "workers",
        {},
        ("worker_id", "state", "alive", "host", "pid", "queues", "slots", "running", "cpu_percent"),
    )


@click.command()
@session
def queues(session: Session) -> None:
    """List queues and what is in them. Needs the server.

    \b
    perdure queues
    """
    _show(session, "queues", {}, ("queue", "total", "states"))


def _show(session: Session, path: str, filters: dict[str, str | int | None], columns: tuple[str, ...]) -> None:
    from perdure.api_client import ApiClient
    from perdure.cli_text import table

    page = ApiClient(session.settings()).get(path, filters)
    session.answer(page, table(page, columns))
