"""`python -m benchmarks [RUNS]` and `python -m benchmarks scale [MOST]`: a table and a JSON file."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks import bare, scale
from benchmarks.engine import EngineBench
from benchmarks.failover import FailoverBench
from benchmarks.measure import Row, show
from benchmarks.work import WorkBench
from perdure.cli_dev import launch
from perdure.dev import stop_running


def told(rows: list[Row]) -> list[Row]:
    """Say what is known so far: the whole takes minutes."""
    for row in rows:
        print(f"{row.name}: {row.median:,.1f} {row.unit}", file=sys.stderr, flush=True)
    return rows


def main() -> int:
    if sys.argv[1:2] == ["scale"]:
        scale.main(*map(int, sys.argv[2:3]))
        return 0
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="perdure-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        stack = launch(folder / "stack", ("benchmarks.tasks",), slots=2, port=None)
        try:
            work = WorkBench(stack, folder)
            rows += told(bare.rows(work.log, runs))
            rows += told(work.rows(runs))
            work.close()
            engine = EngineBench(stack.bootstrap, folder)
            rows += told(engine.rows(runs))
            engine.close()
            failover = FailoverBench(stack.bootstrap, folder)
            rows += told(failover.rows(runs))
            failover.close()
        finally:
            stop_running(folder / "stack")
    show(rows, Path(__file__).parent / "results")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
