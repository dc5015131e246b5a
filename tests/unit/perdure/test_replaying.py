"""Where a replay begins, and what another build decides."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from perdure.connectors.blobs import DirectoryBlobs
from perdure.replaying import OtherBuild, begin, next_after
from perdure.schemas import topics
from perdure.schemas.errors import ConfigurationError, EventsIncomplete
from perdure.streams.log import Record
from perdure.streams.redecide import Redecider
from perdure.streams.replay import Comparison, advance, inputs_of, replay
from perdure.streams.snapshots import FORMAT, Manifest, Place, Snapshots
from perdure.streams.store import RocksStore
from tests.simulation.simulator import a_life
from tests.world import KEYS, World

ROOT = Path(__file__).resolve().parent.parent.parent.parent


def busy(world: World) -> int:
    return max(range(world.partitions), key=world.executed)


def snapshot(world: World, partition: int, position: int, folder: Path) -> None:
    """One of the state before an input, as the engine takes them."""
    decider = Redecider(partition, world.partitions, KEYS)
    advance(decider, inputs_of(world.log, partition, 0, position))
    store = RocksStore(folder / f"store-{position}")
    store.apply(dict(decider.rows()))
    store.copy_to(folder / f"copy-{position}")
    store.close()
    place = Place("engine", partition, world.log.topic_id(topics.CHANGELOG.name))
    inputs = {topics.COMMANDS.name: position}
    Snapshots(DirectoryBlobs(folder / "blobs")).upload(
        folder / f"copy-{position}", lambda files: Manifest(FORMAT, place, position, inputs, world.now, "test", files)
    )


def test_a_replay_begins_at_the_latest_place_that_is_known_exactly(tmp_path: Path) -> None:
    world = a_life(7)
    partition = busy(world)
    executed = world.executed(partition)
    early, late = executed // 3, 2 * executed // 3
    snapshots = Snapshots(DirectoryBlobs(tmp_path / "blobs"))
    for position in (early, late):
        snapshot(world, partition, position, tmp_path)

    assert begin(world.log, snapshots, partition, None) == (0, [])
    assert begin(world.log, snapshots, partition, early - 1) == (0, [])
    assert begin(world.log, snapshots, partition, late - 1)[0] == early
    assert begin(world.log, snapshots, partition, executed)[0] == late

    world.log.truncate(topics.COMMANDS.name, partition, early)
    for wanted in (None, late - 1, late + 1):
        at, rows = begin(world.log, snapshots, partition, wanted)
        comparison = Comparison(partition, other_build=False)
        replay(world.log, Redecider(partition, world.partitions, KEYS, rows), comparison, at, executed)
        assert (comparison.divergence, comparison.tally.inputs) == (None, executed - at)
    for without, wanted in ((None, None), (snapshots, early - 1)):
        with pytest.raises(EventsIncomplete, match=f"begins at {early}, and no snapshot"):
            begin(world.log, without, partition, wanted)


def build(folder: Path, **changes: str) -> Path:
    """This build with a text in its decisions replaced."""
    for name in ("perdure", "schemas", "streams", "projections", "connectors"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    decision = folder / "streams" / "decision.py"
    text = decision.read_text()
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    decision.write_text(text)
    return folder


def test_another_build_decides_in_a_process_of_its_own(tmp_path: Path) -> None:
    world = a_life(7)
    partition = busy(world)
    executed = world.executed(partition)
    own = Redecider(partition, world.partitions, KEYS)
    advance(own, inputs_of(world.log, partition, 0, executed // 2))

    other = build(tmp_path / "other", **{'BUILD = "0.1.0"': 'BUILD = "next"'})
    with OtherBuild(other, partition, world.partitions, KEYS, own.rows()) as decider:
        assert decider.build == "next"
        comparison = Comparison(partition, other_build=True)
        replay(world.log, decider, comparison, executed // 2, executed)
    assert (comparison.divergence, comparison.tally.inputs) == (None, executed - executed // 2)
    assert comparison.tally.events > 0

    shifted = build(tmp_path / "shifted", **{'"at": m.at': '"at": m.at + 1'})
    with OtherBuild(shifted, partition, world.partitions, KEYS, own.rows()) as decider:
        comparison = Comparison(partition, other_build=True)
        replay(world.log, decider, comparison, executed // 2, executed)
    assert comparison.divergence is not None
    assert set(comparison.divergence.fields) == {"at"}


@pytest.mark.parametrize(("place", "told"), [(ROOT, "no other build"), (ROOT / "docs", "is no build of Perdure")])
def test_what_is_no_other_build_is_refused(place: Path, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        OtherBuild(place, 0, 2, KEYS, [])


@pytest.mark.parametrize(("at", "behind"), [(5, 0), (10, 1), (12, 4), (99, 4), (None, None)])
def test_a_slice_ends_behind_the_last_input_of_its_time(at: int | None, behind: int | None) -> None:
    """Also where the log's clock was ahead for one of them."""
    times = [] if at is None else [10, 99, 11, 12]
    records = [Record(topics.COMMANDS.name, 0, n, t, None, None) for n, t in enumerate(times)]
    assert next_after(records, at or 0) == behind
