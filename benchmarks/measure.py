"""Runs, medians and the table."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass
class Row:
    """One figure: the median over runs, with the smallest and the largest."""

    name: str
    unit: str
    wanted: str
    runs: list[float]

    @property
    def median(self) -> float:
        """The figure to quote."""
        return statistics.median(self.runs)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def repeat(count: int, run: Callable[[], float]) -> list[float]:
    """The results of several runs."""
    return [run() for _ in range(count)]


def until(ready: Callable[[], bool], what: str, timeout_s: float = 120.0, pause_s: float = 0.001) -> None:
    """Wait for a condition. Raises `TimeoutError`."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {timeout_s:g} s")
        time.sleep(pause_s)


def show(rows: Sequence[Row], folder: Path) -> None:
    """Print the table and write the JSON file."""
    table = Table("what", "median", "min to max", "wanted", title="Perdure on this machine")
    for row in rows:
        spread = f"{min(row.runs):,.1f} to {max(row.runs):,.1f}"
        table.add_row(row.name, f"{row.median:,.1f} {row.unit}", spread, row.wanted)
    Console(width=120).print(table)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    machine = {"cores": os.cpu_count(), "load_1min": os.getloadavg()[0]}
    path.write_text(
        json.dumps({"machine": machine, "rows": [asdict(r) | {"median": r.median} for r in rows]}, indent=1)
    )
    print(f"written to {path}")
