"""What an engine's host does outside of transactions: ticks, configuration, and the outbox's journeys.

All of it is harmless when done twice: a tick fires what is due, a configuration version counts once, a forwarded
record is numbered, an acknowledgement is cumulative.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from functools import partial

from perdure.schemas import codec, limits, topics
from perdure.schemas.commands import ApplyConfig, Forwarded, ForwardedAck, Tick
from perdure.schemas.errors import InfrastructureError, ValueTooLarge
from perdure.schemas.rows import Outbox, Position
from perdure.schemas.signing import Keys, signed
from perdure.streams import tables, timers
from perdure.streams.config_view import ConfigView
from perdure.streams.engine import Engine
from perdure.streams.log import OnAck, Producer

APPLIED_KINDS = frozenset({"queue", "type", "limit", "schedule", "rule", "notify", "feature"})
_PATIENCE_MS = 1_000
_UNLANDED_MS = 300_000
"""So often at the most is sent again what the producer still has."""
LOG = logging.getLogger("perdure")


@dataclass
class _Way:
    """Records of the outbox on their way to one partition."""

    unsent: deque[int] = field(default_factory=deque)
    sent: deque[int] = field(default_factory=deque)
    known: int = 0
    """Number up to which the outbox was looked at. The state says what is new: what a transaction asks to be done after
    it is lost when nobody hears that it was committed.
    """
    since: int = 0
    """Host time, ms, of the last acknowledgement, or of the oldest sending after it."""
    landed: int = 0
    """Number of the last one that the log has, or has refused."""

    @property
    def due(self) -> int:
        """Host time, ms, at which all is sent again. What has not even landed still waits in the producer: there it is
        not to pile up while a partition has no leader for hours."""
        landed = self.landed == self.sent[-1]
        return self.since + (limits.FORWARD_RESEND_MS if landed else _UNLANDED_MS)

    def lands(self, number: int, _offset: int, _error: InfrastructureError | None) -> None:
        """The producer is done with a record, one way or the other."""
        self.landed = number


class Duties:
    """The duties for one partition. `now` is always the host's wall clock in ms."""

    def __init__(self, engine: Engine, keys: Keys, producer: Producer, config: ConfigView) -> None:
        self._engine, self._keys, self._producer, self._config = engine, keys, producer, config
        self._partition = engine.state.partition
        self._ways = {target: _Way() for target in range(engine.state.partitions)}
        self._offered: dict[str, int] = {}
        self._tick_sent = self._tick_landed = 0
        self._tick_offset: int | None = -1
        self._ahead: int | None = 0
        """ms by which the host's clock was ahead of the log's at the last tick; None: that is not executed yet."""
        self._find_unsent()
        self._deletions_offered = False
        self._offer_deletions()

    def _offer_deletions(self) -> None:
        """What the state still has and `config` has no longer, not even as a tombstone, was deleted."""
        self._deletions_offered = True
        latest = max((version for version, _ in list(self._config.names.values())), default=0)
        for suffix, row in list(self._engine.state.scan(tables.CONFIG)):
            name = suffix.decode()
            # A row that is newer than all that was read shows that the view is behind, not that the name is gone.
            if name not in self._config.names and row.content is not None and row.version < self._config.read_to:
                self._offer(ApplyConfig(name=name, version=max(latest, row.version + 1), content=None))

    def _find_unsent(self) -> None:
        """Begin with what an earlier process has not seen acknowledged."""
        for target in range(self._engine.state.partitions):
            first = next(self._engine.state.suffixes(tables.outbox(target)), None)
            newest = self._engine.state.counter(f"sent/{target}")
            self._ways[target].known = newest if first is None else int.from_bytes(first, "big") - 1

    def after_commit(self, now: int) -> None:
        """Do what the committed records ask for."""
        acknowledgements: dict[int, int] = {}
        for step in self._engine.take_after():
            acknowledgements[step.source] = max(step.up_to, acknowledgements.get(step.source, 0))
        for source, up_to in acknowledgements.items():
            ack = ForwardedAck(source=source, target=self._partition, up_to=up_to)
            self._append(source, signed(ack, *self._keys.newest_engine()))
        self.perform(now)

    def perform(self, now: int) -> None:
        """Send what is due at `now`."""
        self._send_outbox(now)
        if not self._deletions_offered:
            self._offer_deletions()
        self._offer_config()
        self._tick(now)

    def next_due(self, now: int) -> int:
        """Host time in ms at which `perform` has something to do; at most a second away."""
        due = now + _PATIENCE_MS
        wanted = self._engine.next_tick()
        if wanted is not None:
            due = min(due, max(wanted, self._next_tick_at(wanted, now)))
        return min([due, *(way.due for way in self._ways.values() if way.sent)])

    def _tick(self, now: int) -> None:
        wanted = self._engine.next_tick()
        if wanted is not None and now >= max(wanted, self._next_tick_at(wanted, now)):
            self._tick_sent, self._tick_offset = now, None
            self._ahead = None
            position = self._engine.state.position or Position(offset=0)
            # What an input made due was not due before it: a tick may not look late for that.
            due = max(wanted, position.at) if wanted else now
            tick = codec.encode(Tick(due=due, host_clock=now, executed=position.offset))
            self._producer.append(topics.COMMANDS.name, self._partition, None, tick, partial(self._tick_appended, now))

    def _tick_appended(self, sent: int, offset: int, error: InfrastructureError | None) -> None:
        if error is None:
            self._tick_landed, self._tick_offset = sent, offset

    def _next_tick_at(self, wanted: int, now: int) -> int:
        """When another tick makes sense: once the last one is executed; while clocks disagree or ticks fail, seldom."""
        sent = self._tick_sent if self._tick_sent <= now else 0  # the host's clock may have been set back
        position = self._engine.state.position
        done = self._tick_offset is not None and position is not None and position.offset > self._tick_offset
        if position is None or not done or self._engine.failing or timers.skewed(self._engine.state):
            return sent + _PATIENCE_MS
        if wanted == timers.AT_ONCE:
            return sent
        if self._ahead is None:
            self._ahead = min(max(0, self._tick_landed - position.at), limits.CLOCK_AGREES_MS)
        come = position.at >= wanted  # the log itself has shown that it is time
        return max(sent + limits.TICK_SPACING_MS, wanted + (self._ahead if sent and not come else 0))

    def _offer_config(self) -> None:
        state = self._engine.state
        for name, (version, content) in list(self._config.names.items()):
            if name.partition("/")[0] not in APPLIED_KINDS or self._offered.get(name, -1) >= version:
                continue
            self._offered[name] = version
            known = state.get(tables.CONFIG, name.encode())
            if known is None or known.version < version:
                self._offer(ApplyConfig(name=name, version=version, content=content))

    def _offer(self, record: ApplyConfig) -> None:
        """Hand a version or a deletion to the partition, and again with the next duties if it could not be written."""

        def offered(offset: int, error: InfrastructureError | None) -> None:  # noqa: ARG001 - the place is of no interest
            if error is not None and record.content is None:
                self._deletions_offered = False
            elif error is not None and self._offered.get(record.name) == record.version:
                del self._offered[record.name]

        try:
            self._append(self._partition, signed(record, *self._keys.newest_engine()), offered)
        except ValueTooLarge as error:
            LOG.error("%s of config is not applied, the version before it stays in force: %s", record.name[:100], error)

    def _send_outbox(self, now: int) -> None:
        """Send what is new, and all again when nothing was acknowledged for a while: they are taken in order only."""
        for target, way in self._ways.items():
            newest = self._engine.state.counter(f"sent/{target}")
            way.unsent.extend(range(way.known + 1, newest + 1))
            way.known = newest
            while way.sent and self._in_outbox(target, way.sent[0]) is None:
                way.sent.popleft()
                way.since = now
            if way.sent and (now >= way.due or way.since > now):
                way.unsent.extendleft(reversed(way.sent))
                way.sent.clear()
                way.landed = 0
            while way.unsent:
                number = way.unsent.popleft()
                row = self._in_outbox(target, number)
                if row is not None:
                    record = Forwarded(source=self._partition, target=target, number=number, record=row.record)
                    self._append(target, signed(record, *self._keys.newest_engine()), partial(way.lands, number))
                    way.since = way.since if way.sent else now
                    way.sent.append(number)

    def _in_outbox(self, target: int, number: int) -> Outbox | None:
        row: Outbox | None = self._engine.state.get(tables.outbox(target), tables.number(number))
        return row

    def _append(self, partition: int, value: bytes, on_ack: OnAck | None = None) -> None:
        self._producer.append(topics.COMMANDS.name, partition, None, value, on_ack)
