"""How many of its slots a worker lends to each partition.

The engine grants tasks partition by partition, and none of them knows of the others: each is lent a number of slots.
At first they are shared out; later those that lie idle go to partitions that use all of theirs. The sum never exceeds
the slots, unless there are fewer slots than partitions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Use:
    """A partition's use of a worker's slots."""

    weight: int
    """What share it has when all want more."""
    lent: int
    running: int
    hungry: bool
    """Whether it uses all that it is lent, and may have use for more."""


def share_out(slots: int, weights: Mapping[int, int]) -> dict[int, int]:
    """Slots lent to each partition: one at least, the others in proportion to its weight."""
    spare, total = max(0, slots - len(weights)), sum(weights.values())
    exact = {p: spare * w / total for p, w in weights.items()}
    lent = {p: 1 + int(share) for p, share in exact.items()}
    left = spare - sum(int(share) for share in exact.values())
    for p in sorted(weights, key=lambda p: (int(exact[p]) - exact[p], p))[:left]:
        lent[p] += 1
    return lent


def wanted_slots(slots: int, uses: Mapping[int, Use]) -> dict[int, int]:
    """Slots that each partition ought to be lent now.

    Hungry ones share what the others do not need. Those keep what they use, and within their share one more: a task
    that comes to them does not wait for others' tasks to end, which may take days.
    """
    weights = {p: use.weight for p, use in uses.items()}
    shares = share_out(slots, weights)
    hungry = {p: weights[p] for p, use in uses.items() if use.hungry}
    if not hungry:
        return {p: use.lent for p, use in uses.items()} if any(use.running for use in uses.values()) else shares
    needed = {p: _needed(use, shares[p]) for p, use in uses.items() if not use.hungry}
    return needed | share_out(slots - sum(needed.values()), hungry)


def _needed(use: Use, share: int) -> int:
    return max(use.running, min(use.running + 1, share))
