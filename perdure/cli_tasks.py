"""Commands that look at one task: `status`, `why`, `wait`, `history`, `logs`."""

from __future__ import annotations

import click

from perdure.cli_common import REFUSED, Session, dumps, session


@click.command()
@click.argument("task_id", metavar="ID")
@session
def status(session: Session, task_id: str) -> None:
    """Show where a task stands. ID: the task's, a unique beginning of it, or either without its routing key.

    \b
    perdure status 0192f3aa --json
    """
    with session.client() as client:
        found = session.handle(client, task_id).status()
    if session.json:
        session.answer(found.raw)
    else:
        from perdure.cli_text import status_text

        click.echo(status_text(found))


@click.command()
@click.argument("task_id", metavar="ID")
@session
def why(session: Session, task_id: str) -> None:
    """Say in one sentence why a task is where it is.

    \b
    perdure why 0192f3aa
    """
    from perdure.cli_text import why_text

    with session.client() as client:
        found = session.handle(client, task_id).status()
    answer = {"task_id": found.task_id, "state": found.state, "reason": found.reason, "why": found.why}
    session.answer(answer, why_text(found))


@click.command()
@click.argument("task_id", metavar="ID")
@click.option("--timeout", metavar="DURATION", help="Give up after so long (exit 1); default: never.")
@session
def wait(session: Session, task_id: str, timeout: str | None) -> int:
    """Wait for a task's end.

    Exit 0 when it completed, 1 when it failed, timed out or was cancelled.

    \b
    perdure wait 0192f3aa --timeout 10m && echo done
    """
    from perdure.cli_text import clean, large_text, outcome_text

    with session.client() as client:
        found = session.handle(client, task_id).wait(timeout)
    done = found.state == "COMPLETED"
    result = large_text(found.result_ref) if found.result_ref else dumps(found.raw.get("result"))
    session.answer(found.raw, outcome_text(found) + (f": {clean(result)}" if done else ""))
    return 0 if done else REFUSED


@click.command()
@click.argument("task_id", metavar="ID")
@click.option("-f", "--follow", is_flag=True, help="Go on until the task's end.")
@session
def history(session: Session, task_id: str, follow: bool) -> None:
    """Print every recorded event of a task.

    With --json one event a line.

    \b
    perdure history 0192f3aa
    """
    from perdure.cli_text import event_json, event_text

    with session.client() as client:
        for event in session.handle(client, task_id, past=True).events(follow=follow):
            session.answer(event_json(event), event_text(event))


@click.command()
@click.argument("task_id", metavar="ID")
@click.option("-n", "last_n", type=click.IntRange(min=0), default=100, show_default=True, help="So many newest lines.")
@click.option("-f", "--follow", is_flag=True, help="Go on until the task's end.")
@session
def logs(session: Session, task_id: str, last_n: int, follow: bool) -> None:
    """Print what a task has printed and logged.

    With --json one record a line.

    \b
    perdure logs 0192f3aa -n 20 -f
    """
    with session.client() as client:
        for line in session.handle(client, task_id, past=True).log_lines(last_n, follow=follow):
            if line.dropped:
                session.answer({"dropped": line.dropped}, f"... {line.dropped} lines left out ...")
            session.answer(dict(vars(line)), line.text)
