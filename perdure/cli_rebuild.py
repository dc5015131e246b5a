"""The command `rebuild`: the engine's state, made anew from what is left."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from perdure.cli_common import Session, session, talk
from perdure.schemas.errors import CommandRefused, InvalidRequest

if TYPE_CHECKING:
    from perdure.streams.kafka_log import KafkaLog


@click.command()
@click.option("--from-events", is_flag=True, help="Fold task-events; needs all of it, from its first record.")
@click.option("--yes", is_flag=True, help="Replace the topic engine-changelog without asking.")
@click.option("--state-dir", type=click.Path(file_okay=False, path_type=Path), help="Where the work is done.")
@session
def rebuild(session: Session, from_events: bool, yes: bool, state_dir: Path | None) -> int:
    """Make the engine's state anew, when its changelog is lost.

    The last way of recovery: local stores, snapshots and the changelog need no command. Stop every engine first. Tasks,
    their steps, timers and answers come back as they were; tasks that ran go back to their queues.

    \b
    perdure rebuild --from-events
    """
    if not from_events:
        raise InvalidRequest("say from what: --from-events is the only way that needs a command", field="from_events")
    from perdure.engine_main import state_directory
    from perdure.schemas import codec, topics
    from perdure.settings import Settings
    from perdure.streams import topology
    from perdure.streams.kafka_log import KafkaLog
    from perdure.streams.rebuild import rebuild as fold_all
    from perdure.streams.schema_lookup import SchemaLookup

    settings = Settings.load(**session.flags, state_dir=state_dir)
    bootstrap, namespace = settings.require_bootstrap(), settings.namespace
    pinned = topology.pinned_partitions(
        KafkaLog(bootstrap, namespace, options=settings.kafka, partitions=0), besides=[topics.CHANGELOG]
    )
    log = KafkaLog(bootstrap, namespace, options=settings.kafka, partitions=pinned)
    _refuse_while_it_runs(log)
    if not yes:
        click.confirm(f"Delete {topics.CHANGELOG.on(log.prefix)} and write it anew from task-events?", abort=True)
    folder = state_directory(settings) / "rebuild"
    shutil.rmtree(folder, ignore_errors=True)
    unlearn = codec.learn_from(SchemaLookup(log))  # events may be of a newer build
    try:
        count = fold_all(log, folder, lambda: topology.replace_topic(log, topics.CHANGELOG), talk)
    finally:
        unlearn()
        shutil.rmtree(folder, ignore_errors=True)
    facts: dict[str, Any] = {"events": count, "partitions": log.partitions}
    session.answer(facts, f"{count:,} events folded; start the engine now")
    return 0


def _refuse_while_it_runs(log: KafkaLog) -> None:
    from perdure.schemas import topics

    members = log.members(topics.ENGINE_GROUP)
    if members:
        raise CommandRefused(
            f"{len(members)} engine processes are in the group ({', '.join(members)}): stop them first; one "
            f"that was killed leaves the group after 10 s"
        )
