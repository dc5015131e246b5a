"""`perdure doctor`: is everything as it has to be, and if not, what to do."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from perdure.cli_common import REFUSED, Session, session

if TYPE_CHECKING:
    from perdure.findings import Finding

_COLOURS = {"ok": "green", "note": "yellow", "wrong": "red"}


@click.command()
@session
def doctor(session: Session) -> int:
    """Look a namespace over: broker, topics, engine, workers, clocks, what was set aside, and this machine.

    One line for each check, and what to do where something is wrong. Exit 0 all right (notes do not count), 1 something
    is wrong, 4 no broker answers.

    \b
    perdure doctor
    perdure doctor --json
    """
    from perdure.doctor import diagnose

    found = diagnose(session.settings())
    wrong = [f for f in found if f.state == "wrong"]
    session.answer({"ok": not wrong, "findings": [asdict(f) for f in found]}, _text(found))
    return REFUSED if wrong else 0


def _text(found: list[Finding]) -> str:
    from perdure.cli_text import clean

    width = max(len(f.check) for f in found)
    lines = []
    for f in found:
        lines.append(f"{click.style(f'{f.state:<5}', _COLOURS[f.state])}  {f.check:<{width}}  {clean(f.told)}")
        if f.advice:
            lines.append(f"{'':<{width + 7}}  -> {clean(f.advice)}")
    wrong, notes = (sum(f.state == state for f in found) for state in ("wrong", "note"))
    lines.append("all right" + (f", {notes} to know" if notes else "") if not wrong else f"{wrong} wrong")
    return "\n".join(lines)
