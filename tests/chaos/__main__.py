"""The fault campaign: `python -m tests.chaos`; see docs/chaos.md.

Exit code 0: no violation. 1: some. 2: usage.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tests.chaos.campaign import Campaign, Tally, campaign
from tests.chaos.faults import KINDS, schedule
from tests.chaos.proof import audited, proved
from tests.chaos.watch import Violation


def main() -> int:
    """Run a campaign and print its table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description="Faults under load, and the proof after them."
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="how long faults are injected (5)")
    parser.add_argument(
        "--seed", type=int, default=None, help="the order and the choices of the faults; default: new ones"
    )
    parser.add_argument("--kinds", default="", help="only these kinds, with commas between them")
    parser.add_argument("--json", type=Path, default=None, help="write everything that was found to this file")
    parser.add_argument("--keep", type=Path, default=None, help="leave logs and data in this empty folder")
    parser.add_argument(
        "--brokers", type=int, choices=(1, 3), default=1, help="one behind a proxy, or three with replicas"
    )
    given = parser.parse_args()
    seed = int.from_bytes(os.urandom(3)) if given.seed is None else given.seed
    kinds = [k for k in KINDS if not given.kinds or k.kind in given.kinds.split(",")]
    if not kinds:
        parser.error(f"there are {', '.join(k.kind for k in KINDS)}")
    print(f"seed {seed}, {given.minutes:g} minutes, {len(kinds)} kinds of faults", flush=True)
    with tempfile.TemporaryDirectory(prefix="perdure-chaos-") as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        with campaign(folder, seed, say=lambda line: print(line, flush=True), brokers=given.brokers) as c:
            skipped = {k.kind: why for k in kinds if (why := k.needs(c))}
            end = time.monotonic() + given.minutes * 60
            for fault in schedule(seed, [k for k in kinds if k.kind not in skipped]):
                if time.monotonic() >= end:
                    break
                c.inject(fault.kind, fault.inject)
            print("every fault is over; the rest of the work, and the proof", flush=True)
            c.end()
            return _report(c, [*proved(c), *audited(c)], skipped, given.json)


def _report(c: Campaign, violations: list[Violation], skipped: dict[str, str], file: Path | None) -> int:
    elsewhere = [v for v in violations if not _counted(c, v)]
    print(_table(c.tallies))
    for kind, why in skipped.items():
        print(f"not injected here: {kind}: {why}")
    for end, times in Counter(c.ends).items():
        print(f"ended by itself, {times} times: {end.name}, code {end.code}, during {end.fault}: {end.words}")
    for line in c.kafkas_own:
        print(f"Kafka's own, the broker was restarted: {line}")
    for violation in violations:
        print(f"VIOLATION: {violation.what}")
    faults = sum(t.times for t in c.tallies.values())
    tasks, events = len(c.load.wanted), c.observer.events
    steps = sum(len(life.steps) for life in c.observer.lives.values())
    executions = sum(map(len, c.witness.executions.values()))
    print(
        f"seed {c.seed}: faults {faults} of {len(c.tallies)} kinds, tasks {tasks}, recorded steps {steps}, executions "
        f"{executions}, hostile records {len(c.hostile)}, events {events}, load "
        f"{os.getloadavg()[1]:.1f} on {os.cpu_count()} cores; violations {len(violations)}"
        + (f" ({len(elsewhere)} that no fault can be named for)" if elsewhere else "")
    )
    if file is not None:
        said = {
            "seed": c.seed, "faults": {kind: asdict(t) for kind, t in c.tallies.items()}, "skipped": skipped,
            "ends": [asdict(e) for e in c.ends], "violations": [asdict(v) for v in violations], "load": os.getloadavg(),
            "tasks": tasks, "steps": steps, "executions": executions, "events": events,
            "order": [h.kind for h in c.happenings], "kafkas_own": c.kafkas_own,
        }  # fmt: skip
        file.write_text(json.dumps(said, indent=1))
    return 1 if violations else 0


def _counted(c: Campaign, violation: Violation) -> bool:
    """Put a violation down to the last fault that was injected before it, if it has a time."""
    before = [h for h in c.happenings if violation.at is not None and h.began_at <= violation.at]
    if before:
        c.tallies[before[-1].kind].violations += 1
    return bool(before)


def _table(tallies: dict[str, Tally]) -> str:
    rows = [f"{'fault':34}{'times':>6}{'violations':>12}{'ended':>7}{'p50 s':>9}{'p99 s':>9}{'max s':>9}"]
    for kind, tally in sorted(tallies.items()):
        took = sorted(tally.recoveries)
        ranks = (0.5, 0.99, 1.0) if took else ()
        figures = "".join(f"{took[max(0, math.ceil(len(took) * rank) - 1)]:9.2f}" for rank in ranks)
        rows.append(f"{kind:34}{tally.times:6}{tally.violations:12}{tally.ends:7}{figures}")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
