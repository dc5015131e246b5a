"""The figures of docs/benchmarks.md: a table and a JSON file.

python -m benchmarks [RUNS]             rates, latencies and recoveries on a dev stack
python -m benchmarks stack [RUNS]       what a dev stack costs: start, idleness, progress, checkpoints
python -m benchmarks together           200 processes and 10,000 async tasks at the same time
python -m benchmarks cold [TASKS]       recovery with 1,000,000 tasks
python -m benchmarks scale [MOST]       cost of each input as the state grows to 1,000,000 tasks
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks import bare, cold, scale, together
from benchmarks.engine import EngineBench
from benchmarks.failover import FailoverBench
from benchmarks.measure import Row, show
from benchmarks.stack import rows as stack_rows
from benchmarks.stack import start_rows
from benchmarks.work import WorkBench
from perdure.cli_dev import launch
from perdure.dev import stop_running

_RESULTS = Path(__file__).parent / "results"


def told(rows: list[Row]) -> list[Row]:
    """Say what is known so far: the whole takes minutes."""
    for row in rows:
        print(f"{row.name}: {row.median:,.1f} {row.unit}", file=sys.stderr, flush=True)
    return rows


def main(words: list[str]) -> int:
    numbers = [int(word) for word in words if word.isdecimal()]
    match next((word for word in words if not word.isdecimal()), "work"):
        case "scale":
            scale.main(*numbers[:1])
        case "together":
            show(together.rows(), _RESULTS)
        case "cold":
            show(cold.rows(*numbers[:1] or [1_000_000]), _RESULTS)
        case "stack":
            show(on_stack(*numbers[:1] or [3]), _RESULTS)
        case "work":
            show(work(*numbers[:1] or [3]), _RESULTS)
        case other:
            print(f"there is no {other!r}: {__doc__}", file=sys.stderr)
            return 2
    return 0


def work(runs: int) -> list[Row]:
    """Everything on one stack's broker."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="perdure-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        stack = launch(folder / "stack", ("benchmarks.tasks",), slots=2, port=None)
        try:
            bench = WorkBench(stack, folder)
            rows += told(bare.rows(bench.log, runs))
            rows += told(bench.rows(runs))
            bench.close()
            engine = EngineBench(stack.bootstrap, folder)
            rows += told(engine.rows(runs))
            engine.close()
            failover = FailoverBench(stack.bootstrap, folder)
            rows += told(failover.rows(runs))
            failover.close()
        finally:
            stop_running(folder / "stack")
    return rows


def on_stack(runs: int) -> list[Row]:
    """What a dev stack costs."""
    with tempfile.TemporaryDirectory(prefix="perdure-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        rows = told(start_rows(folder, runs))
        running = launch(folder / "stack", ("benchmarks.tasks",), slots=2, port=None)
        try:
            return rows + told(stack_rows(running, runs))
        finally:
            stop_running(folder / "stack")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
