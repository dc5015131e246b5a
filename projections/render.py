"""Records as plain JSON for people and programs: the names of `status --json`, times in ms, recorded values inline."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, get_args, get_origin

from perdure.projections.history import Attempt
from perdure.projections.inputs import Fact
from perdure.projections.views import Numbered, alive
from perdure.schemas import references
from perdure.schemas.errors import DecodeError
from perdure.schemas.json_commands import strict_loads
from perdure.schemas.public import ConfigRecord, DeadLetter, LogLine, TaskProgress, WorkerMetrics
from perdure.schemas.records import JsonText, field_types

Plain = dict[str, Any]


def to_text(content: Any) -> bytes:
    """JSON as it is sent: ASCII only, so no control, bidirectional or broken character of a text gets out raw."""
    return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def status(p: TaskProgress, now: int) -> Plain:
    """A task's state; `now` in ms says how long it has been running and how long it still may."""
    end = now if p.finished_at is None else p.finished_at
    return (
        {"result_ref": None}
        | plain(p)
        | {
            "worker_id": p.worker_id or None,
            "current_step": p.current_step or None,
            "total_steps": None,
            "elapsed_seconds": None if p.started_at is None else max(0, end - p.started_at) / 1000,
            "eta_seconds": None if p.eta_at is None else max(0, p.eta_at - now) / 1000,
            "estimated_duration_seconds": None if p.estimated_duration is None else p.estimated_duration / 1000,
        }
    )


def event(fact: Fact) -> Plain:
    """An event with its kind."""
    return {"kind": type(fact).__name__, **plain(fact)}


def attempt(a: Attempt) -> Plain:
    """An attempt with its epochs."""
    return plain(a) | {"started_at": a.started_at, "ended_at": a.ended_at}


def line(numbered: Numbered[LogLine]) -> Plain:
    """A log line; `position` is where to go on reading."""
    return {"position": numbered.number, **plain(numbered.record)}


def dead_letter(letter: DeadLetter) -> Plain:
    """A dead letter."""
    return plain(letter)


def worker(w: WorkerMetrics, now: int) -> Plain:
    """A worker process; `now` in ms."""
    return plain(w) | {"alive": alive(w, now), "seen_seconds": max(0, now - w.at) / 1000}


def config(numbered: Numbered[ConfigRecord]) -> Plain:
    """A configuration name without its kind, with its version and content."""
    return plain(numbered.record) | {"name": numbered.record.name.partition("/")[2], "version": numbered.number}


def plain(record: Any) -> Plain:
    """A record's fields as JSON values; a value that the record only refers to is null, described in `<name>_ref`."""
    kind: Any = type(record)
    recorded = _json_fields(kind)
    found: Plain = {}
    for f in dataclasses.fields(record):
        value = getattr(record, f.name)
        large = _large(value) if f.name in recorded else None
        if large is not None:
            found |= {f.name: None, f"{f.name}_ref": large}
        else:
            found[f.name] = _recorded(value) if f.name in recorded else _plain(value)
    return found


def _large(value: bytes | None) -> Plain | None:
    try:
        return references.shown(value)
    except DecodeError:
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return plain(value) if dataclasses.is_dataclass(value) else value


def _recorded(value: bytes | None) -> Any:
    """A recorded JSON value; what is none (any producer may write Avro) shows as the text it is."""
    try:
        return None if value is None else strict_loads(value)
    except DecodeError:
        return (value or b"").decode(errors="replace")


@cache
def _json_fields(cls: Any) -> frozenset[str]:
    """Names of the fields that hold JSON text."""
    return frozenset(name for name, hint in field_types(cls).items() if _is_json(hint))


def _is_json(hint: Any) -> bool:
    if get_origin(hint) is Annotated and any(isinstance(mark, JsonText) for mark in get_args(hint)[1:]):
        return True
    return any(_is_json(arm) for arm in get_args(hint) if get_origin(arm) is not None)
