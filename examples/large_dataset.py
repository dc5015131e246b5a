"""One long loop over a data set: a step that is never repeated, a position that survives, progress that can be watched.

perdure dev --tasks examples/large_dataset.py
perdure submit process_large_dataset --input '{"dataset_path": "large.csv"}'
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from perdure import Context, Retry, task

BATCH_ROWS = 1_000


@task(checkpoint_interval="5m", timeout="12h", retry=Retry(max_attempts=3, retry_on=["OSError", "TimeoutError"]))
def process_large_dataset(ctx: Context, dataset_path: str) -> dict[str, Any]:
    """Sum up the amounts in a CSV file, batch by batch."""
    schema = ctx.step("read-schema", read_schema, dataset_path)  # recorded once, never run again
    ctx.state.setdefault("sum", 0)
    for batch in ctx.track(batches(dataset_path), total=schema["batches"]):  # resumes at the last checkpoint
        ctx.state["sum"] += sum(int(row["amount"]) for row in batch)  # saved together with the position
    ctx.milestone("aggregated")
    return {"sum": ctx.state["sum"], "columns": schema["columns"]}


def read_schema(path: str) -> dict[str, Any]:
    """What there is to do."""
    with Path(path).open(newline="") as file:
        rows = csv.reader(file)
        columns = next(rows)
        return {"columns": columns, "batches": -(-sum(1 for _ in rows) // BATCH_ROWS)}


def batches(path: str) -> Iterator[list[dict[str, str]]]:
    """The rows of the file, a thousand at a time; the same ones in the same order whenever it is called."""
    with Path(path).open(newline="") as file:
        rows = csv.DictReader(file)
        while batch := list(islice(rows, BATCH_ROWS)):
            yield batch
