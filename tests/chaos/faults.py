"""The faults. Each does its harm, undoes it, and says how many seconds the recovery took, where one is measured."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from confluent_kafka import Producer

from perdure.schemas import codec, commands, topics
from perdure.schemas.errors import DecodeError
from perdure.schemas.signing import signed
from perdure.streams.failpoints import POINTS, VARIABLE
from perdure.streams.log import BEGIN
from tests.chaos.campaign import Campaign, Service
from tests.integration.stack import stopped, tree
from tests.integration.test_hostile import Attacker
from tests.kafka_cluster import BROKERS

Inject = Callable[[Campaign], float | None]
SESSION_S = 10.0
"""Of a member of the engine's group, and the lease of a worker."""
HOUR_MS = 3_600_000
IN_TRANSACTION = [point for point in POINTS if point not in ("in-checkpoint", "in-restore")]
"""Points that an engine passes with every batch."""


@dataclass(frozen=True)
class Fault:
    """A kind of fault."""

    kind: str
    inject: Inject
    weight: int
    """Times in a round; each round begins with one of each kind."""
    measured: str
    """What the recovery is measured from and to."""
    needs: Callable[[Campaign], str] = lambda _: ""
    """Why it cannot be injected here, if it cannot."""


KINDS: list[Fault] = []
TRANSITION = "until each partition executes a new command"
NEXT_STEP = "until each of its tasks executes its next step"


def fault(weight: int, measured: str, needs: Callable[[Campaign], str] = lambda _: "") -> Callable[[Inject], Inject]:
    """Make a function one of the kinds, under its name."""

    def register(inject: Inject) -> Inject:
        KINDS.append(Fault(inject.__name__.replace("_", "-"), inject, weight, measured, needs))
        return inject

    return register


def schedule(seed: int, kinds: list[Fault]) -> Iterator[Fault]:
    """The order of a seed: rounds of one of each kind, then the heavier ones again by their weights."""
    draw = random.Random(seed)
    while True:
        once = list(kinds)
        again = [k for k in kinds for _ in range(k.weight - 1)]
        draw.shuffle(once)
        draw.shuffle(again)
        yield from (*once, *again)


def now_ms() -> int:
    """The wall clock, ms."""
    return time.time_ns() // 1_000_000


# Workers -------------------------------------------------------------------------------------------------------------


@fault(14, NEXT_STEP)
def kill_child(c: Campaign) -> float | None:
    """SIGKILL of the process that runs a task."""
    tasks = {t: e for t, e in c.spare().items() if "/walk-" in t}
    if not tasks:
        return None
    task = c.draw.choice(sorted(tasks))
    last = c.witness.last(task)
    assert last is not None
    began = now_ms()
    with suppress(ProcessLookupError):
        os.kill(last[1].pid, signal.SIGKILL)
    return c.next_steps({task: tasks[task]}, began)


@fault(3, NEXT_STEP)
def kill_shared_child(c: Campaign) -> float | None:
    """SIGKILL of a process that runs many async tasks."""
    tasks = {t: e for t, e in c.spare().items() if "/drift-" in t}
    if not tasks:
        return None
    last = c.witness.last(c.draw.choice(sorted(tasks)))
    assert last is not None
    shared = {t: e for t, e in tasks.items() if (found := c.witness.last(t)) and found[1].pid == last[1].pid}
    began = now_ms()
    with suppress(ProcessLookupError):
        os.kill(last[1].pid, signal.SIGKILL)
    return c.next_steps(shared, began)


@fault(5, NEXT_STEP)
def kill_worker(c: Campaign) -> float | None:
    """SIGKILL of a worker that is started again under its name."""
    worker = c.draw.choice(c.workers)
    tasks = c.spare(worker.name)
    began = now_ms()
    c.kill(worker)
    return c.next_steps(tasks, began)


@fault(1, NEXT_STEP)
def lose_worker(c: Campaign) -> float | None:
    """SIGKILL of a worker that does not come back while its tasks run."""
    worker = c.draw.choice(c.workers)
    tasks = c.spare(worker.name)
    began = now_ms()
    with c.without(worker):
        return c.next_steps(tasks, began)


@fault(2, NEXT_STEP)
def drain_worker(c: Campaign) -> float | None:
    """SIGTERM: the worker hands its tasks back, ends, and is started again."""
    worker = c.draw.choice(c.workers)
    tasks = c.spare(worker.name)
    began = now_ms()
    worker.process.signal(signal.SIGTERM)
    return c.next_steps(tasks, began)


@fault(1, NEXT_STEP)
def stop_worker(c: Campaign) -> float | None:
    """SIGSTOP of a worker and its children beyond their leases: its reports come late, and from an old epoch."""
    worker = c.draw.choice(c.workers)
    tasks = c.spare(worker.name)
    began = now_ms()
    with stopped(*tree(worker.process.pid)):
        return c.next_steps(tasks, began)


@fault(1, "none: it takes work and gives it back")
def worker_joins_and_leaves(c: Campaign) -> float | None:
    """A third worker takes what waits, and leaves in an orderly way."""
    worker = c.guest("w2")
    worker.start()
    c.patiently("a grant of the third worker", lambda: c.observer.running(worker.name))
    worker.stop()
    return None


# Engines -------------------------------------------------------------------------------------------------------------


@fault(6, TRANSITION)
def kill_engine(c: Campaign) -> float | None:
    """SIGKILL of an engine process that is started again."""
    began = time.monotonic()
    c.kill(c.draw.choice(c.engines))
    return c.recovered(began, "the kill")


@fault(1, TRANSITION)
def lose_engine_host(c: Campaign) -> float | None:
    """SIGKILL of an engine whose host does not come back for a while: the other host takes over."""
    c.at_full_strength()
    began = time.monotonic()
    with c.without(c.draw.choice(c.engines)):
        return c.recovered(began, "the loss")


@fault(2, TRANSITION + ", from its end")
def restart_engine(c: Campaign) -> float | None:
    """SIGTERM of an engine that is started again."""
    engine = c.draw.choice(c.engines)
    lives = engine.lives
    engine.process.signal(signal.SIGTERM)
    c.patiently("its next life", lambda: engine.lives > lives)
    return c.recovered(time.monotonic(), "the restart")


@fault(2, TRANSITION + ", from SIGCONT")
def stop_engine(c: Campaign) -> float | None:
    """SIGSTOP of an engine for some seconds."""
    engine = c.draw.choice(c.engines)
    with stopped(engine.process.pid):
        time.sleep(c.draw.uniform(1.0, 4.0))  # the fault itself
    return c.recovered(time.monotonic(), "the stop")


@fault(1, TRANSITION + ", from SIGSTOP")
def zombie_engine(c: Campaign) -> float | None:
    """SIGSTOP of an engine beyond its session: the other host takes over, and then the zombie goes on."""
    engine = c.draw.choice(c.engines)
    began = time.monotonic()
    with stopped(engine.process.pid):
        recovery = c.recovered(began, "the takeover")
        time.sleep(max(0.0, began + SESSION_S + 3.0 - time.monotonic()))  # the fault itself
    return recovery


@fault(1, TRANSITION + ", from the halt")
def halted_in_commit(c: Campaign) -> float | None:
    """An engine stands still in a commit, until another host has its partitions: then it goes on, from memory."""
    engine = c.draw.choice(c.engines)
    with c.without(engine):
        engine.next_life = {VARIABLE: "in-commit=stop:0.05"}
    c.patiently("a halt in a commit", lambda: _is_stopped(engine.process.pid))
    began, pid = time.monotonic(), engine.process.pid
    try:
        recovery = c.recovered(began, "the takeover")
        time.sleep(max(0.0, began + SESSION_S + 3.0 - time.monotonic()))  # the fault itself
    finally:
        os.kill(pid, signal.SIGCONT)
    c.recovered(time.monotonic(), "its return")
    return recovery


def _is_stopped(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


@fault(1, TRANSITION)
def lose_store(c: Campaign) -> float | None:
    """An engine dies, and its disk with it: the whole changelog is read."""
    engine = c.draw.choice(c.engines)
    began = time.monotonic()
    with c.without(engine):
        shutil.rmtree(_state(c, engine) / "partition", ignore_errors=True)
    return c.recovered(began, "the loss of the store")


@fault(1, TRANSITION + ", while members come and go")
def rebalance_storm(c: Campaign) -> float | None:
    """A third engine process joins and dies, again and again."""
    guest = c.guest("engine-c")
    for _ in range(3):
        guest.start()
        c.patiently("a member that has joined", lambda: c.held(guest) or not guest.process.runs())
        guest.process.kill()
    return c.recovered(time.monotonic(), "the storm")


@fault(1, TRANSITION + ", from the end of the twin")
def twin_host(c: Campaign) -> float | None:
    """Two hosts go by one id, as after a copied disk: one of them has to give way."""
    home = c.stack.folder / "state-twin"
    home.mkdir(exist_ok=True)
    shutil.copy(_state(c, c.engines[1]) / "host-id", home / "host-id")
    twin = c.guest("twin")
    twin.start()
    c.patiently("the twin's place, or its end", lambda: c.held(twin) or not twin.process.runs())
    twin.process.kill()
    return c.recovered(time.monotonic(), "the twin")


def _failpoint(point: str) -> Inject:
    def inject(c: Campaign) -> float | None:
        """An engine that dies by itself at a point of its transaction."""
        engine = c.draw.choice(c.engines)
        with c.without(engine):
            if point == "in-restore":
                shutil.rmtree(_state(c, engine) / "partition", ignore_errors=True)
            engine.next_life = {VARIABLE: f"{point}=kill:{0.05 if point in IN_TRANSACTION else 1}"}
        lives = engine.lives
        c.patiently(f"a death at {point}", lambda: engine.lives > lives)
        return c.recovered(time.monotonic(), "the death")

    inject.__name__ = f"failpoint_{point}"
    return inject


for _point in POINTS:
    fault(2, TRANSITION + ", from the death")(_failpoint(_point))


# Broker and network --------------------------------------------------------------------------------------------------


def _proxied(c: Campaign) -> str:
    return "" if c.behind_proxy else "three brokers are reached without a proxy"


@fault(1, TRANSITION + ", from the return of each broker", needs=lambda c: "only one broker" if c.behind_proxy else "")
def rolling_restart(c: Campaign) -> float | None:
    """An orderly restart of all brokers, one after the other."""
    slowest = 0.0
    for _ in range(BROKERS):
        c.at_full_strength()
        c.kafka.stop()
        c.kafka.start(timeout_s=120)
        slowest = max(slowest, c.recovered(time.monotonic(), "a broker's return"))
    return slowest


@fault(2, TRANSITION + ", from the broker's return")
def kill_broker(c: Campaign) -> float | None:
    """SIGKILL of the broker, and its restart."""
    c.at_full_strength()
    _kill_broker(c)
    c.kafka.start(timeout_s=120)
    return c.recovered(time.monotonic(), "the broker's return")


def _kill_broker(c: Campaign) -> None:
    psutil.Process(c.kafka.pid).kill()
    c.patiently("the broker's end", lambda: not c.kafka.alive())


@fault(1, TRANSITION + ", from the broker's return")
def restart_broker(c: Campaign) -> float | None:
    """An orderly restart of the broker."""
    c.at_full_strength()
    c.kafka.stop()
    c.kafka.start(timeout_s=120)
    return c.recovered(time.monotonic(), "the broker's return")


@fault(2, TRANSITION + ", from SIGCONT")
def stop_broker(c: Campaign) -> float | None:
    """SIGSTOP of the broker for some seconds."""
    with stopped(c.kafka.pid):
        time.sleep(c.draw.uniform(2.0, 6.0))  # the fault itself
    return c.recovered(time.monotonic(), "the stop")


@fault(1, TRANSITION + ", from the broker's return")
def outage_and_late_workers(c: Campaign) -> float | None:
    """The broker is away for longer than a lease, and all workers come back 10 s after it."""
    c.at_full_strength()
    with stopped(*(pid for worker in c.workers for pid in tree(worker.process.pid))):
        c.kafka.stop()
        time.sleep(SESSION_S + 1.0)  # the fault itself
        c.kafka.start(timeout_s=120)
        back = time.monotonic()
        recovery = c.recovered(back, "the broker's return")
        time.sleep(max(0.0, back + 10.0 - time.monotonic()))  # the fault itself
    return recovery


@fault(1, TRANSITION + ", from SIGCONT")
def stop_everything(c: Campaign) -> float | None:
    """The whole machine stands still for longer than a lease and a session."""
    services = (*c.engines, *c.workers, c.server)
    with stopped(c.kafka.pid, *(pid for service in services for pid in tree(service.process.pid))):
        time.sleep(SESSION_S + 3.0)  # the fault itself
    return c.recovered(time.monotonic(), "the stop")


@fault(1, TRANSITION + ", from the broker's return")
def power_cut(c: Campaign) -> float | None:
    """SIGKILL of everything at once, the broker too."""
    c.kill(*c.engines, *c.workers, c.server)
    _kill_broker(c)
    c.kafka.start(timeout_s=120)
    return c.recovered(time.monotonic(), "the broker's return")


@fault(2, TRANSITION + ", from the reset", needs=_proxied)
def reset_links(c: Campaign) -> float | None:
    """Every connection of engines, workers and server is reset."""
    began = time.monotonic()
    c.proxy.reset()
    return c.recovered(began, "the reset")


@fault(2, TRANSITION + ", from the link's return", needs=_proxied)
def cut_links(c: Campaign) -> float | None:
    """No connection for some seconds."""
    c.proxy.cut()
    time.sleep(c.draw.uniform(1.0, 6.0))  # the fault itself
    c.proxy.heal()
    return c.recovered(time.monotonic(), "the link's return")


@fault(1, TRANSITION + ", from the link's return", needs=_proxied)
def silent_links(c: Campaign) -> float | None:
    """Connections stay, and nothing comes through, for longer than a session."""
    c.proxy.blackhole()
    time.sleep(SESSION_S + 2.0)  # the fault itself
    c.proxy.heal()
    return c.recovered(time.monotonic(), "the link's return")


@fault(2, TRANSITION + ", over the slow link", needs=_proxied)
def slow_links(c: Campaign) -> float | None:
    """Everything arrives 100 ms later, at 2 MB/s."""
    c.proxy.slow(delay_s=0.1, rate=2_000_000)
    began = time.monotonic()
    recovery = c.recovered(began, "the delay")
    time.sleep(3.0)  # the fault itself
    return recovery


@fault(2, TRANSITION + ", while it hangs")
def hung_transaction(c: Campaign) -> float | None:
    """A stranger's transaction on task-commands stays open, and is aborted in the end."""
    with _foreign(c) as producer:
        for partition in range(c.stack.log.partitions):
            producer.produce(
                topics.COMMANDS.on(c.stack.prefix),
                b'{"command": "DescribeTask", "task_id": "q/none"}',
                partition=partition,
            )
        producer.flush(30)
        recovery = c.recovered(time.monotonic(), "the open transaction")
        time.sleep(2.0)  # the fault itself
    return recovery


@contextmanager
def _foreign(c: Campaign) -> Iterator[Producer]:
    producer = Producer({
        "bootstrap.servers": c.stack.bootstrap, "transactional.id": "chaos.foreign", "transaction.timeout.ms": 600_000,
        "log_level": 0,
    })  # fmt: skip
    producer.init_transactions(30)
    producer.begin_transaction()
    yield producer
    producer.abort_transaction(30)


# Records -------------------------------------------------------------------------------------------------------------


@fault(4, TRANSITION + ", after the last of them")
def poison(c: Campaign) -> float | None:
    """Hostile records of all sorts, in all partitions; each has to end in one place."""
    running = sorted(c.observer.running().items())
    task, epoch = running[0] if running else ("q0/none", 1)
    stale = signed(commands.WorkerBeat(session="s-0", grants_seen=0, free=0), *c.stack.keys.newest_worker())
    attacker = Attacker(c.stack, c.draw, "s-0", task, epoch, _some_outputs(c), [stale])
    for _ in range(60):
        kind = c.draw.choice(("quarantine", "command_rejected", "report_rejected"))
        value = getattr(attacker, kind)()

        def placed(partition: int, offset: int, kind: str = kind) -> None:
            c.hostile[partition, offset] = kind

        c.load.append(value, c.draw.randrange(c.stack.log.partitions), placed)
    return c.recovered(time.monotonic(), "the poison")


def _some_outputs(c: Campaign) -> list[bytes | None]:
    """What the engine has written, from the beginning of its topics."""
    reader = c.stack.log.reader()
    names = [t.name for t in (topics.EVENTS, topics.INBOX, topics.REPLIES, topics.CHANGELOG)]
    reader.assign({(name, p): BEGIN for name in names for p in range(c.stack.log.partitions)})
    found = [r.value for r in c.patiently("outputs of the engine", lambda: reader.read(200, 0.2)) if r.value]
    reader.close()
    return found


@fault(3, TRANSITION + ", after the last of them")
def repeated_records(c: Campaign) -> float | None:
    """Authentic records of the last minutes, written again, in any order and any partition."""
    reader = c.stack.log.reader(committed=False)
    name = topics.COMMANDS.name
    bounds = {p: reader.bounds(name, p) for p in range(c.stack.log.partitions)}
    reader.assign({(name, p): max(first, end - 300) for p, (first, end) in bounds.items()})
    found = [r.value for r in c.patiently("the last commands", lambda: reader.read(1_000, 0.5)) if _is_ours(r.value)]
    reader.close()
    for value in c.draw.choices(found, k=150):
        c.load.append(value, c.draw.randrange(c.stack.log.partitions))
    return c.recovered(time.monotonic(), "the repetition")


def _is_ours(value: bytes | None) -> bool:
    """No poison, which has its own accounts."""
    if value is None:
        return False
    if value.startswith(b"{"):
        return b'"command_id": "probe/' in value or b'"command_id": "chaos-' in value
    with suppress(DecodeError):
        return type(codec.decode(value)).__name__ != "SubmitTask"
    return False


def _defect(kind: str) -> Inject:
    def inject(c: Campaign) -> float | None:
        """A record whose decision fails; faulty_engine.py says how."""
        began = time.monotonic()
        partition = c.draw.randrange(c.stack.log.partitions)
        name = f"defect-{len(c.happenings)}"
        c.defects[kind] += 1
        c.load.command("SubmitTask", f"{c.queues[partition]}/{name}", partition, name, type=kind)
        return c.recovered(began, kind)

    inject.__name__ = f"decision_{kind}"
    return inject


for _kind, _weight in (("raises", 2), ("oversized", 2), ("kills", 1)):
    fault(_weight, TRANSITION)(_defect(_kind))


# Hosts ---------------------------------------------------------------------------------------------------------------


@fault(2, TRANSITION + ", from the step back", needs=lambda c: "" if c.skew else "no C compiler (cc) for the clock")
def clock_step(c: Campaign) -> float | None:
    """The clock of an engine's host is an hour wrong for some seconds."""
    engine = c.draw.choice(c.engines)
    c.set_clock(engine.name, c.draw.choice((-HOUR_MS, HOUR_MS)))
    try:
        time.sleep(c.draw.uniform(2.0, 6.0))  # the fault itself
        c.recovered(time.monotonic(), "the step")
    finally:
        c.set_clock(engine.name, 0)
    return c.recovered(time.monotonic(), "the step back")


@fault(
    1,
    TRANSITION + ", from when there is room again",
    needs=lambda c: "" if c.has_disk else "mounting a tmpfs is not allowed here",
)
def full_disk(c: Campaign) -> float | None:
    """The disk of an engine's host is full, and stays so while it tries to start again."""
    engine = c.engines[0]
    ballast = _state(c, engine) / "ballast"
    with ballast.open("wb") as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
            file.flush()
    time.sleep(4.0)  # the fault itself
    ballast.unlink()
    return c.recovered(time.monotonic(), "the full disk")


@fault(2, "until the API answers")
def kill_server(c: Campaign) -> float | None:
    """SIGKILL of the read side, that is started again."""
    began, lives = time.monotonic(), c.server.lives
    c.kill(c.server)
    c.patiently("the server's next life", lambda: c.server.lives > lives)
    c.patiently("the API", lambda: "the API answers at" in c.server.process.text())
    return time.monotonic() - began


def _state(c: Campaign, engine: Service) -> Path:
    return c.stack.folder / ("state" if engine is c.engines[0] else "state-b")
