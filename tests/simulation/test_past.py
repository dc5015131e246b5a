"""A partition as it was is what its engine said of itself then, at any point of any life."""

from __future__ import annotations

import io
from typing import Any

import pytest
from fastavro import schemaless_writer

from perdure.schemas import codec, topics
from perdure.schemas.codec import replace
from perdure.schemas.commands import WorkerBeat
from perdure.schemas.common import Cause
from perdure.schemas.signing import signed
from perdure.streams import clock, describe
from perdure.streams.decision import Moment
from perdure.streams.past import Past, Point
from tests.simulation.faults import FAULTS
from tests.simulation.simulator import Simulator, a_life
from tests.world import HOUR, KEYS, SECOND, ScriptedWorker, World

OF_WORKERS = {"reason", "why"}
"""What depends on which workers were there: the engine judges that by ticks, a look back by what they said."""


def said(world: World, partition: int) -> tuple[int, dict[str, Any], set[tuple[str, str]]]:
    """(last input executed, task -> status, sessions) as the engine has it now."""
    s = world.of_engine(partition).state
    offset = world.executed(partition) - 1
    at = world.log.records(topics.COMMANDS.name, partition)[offset].at
    moment = Moment(at, clock.now(s, at), Cause(partition=partition, offset=offset))
    known = s.find_tasks(b"t", 1_000)
    sessions = {(w.session, w.state) for w in s.sessions.values() if w.state != "ended"}
    return offset, {t: describe.status(s, moment, t) for t in known}, sessions


@pytest.mark.parametrize("seed", range(3))
def test_a_look_back_says_what_the_engine_said(seed: int) -> None:
    life = Simulator(seed, faults=frozenset(FAULTS), rate=0.002, tasks=12, partitions=2)
    world, told = life.world, []
    for _ in range(20):
        life.go_on(3 * SECOND)
        if life.host is not None:
            told += [(p, *said(world, p)) for p in range(world.partitions) if world.executed(p)]
    agreed = 0
    for partition, offset, statuses, sessions in told:
        past = Past(world.log, partition, Point(command=offset))
        assert {t for t, _ in past.tasks()} == set(statuses)
        same_workers = {(w.session, w.state) for w in past.workers} == sessions
        agreed += same_workers and bool(sessions)
        for task_id, status in statuses.items():
            past.recall_progress(task_id)
            left_out = set() if same_workers else OF_WORKERS
            mine = past.status(task_id)
            assert {k: v for k, v in mine.items() if k not in left_out} == {
                k: v for k, v in status.items() if k not in left_out
            }
    assert agreed > len(told) // 4, f"workers were seen right at {agreed} of {len(told)} points"


def test_a_time_an_input_and_an_event_name_the_same_past() -> None:
    world = a_life(5)
    log = world.log
    for partition in range(world.partitions):
        found = log.records(topics.EVENTS.name, partition)
        decoded = [world.decode(r) for r in found]
        for n in range(len(found) - 1):
            e = decoded[n]
            last = max(r.offset for r in log.records(topics.COMMANDS.name, partition) if r.at <= e.at)
            if e.cause.offset <= last < decoded[n + 1].cause.offset:
                pasts = [
                    Past(log, partition, Point(at=e.at)),
                    Past(log, partition, Point(command=e.cause.offset)),
                    Past(log, partition, Point(event=found[n].offset)),
                ]
                assert {p.event for p in pasts} == {found[n].offset}
                assert len({str(sorted(p.tasks())) for p in pasts}) == 1


@pytest.mark.parametrize("commands_kept", [True, False])
def test_a_clock_that_was_ahead_hides_nothing_that_came_after(commands_kept: bool) -> None:
    world = World(1)
    tasks = [world.submit()]
    world.skew = HOUR
    tasks.append(world.submit())
    world.skew = 0
    world.advance(SECOND)
    tasks.append(world.submit())
    if not commands_kept:
        world.log.truncate(topics.COMMANDS.name, 0, world.executed(0))
    past = Past(world.log, 0, Point(at=world.now))
    assert {task for task, _ in past.tasks()} == set(tasks)
    assert past.at == world.now


def test_workers_of_an_older_build_are_heard() -> None:
    """Their beats go by the same name, and have another fingerprint."""
    world = World(1)
    worker = ScriptedWorker(world).start()
    world.now += 20 * SECOND
    assert [w.session for w in Past(world.log, 0, Point()).workers] == [worker.session]
    world.append(b"{}", 0)
    assert Past(world.log, 0, Point()).workers == []
    header, older = next(
        (header, known)
        for header, known in codec._BY_HEADER.items()
        if known.cls is WorkerBeat and header != codec.header_of(WorkerBeat)
    )
    beat = WorkerBeat(session=worker.session, grants_seen=0, free=1)
    told = {field["name"]: getattr(beat, field["name"]) for field in older.parsed["fields"]}
    data = io.BytesIO(header)
    data.seek(len(header))
    schemaless_writer(data, older.parsed, told)
    world.append(data.getvalue(), 0)
    assert [w.session for w in Past(world.log, 0, Point()).workers] == [worker.session]


def test_what_the_engine_set_aside_is_no_word_of_a_worker() -> None:
    """Nor is what it has not come to yet, and will set aside."""
    world = World(1)
    worker = ScriptedWorker(world, beating=True).start()
    forged = replace(worker.started(), session="forged", worker_id="w2")
    world.host(forged, 0)
    torn = signed(replace(forged, session="torn"), *KEYS.newest_worker())[:-1]
    world.send(torn, 0)
    world.advance(SECOND)
    assert len(world.quarantined()) == 1
    world.append(torn, 0)
    assert [w.session for w in Past(world.log, 0, Point()).workers] == [worker.session]
