"""A task of ninety days outlives the retention of every topic, engines, workers, keys and a build (on virtual time)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from perdure.context import Context
from perdure.schemas import topics
from perdure.session import publish
from perdure.streams import engine, policies
from perdure.streams.decision import FEATURE_LEVEL, LEVEL
from perdure.testing import START_MS, Kit

DAYS = 90
DAY_S = 86_400
STEP_EVERY_S = 3_600
DEATHS = 60


class LongLived(Kit):
    """A namespace for months: its topics forget, its keys are exchanged, its engine is upgraded."""

    def forget(self) -> None:
        """Delete what is older than its topic keeps, as the broker does."""
        now = self._clock.now
        for topic in topics.ALL:
            kept_ms = int(topic.settings.get("retention.ms", -1))
            for partition in range(self.log.partitions if topic.partitioned and kept_ms >= 0 else 0):
                records = self.log.records(topic.name, partition)
                gone = [record.offset for record in records if record.at < now - kept_ms]
                self.log.truncate(topic.name, partition, max(gone, default=-1) + 1)

    def exchange_keys(self) -> None:
        """New keys, for the engine first: the worker signs with the old ones until its next life."""
        self._keys = self._keys.rotated()
        self.crash_engine()

    def raise_level(self, level: int) -> None:
        """Let the namespace use what the next build knows."""
        publish(self._log, {}, {LEVEL: {"level": level}}, "operator", self._clock.now)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_task_of_ninety_days(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """G3, G4: each step once, less than 1 % of the work done again."""
    dice = random.Random(seed)
    steps: Counter[int] = Counter()
    items = DAYS * DAY_S // STEP_EVERY_S

    def season(ctx: Context) -> int:
        ctx.state.setdefault("sum", 0)
        for item in ctx.track(range(items)):
            kit.sleep(STEP_EVERY_S)
            ctx.state["sum"] += ctx.step("square", square, item)
        return int(ctx.state["sum"])

    def square(item: int) -> int:
        steps[item] += 1
        return item * item

    def upgrade() -> None:
        for module in (engine, policies):
            monkeypatch.setattr(module, "FEATURE_LEVEL", FEATURE_LEVEL + 1)
        kit.crash_engine()
        kit.raise_level(FEATURE_LEVEL + 1)

    with LongLived([season], partitions=1) as kit:
        handle = kit.submit(season)
        deaths: list[Callable[[], None]] = [lambda: kit.kill_task(handle), kit.crash_worker, kit.crash_engine]
        events = [(dice.uniform(0, DAYS), dice.choice(deaths)) for _ in range(DEATHS)]
        events += [(day + 0.01, kit.forget) for day in range(DAYS)]
        events += [(day, lambda: kit.crash_engine(lose_disk=True)) for day in (20.0, 70.0)]
        events += [(30.0, kit.exchange_keys), (60.0, kit.exchange_keys), (45.0, upgrade)]
        for day, happens in sorted(events, key=lambda event: event[0]):
            kit.advance(max(0.0, START_MS / 1000 + day * DAY_S - kit.time()))
            happens()
        forgotten = {
            t.name: kit.log.reader().bounds(t.name, 0)[0] for t in (topics.COMMANDS, topics.INBOX, topics.REPLIES)
        }
        assert min(forgotten.values()) > 0, forgotten
        assert handle.result() == sum(item * item for item in range(items))
        assert steps == dict.fromkeys(range(items), 1)
        assert handle.status().epoch > DEATHS // 3
        recomputed = (kit.time() - START_MS / 1000) / (DAYS * DAY_S) - 1
        assert 0 < recomputed < 0.01
        assert kit.log.records("quarantine") == []
