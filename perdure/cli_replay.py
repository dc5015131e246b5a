"""`perdure replay`: real input decided again, and the first event that differs."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from perdure.cli_asof import present
from perdure.cli_common import REFUSED, Session, session, talk
from perdure.schemas.errors import InvalidRequest

if TYPE_CHECKING:
    from perdure.points import Place
    from perdure.schemas.signing import Keys
    from perdure.streams.log import Log
    from perdure.streams.replay import Comparison, Decides, Divergence
    from perdure.streams.snapshots import Snapshots

_SAY_S = 1.0
"""How often a shadow says how far it is, at most."""


@click.command()
@click.option(
    "--from", "from_", metavar="TIME|OFFSETS", help="The slice's first input; default: as far back as possible."
)
@click.option("--to", metavar="TIME|OFFSETS", help="Its last input; default: the last that the engine has executed.")
@click.option("--against", type=click.Path(exists=True, path_type=Path), metavar="BUILD",
              help="Decide with another build: a checkout, a virtual environment or its Python.")  # fmt: skip
@click.option("--shadow", is_flag=True, help="Go on with what the engine executes, until Ctrl-C.")
@session
def replay(session: Session, from_: str | None, to: str | None, against: Path | None, shadow: bool) -> int:
    """Decide real input again and compare the events with the log's, byte for byte. Exit 1 at a difference.

    With --against the inputs before the slice are decided by this build and the slice by the other one; the fields
    `build` and `feature_level` may differ then. A slice begins at any input, but the state before it has to be known,
    from offset 0 of task-commands or from a snapshot on. A history with a `perdure rebuild` in it has to be replayed
    from a snapshot behind that. The keys of the time are needed, as engines use them.

    \b
    perdure replay
    perdure replay --from "2h ago" --against ../perdure-next
    perdure replay --shadow
    """
    if shadow and to is not None:
        raise InvalidRequest("--shadow goes on until Ctrl-C: it takes no --to", field="to")
    from perdure.points import parse_place
    from perdure.schemas import topics
    from perdure.streams.survey import committed_offsets

    settings = session.settings()
    keys = settings.require_keys()
    with session.client() as client, ExitStack() as stack:
        log, kafka = client.log, session.kafka()
        begins, ends = (None if text is None else parse_place(text, present(), log.partitions, name)
                        for text, name in ((from_, "from"), (to, "to")))  # fmt: skip
        executed = committed_offsets(kafka, topics.ENGINE_GROUP, topics.COMMANDS, range(log.partitions))
        slices = _slices(log, begins, ends, {p: offset or 0 for p, offset in executed.items()})
        run = Run(log, keys, _snapshots(settings.blobs), against, stack)
        for partition, (first, until) in slices.items():
            run.partition(partition, first, until)
            if run.divergence is not None:
                break
        if shadow and run.divergence is None:
            talk(f"equal so far: {run.told()}; following the engine, Ctrl-C ends it")
            try:
                run.follow({p: until for p, (_, until) in slices.items()}, talk)
            except KeyboardInterrupt:
                talk("")
    return _answer(session, run)


def _snapshots(url: str | None) -> Snapshots | None:
    if url is None:
        return None
    from perdure.connectors.blobs import open_blobs
    from perdure.streams.snapshots import Snapshots

    return Snapshots(open_blobs(url))


def _slices(
    log: Log, begins: Place | None, ends: Place | None, executed: dict[int, int]
) -> dict[int, tuple[int | None, int]]:
    """Partition -> (first input, if one was asked for; input after the last)."""
    named = {p for place in (begins, ends) if place is not None for p in place.partitions} or set(range(log.partitions))
    slices = {}
    for p in sorted(named):
        first = None if begins is None else _offset(log, p, begins, executed[p], after=False)
        last = executed[p] if ends is None else _offset(log, p, ends, executed[p], after=True)
        slices[p] = (first, executed[p] if last is None else min(last, executed[p]))
    return slices


def _offset(log: Log, partition: int, place: Place, executed: int, *, after: bool) -> int | None:
    """The first input of a place or, `after` it, the next one; None if the place says nothing of the partition."""
    from perdure.replaying import first_at, next_after
    from perdure.schemas import topics
    from perdure.streams.log import records_of

    point = place.of(partition)
    if point is None:
        return None
    if point.event is not None:
        raise InvalidRequest("a replay begins and ends at inputs: name offsets of task-commands", field="from")
    if point.command is not None:
        return point.command + after
    assert point.at is not None, "it is a time then"
    records = records_of(log, topics.COMMANDS.name, partition, committed=False)
    found = next_after(records, point.at) if after else first_at(records, point.at)
    return executed if found is None else found


class Run:
    """A replay of some partitions, one after the other."""

    def __init__(
        self, log: Log, keys: Keys, snapshots: Snapshots | None, against: Path | None, stack: ExitStack
    ) -> None:
        self._log, self._keys, self._snapshots, self._against, self._stack = log, keys, snapshots, against, stack
        self.comparisons: dict[int, Comparison] = {}
        self._deciders: dict[int, Decides] = {}
        self.begun: dict[int, int] = {}
        self.build = ""

    @property
    def divergence(self) -> Divergence | None:
        """The first one that was found."""
        return next((c.divergence for c in self.comparisons.values() if c.divergence is not None), None)

    def partition(self, partition: int, first: int | None, until: int) -> None:
        """Replay a partition's slice. Blocks."""
        from perdure.replaying import OtherBuild, begin
        from perdure.streams.redecide import Redecider
        from perdure.streams.replay import Comparison, advance, inputs_of, replay

        at, rows = begin(self._log, self._snapshots, partition, first)
        own = Redecider(partition, self._log.partitions, self._keys, rows)
        decider: Decides = own
        self.build = own.build
        start = at if first is None else max(at, first)
        if start > at:
            advance(own, inputs_of(self._log, partition, at, min(start, until)))
        if self._against is not None:
            other = OtherBuild(self._against, partition, self._log.partitions, self._keys, own.rows())
            decider = self._stack.enter_context(other)
            self.build = other.build
        comparison = self.comparisons[partition] = Comparison(partition, other_build=self._against is not None)
        self._deciders[partition], self.begun[partition] = decider, start
        if start < until:
            replay(self._log, decider, comparison, start, until)

    def follow(self, positions: dict[int, int], say: Callable[[str], None]) -> None:
        """Compare what the engine goes on to do, and say how far, until there is a difference or an interrupt."""
        from perdure.streams.replay import follow

        said, due = self.told(), time.monotonic() + _SAY_S

        def looked() -> None:
            nonlocal said, due
            if time.monotonic() >= due and self.told() != said:
                said, due = self.told(), time.monotonic() + _SAY_S
                say(f"equal so far: {said}")

        follow(self._log, self._deciders, self.comparisons, positions, looked)

    def told(self) -> str:
        """What was equal."""
        inputs, events = (sum(getattr(c.tally, n) for c in self.comparisons.values()) for n in ("inputs", "events"))
        return f"{inputs:,} inputs and {events:,} events of {len(self.comparisons)} partition(s)"


def _answer(session: Session, run: Run) -> int:
    found = run.divergence
    answer = {
        "equal": found is None, "build": run.build,
        "partitions": [
            {"partition": p, "from": run.begun[p], "inputs": c.tally.inputs, "events": c.tally.events}
            for p, c in sorted(run.comparisons.items())
        ],
        "divergence": None if found is None else _plain(asdict(found)),
    }  # fmt: skip
    session.answer(answer, f"equal: {run.told()}, decided by build {run.build}" if found is None else _text(found))
    return 0 if found is None else REFUSED


def _text(d: Divergence) -> str:
    from perdure.cli_text import shown, time_text

    told = d.logged or d.replayed or {}
    lines = [f"DIFFERENT at input {d.input} of task-commands/{d.partition} ({time_text(told['at'])})"]
    if d.logged is None:
        lines.append(f"the replay makes {_named(told)}, the log has no event there")
    elif d.replayed is None:
        lines.append(f"the log has {_named(told)} at {d.event} of task-events/{d.partition}, the replay makes none")
    else:
        lines.append(f"event {d.event} of task-events/{d.partition}:")
        if not d.fields:
            lines += [f"  log     {_named(d.logged)}", f"  replay  {_named(d.replayed)}"]
    for name, (was, now) in _plain(d.fields).items():
        lines.append(f"  {name}\n    log     {shown(was, 500)}\n    replay  {shown(now, 500)}")
    return "\n".join(lines)


def _named(event: dict[str, Any]) -> str:
    return f"{event['kind']} {event['seq']}" + (f" of {event['task_id']}" if event.get("task_id") else "")


def _plain(value: Any) -> Any:
    """Bytes in events are JSON text, or records on their way elsewhere."""
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
