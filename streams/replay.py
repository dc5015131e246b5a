"""Decides a partition's real input again and compares the events with those in the log (G5).

A replay begins where the state is known exactly: at offset 0, if task-commands still has it, or at a snapshot. A fold
of task-events will not do: sessions, beats and latest progress are in no event, and the first grant would differ.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from perdure.schemas import codec, topics
from perdure.streams.log import Log, Record, records_of
from perdure.streams.past import set_aside
from perdure.streams.redecide import Made

BATCH = 500
_OF_THE_BUILD = frozenset({"build", "feature_level"})


class Decides(Protocol):
    """An engine in this process or in another one; see `redecide.Redecider`."""

    def decide(self, inputs: list[tuple[Record, bool]]) -> Made: ...


@dataclass(frozen=True)
class Divergence:
    """The first place where the replay and the log differ."""

    partition: int
    input: int
    """Offset of task-commands."""
    event: int | None
    """Offset of task-events; None: the log has no event there."""
    logged: dict[str, Any] | None
    """The event in the log; None: it has none for this input."""
    replayed: dict[str, Any] | None
    """The event that was decided again; None: there was none."""
    fields: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Field -> (in the log, replayed), of two events of one kind."""


@dataclass
class Tally:
    """How much was found equal."""

    inputs: int = 0
    events: int = 0


class Comparison:
    """Events as they were logged and as they are decided again, compared in order as they come."""

    def __init__(self, partition: int, *, other_build: bool) -> None:
        self.partition = partition
        self.tally = Tally()
        self.divergence: Divergence | None = None
        self._other_build = other_build
        self._logged: deque[tuple[int, bytes]] = deque()
        self._replayed: deque[tuple[int, bytes]] = deque()

    @property
    def behind(self) -> int:
        """Replayed events whose counterpart in the log has not been seen."""
        return len(self._replayed)

    def logged(self, offset: int, value: bytes) -> None:
        """The log has this event."""
        self._logged.append((offset, value))
        self._compare()

    def replayed(self, made: Made, inputs: int) -> None:
        """The replay has made these events of so many inputs."""
        self._replayed += made
        self.tally.inputs += inputs
        self._compare()

    def _compare(self) -> None:
        while self.divergence is None and self._logged and self._replayed:
            (offset, was), (cause, now) = self._logged.popleft(), self._replayed.popleft()
            if was == now or (self._other_build and _plain(was) == _plain(now)):
                self.tally.events += 1
            else:
                self.divergence = self._difference(offset, was, cause, now)

    def _difference(self, offset: int, was: bytes, cause: int, now: bytes) -> Divergence:
        logged, replayed = _shown(was), _shown(now)
        caused = logged["cause"]["offset"]
        if caused > cause:  # the log goes on with a later input
            return Divergence(self.partition, cause, None, None, replayed)
        if caused < cause:
            return Divergence(self.partition, caused, offset, logged, None)
        passed_over = _OF_THE_BUILD if self._other_build else frozenset()
        fields = {
            name: (logged.get(name), replayed.get(name))
            for name in dict.fromkeys([*logged, *replayed])
            if logged.get(name) != replayed.get(name) and name not in passed_over
        }
        if logged["kind"] != replayed["kind"]:
            fields = {}
        return Divergence(self.partition, cause, offset, logged, replayed, fields)

    def finish(self, until: int) -> None:
        """No more is to come for the inputs before `until`: what is left over on one side is a divergence."""
        if self.divergence is not None:
            return
        if self._replayed:
            cause, now = self._replayed[0]
            self.divergence = Divergence(self.partition, cause, None, None, _shown(now))
        elif self._logged:
            offset, was = self._logged[0]
            if (cause := _shown(was)["cause"]["offset"]) < until:
                self.divergence = Divergence(self.partition, cause, offset, _shown(was), None)


def _shown(data: bytes) -> dict[str, Any]:
    """An event as plain values, its kind first."""
    event = codec.decode(data)
    return {"kind": type(event).__name__} | asdict(event)


def _plain(data: bytes) -> dict[str, Any]:
    return {name: value for name, value in _shown(data).items() if name not in _OF_THE_BUILD}


def killers(log: Log, partition: int) -> frozenset[int]:
    """Inputs that killed their process and were passed over unread: that is of no log, but a fact of its history."""
    return frozenset(offset for offset, cause in set_aside(log, partition).items() if cause == "killer")


def inputs_of(log: Log, partition: int, first: int, until: int) -> Iterator[list[tuple[Record, bool]]]:
    """The inputs of a slice in batches, each with whether it is passed over unread. Blocks while it reads."""
    unread = killers(log, partition)
    batch: list[tuple[Record, bool]] = []
    for record in records_of(log, topics.COMMANDS.name, partition, first=first, committed=False):
        if record.offset >= until:
            break
        batch.append((record, record.offset in unread))
        if len(batch) >= BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def events_since(log: Log, partition: int, first: int) -> Iterator[Record]:
    """The events brought about by inputs from `first` on."""
    reached = False
    for record in records_of(log, topics.EVENTS.name, partition):
        reached = reached or codec.decode(record.value or b"").cause.offset >= first
        if reached:
            yield record


def advance(decider: Decides, inputs: Iterable[list[tuple[Record, bool]]]) -> None:
    """Bring a decider's state forward without comparing anything."""
    for batch in inputs:
        decider.decide(batch)


def replay(log: Log, decider: Decides, comparison: Comparison, first: int, until: int) -> None:
    """Decide the inputs of [first, until) again, up to the first divergence. All of them have to be executed.

    `decider`: its state is that before `first`. Blocks while it reads and decides.
    """
    logged = events_since(log, comparison.partition, first)
    for batch in inputs_of(log, comparison.partition, first, until):
        comparison.replayed(decider.decide(batch), len(batch))
        while comparison.divergence is None and comparison.behind:
            record = next(logged, None)
            if record is None:
                break
            comparison.logged(record.offset, record.value or b"")
        if comparison.divergence is not None or comparison.behind:
            break
    following = next(logged, None)
    if following is not None and not comparison.behind:
        comparison.logged(following.offset, following.value or b"")
    comparison.finish(until)


def follow(
    log: Log,
    deciders: Mapping[int, Decides],
    comparisons: Mapping[int, Comparison],
    positions: Mapping[int, int],
    looked: Callable[[], None] = lambda: None,
) -> None:
    """Decide what comes behind `positions` (next input by partition) as the engine does, until something differs.

    Blocks for ever otherwise; an interrupt ends it. The comparisons have seen every event of the inputs before.
    `looked`: called after each look at the log, several times a second.
    """
    inputs, logged = log.reader(committed=False), log.reader()
    try:
        unread = {p: killers(log, p) for p in positions}
        begins = {}
        for p, position in positions.items():
            _, end = logged.bounds(topics.EVENTS.name, p)
            since = next(events_since(log, p, position), None)
            begins[p] = end if since is None else since.offset
        inputs.assign({(topics.COMMANDS.name, p): offset for p, offset in positions.items()})
        logged.assign({(topics.EVENTS.name, p): offset for p, offset in begins.items()})
        while not any(c.divergence for c in comparisons.values()):
            for record in inputs.read(BATCH, 0.1):
                p = record.partition
                comparisons[p].replayed(deciders[p].decide([(record, record.offset in unread[p])]), 1)
            for record in logged.read(BATCH, 0.1):
                comparisons[record.partition].logged(record.offset, record.value or b"")
            looked()
    finally:
        inputs.close()
        logged.close()
