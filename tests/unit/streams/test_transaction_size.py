"""How many records share a transaction, and how many may wait for one."""

from __future__ import annotations

import pytest

from perdure.schemas import limits
from perdure.streams.lane import most_records
from perdure.streams.runner import most_waiting


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


def test_what_waits_is_bounded_for_the_process_and_never_too_little_for_a_partition() -> None:
    assert [most_waiting(n) for n in (0, 1, 4, 16, 100)] == [80_000, 80_000, 20_000, 5_000, 5_000]
