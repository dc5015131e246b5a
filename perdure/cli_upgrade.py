"""The command `upgrade`: raise the namespace to the features that every running engine knows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from perdure.cli_common import Session, session
from perdure.schemas.errors import CommandRefused, InvalidRequest

if TYPE_CHECKING:
    from perdure.streams.config_view import ConfigView
    from perdure.streams.kafka_log import KafkaLog


@click.command()
@click.option("--to", "wanted", type=click.IntRange(min=1), help="The level; default: this build's highest.")
@session
def upgrade(session: Session, wanted: int | None) -> int:
    """Let the engines use what a new build brings, once all of them run it.

    New builds work as the old one did until this is said, so engines, workers and servers can be replaced one by one,
    and put back. Afterwards an older build refuses the namespace.

    \b
    perdure upgrade
    """
    from perdure.schemas import codec, topics
    from perdure.schemas.public import ConfigRecord
    from perdure.streams.config_view import ConfigView
    from perdure.streams.decision import FEATURE_LEVEL, LEVEL
    from perdure.streams.host import namespace_level
    from perdure.streams.kafka_log import KafkaLog
    from perdure.streams.log import append_one

    settings = session.settings()
    level = wanted or FEATURE_LEVEL
    if level > FEATURE_LEVEL:
        raise InvalidRequest(f"this build knows levels up to {FEATURE_LEVEL}; use a newer one", field="to")
    log = KafkaLog(settings.require_bootstrap(), settings.namespace, options=settings.kafka)
    view = ConfigView(log)
    view.refresh()
    view.close()
    present = namespace_level(view)
    if level < present:
        raise CommandRefused(f"the namespace is at level {present}, and levels are never lowered")
    if level > present:
        _refuse_older(log, view, level)
        record = ConfigRecord(name=LEVEL, content=json.dumps({"level": level}).encode())
        append_one(log, topics.CONFIG.name, 0, LEVEL.encode(), codec.encode(record))
    session.answer({"level": level, "was": present}, f"feature level {level} (was {present})")
    return 0


def _refuse_older(log: KafkaLog, view: ConfigView, level: int) -> None:
    from perdure.schemas import topics
    from perdure.streams.host import ENGINES

    older = []
    for name in log.members(topics.ENGINE_GROUP):
        _, content = view.names.get(ENGINES + name, (0, None))
        said = {} if content is None else json.loads(content)
        if said.get("level", 0) < level:
            older.append(f"{name} (build {said.get('build', 'unknown')}, level {said.get('level', 'unknown')})")
    if older:
        raise CommandRefused(
            f"engines that do not know level {level} are running: {', '.join(sorted(older))}; replace them first. One "
            f"that has ended leaves the group after 10 s"
        )
