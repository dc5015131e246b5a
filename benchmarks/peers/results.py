"""The results file: what was measured, when, where, with what; the page is made of it alone."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("results.json")


@dataclass(frozen=True)
class Figure:
    """One thing that is compared."""

    key: str
    workload: str
    title: str
    unit: str
    more_is_better: bool
    digits: int

    def text(self, value: float) -> str:
        """A value as it is shown."""
        return f"{value:,.{self.digits}f}"


TASKS = (
    Figure("tasks_per_s", "W1", "Tiny tasks", "tasks/s", True, 0),
    Figure("start_p50_ms", "W2", "Submit to start, p50", "ms", False, 1),
    Figure("start_p99_ms", "W2", "Submit to start, p99", "ms", False, 1),
    Figure("steps_per_s", "W3", "Durable steps in sequence", "steps/s", True, 0),
    Figure("next_step_s", "W4", "SIGKILL of the worker to the next step", "s", False, 2),
    Figure("worker_pss_mb", "W5", "Memory of the worker, idle", "MB", False, 0),
    Figure("server_pss_mb", "W5", "Memory of the servers, idle", "MB", False, 0),
    Figure("idle_cpu_percent", "W5", "CPU, idle", "% of a core", False, 1),
)
STREAM = (
    Figure("S100k_per_s", "S100k", "Stream, 100,000 records", "records/s", True, 0),
    Figure("S100k_wall_s", "S100k", "From start to the last of 100,000", "s", False, 1),
    Figure("S1M_per_s", "S1M", "Stream, 1,000,000 records", "records/s", True, 0),
    Figure("S1M_wall_s", "S1M", "From start to the last of 1,000,000", "s", False, 1),
    Figure("S1M_cpu_us", "S1M", "CPU of a record, of 1,000,000", "µs", False, 0),
    Figure("S1M_rss_mb", "S1M", "Memory at the end of 1,000,000", "MB", False, 0),
)


@dataclass
class Measured:
    """What one peer has shown so far; `runs` and `failures` by workload."""

    title: str
    durability: str
    settings: str
    workloads: list[str]
    versions: dict[str, str] = field(default_factory=dict)
    runs: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    failures: dict[str, list[str]] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)

    def values(self, figure: str) -> list[float]:
        """All runs' values of one figure."""
        return [run[figure] for runs in self.runs.values() for run in runs if figure in run]

    def median(self, figure: str) -> float | None:
        """The figure to quote, if there is one."""
        found = self.values(figure)
        return statistics.median(found) if found else None


@dataclass
class Results:
    """One file."""

    machine: dict[str, Any]
    counts: dict[str, int]
    peers: dict[str, Measured] = field(default_factory=dict)

    @classmethod
    def begin(cls, counts: dict[str, int], provisional: str | None) -> Results:
        """An empty one, of now and here."""
        return cls(_machine() | {"provisional": provisional}, counts)

    @classmethod
    def load(cls, path: Path) -> Results:
        """As it was written."""
        known = json.loads(path.read_text())
        return cls(known["machine"], known["counts"], {name: Measured(**m) for name, m in known["peers"].items()})

    def save(self, path: Path) -> None:
        """Write the file."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def _machine() -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()
