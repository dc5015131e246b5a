"""`perdure topics`: the namespace's topics as they are on the broker, and making those that are missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from perdure.cli_common import REFUSED, Session, session
from perdure.schemas.errors import ConfigurationError
from perdure.schemas.limits import DEFAULT_PARTITIONS

if TYPE_CHECKING:
    from perdure.settings import Settings
    from perdure.streams.kafka_log import KafkaLog
    from perdure.streams.survey import TopicFacts


@click.group(invoke_without_command=True)
@session
def topics(session: Session) -> int:
    """Show the namespace's topics as they are, and what is wrong with them: exit 1 if anything is.

    RECORDS counts offsets in use: records, and the gaps that transactions and compaction leave. SIZE is known for a
    broker of this machine's own (`perdure dev`, `perdure kafka`).

    \b
    perdure topics
    perdure topics create --partitions 8 --replication 3
    """
    subcommand = click.get_current_context().invoked_subcommand
    if subcommand is not None:
        if session.json or any(value is not None for value in session.flags.values()):
            raise click.UsageError(f"write the options behind {subcommand!r}: here they would not count for it")
        return 0
    from perdure.streams.survey import survey_topics

    log = session.kafka()
    found = survey_topics(log)
    count = _pinned(log, found)
    sizes = sizes_on_disk(session.settings())
    rows = [_row(f, log.prefix, count, sizes) for f in found]
    wrong = any(row["wrong"] for row in rows) or count is None
    session.answer({"namespace": log.prefix, "partitions": count, "topics": rows}, _text(rows, count, log.prefix))
    return REFUSED if wrong else 0


@topics.command()
@click.option("--partitions", type=click.IntRange(1, 10_000), help="Of each partitioned topic, for good: it is pinned. "
              f"[default: as pinned, else {DEFAULT_PARTITIONS}]")  # fmt: skip
@click.option("--replication", type=click.IntRange(1, 100), default=1, show_default=True, help="Copies of each record.")
@session
def create(session: Session, partitions: int | None, replication: int) -> None:
    """Make the topics that are missing and pin the partition count; nothing that exists is touched.

    \b
    perdure topics create --partitions 8 --replication 3
    """
    from perdure.streams.survey import survey_topics
    from perdure.streams.topology import create_topics

    settings = session.settings()
    log = session.kafka()
    found = survey_topics(log)
    known = _pinned(log, found)
    if known is not None and partitions not in (None, known):  # before anything is made
        raise ConfigurationError(f"the namespace {log.prefix!r} is pinned to {known} partitions, not {partitions}")
    count = known or partitions or DEFAULT_PARTITIONS
    missing = [f.topic.on(log.prefix) for f in found if not f.partitions]
    create_topics(
        settings.require_bootstrap(), settings.namespace, partitions=count, replication=replication,
        options=settings.kafka,
    )  # fmt: skip
    told = "nothing was missing" if not missing else "created:\n" + "\n".join(f"  {name}" for name in missing)
    session.answer({"created": missing, "partitions": count, "replication": replication}, told)


def _pinned(log: KafkaLog, found: list[TopicFacts]) -> int | None:
    """The pinned partition count; None also where there is no topic that could hold it."""
    from perdure.streams.topology import pinned

    return pinned(log) if any(f.topic.name == "config" and f.partitions for f in found) else None


def sizes_on_disk(settings: Settings) -> dict[str, int]:
    """Topic on the broker -> bytes, where the broker is one of this machine's own; else nothing."""
    from perdure.connectors.embedded_kafka import running

    broker = running(settings.data_dir / "kafka")
    if broker is None or broker.bootstrap != settings.bootstrap:
        return {}
    sizes: dict[str, int] = {}
    for folder in (broker.data_dir / "data").glob("*-*"):
        topic = folder.name.rpartition("-")[0]
        sizes[topic] = sizes.get(topic, 0) + sum(file.stat().st_size for file in folder.glob("*.log"))
    return sizes


def _row(facts: TopicFacts, prefix: str, count: int | None, sizes: dict[str, int]) -> dict[str, Any]:
    name = facts.topic.on(prefix)
    wanted = count if facts.topic.partitioned else 1
    wrong = list(facts.off)
    if not facts.partitions:
        wrong = ["is missing"]
    elif wanted is not None and len(facts.partitions) != wanted:
        wrong.append(f"has {len(facts.partitions)} partitions, should have {wanted}")
    return {
        "topic": name, "partitions": len(facts.partitions), "replication": facts.replication,
        "records": facts.offsets, "bytes": sizes.get(name),
        "first_at": min((p.first_at for p in facts.partitions if p.first_at is not None), default=None),
        "last_at": max((p.last_at for p in facts.partitions if p.last_at is not None), default=None),
        "cleanup": facts.settings.get("cleanup.policy"), "retention_ms": _retention(facts), "wrong": wrong,
        "offsets": [{"partition": p.partition, "first": p.first, "end": p.end} for p in facts.partitions],
    }  # fmt: skip


def _retention(facts: TopicFacts) -> int | None:
    """None: for ever, or for a topic that is compacted only."""
    if "delete" not in facts.settings.get("cleanup.policy", ""):
        return None
    ms = int(facts.settings["retention.ms"])
    return None if ms < 0 else ms


def _text(rows: list[dict[str, Any]], count: int | None, prefix: str) -> str:
    from perdure.cli_text import table

    shown = [
        {
            "topic": row["topic"], "partitions": row["partitions"] or "missing", "replication": row["replication"],
            "records": f"{row['records']:,}", "size": "-" if row["bytes"] is None else size_text(row["bytes"]),
            "first_at": _short(row["first_at"]), "last_at": _short(row["last_at"]),
            "kept": _kept(row),
        }
        for row in rows
    ]  # fmt: skip
    columns = ("topic", "partitions", "replication", "records", "size", "first_at", "last_at", "kept")
    if not any(row["partitions"] for row in rows):
        return f"no topic of namespace {prefix!r} is there; make them: perdure topics create"
    lines = [table({"topics": shown}, columns)]
    lines += [f"wrong: {row['topic']} {told}" for row in rows for told in row["wrong"]]
    if count is None:
        lines.append(f"wrong: no partition count is pinned for {prefix!r}; make the topics: perdure topics create")
    return "\n".join(lines)


def _kept(row: dict[str, Any]) -> str:
    from perdure.schemas.durations import to_text

    if row["retention_ms"] is not None:
        return to_text(row["retention_ms"]).removesuffix(" 0m").removesuffix(" 0h")
    return "for ever" if row["cleanup"] == "delete" else str(row["cleanup"] or "-")


def _short(ms: int | None) -> str | None:
    from perdure.cli_text import time_text

    return None if ms is None else str(time_text(ms))[:19]


def size_text(size: float) -> str:
    """Bytes, for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
