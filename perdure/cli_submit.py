"""`perdure submit`."""

from __future__ import annotations

from typing import Any

import click

from perdure.cli_common import Session, read_json, session
from perdure.schemas.errors import InvalidRequest


@click.command()
@click.argument("type")
@click.option("--input", "input_text", metavar="JSON", default="null", help="Input: JSON, @FILE, or - for stdin.")
@click.option("--id", help="The task's id; the same id and content again is the same task.")
@click.option("--key", help="Idempotency key: names the task within queue and type.")
@click.option("--queue", help="Queue; default: the type's.")
@click.option("--priority", type=int, help="0 to 9, higher first; default 5.")
@click.option("--delay", metavar="DURATION", help="Start no sooner than so much later: 90s, 6h.")
@click.option("--at", metavar="TIME", help="Start no sooner than 2026-11-21T08:00:00Z, or seconds since 1970.")
@click.option("--timeout", metavar="DURATION", help="Running time of one attempt.")
@click.option("--queue-timeout", metavar="DURATION", help="Time in the queue while it could have run.")
@click.option("--total-timeout", metavar="DURATION", help="Time from submit to end.")
@click.option("--no-progress-timeout", metavar="DURATION", help="Running time without any sign of progress.")
@click.option("--retry", "retry_text", metavar="JSON", help="""Retry policy: '{"max_attempts": 3}'.""")
@click.option("--estimated-duration", metavar="DURATION", help="Your estimate; the first ETA.")
@click.option("--checkpoint-interval", metavar="DURATION", help="Time between checkpoints.")
@click.option("--agent-config", "config_text", metavar="JSON", help="Handed to the task as ctx.config.")
@click.option("--on-success", metavar="NAME", help="task:TYPE, notify:TARGET, or a bare name of either.")
@click.option("--on-failure", metavar="NAME", help="task:TYPE, notify:TARGET, or a bare name of either.")
@click.option("--user", help="On whose behalf.")
@click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="A free label; may be repeated.")
@session
def submit(
    session: Session,
    type: str,
    input_text: str,
    retry_text: str | None,
    config_text: str | None,
    labels: tuple[str, ...],
    **options: Any,
) -> None:
    """Submit a task of TYPE and print its id.

    Done when Kafka has it for good; a worker need not be there yet.

    \b
    perdure submit process_large_dataset --input '{"dataset_path": "large.csv"}' --key 2026-11
    """
    value = read_json(input_text, "input")
    if retry_text is not None:
        options["retry"] = read_json(retry_text, "retry")
    if config_text is not None:
        options["agent_config"] = read_json(config_text, "agent-config")
    if options["at"] is not None:
        options["at"] = _moment(options["at"])
    if labels:
        options["labels"] = dict(_pair(label) for label in labels)
    with session.client() as client:
        handle = client.submit(type, value, **options)
    session.answer({"task_id": handle.id, "type": type}, handle.id)


def _moment(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _pair(label: str) -> tuple[str, str]:
    name, equals, value = label.partition("=")
    if not equals or not name:
        raise InvalidRequest(f"label {label!r} is not NAME=VALUE", field="label")
    return name, value
