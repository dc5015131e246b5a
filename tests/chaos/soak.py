"""`python -m tests.chaos.soak --hours H`: a stack under load for hours, a fault now and then, and whether it stays as it is.

Only faults that no process ends by, so that what leaks in one has time to show: the processes at the end are those of the
beginning. Exit code 0: nothing was lost, nothing has grown. 1: something. 2: usage.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.chaos.campaign import Campaign, campaign
from tests.chaos.faults import KINDS, schedule
from tests.chaos.proof import audited, proved
from tests.chaos.watch import Violation

GENTLE = frozenset({
    "kill-child", "kill-shared-child", "worker-joins-and-leaves", "stop-engine", "stop-worker", "kill-broker",
    "restart-broker", "stop-broker", "reset-links", "cut-links", "silent-links", "slow-links", "hung-transaction", "poison",
})  # fmt: skip
EVERY_S = 10.0
"""Between two looks."""
_SHARE = 0.1
_SPARE = {"memory, MB": 20.0, "open files": 20.0, "threads": 5.0}
"""What may come and go without anything leaking."""


@dataclass(frozen=True)
class Look:
    """One process at a moment."""

    pid: int
    figures: Mapping[str, float]


class Watcher(threading.Thread):
    """Looks at every process of the stack now and then."""

    def __init__(self, c: Campaign) -> None:
        super().__init__(name="watcher", daemon=True)
        self._services = (*c.engines, *c.workers, c.server)
        self.looks: dict[str, list[Look]] = {service.name: [] for service in self._services}
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.wait(EVERY_S):
            for service in self._services:
                try:
                    self.looks[service.name].append(look_at(service.process.pid))
                except psutil.Error:
                    continue  # it is being started again

    def stop(self) -> None:
        """Look no more."""
        self._stopping.set()
        self.join()


def look_at(pid: int) -> Look:
    """A process, without those below it."""
    process = psutil.Process(pid)
    figures = {
        "memory, MB": process.memory_info().rss / 1e6,
        "open files": float(process.num_fds()),
        "threads": float(process.num_threads()),
    }
    return Look(pid, figures)


def grown(name: str, looks: Sequence[Look]) -> Iterator[str]:
    """What a process's last life holds more of in its last quarter than in its second one."""
    life = [look for look in looks if looks and look.pid == looks[-1].pid]
    quarter = len(life) // 4
    if quarter < 3:
        yield f"{name}: it lived for too short a time to tell"
        return
    for what, spare in _SPARE.items():
        early = statistics.median(look.figures[what] for look in life[quarter : 2 * quarter])
        late = statistics.median(look.figures[what] for look in life[-quarter:])
        if late - early > max(spare, early * _SHARE):
            yield f"{name}: {what} rose from {early:,.0f} to {late:,.0f}"


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue  # compaction has just deleted it
    return total


def main() -> int:
    """Run, and say how it was."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak", description=__doc__)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--every", type=float, default=120.0, help="seconds between two faults (120)")
    parser.add_argument("--seed", type=int, default=None)
    given = parser.parse_args()
    seed = int.from_bytes(os.urandom(3)) if given.seed is None else given.seed
    print(f"seed {seed}, {given.hours:g} hours", flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="perdure-soak-") as scratch,
        campaign(Path(scratch), seed, say=lambda line: print(line, flush=True)) as c,
    ):
        kinds = [kind for kind in KINDS if kind.kind in GENTLE and not kind.needs(c)]
        watcher = Watcher(c)
        watcher.start()
        end = time.monotonic() + given.hours * 3_600
        for fault in schedule(seed, kinds):
            if time.monotonic() + given.every >= end:
                break
            time.sleep(given.every)  # the load alone
            c.inject(fault.kind, fault.inject)
        time.sleep(max(0.0, end - time.monotonic()))  # the load alone
        watcher.stop()
        tasks = len(c.load.wanted)
        for part in ("state", "state-b", "state-server"):
            size = size_of(c.stack.folder / part)
            print(
                f"{part}: {size / 1e6:,.1f} MB on disk, {size / max(1, tasks) / 1e3:,.1f} kB for each of {tasks:,} tasks"
            )
        c.end()
        violations: list[Violation] = [*proved(c), *audited(c)]
        for name, looks in watcher.looks.items():
            if looks:
                print(f"{name}: " + ", ".join(f"{what} {value:,.0f}" for what, value in looks[-1].figures.items()))
            violations += [Violation(what) for what in grown(name, looks)]
    for violation in violations:
        print(f"VIOLATION: {violation.what}")
    print(f"{len(violations)} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
