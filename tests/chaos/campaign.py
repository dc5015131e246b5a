"""A campaign: a whole stack under load, and one fault after the other.

Two engine hosts (state directories of their own), two workers and a server, kept alive as an init system keeps them,
on a broker of the campaign's own that engines and workers reach through a proxy.
"""

from __future__ import annotations

import random
import shutil
import signal
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from typing import TypeVar

from perdure.connectors.embedded_kafka import EmbeddedKafka
from perdure.schemas import topics
from perdure.schemas.errors import Unreachable
from perdure.streams.survey import survey_group
from tests.chaos.load import Load, queues_of
from tests.chaos.proxy import Proxy, proxied_kafka
from tests.chaos.watch import Observer, Violation, Witness
from tests.integration.stack import FAULTY, TASKS, Process, Stack, stack_on, until
from tests.kafka_cluster import KafkaCluster, OneOfThree

PARTITIONS = 4
ALIVE = 8
"""Tasks under way; half of what one worker can hold, so that either of them can take them all."""
SLOTS = "8"
RECOVERY_S = 90.0
"""What has not come back after this is a violation."""
_KEEP_S = 0.02
T = TypeVar("T")
_STATE_MB = 512


@dataclass(frozen=True)
class End:
    """A process that ended although nobody had asked it to."""

    name: str
    code: int
    words: str
    fault: str


class Service:
    """A process that is kept alive."""

    def __init__(self, name: str, process: Process, environment: dict[str, str]) -> None:
        self.name, self.process, self._environment = name, process, environment
        self.wanted = False
        self.next_life: dict[str, str] = {}
        """In the environment of its next life only."""
        self.lives = 0

    def start(self) -> None:
        """Begin a life, and keep it alive from now on."""
        environment = self._environment | self.next_life
        self.next_life = {}
        self.process.start(**environment)
        self.lives += 1
        self.wanted = True

    def stop(self) -> None:
        """End it in an orderly way, and leave it so."""
        self.wanted = False
        self.process.stop()


@dataclass
class Tally:
    """What became of one kind of fault."""

    times: int = 0
    recoveries: list[float] = field(default_factory=list)
    violations: int = 0
    ends: int = 0
    """Processes that ended by themselves meanwhile, and were started again."""
    skipped: str = ""


@dataclass
class Happening:
    """One fault, injected."""

    kind: str
    began_at: int
    """ms."""


class Campaign:
    """The stack, its load and what is seen of it; see `campaign`."""

    def __init__(
        self,
        folder: Path,
        kafka: EmbeddedKafka | OneOfThree,
        proxy: Proxy | None,
        stack: Stack,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.kafka, self.stack, self.seed, self.say = folder, kafka, stack, seed, say
        self._proxy = proxy
        self.draw = random.Random(f"{seed}/0")
        """For the fault that is being injected; a new one for each, so that a seed gives the same faults again."""
        self.tallies: dict[str, Tally] = {}
        self.happenings: list[Happening] = []
        self.violations: list[Violation] = []
        self.hostile: dict[tuple[int, int], str] = {}
        """Where a hostile record lies -> where it has to end."""
        self.defects: Counter[str] = Counter()
        """Records that break the engine -> how many there are."""
        self.queues = queues_of(PARTITIONS)
        self.ends: list[End] = []
        self.kafkas_own: list[str] = []
        """What the broker said when it gave groups up for good; see docs/chaos.md."""
        self._guests: dict[str, Service] = {}
        self.has_disk = True
        """Whether the first host's state is on a file system of its own, that can be filled."""
        self.skew = _skew_library(folder)
        stack.environment = {"PERDURE_BLOBS": str(folder / "blobs"), "PERDURE_SNAPSHOT_ROWS": "1000"}
        self.engines = [self._engine("engine-a", "state"), self._engine("engine-b", "state-b")]
        self.workers = [self._worker("w0"), self._worker("w1")]
        views = str(stack.folder / "state-server")
        self.server = self._service("server", {}, "-m", "perdure.cli", "server", "--port", "0", "--state-dir", views)
        self._services = [*self.engines, *self.workers, self.server]
        self.observer = Observer(stack.log)
        self.witness = Witness(stack.witness)
        self.load = Load(stack, self.observer, self.queues, f"{seed}/load", ALIVE)
        self._done = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._lock = threading.Lock()

    # Processes -------------------------------------------------------------------------------------------------------

    @property
    def behind_proxy(self) -> bool:
        """Whether what the links carry can be held up; one broker is, three are not."""
        return self._proxy is not None

    @property
    def proxy(self) -> Proxy:
        """What engines, workers and server reach the broker through."""
        assert self._proxy is not None, "a fault that needs the proxy says so"
        return self._proxy

    def _service(self, name: str, environment: dict[str, str], *command: str) -> Service:
        whole = self.stack.bootstrap
        self.stack.bootstrap = whole if self._proxy is None else self._proxy.bootstrap
        made = Service(name, self.stack.process(name, *command), environment)
        self.stack.bootstrap = whole
        return made

    def _engine(self, name: str, state: str) -> Service:
        environment = {}
        if self.skew is not None:
            clock = self.clock_of(name)
            clock.write_bytes(bytes(8))
            environment = {"LD_PRELOAD": str(self.skew), "SKEW_FILE": str(clock)}
        directory = self.stack.folder / state
        return self._service(name, environment, FAULTY, "engine", "--state-dir", str(directory))

    def guest(self, name: str) -> Service:
        """A process that comes and goes: `w2`, `engine-c` on the first host, or `twin`, a host of its own. Not kept alive."""
        if name not in self._guests:
            state = {"engine-c": "state", "twin": "state-twin"}.get(name)
            self._guests[name] = self._worker(name) if state is None else self._engine(name, state)
        return self._guests[name]

    def _worker(self, name: str) -> Service:
        queues = [part for queue in self.queues for part in ("--queue", queue)]
        return self._service(
            name, {}, "-m", "perdure.cli", "worker", "-m", TASKS, "--name", name, "--slots", SLOTS, *queues
        )

    def clock_of(self, engine: str) -> Path:
        """The file that says how wrong a host's clock is."""
        return self.folder / f"{engine}.clock"

    def set_clock(self, engine: str, ms: int) -> None:
        """From now on its host's clock is wrong by so much."""
        with self.clock_of(engine).open("r+b") as file:
            file.write(struct.pack("=q", ms))

    def _keep(self) -> None:
        while not self._done.wait(_KEEP_S):
            with self._lock:
                for service in self._services:
                    if service.wanted and not service.process.runs():
                        self._buried(service)
                        service.start()

    def _buried(self, service: Service) -> None:
        code = service.process.ended()
        kind = self.happenings[-1].kind if self.happenings else "start"
        if code not in (0, -signal.SIGKILL):
            words = service.process.text().strip().splitlines()[-1:]
            self.ends.append(End(service.name, code, words[0][-500:] if words else "", kind))
            self.tallies.setdefault(kind, Tally()).ends += 1

    def kill(self, *services: Service) -> None:
        """SIGKILL; they are started again at once, unless they are no longer wanted."""
        for service in services:
            if service.process.runs():
                service.process.signal(signal.SIGKILL)

    @contextmanager
    def without(self, service: Service) -> Iterator[None]:
        """A process that stays dead for a while."""
        with self._lock:
            service.wanted = False
        self.kill(service)
        service.process.ended()
        try:
            yield
        finally:
            service.start()

    # Life of the campaign --------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start everything, and return once all of it works."""
        for service in self._services:
            service.start()
        self._keeper.start()
        self.observer.start()
        self.load.start()
        self.recovered(time.monotonic(), "the start")
        until("tasks in the middle of their work", lambda: len(self.spare()) >= ALIVE // 2)
        self.load.spared.clear()

    def inject(self, kind: str, fault: Callable[[Campaign], float | None]) -> None:
        """One fault, its measured recovery, and all partitions flowing again."""
        self.happenings.append(Happening(kind, time.time_ns() // 1_000_000))
        self.draw = random.Random(f"{self.seed}/{len(self.happenings)}")
        tally = self.tallies.setdefault(kind, Tally())
        tally.times += 1
        try:
            recovery = fault(self)
            self.recovered(time.monotonic(), kind)
        except NotRecovered as error:
            recovery = None
            if not self._is_kafkas_own():
                self.violations.append(Violation(f"{kind}: {error}", self.happenings[-1].began_at))
        finally:
            self.load.spared.clear()
            if self._proxy is not None:
                self._proxy.heal()
        if recovery is not None:
            tally.recoveries.append(recovery)
        self.say(f"{len(self.happenings):4} {kind:32} {'' if recovery is None else f'{recovery:6.2f} s'}")
        for failure in (self.load.failure, self.observer.failure):
            if failure is not None:
                raise failure

    def _is_kafkas_own(self) -> bool:
        """Whether the broker has given its groups up for good, and nothing but its restart has brought them back.

        Seen once in a hundred kills of a broker 4.2.2; `perdure.connectors.lost_groups` says why.
        """
        log = self.kafka.data_dir / "logs" / "broker.log"
        lost = self.kafka.lost_groups()
        if not lost:
            return False
        shutil.copy(log, self.folder / f"given-up-{len(self.happenings)}.log")
        self.kafkas_own += lost
        self.say(f"     Kafka's own: {lost[0]}; the broker is restarted")
        self.kafka.stop()
        self.kafka.start(timeout_s=120)
        try:
            self.recovered(time.monotonic(), "the restart of a broker that had given its groups up")
        except NotRecovered:
            return False
        return True

    def recovered(self, since: float, what: str) -> float:
        """Wait until every partition has executed a command that was sent after `since`; how long after, s."""
        moment = self.patiently(
            f"transitions in every partition after {what}", lambda: self.observer.probes.flowing(since)
        )
        return moment - since

    def at_full_strength(self) -> None:
        """Wait until each engine has its share, so that what comes next is one fault and not two. Raises `NotRecovered`."""

        def shared() -> bool:
            try:
                group = survey_group(self.stack.log, topics.ENGINE_GROUP)
            except Unreachable:
                return False
            return group.state == "STABLE" and sum(bool(o.partitions) for o in group.owners) == len(self.engines)

        self.patiently("a share for each engine", shared)

    def patiently(self, what: str, found: Callable[[], T | None]) -> T:
        """Wait for it. Raises `NotRecovered`."""
        try:
            return until(what, found, RECOVERY_S)
        except AssertionError as error:
            raise NotRecovered(str(error)) from error

    def next_steps(self, tasks: dict[str, int], since_ms: int) -> float | None:
        """Wait until each of these tasks goes on in a later epoch; how long after the last one did, s.

        tasks: to the epoch that is over. Those that ended instead do not count; None if none is left.
        """
        moments: dict[str, int] = {}

        def look() -> bool:
            self.witness.look()
            for task, epoch in tasks.items():
                first = self.witness.first_after(task, epoch)
                if first is not None:
                    moments.setdefault(task, first.at)
            return all(t in moments or self.observer.lives[t].end is not None for t in tasks)

        self.patiently("the next steps", look)
        return (max(moments.values()) - since_ms) / 1000 if moments else None

    def spare(self, worker: str | None = None) -> dict[str, int]:
        """Tasks in the middle of their work (on a worker), with their epochs; nobody meddles with them from now on."""
        self.witness.look()
        found: dict[str, int] = {}
        for task, epoch in self.observer.running(worker).items():
            last = self.witness.last(task)
            wanted = self.load.wanted.get(task)
            if last is None or wanted is None or last[0] != epoch or wanted.cancelled or wanted.resume_at is not None:
                continue
            number = int(last[1].words[3])
            stumbling = wanted.stumbles and not wanted.redriven
            if number < wanted.count * 0.8 and not (stumbling and number >= wanted.count // 2 - 2):
                found[task] = epoch
        self.load.spared |= set(found)
        return found

    def end(self) -> None:
        """No more faults and no more work; returns when everything that was asked for has ended, or should have."""
        self.load.stop()
        try:
            self.patiently("the end of every task", self.load.settle)
            self.patiently("the end of every command", lambda: self.observer.probes.unseen() == 0)
            self.recovered_stores()
        except NotRecovered as error:
            self.violations.append(Violation(str(error)))
        finally:
            self._done.set()
            self._keeper.join()
            self.observer.stop()
            self.witness.look()

    def recovered_stores(self) -> None:
        """Give the first host alone all partitions, everything else stopped, and compare its stores (G5)."""
        for service in (*self.workers, self.server, *self.engines):
            with self._lock:
                service.wanted = False
            service.stop()
        first = self.engines[0]
        first.start()
        self.patiently("all partitions on the first host", lambda: len(self.held(first)) == PARTITIONS)
        first.wanted = False
        try:
            self.stack.check_store(first.process)
        except AssertionError as error:
            self.violations.append(Violation(f"store and changelog: {error}"))

    @staticmethod
    def held(engine: Service) -> set[str]:
        """The partitions that a process has brought up to date in its present life."""
        lines = [line for line in engine.process.text().splitlines() if "is up to date" in line]
        return {line.split("partition ")[1].split()[0] for line in lines}


class NotRecovered(AssertionError):
    """Something did not come back."""


def _skew_library(folder: Path) -> Path | None:
    """Compile the clock that can be set; None without a C compiler."""
    compiler = which("cc")
    if compiler is None:
        return None
    library = folder / "skew.so"
    source = Path(__file__).with_name("skew.c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


@contextmanager
def _small_disk(folder: Path) -> Iterator[bool]:
    """A file system of a bounded size, if this process may mount one."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_STATE_MB}m", "perdure-chaos", str(folder)],
        capture_output=True,
        check=False,
    )
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def campaign(folder: Path, seed: int, say: Callable[[str], None] = print, brokers: int = 1) -> Iterator[Campaign]:
    """A stack of its own, under load, on one broker behind a proxy or on three; nothing is left of it at the end."""
    with ExitStack() as stack:
        kafka: EmbeddedKafka | OneOfThree
        proxy: Proxy | None = None
        if brokers == 1:
            kafka, proxy = stack.enter_context(proxied_kafka(folder / "kafka"))
        else:
            cluster = KafkaCluster(folder / "kafka")
            stack.callback(cluster.stop)
            cluster.start()
            kafka = OneOfThree(cluster)
        (folder / "stack").mkdir()
        has_disk = stack.enter_context(_small_disk(folder / "stack" / "state"))
        whole = stack.enter_context(
            stack_on(kafka.bootstrap, "chaos.", folder / "stack", partitions=PARTITIONS, replication=brokers)
        )
        made = Campaign(folder, kafka, proxy, whole, seed, say)
        made.has_disk = has_disk
        try:
            made.begin()
            yield made
        finally:
            made._done.set()
