"""The projections as a runner sees them."""

from __future__ import annotations

from perdure.projections.dead_letters import DeadLetterProcessor
from perdure.projections.inputs import GATHER_MS
from perdure.projections.progress import ProgressProcessor
from perdure.schemas import topics
from perdure.streams.processor import Kind, Table

PROGRESS = Kind(
    name=ProgressProcessor.name,
    inputs=ProgressProcessor.inputs,
    changelog=ProgressProcessor.changelog,
    open=lambda store, _: Table(ProgressProcessor.name, store, ProgressProcessor().handle, ProgressProcessor.inputs),
    plain_changelog=True,
    gather_ms=GATHER_MS,
    skippable=frozenset({topics.TELEMETRY.name}),
)
DEAD_LETTERS = Kind(
    name=DeadLetterProcessor.name,
    inputs=DeadLetterProcessor.inputs,
    changelog=DeadLetterProcessor.changelog,
    open=lambda store, _: Table(
        DeadLetterProcessor.name, store, DeadLetterProcessor().handle, DeadLetterProcessor.inputs
    ),
    gather_ms=GATHER_MS,
)
