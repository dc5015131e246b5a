"""Which checkpoints of a running task stay in the store, on real processes (G3)."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.integration.stack import Stack, stack_on, until

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]


@pytest.fixture
def stack(kafka_bootstrap: str, topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    with stack_on(kafka_bootstrap, topic_prefix, tmp_path) as made:
        yield made


def test_checkpoints_go_as_newer_ones_are_recorded_and_stay_while_no_engine_records(
    stack: Stack, tmp_path: Path
) -> None:
    engine = stack.engine()
    stack.worker("--slots", "1", name="w")
    gates = tmp_path / "gates"
    gates.mkdir()
    task = stack.submit("saved", {"gates": str(gates), "count": 30})

    def kept() -> list[int]:
        return sorted(int(path.name.partition("-")[0]) for path in (tmp_path / "checkpoints").glob("*/0*-*"))

    def save(version: int) -> list[int]:
        (gates / str(version)).touch()
        until(f"checkpoint {version}", lambda: version in kept(), 30)
        return kept()

    def is_recorded(version: int) -> bool:
        return version in (event.version for event in stack.events(task.id, "CheckpointRecorded"))

    def save_until_few(version: int) -> int:
        """Save until only the three newest recorded ones are left, and what the engine has not spoken of yet.

        Not faster than it records them: where that takes longer than a save, more wait for its word.
        """
        while len(save(version)) > 5:
            until(f"checkpoint {version} in the log", partial(is_recorded, version))
            version += 1
            assert version < 30, f"nothing is deleted: {kept()}"
        return version

    for version in range(1, 6):
        save(version)
    recorded = save_until_few(6)
    engine.signal(signal.SIGSTOP)
    for version in range(recorded + 1, recorded + 8):
        save(version)
    assert set(range(recorded - 1, recorded + 8)) <= set(kept()), "a resume would begin from one of these"
    engine.signal(signal.SIGCONT)
    last = save_until_few(recorded + 8)
    assert min(kept()) > recorded
    for version in range(last + 1, 31):
        (gates / str(version)).touch()
    assert stack.result(task) == 30
