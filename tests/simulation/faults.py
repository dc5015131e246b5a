"""The kinds of faults that a simulated life may have, and how often: kind -> (what happens, every so many ms).

A kind without a period is not an event but a way in which things happen; the simulator and its workers ask for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from perdure.schemas import commands
from tests.simulation import hostile
from tests.simulation.workers import CONTROLS, Worker
from tests.world import HOUR, SECOND, crashed

if TYPE_CHECKING:
    from tests.simulation.simulator import Simulator


def _kill_worker(sim: Simulator) -> None:
    worker = sim.draw.choice(sim.workers)
    worker.die()
    sim.after(sim.draw.choice((0, 100, 5 * SECOND, HOUR)), worker.start)


def _kill_child(sim: Simulator) -> None:
    running = [a for a in sim.running() if sim.grants[a.grant.task_id] < 3]
    if running:
        sim.draw.choice(running).end(crashed(innocent=sim.draw.random() < 0.3))


def _twin(sim: Simulator) -> None:
    """A worker that hangs, and a new process under its name."""
    worker = sim.draw.choice(sim.workers)
    if not worker.gone and len(sim.workers) < 5:
        worker.hush(sim.draw.choice((0, 3_000, 15_000)))
        newer = Worker(sim, worker.name)
        sim.workers.append(newer)
        newer.start()


def _outage(sim: Simulator) -> None:
    """The broker is away; nobody's records arrive, and workers may find it again later than hosts."""
    away = sim.draw.choice((SECOND, 5 * SECOND, 15 * SECOND))
    sim.silent_until = max(sim.silent_until, sim.now + away)
    for worker in sim.workers:
        worker.hush(away + sim.draw.choice((0, 4_000, 8_000)))


def _stall(sim: Simulator) -> None:
    """The engine hangs, and goes on."""
    if sim.host is not None:
        sim.host.stalled_until = sim.now + sim.draw.choice((SECOND, 5 * SECOND, 20 * SECOND))


def _ask(sim: Simulator) -> None:
    """Anything may be asked of a task that allows for it, at any moment; and any task may be looked at."""
    wild = [task_id for task_id in sim.plans if "/wild" in task_id]
    if wild:
        sim.ask(sim.draw.choice(CONTROLS), sim.draw.choice(wild))
    sim.ask(sim.draw.choice((commands.DescribeTask, commands.AwaitTask)), sim.draw.choice(list(sim.plans)))


def _broker_clock(sim: Simulator) -> None:
    """Not as wrong as the host's: two clocks that lie alike nobody can tell from two that are right."""
    skew = sim.draw.choice((0, 0, HOUR, -HOUR, 700))
    sim.set_broker_clock(0 if skew == sim.host_skew else skew)


def _host_clock(sim: Simulator) -> None:
    """See `_broker_clock`."""
    skew = sim.draw.choice((0, 0, 700, -700, 20 * SECOND, -20 * SECOND, HOUR, -HOUR))
    sim.host_skew = 0 if skew == sim.world.skew else skew
    sim.wake_all()


def _slow(sim: Simulator) -> None:
    sim.slow = sim.draw.choice((0, 1_000, 15_000))


def _hush(sim: Simulator) -> None:
    sim.draw.choice(sim.workers).hush(sim.draw.choice((9_000, 13_000)))


FAULTS: dict[str, tuple[Callable[[Simulator], None], int]] = {
    "kill worker": (_kill_worker, 8 * SECOND),
    "kill child": (_kill_child, 6 * SECOND),
    "shut worker": (lambda sim: sim.draw.choice(sim.workers).shut_down(), 15 * SECOND),
    "twin": (_twin, 12 * SECOND),
    "hush": (_hush, 10 * SECOND),
    "kill engine": (lambda sim: sim.kill_engine(sim.draw.choice((100, SECOND, 12 * SECOND))), 8 * SECOND),
    "stall": (_stall, 10 * SECOND),
    "take over": (lambda sim: sim.take_over(), 10 * SECOND),
    "outage": (_outage, 15 * SECOND),
    "slow": (_slow, 10 * SECOND),
    "broker clock": (_broker_clock, 8 * SECOND),
    "host clock": (_host_clock, 8 * SECOND),
    "configuration": (hostile.configure, 6 * SECOND),
    "ask": (_ask, 2 * SECOND),
    "hostile": (hostile.attack, SECOND),
    "submit": (hostile.submit, 3 * SECOND),
} | dict.fromkeys(
    ("crash", "transactions", "late appends", "lost report", "disks", "duplicates", "astray", "lag"),
    (lambda sim: None, 0),
)  # fmt: skip
