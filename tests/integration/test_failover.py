"""Several engine hosts in one group: whoever is lost, the others go on with the same state (G1, G2, G5).

Hosts are state directories of their own on one machine: they share nothing but the broker.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.stack import Process, Stack, stack_on, stopped, until
from tests.integration.traffic import traffic_on

pytestmark = pytest.mark.kafka
GATED = str(Path(__file__).with_name("gated_engine.py"))
UP_TO_DATE = "is up to date"


@pytest.fixture
def stack(kafka_bootstrap: str, topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    with stack_on(kafka_bootstrap, topic_prefix, tmp_path) as made:
        yield made


def host(stack: Stack, name: str, *program: str) -> Process:
    """An engine on a host of its own; it has joined nothing yet."""
    return stack.process(f"engine-{name}", *(program or ("-m", "perdure.cli")), "engine", host=name)


def shared_out(stack: Stack, *engines: Process) -> None:
    """Wait until every engine has partitions that are up to date."""
    for engine in engines:
        engine.await_text(UP_TO_DATE)


def equal(stack: Stack, last: Process, name: str) -> None:
    """After the others are gone: what the last host's stores hold is what the changelog says."""
    last.await_text(UP_TO_DATE, stack.log.partitions)
    stack.check_store(last, host=name)


def test_a_host_that_is_lost_is_replaced_by_the_others(stack: Stack) -> None:
    first, second = host(stack, "a").start(), host(stack, "b").start()
    with traffic_on(stack, second) as traffic:
        shared_out(stack, first, second)
        traffic.flows()
        first.kill()
        traffic.flows()
        second.await_text(UP_TO_DATE, stack.log.partitions)
        third = host(stack, "c").start()
        shared_out(stack, third)
        traffic.flows()
        assert third.stop() == 0
        traffic.stop()
    equal(stack, second, "b")


def test_a_host_with_warm_copies_takes_over_where_the_lost_one_was(stack: Stack) -> None:
    stack.environment["PERDURE_STANDBYS"] = "true"
    first, second = host(stack, "a").start(), host(stack, "b").start()
    with traffic_on(stack, second) as traffic:
        shared_out(stack, first, second)
        second.await_text("has a warm copy here", stack.log.partitions // 2)
        traffic.flows()
        first.kill()
        traffic.flows()
        second.await_text("is taken, which stands at", stack.log.partitions // 2)
        traffic.stop()
    equal(stack, second, "b")


def test_a_host_that_stood_still_longer_than_its_session_changes_nothing_any_more(stack: Stack) -> None:
    zombie, heir = host(stack, "a").start(), host(stack, "b").start()
    with traffic_on(stack, heir) as traffic:
        shared_out(stack, zombie, heir)
        traffic.flows()
        with stopped(zombie.pid):  # in the middle of whatever it does
            heir.await_text(UP_TO_DATE, 2 + stack.log.partitions)
            traffic.flows()
        until("the zombie's end or return", lambda: not zombie.runs() or zombie.text().count(UP_TO_DATE) > 2)
        traffic.flows()
        if zombie.runs():
            assert zombie.stop() == 0
        traffic.stop()
    equal(stack, heir, "b")


@pytest.mark.slow
def test_who_joins_and_leaves_while_state_is_restored_is_right_in_the_end(stack: Stack) -> None:
    first = stack.engine()
    with traffic_on(stack) as traffic:
        traffic.flows()
        traffic.stop()
    assert first.stop() == 0
    gate = stack.folder / "gate"
    slow = host(stack, "slow", GATED).start()
    slow.await_text("waits at the gate")  # a part of the state is in its stores
    other = host(stack, "other", GATED).start()
    other.await_text("waits at the gate")
    other.kill()
    third = host(stack, "third", GATED).start()
    third.await_text("waits at the gate")
    assert third.stop() == 0, "it leaves in the middle of its restore"
    gate.touch()
    with traffic_on(stack, slow) as again:
        again.flows()
        again.stop()
    equal(stack, slow, "slow")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_storm_of_joins_and_leaves(stack: Stack) -> None:
    """Hosts come before the last one's session is over, and go by a kill or in order, by turns."""
    steady = host(stack, "steady").start()
    with traffic_on(stack, steady) as traffic:
        shared_out(stack, steady)
        for number in range(6):
            guest = host(stack, f"guest-{number}").start()
            shared_out(stack, guest)
            if number % 2:
                guest.kill()
            else:
                assert guest.stop() == 0
        traffic.flows()
        traffic.stop()
    equal(stack, steady, "steady")


def test_two_hosts_on_copies_of_one_state_directory_are_told(stack: Stack) -> None:
    """Both are the same member to the group: one of them ends, and says why."""
    original = host(stack, "a").start()
    original.await_text(UP_TO_DATE, stack.log.partitions)
    with traffic_on(stack) as traffic:
        traffic.flows()
        shutil.copytree(stack.folder / "a", stack.folder / "b")
        copy = host(stack, "b").start()
        until("the end of one of them", lambda: not (original.runs() and copy.runs()))
        told, other = (original, copy) if copy.runs() else (copy, original)
        assert told.ended() != 0
        assert "Another process has its name: two hosts work on copies of one state directory" in told.text()
        traffic.flows()
        traffic.stop()
    equal(stack, other, "b" if other is copy else "a")
