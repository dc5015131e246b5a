"""What commands print for people, and events as plain JSON."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from perdure.handle import Event
from perdure.schemas import references
from perdure.schemas.durations import to_text
from perdure.status import Status

_HEAD = frozenset({"task_id", "seq", "at", "cause", "build", "feature_level"})
_TIMES = ("_at", "due", "not_before")
_SHOWN = 60


def status_text(s: Status) -> str:
    """A task in some lines."""
    worked = None if s.elapsed_seconds is None else to_text(round(s.elapsed_seconds * 1000))
    attempt = f"{s.attempt} of {s.max_attempts}" if s.max_attempts else str(s.attempt)
    steps = f"{s.steps_completed:,}" + (f" of {s.total_steps:,}" if s.total_steps is not None else "")
    lines = {
        "task": s.task_id,
        "type": s.type,
        "state": s.state + (f" ({s.stopping})" if s.stopping != "none" else f" ({s.reason})" if s.reason else ""),
        "why": None if s.why == s.state else s.why,
        "progress": progress_text(s),
        "step": s.current_step,
        "steps": steps if s.steps_completed else None,
        "milestones": ", ".join(s.milestones) or None,
        "attempt": f"{attempt}, epoch {s.epoch}" if s.epoch else None,
        "worker": s.worker_id,
        "elapsed": worked,
        "checkpoint": s.checkpoint_version,
        "submitted": time_text(s.submitted_at),
        "started": time_text(s.started_at),
        "finished": time_text(s.finished_at),
        "result": shown(large_text(s.result_ref) if s.result_ref else s.raw.get("result"))
        if s.state == "COMPLETED"
        else None,
        "error": f"{s.error['type']}: {s.error['message']}" if s.error else None,
    }
    return aligned({name: str(value) for name, value in lines.items() if value not in (None, "")})


def why_text(s: Status) -> str:
    """A task's state and, in one sentence, why."""
    return clean(s.why if s.why.startswith(s.state) else f"{s.state}: {s.why}")


def outcome_text(s: Status) -> str:
    """How a task ended."""
    outcome = s.outcome()
    return clean(str(outcome)) if outcome else s.state


def large_text(ref: Mapping[str, Any]) -> str:
    """How long a value is that is too large for a record, and how it begins."""
    return f"{ref['size']:,} bytes: {ref['preview']}..."


def letter_text(letter: Mapping[str, Any]) -> str:
    """A dead letter, with the traceback last."""
    lines = str((letter.get("error") or {}).get("traceback") or "").splitlines()
    return "\n".join([pairs(letter), *map(clean, lines)])


def progress_text(s: Status) -> str | None:
    """Percent, units and the rest of the time, as far as they are known."""
    parts = []
    if s.progress is not None:
        parts.append(f"{100 * s.progress:.1f} %")
    if s.units_done is not None:
        parts.append(f"{s.units_done:,}" + (f" of {s.units_total:,}" if s.units_total is not None else ""))
    if s.eta_seconds is not None and not s.ended:
        parts.append(eta_text(s.eta_seconds))
    return ", ".join(parts) or None


def eta_text(seconds: float) -> str:
    """The rest of the time, in whole seconds: it is an estimate."""
    return f"{to_text(1000 * max(1, round(seconds)))} to go"


def event_json(event: Event) -> dict[str, Any]:
    """An event as plain JSON: recorded values as they are, large ones as null with `<name>_ref` beside them."""
    fields = asdict(event.record)
    large = {name: references.shown(value) for name, value in fields.items() if isinstance(value, bytes)}
    refs = {f"{name}_ref": ref for name, ref in large.items() if ref is not None}
    return {"kind": event.kind} | {n: None if large.get(n) else _plain(v) for n, v in fields.items()} | refs


def event_text(event: Event) -> str:
    """An event in one line: time, kind, and what is particular to it."""
    fields = {
        n: v for n, v in event_json(event).items() if n not in _HEAD and n != "kind" and v not in (None, "", [], {})
    }
    return f"{time_text(event.at)}  {event.kind:<18} " + "  ".join(
        f"{n}={shown(large_text(v) if n.endswith('_ref') else v)}" for n, v in fields.items()
    )


def table(page: Mapping[str, Any], columns: Sequence[str]) -> str:
    """The rows of an answer of the HTTP API under the chosen columns."""
    rows = next((value for value in page.values() if isinstance(value, list)), [])
    cells = [[name.removesuffix("_at") for name in columns]]
    cells += [[_cell(name, row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    text = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )
    return text + (f"\nmore: --cursor {page['next']}" if page.get("next") else "")


def pairs(content: Mapping[str, Any]) -> str:
    """An object as lines of name and value."""
    return aligned({name: _cell(name, value, most=2000) for name, value in content.items()})


def aligned(lines: Mapping[str, str]) -> str:
    """Lines of name and value in two columns."""
    width = max(map(len, lines), default=0)
    return "\n".join(f"{name:<{width}}  {clean(value)}" for name, value in lines.items())


def time_text(ms: int | None) -> str | None:
    """A log time, in this machine's zone."""
    return None if ms is None else dt.datetime.fromtimestamp(ms / 1000).astimezone().isoformat(" ", "milliseconds")


def shown(value: Any, most: int = _SHOWN) -> str:
    """A value in one line, cut to `most` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = clean(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def clean(text: str) -> str:
    """`text` without what could steer a terminal: tasks choose their own words."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def _cell(name: str, value: Any, most: int = _SHOWN) -> str:
    if value is None:
        return "-"
    if name.endswith(_TIMES) and isinstance(value, int):
        return str(time_text(value))
    if name == "progress":
        return f"{100 * value:.1f} %"
    if name == "states":
        return ", ".join(f"{state} {count}" for state, count in value.items())
    if isinstance(value, float):
        return f"{value:.1f}"
    if name == "error":
        return shown(f"{value.get('type')}: {value.get('message')}", most)
    if isinstance(value, list):
        return shown(", ".join(map(str, value)) or "-", most)
    return shown(value, most)


def _plain(value: Any) -> Any:
    """Recorded bytes are JSON text in every event of a task."""
    if isinstance(value, bytes):
        return json.loads(value)
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value
