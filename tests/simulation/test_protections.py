"""Each protection matters: with it switched off, a violation appears.

A protection is switched off by one change of its text. Where the simulator finds its absence soon, the seed beside it is
one that did; should the simulator have changed since, the search goes on through the other seeds that CI lives. What
takes a rarer coincidence is shown by a scenario of its own, which holds with the protection and fails without it.
By hand, the simulator on all of them, and further: PERDURE_SEARCH=2000 pytest -s tests/simulation/test_protections.py
"""

from __future__ import annotations

import inspect
import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

import pytest

from perdure.streams import attempts, clock, decide, leases, routing, submit, timers
from perdure.streams.duties import Duties
from perdure.streams.engine import Engine
from perdure.streams.shard import Shard
from perdure.streams.task_change import TaskChange
from tests.simulation.simulator import Simulator
from tests.unit.streams import test_attempts, test_clock, test_duties, test_routing, test_takeover

BY_HAND = "PERDURE_SEARCH" in os.environ
SEARCH = int(os.environ.get("PERDURE_SEARCH", "200"))


@dataclass(frozen=True)
class Protection:
    function: Callable[..., Any]
    text: str
    without: str
    seed: int | None = None
    """One that finds it missing."""
    shown_by: Callable[[], None] | None = None
    """A scenario that fails without it."""


PROTECTIONS = {
    "an old epoch's reports change nothing": Protection(
        attempts._fault,
        't.epoch != e.epoch or t.state != "RUNNING" or t.session != session',
        't.state != "RUNNING"',
        seed=13,
    ),
    "a report carries the grant's token": Protection(attempts._fault, "not token_holds", "False", seed=8),
    "worker records are signed": Protection(
        Engine._read, "authentic(data, message, self._keys.worker)", "True", seed=41
    ),
    "host records are signed": Protection(
        Engine._read,
        "return Input(message, authentic(data, message, self._keys.engine))",
        "return Input(message, True)",
        seed=8,
    ),
    "a repeated report is dropped": Protection(attempts.entry, "report.seq <= last", "False", seed=43),
    "a gap in reports ends the epoch": Protection(
        attempts.entry,
        "report.seq > last + 1",
        "False",
        shown_by=test_attempts.test_a_gap_ends_the_epoch_and_what_follows_it_is_lost,
    ),
    "a recorded step is not recorded again": Protection(
        attempts._fault_of_step,
        "known is not None and not _may_rerun(s, task_id, known, report)",
        "False",
        shown_by=test_attempts.test_a_recorded_step_is_never_recorded_again,
    ),
    "forwarded records are numbered": Protection(
        routing.is_next, 'record.number == s.counter(f"taken/{record.source}") + 1', "True", seed=2
    ),
    "forwarded records are sent again": Protection(
        Duties._send_outbox,
        "now >= way.due or way.since > now",
        "False",
        shown_by=test_routing.test_an_acknowledgement_that_never_comes_is_asked_for_by_sending_again,
    ),
    "forwarded records that were taken are acknowledged again": Protection(
        decide._host,
        'yield Acknowledge(record.source, s.counter(f"taken/{record.source}"))',
        "return",
        shown_by=test_routing.test_a_lost_acknowledgement_is_given_again_when_the_record_is_sent_again,
    ),
    "answers are kept": Protection(
        decide._execute,
        "stored: rows.Answer | None = s.get(scope, suffix)",
        "stored: rows.Answer | None = None",
        seed=17,
    ),
    "an older configuration is not applied": Protection(
        decide._apply_config, "known is not None and known.version >= record.version", "False", seed=4
    ),
    "a lease ends at the second tick that finds no beat": Protection(
        leases.examine, "not session.suspected", "False", seed=20
    ),
    "a late tick restarts the leases": Protection(
        timers.tick,
        "m.at - record.due > limits.BEAT_MS or leases.overdue(s, m)",
        "False",
        shown_by=test_duties.test_a_tick_that_could_not_be_written_in_time_is_late,
    ),
    "a leap of the clock has to be confirmed": Protection(
        clock.adjust, "leap = step > limits.CLOCK_AGREES_MS", "leap = False", seed=9
    ),
    "a tick counts only where host and broker agree": Protection(
        timers.tick,
        "not clock.agrees(record, m.at)",
        "False",
        shown_by=test_clock.test_disagreeing_clocks_fire_nothing_and_say_so,
    ),
    "timers that were set in doubt are set right": Protection(
        TaskChange.arm,
        "relative and self.s.clock.unconfirmed > 0",
        "False",
        shown_by=test_clock.test_many_timers_set_while_the_clock_is_ahead_all_come_back,
    ),
    "a start time that may have passed is left to a tick": Protection(
        submit.submit,
        "s.clock.unconfirmed",
        "False",
        shown_by=test_clock.test_a_start_time_that_the_clock_has_only_passed_by_being_ahead_is_kept_to,
    ),
    "what the store lacks is read from the changelog": Protection(
        Shard._begin_restore,
        "(self.kind.changelog, self.partition): begin}",
        "(self.kind.changelog, self.partition): self._target}",
        seed=0,
    ),
    "an aborted transaction drops the overlay": Protection(
        Shard.run_batch, "self.processor.rolled_back()\n            failures += 1", "failures += 1", seed=29
    ),
    "an unknown outcome is not taken for a commit": Protection(
        Shard.run_batch,
        "self._found_committed(records[-1], still_mine)",
        "(self._found_committed(records[-1], still_mine), 1)",
        seed=41,
    ),
    "what is executed is not executed again": Protection(
        Shard._transact,
        "unexecuted(records, self.processor.positions())",
        "list(records)",
        shown_by=lambda: test_takeover.test_what_is_handed_over_twice_is_executed_once(test_takeover.log_of_garbage()),
    ),
}


def switch_off(monkeypatch: pytest.MonkeyPatch, protection: Protection) -> None:
    """Change the function's code, so wherever it is called from."""
    function = protection.function
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(protection.text) == 1, f"{function.__qualname__} has no longer just one {protection.text!r}"
    module = compile(
        source.replace(protection.text, protection.without), "<without>", "exec", annotations.compiler_flag
    )
    found = (c for c in module.co_consts if isinstance(c, CodeType) and c.co_name == function.__name__)
    monkeypatch.setattr(function, "__code__", next(found))


def found_by(seeds: list[int]) -> tuple[int, str] | None:
    """The first of the seeds that finds something, and what."""
    for seed in seeds:
        try:
            Simulator(seed).run()
        except Exception as error:  # noqa: BLE001 - a violation is what is looked for, also one that breaks the engine
            return seed, f"{type(error).__name__}: {str(error)[:300]}"
    return None


@pytest.mark.parametrize("name", [name for name, p in PROTECTIONS.items() if BY_HAND or p.seed is not None])
def test_without_it_the_simulator_finds_a_violation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    protection = PROTECTIONS[name]
    switch_off(monkeypatch, protection)
    found = found_by([*([] if protection.seed is None else [protection.seed]), *range(SEARCH)])
    print(f"{name}: {found}")  # read with -s to renew the seeds
    assert found is not None


@pytest.mark.parametrize("name", [name for name, p in PROTECTIONS.items() if p.seed is None])
def test_without_it_its_scenario_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = PROTECTIONS[name].shown_by
    assert scenario is not None, "a protection without a seed has a scenario"
    scenario()
    switch_off(monkeypatch, PROTECTIONS[name])
    with pytest.raises(AssertionError):
        scenario()
