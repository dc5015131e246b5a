"""How many records share a transaction: more where they are quick to execute, so that none waits long for the others."""

from __future__ import annotations

import pytest

from perdure.schemas import limits
from perdure.streams.runner import most_records


@pytest.mark.parametrize(
    ("record_cpu_s", "most"),
    [
        (0.0, limits.BATCH_RECORDS),  # nothing is executed yet, or all of it was executed before
        (1.0, limits.BATCH_RECORDS),
        (150e-6, limits.BATCH_RECORDS),
        (25e-6, 2_000),
        (10e-6, 5_000),
        (1e-6, limits.BATCH_RECORDS_QUICK),
    ],
)
def test_a_transaction_takes_as_many_as_are_executed_in_little_time(record_cpu_s: float, most: int) -> None:
    assert most_records(record_cpu_s) == pytest.approx(most, abs=1)
