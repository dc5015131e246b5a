"""What one input costs the engine as its state grows: 10^3 to 10^6 pending tasks, long tasks, many leases.

The engine's core and its RocksDB store in this process, without Kafka. Costs are CPU time of the thread that executes,
transactions of 100 records included; RocksDB's own threads show in the cost of loading alone.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import psutil

from perdure.process import collect_seldom
from perdure.schemas import codec, commands, ids, reports, topics
from perdure.schemas.common import Usage
from perdure.schemas.inbox import RunAttempt, StepPage
from perdure.schemas.signing import Keys, signed
from perdure.streams.engine import Engine
from perdure.streams.log import Record
from perdure.streams.processor import Out
from perdure.streams.store import RocksStore

SIZES = (1_000, 10_000, 100_000, 1_000_000)
_PROBES = 500
_TRANSACTION = 100
_TYPE = "bench"
_EPOCH = 1_800_000_000_000
"""Log time of the first record, ms."""
_DAY = 24 * 3600 * 1000


class BareEngine:
    """One partition of the engine on a store, and a log that is a counter."""

    def __init__(self, path: Path) -> None:
        self.keys = Keys.generate()
        self.open(path)
        self.now = _EPOCH
        self._offsets = count()
        self._names = count()

    def open(self, path: Path) -> None:
        """Take up what the store has."""
        self.store = RocksStore(path)
        self.engine = Engine(self.store, 0, 1, self.keys)

    def run(self, values: Iterable[bytes]) -> list[Out]:
        """Execute records, a transaction for each hundred of them."""
        out: list[Out] = []
        rest = iter(values)
        while some := list(islice(rest, _TRANSACTION)):
            for value in some:
                self.now += 1
                self.engine.execute(Record(topics.COMMANDS.name, 0, next(self._offsets), self.now, None, value))
            out += self.engine.take_out()
            self.store.apply(self.engine.writes())
            self.engine.committed()
        return out

    def cost(self, values: Sequence[bytes]) -> tuple[float, list[Out]]:
        """(µs of this thread's CPU for each record, outputs)."""
        began = time.thread_time_ns()
        out = self.run(values)
        return (time.thread_time_ns() - began) / 1e3 / len(values), out

    def submits(self, tasks: int) -> Iterator[bytes]:
        """As many new tasks."""
        for n in (next(self._names) for _ in range(tasks)):
            yield codec.encode(commands.SubmitTask(
                command_id=f"c-{n}", task_id=name(n), type=_TYPE, queue="default", input=b'{"n":1}',
            ))  # fmt: skip

    def configure(self) -> None:
        """Make the tasks' type known; each task has a timer."""
        content = json.dumps({"queue": "default", "policy": {"total_timeout": _DAY}}).encode()
        record = commands.ApplyConfig(name=f"type/{_TYPE}", version=1, content=content)
        self.run([signed(record, *self.keys.newest_engine())])

    def worker(self, slots: int) -> tuple[str, list[RunAttempt]]:
        """A new session, and what it is granted."""
        session = ids.new_id("s-")
        record = commands.WorkerStarted(
            session=session, worker_id=session, types={_TYPE: 1}, queues=["default"], slots=slots
        )
        out = self.run([signed(record, *self.keys.newest_worker())])
        while len(granted := found(out, RunAttempt)) < slots and self.engine.state.grantable:
            out += self.run([self.tick()])
        return session, granted

    def tick(self) -> bytes:
        """Time has passed."""
        return codec.encode(commands.Tick(due=self.now, host_clock=self.now))

    def beat(self, session: str) -> bytes:
        """A session is alive, and has seen every grant."""
        return signed(commands.WorkerBeat(session=session, grants_seen=10**9, free=1), *self.keys.newest_worker())

    def report(self, run: RunAttempt, *said: reports.Report) -> bytes:
        """A batch with what one attempt says."""
        entry = reports.ReportEntry(task_id=run.task_id, epoch=run.epoch, token=run.token, reports=list(said))
        return signed(reports.ReportBatch(session=run.session, entries=[entry]), *self.keys.newest_worker())


def name(n: int) -> str:
    """The id of the n-th task; in the store they lie in no order of submission."""
    return f"default/{n * 2654435761 % 2**32:08x}-{n:08d}"


def found(out: Iterable[Out], cls: type) -> list[Any]:
    """Output records of a class."""
    header = codec.header_of(cls)
    return [codec.decode(o.value) for o in out if o.value is not None and o.value.startswith(header)]


@dataclass
class Curve:
    """What was measured at each number of tasks."""

    unit: str
    at: dict[int, float]

    def thinned(self, points: int) -> Curve:
        """The first, the last, and some between."""
        last = len(self.at) - 1
        kept = sorted({last * n // (points - 1) for n in range(points)})
        return Curve(self.unit, {at: self.at[at] for at in (list(self.at)[n] for n in kept)})


def main(most: int = SIZES[-1]) -> None:
    """Measure and print; loading 1,000,000 tasks takes minutes."""
    collect_seldom()
    with tempfile.TemporaryDirectory(prefix="perdure-scale-") as name:
        show(tasks_in_state(Path(name), [size for size in SIZES if size <= most]), "pending tasks")
        steps = long_task(Path(name))
        show({what: curve.thinned(4) for what, curve in steps.items()}, "n-th step, page or tick")


def show(curves: dict[str, Curve], along: str) -> None:
    """One line for each number of tasks (steps, pages)."""
    for what, curve in curves.items():
        found = "   ".join(f"{at:,}: {value:,.0f}" for at, value in curve.at.items())
        print(f"{what} [{curve.unit}] by {along}: {found}")


def tasks_in_state(path: Path, sizes: Sequence[int] = SIZES) -> dict[str, Curve]:
    """Cost of each kind of input with this many pending tasks, each with a timer."""
    curves: dict[str, Curve] = {}

    def note(what: str, size: int, value: float, unit: str = "µs") -> None:
        curves.setdefault(what, Curve(unit, {})).at[size] = value

    bare = BareEngine(path / "tasks")
    bare.configure()
    loaded = 0
    for size in sizes:
        began = time.process_time_ns()
        bare.run(bare.submits(size - loaded))
        note("load, all threads", size, (time.process_time_ns() - began) / 1e3 / (size - loaded))
        loaded = size
        for what, cost in _probes(bare, size):
            note(what, size, cost)
        note("memory of the process", size, psutil.Process().memory_info().rss / 1e6, "MB")
        bare.store.close()
        began = time.thread_time_ns()
        bare.open(path / "tasks")
        note("opening store and state", size, (time.thread_time_ns() - began) / 1e3)
    bare.store.close()
    return curves


def _probes(bare: BareEngine, size: int) -> Iterator[tuple[str, float]]:
    chosen = random.Random(size).sample(range(size // 2, size), min(size // 4, _PROBES))
    yield "submit", bare.cost(list(bare.submits(_PROBES)))[0]
    yield "describe", bare.cost([codec.encode(commands.DescribeTask(
        command_id=f"d-{size}-{n}", task_id=name(n), reply_to="bench")) for n in chosen])[0]  # fmt: skip
    yield "cancel", bare.cost([codec.encode(commands.CancelTask(
        command_id=f"x-{size}-{n}", task_id=name(n), reason="bench")) for n in chosen])[0]  # fmt: skip
    yield "tick, nothing due", bare.cost([bare.tick() for _ in range(20)])[0]
    began = time.thread_time_ns()
    session, runs = bare.worker(_PROBES // 2)
    yield "grant", (time.thread_time_ns() - began) / 1e3 / len(runs)
    yield "beat", bare.cost([bare.beat(session) for _ in range(20)])[0]
    yield "start", bare.cost([bare.report(r, reports.AttemptStarted(seq=1)) for r in runs])[0]
    yield "step", bare.cost([bare.report(r, _step(2, "step")) for r in runs])[0]
    yield "progress", bare.cost([bare.report(r, reports.ReportProgress(seq=3, fraction=0.5)) for r in runs])[0]
    # each end makes room for the next grant
    yield "complete and grant", bare.cost(
        [bare.report(r, reports.AttemptCompleted(seq=4, result=b"1", usage=Usage())) for r in runs])[0]  # fmt: skip
    stop = commands.WorkerStopping(session=session)
    bare.run([signed(stop, *bare.keys.newest_worker())])
    yield "retried command", bare.cost([codec.encode(commands.CancelTask(
        command_id=f"x-{size}-{n}", task_id=name(n), reason="bench")) for n in chosen])[0]  # fmt: skip
    bare.now += 12_000  # the session's lease is over at the second tick from here
    began = time.thread_time_ns()
    bare.run([bare.tick()])
    for _ in range(8):
        bare.now += 3_000
        bare.run([bare.tick()])
    yield "end of a session, each lease", (time.thread_time_ns() - began) / 1e3 / len(runs)


def _step(seq: int, step_id: str) -> reports.ReportStep:
    return reports.ReportStep(
        seq=seq, step_id=step_id, name="step", function="bench.step", code_version="1", args_hash="0" * 16,
        result=b'{"n":1}', duration_ms=1,
    )  # fmt: skip


def long_task(path: Path, steps: int = 100_000) -> dict[str, Curve]:
    """A task of many steps: each step, all pages of a resume, and the checkpoint that makes them unnecessary."""
    bare = BareEngine(path / "steps")
    bare.configure()
    bare.run(bare.submits(1))
    _, (run,) = bare.worker(1)
    bare.run([bare.report(run, reports.AttemptStarted(seq=1))])
    curves: dict[str, Curve] = {"step": Curve("µs", {}), "page of a resume": Curve("µs", {})}
    done = 0
    while done < steps:
        said = [_step(done + i + 2, f"files@{done + i:012d}/read") for i in range(1_000)]
        curves["step"].at[done + 1_000] = bare.cost([bare.report(run, s) for s in said])[0]
        done += 1_000
    cost, out = bare.cost([bare.report(run, reports.AttemptCrashed(seq=done + 2, exit_code=1, usage=Usage()))])
    (again,), (page,) = found(out, RunAttempt), found(out, StepPage)
    pages, seq = 1, 1
    curves["page of a resume"].at[pages] = cost
    while page.more:
        cost, out = bare.cost([bare.report(again, reports.SendSteps(seq=seq, after=page.steps[-1].step_id))])
        (page,) = found(out, StepPage)
        pages, seq = pages + 1, seq + 1
        curves["page of a resume"].at[pages] = cost
    curves["retiring, each tick"] = Curve("µs", {})
    bare.run([bare.report(again, reports.ReportCheckpoint(
        seq=seq, version=1, uri="file:///x", sha256="0" * 64, size=1, positions={"files": steps}))])  # fmt: skip
    ticks = 0
    while bare.engine.state.known(again.task_id).steps_kept:
        ticks += 1
        curves["retiring, each tick"].at[ticks] = bare.cost([bare.tick()])[0]
    bare.store.close()
    return curves
