"""`perdure audit`: proves from the topics alone that the engine kept its guarantees."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from perdure.cli_common import REFUSED, Session, dumps, session, talk

if TYPE_CHECKING:
    from perdure.audit_reader import AuditReader
    from perdure.projections.audit_rules import Violation

SHOWN = 1_000
"""Violations that the answer holds; all are counted."""
_PAUSE_S = 1.0


@click.command()
@click.option("--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option("--rules", is_flag=True, help="Only say what is held, and which guarantee each rule proves.")
@session
def audit(session: Session, follow: bool, rules: bool) -> int:
    """Prove the guarantees G1 to G6 from the topics alone.

    Reads everything that is in the log, with code of its own; what was deleted is not held against the rest. Exit code
    0: no rule is broken; 1: some are, each named with topic, partition and offset.

    \b
    perdure audit
    perdure audit --follow --json
    """
    if rules:
        _tell_rules(session)
        return 0
    from perdure.audit_reader import AuditReader

    settings = session.settings()
    reader = AuditReader(settings.require_bootstrap(), settings.namespace, settings.kafka, talk)
    try:
        if follow:
            _follow(session, reader)
        else:
            reader.round()
            reader.round()  # what a partition has taken was sent before: the senders are read once more
            _tell(session, reader)
        return REFUSED if reader.audit.counts else 0
    finally:
        reader.close()


def _tell_rules(session: Session) -> None:
    from perdure.projections.audit_rules import RULES

    found = [{"rule": r.name, "guarantee": r.guarantee, "says": r.says} for r in RULES]
    session.answer(found, "\n".join(f"{r.guarantee}  {r.name:<20}{r.says}" for r in RULES))


def _tell(session: Session, reader: AuditReader) -> None:
    """What was found, as a whole."""
    summary = reader.audit.summary()
    shown = reader.audit.violations[:SHOWN]
    read = summary["read"]
    lines = [violation.line() for violation in shown]
    found = "clean" if summary["clean"] else f"{summary['violations_total']:,} violations"
    lines.append(
        f"{found} in {read['records']:,} records of {read['partitions']} partitions: {read['commands']:,} commands, "
        f"{read['tasks']:,} tasks, {read['partial']:,} of them not from their beginning"
    )
    session.answer(summary | {"violations": [_as_json(v) for v in shown]}, "\n".join(lines))


def _follow(session: Session, reader: AuditReader) -> None:
    """Each violation as it is found; at the end what was found as a whole."""
    told = 0
    try:
        while True:
            reader.round()
            for violation in reader.audit.violations[told:]:
                click.echo(dumps(_as_json(violation)) if session.json else violation.line())
            told = len(reader.audit.violations)
            time.sleep(_PAUSE_S)
    except KeyboardInterrupt:
        talk(f"{reader.audit.records:,} records read, {reader.audit.counts.total()} violations")


def _as_json(violation: Violation) -> dict[str, Any]:
    from perdure.projections.audit_rules import BY_NAME

    fields = {name: getattr(violation, name) for name in type(violation).__slots__}
    return {"guarantee": BY_NAME[violation.rule].guarantee} | fields
