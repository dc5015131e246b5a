"""Slots move between partitions: who ought to have how many, and in which order the engine is told."""

from __future__ import annotations

import random
from typing import Any

import pytest

from perdure.lending import Use, share_out, wanted_slots
from perdure.schemas.commands import WorkerBeat
from perdure.schemas.errors import InfrastructureError
from perdure.session import Lane, Session, Sessions
from tests.unit.perdure.answering import KEYS, Answering


@pytest.mark.parametrize(
    ("slots", "weights", "lent"),
    [
        (8, {0: 1}, {0: 8}),
        (8, {0: 1, 3: 1}, {0: 4, 3: 4}),
        (8, {0: 1, 3: 3}, {0: 3, 3: 5}),  # one each, then the other six as 1 : 3, the half goes to the lower partition
        (9, {1: 1, 2: 1, 5: 1}, {1: 3, 2: 3, 5: 3}),
        (10, {1: 1, 2: 1, 5: 1}, {1: 4, 2: 3, 5: 3}),
        (1, {0: 1, 1: 1, 2: 5}, {0: 1, 1: 1, 2: 1}),  # more than there are: grants beyond them are declined
    ],
)
def test_slots_are_shared_out(slots: int, weights: dict[int, int], lent: dict[int, int]) -> None:
    assert share_out(slots, weights) == lent


@pytest.mark.parametrize(
    ("slots", "uses", "wanted"),
    [
        # nobody wants more: all stay as they are, and when nothing runs at all they are shared out again
        (8, {0: Use(1, 5, 4, False), 1: Use(1, 3, 0, False)}, {0: 5, 1: 3}),
        (8, {0: Use(1, 7, 0, False), 1: Use(1, 1, 0, False)}, {0: 4, 1: 4}),
        # one wants more: the others keep one idle slot each
        (8, {0: Use(1, 2, 2, True), 1: Use(1, 2, 0, False), 2: Use(1, 2, 0, False), 3: Use(1, 2, 0, False)},
         {0: 5, 1: 1, 2: 1, 3: 1}),
        # within its share a partition keeps one idle slot besides those in use, beyond it none
        (8, {0: Use(1, 4, 4, True), 1: Use(1, 4, 2, False)}, {0: 5, 1: 3}),
        (8, {0: Use(1, 2, 2, True), 1: Use(1, 6, 5, False)}, {0: 3, 1: 5}),
        # both want more: by their weights, whatever they have now
        (8, {0: Use(1, 7, 7, True), 1: Use(1, 1, 1, True)}, {0: 4, 1: 4}),
        (9, {0: Use(1, 7, 7, True), 1: Use(2, 2, 2, True)}, {0: 3, 1: 6}),
        # fewer slots than partitions: one for each stays
        (1, {0: Use(1, 1, 1, True), 1: Use(1, 1, 0, False)}, {0: 1, 1: 1}),
    ],
)  # fmt: skip
def test_idle_slots_go_where_all_are_in_use(slots: int, uses: dict[int, Use], wanted: dict[int, int]) -> None:
    assert wanted_slots(slots, uses) == wanted


class Lender:
    """A worker's sessions with some partitions, which it tells how many slots they have."""

    def __init__(self, slots: int, partitions: int) -> None:
        self.producer, self.now = Answering(), 0
        self.sessions = Sessions(self.producer, KEYS.newest_worker(), lambda _: None)
        lane = Lane("w", "process", {"t": 7}, slots)
        lent = share_out(slots, dict.fromkeys(range(partitions), 1))
        self.of = [self.sessions.begin(lane, p, "s-1", ["q"], lent[p], 0, now=0) for p in range(partitions)]
        self.beat()
        self.answer()
        self.producer.sent.clear()

    def beat(self, after: int = 0) -> dict[int, int]:
        """What partitions are told now: slots."""
        self.now += after
        self.sessions.beat(self.now, lambda s: max(0, s.lent - s.running))
        told = {p: m.slots for _, p, m in self.producer.sent if isinstance(m, WorkerBeat)}
        self.producer.sent.clear()
        return told

    def answer(self, error: InfrastructureError | None = None) -> None:
        while not self.producer.flush(0):
            self.producer.answer(error)

    def grant(self, session: Session, count: int = 1) -> None:
        for _ in range(count):
            session.take_slot()


def test_a_partition_that_uses_all_its_slots_gets_those_that_lie_idle_once_they_were_given_up() -> None:
    lender = Lender(8, 4)
    busy = lender.of[0]
    lender.grant(busy, 2)
    assert lender.beat() == {1: 1, 2: 1, 3: 1}, "at once, without waiting for the next beats"
    assert lender.sessions.next_beat() == 200
    assert lender.beat(200) == {}, "the engine may not have heard yet"
    lender.answer()
    assert lender.beat(200) == {0: 5}
    lender.answer()
    lender.grant(busy, 3)
    assert lender.beat(200) == {}
    assert lender.sessions.next_beat() == 2_000, "nothing moves any more"


def test_a_hunger_that_has_passed_does_not_keep_the_worker_awake() -> None:
    lender = Lender(8, 2)
    busy = lender.of[0]
    lender.grant(busy, 4)
    assert lender.beat() == {1: 1}
    for _ in range(4):
        busy.free_slot()  # before the slots that were to move have moved
    lender.beat(200)
    assert lender.sessions.next_beat() == 2_000


def test_what_was_given_up_is_not_lent_again_before_the_log_has_it() -> None:
    lender = Lender(8, 2)
    lender.grant(lender.of[0], 4)
    assert lender.beat() == {1: 1}
    lender.answer(InfrastructureError("timed out"))
    assert lender.beat(200) == {}
    assert lender.beat(1_800) == {0: 4, 1: 1}, "the next beat says it again"
    lender.answer()
    assert lender.beat(200) == {0: 7}


def test_slots_in_use_are_not_lent_to_others() -> None:
    lender = Lender(8, 2)
    first, second = lender.of
    lender.grant(first, 4)
    lender.beat()
    lender.answer()
    assert lender.beat(200) == {0: 7}
    lender.answer()
    lender.grant(first, 3)
    lender.grant(second)  # now both want more
    assert lender.beat(200) == {0: 4}
    lender.answer()
    assert lender.beat(200) == {}
    first.free_slot()
    assert lender.beat(200) == {1: 2}
    lender.answer()
    assert sum(s.bound for s in lender.of) == 8


def test_who_gives_idle_slots_away_does_not_want_them_back() -> None:
    lender = Lender(8, 2)
    first, second = lender.of
    lender.grant(first, 4)
    for _ in range(3):
        lender.beat(200)
        lender.answer()
    lender.grant(first, 3)
    first.free_slot()
    first.free_slot()
    lender.grant(second)
    assert lender.beat(200) == {0: 5}
    lender.answer()
    assert lender.beat(200) == {1: 3}
    lender.answer()
    assert lender.beat(200) == {}


def test_never_more_than_there_are_whatever_happens() -> None:
    for seed in range(200):
        draw = random.Random(seed)
        lender = Lender(slots := draw.randint(4, 12), draw.randint(1, 4))
        for _ in range(120):
            session = draw.choice(lender.of)
            action = draw.randrange(4)
            if action == 0 and session.running < session.lent:
                lender.grant(session)
            elif action == 1 and session.running:
                session.free_slot()
            elif action == 2:
                lender.answer(InfrastructureError("lost") if draw.random() < 0.2 else None)
            else:
                lender.beat(draw.choice((5, 200, 2_000)))
            assert sum(s.bound for s in lender.of) <= slots, f"seed {seed}"
            assert all(s.lent >= 1 for s in lender.of), f"seed {seed}"


def test_a_new_session_is_lent_what_the_old_one_was() -> None:
    lender = Lender(8, 2)
    lender.grant(lender.of[0], 4)
    lender.beat()
    new: Any = lender.sessions.renew(lender.of[1], lender.now)
    assert (new.lent, new.held) == (1, 1)
