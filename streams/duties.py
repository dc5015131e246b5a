"""What an engine's host does outside of transactions: ticks, configuration, and the outbox's journeys.

All of it is harmless when done twice: a tick fires what is due, a configuration version counts once, a forwarded
record is numbered, an acknowledgement is cumulative.
"""

from __future__ import annotations

from perdure.schemas import codec, limits, topics
from perdure.schemas.commands import ApplyConfig, Forwarded, ForwardedAck, Tick
from perdure.schemas.signing import Keys, signed
from perdure.streams import tables
from perdure.streams.config_view import ConfigView
from perdure.streams.decision import Acknowledge, Send
from perdure.streams.engine import Engine
from perdure.streams.log import Producer

APPLIED_KINDS = frozenset({"queue", "type", "limit", "schedule", "rule", "notify"})
_SPACING_MAX_MS = 1_000


class Duties:
    """The duties for one partition. `now` is always the host's wall clock in ms."""

    def __init__(self, engine: Engine, keys: Keys, producer: Producer, config: ConfigView) -> None:
        self._engine, self._keys, self._producer, self._config = engine, keys, producer, config
        self._partition = engine.state.partition
        self._unacknowledged: dict[tuple[int, int], int] = {}
        self._offered: dict[str, int] = {}
        self._tick_sent = 0
        self._tick_for: int | None = None
        self._spacing = limits.TICK_SPACING_MS
        self._find_unsent()

    def _find_unsent(self) -> None:
        for target in range(self._engine.state.partitions):
            for suffix, _ in self._engine.state.scan(tables.outbox(target)):
                self._unacknowledged[target, int.from_bytes(suffix, "big")] = 0

    def after_commit(self, now: int) -> None:
        """Do what the committed records ask for."""
        acknowledgements: dict[int, int] = {}
        for step in self._engine.take_after():
            match step:
                case Send():
                    self._unacknowledged[step.target, step.number] = 0
                case Acknowledge():
                    acknowledgements[step.source] = max(step.up_to, acknowledgements.get(step.source, 0))
        for source, up_to in acknowledgements.items():
            ack = ForwardedAck(source=source, target=self._partition, up_to=up_to)
            self._append(source, signed(ack, *self._keys.newest_engine()))
        self.perform(now)

    def perform(self, now: int) -> None:
        """Send what is due at `now`."""
        self._send_outbox(now)
        self._offer_config()
        self._tick(now)

    def next_due(self, now: int) -> int:
        """Host time in ms at which `perform` has something to do; at most a second away."""
        due = now + _SPACING_MAX_MS
        wanted = self._engine.next_tick()
        if wanted is not None:
            due = min(due, max(wanted, self._tick_sent + self._spacing))
        if self._unacknowledged:
            due = min(due, min(self._unacknowledged.values()) + limits.FORWARD_RESEND_MS)
        return due

    def _tick(self, now: int) -> None:
        wanted = self._engine.next_tick()
        if wanted is None or wanted > now:
            self._spacing = limits.TICK_SPACING_MS
            return
        if now - self._tick_sent < self._spacing and now >= self._tick_sent:
            return
        # A tick that changed nothing (clocks that disagree, say) is repeated at growing intervals.
        self._spacing = min(self._spacing * 2, _SPACING_MAX_MS) if wanted == self._tick_for else limits.TICK_SPACING_MS
        self._tick_for, self._tick_sent = wanted, now
        self._append(self._partition, codec.encode(Tick(due=wanted or now, host_clock=now)))

    def _offer_config(self) -> None:
        state = self._engine.state
        for name, (version, content) in list(self._config.names.items()):
            if name.partition("/")[0] not in APPLIED_KINDS or self._offered.get(name, -1) >= version:
                continue
            self._offered[name] = version
            known = state.get(tables.CONFIG, name.encode())
            if known is None or known.version < version:
                record = ApplyConfig(name=name, version=version, content=content)
                self._append(self._partition, signed(record, *self._keys.newest_engine()))

    def _send_outbox(self, now: int) -> None:
        state = self._engine.state
        for (target, number), sent in sorted(self._unacknowledged.items()):
            row = state.get(tables.outbox(target), tables.number(number))
            if row is None:
                del self._unacknowledged[target, number]
            elif now - sent >= limits.FORWARD_RESEND_MS or sent > now:
                self._unacknowledged[target, number] = now
                record = Forwarded(source=self._partition, target=target, number=number, record=row.record)
                self._append(target, signed(record, *self._keys.newest_engine()))

    def _append(self, partition: int, value: bytes) -> None:
        self._producer.append(topics.COMMANDS.name, partition, None, value)
