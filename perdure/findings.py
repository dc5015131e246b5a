"""What `perdure doctor` has to say about what it found: a function for each check, from facts to one line.

A finding is `ok`, a `note` (all works; somebody may want to know) or `wrong` (with what to do about it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from perdure.schemas import limits, topics
from perdure.schemas.durations import to_text
from perdure.schemas.public import WorkerMetrics
from perdure.streams.survey import GroupFacts, TopicFacts

LAG_MAX_MS = 10_000
"""An input older than this that is still unread means that its partition stands still or is far behind."""
SILENT_MS = limits.LEASE_MS + limits.BEAT_MS
SKEW_MAX_MS = limits.CLOCK_AGREES_MS
METRICS_MS = 30_000
"""Between two metrics of a live worker, with room: they are written every 10 s."""
DISK_MIN = 1_000_000_000
OPEN_MAX_MS = 60_000
"""The engine's own transactions are ended after 15 s; another program's by default after 60 s."""
_NAMED = 3


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    state: str
    """ok, note or wrong."""
    told: str
    advice: str = ""
    """What to do."""


def ok(check: str, told: str) -> Finding:
    """All is as it has to be."""
    return Finding(check, "ok", told)


def note(check: str, told: str, advice: str) -> Finding:
    """All works; somebody may want to know."""
    return Finding(check, "note", told, advice)


def wrong(check: str, told: str, advice: str) -> Finding:
    """Something does not work, or will not for long."""
    return Finding(check, "wrong", told, advice)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was found of a namespace whose broker answers and whose topics are there. Times in ms."""

    now: int
    """The broker's clock, as well as it is known."""
    brokers: int
    version: str | None
    """Of the broker; its protocol tells it only for one of this machine's own."""
    topics: Mapping[str, TopicFacts]
    pinned: int | None
    group: GroupFacts
    committed: Mapping[int, int | None]
    unread_at: Mapping[int, int]
    """Partition -> log time of its oldest unread input, where there is one."""
    answers: int
    """Partitions whose engine has answered a question."""
    answer_ms: int
    """How long the last of them took."""
    skews: Mapping[str, int] = field(default_factory=dict)
    """Who -> its clock minus the broker's."""
    beats: Mapping[str, int] = field(default_factory=dict)
    """Session -> log time of its last beat."""
    workers: tuple[WorkerMetrics, ...] = ()
    """The newest metrics of each worker."""
    quarantined: tuple[int, str] = (0, "")
    """(how many, the newest in words)"""
    dead_letters: int = 0
    open_since: Mapping[str, int] = field(default_factory=dict)
    """topic/partition -> log time of the first record whose transaction has not ended, where there is one."""


def examine(facts: Facts) -> list[Finding]:
    """Every check of the namespace, in the order of the report."""
    return [finding for check in _CHECKS for finding in check(facts)]


def _broker(f: Facts) -> Iterator[Finding]:
    version = f", Kafka {f.version}" if f.version else ""
    yield ok("broker", f"{_count(f.brokers, 'broker')}{version}")


def _topics(f: Facts) -> Iterator[Finding]:
    missing = [t.topic.name for t in f.topics.values() if not t.partitions]
    off = [f"{t.topic.name}: {line}" for t in f.topics.values() for line in t.off]
    headless = [f"{t.topic.name}/{p.partition}" for t in f.topics.values() for p in t.partitions if p.leader < 0]
    if missing:
        yield wrong("topics", "missing: " + ", ".join(missing), "make them: perdure topics create")
    if off:
        yield wrong(
            "topics", "; ".join(off), "set them as the table says (kafka-configs.sh --alter); perdure topics shows them"
        )
    if headless:
        yield wrong("topics", "without a leader: " + _some(headless), "bring back the brokers that hold them")
    if not (missing or off or headless):
        yield ok("topics", f"all {len(f.topics)} with the settings of the table")


def _partitions(f: Facts) -> Iterator[Finding]:
    if f.pinned is None:
        yield wrong("partitions", "no partition count is pinned", "pin it: perdure topics create")
        return
    differ = [
        f"{t.topic.name} has {len(t.partitions)}"
        for t in f.topics.values()
        if t.partitions and len(t.partitions) != (f.pinned if t.topic.partitioned else 1)
    ]
    if differ:
        yield wrong(
            "partitions",
            f"pinned to {f.pinned}, but {', '.join(differ)}",
            "routing keys would go elsewhere: restore the topic, or use a new namespace",
        )
    else:
        yield ok("partitions", f"pinned to {f.pinned}")


def _replication(f: Facts) -> Iterator[Finding]:
    present = [t for t in f.topics.values() if t.partitions]
    copies = min((t.replication for t in present), default=0)
    behind = sum(p.in_sync < p.replicas for t in present for p in t.partitions)
    stuck = [t.topic.name for t in present if _min_in_sync(t) > t.replication]
    lone = [t.topic.name for t in present if t.replication >= 3 and _min_in_sync(t) < 2]
    told = f"{copies} {'copy' if copies == 1 else 'copies'} of each record on {_count(f.brokers, 'broker')}"
    if stuck:
        yield wrong(
            "replication",
            f"min.insync.replicas above the copies: {_some(stuck)}",
            "nothing can be written there: lower it, or add replicas",
        )
    elif behind:
        yield wrong(
            "replication",
            f"{told}; {behind} partitions have replicas out of sync",
            "see which broker is down or too slow",
        )
    elif lone:
        yield wrong(
            "replication",
            f"{told}, but min.insync.replicas is 1: {_some(lone)}",
            "set it to 2: an acknowledged command may be on one disk only",
        )
    elif copies < 3 <= f.brokers:
        yield wrong("replication", told, "three brokers can keep three copies: raise the replication of the topics")
    elif copies < 2:
        yield note(
            "replication",
            f"{told}: a lost disk loses the namespace",
            "for development only; use three brokers for work that matters",
        )
    else:
        yield ok("replication", told)


def _min_in_sync(t: TopicFacts) -> int:
    return int(t.settings.get("min.insync.replicas", "1"))


def _retention(f: Facts) -> Iterator[Finding]:
    commands = f.topics[topics.COMMANDS.name]
    kept = int(commands.settings.get("retention.ms", "-1"))
    lost = [p.partition for p in commands.partitions if (c := f.committed.get(p.partition)) is not None and c < p.first]
    oldest = min(f.unread_at.values(), default=None)
    waits = 0 if oldest is None else max(0, f.now - oldest)
    for_ = "for ever" if kept < 0 else f"for {_span(kept)}"
    if lost:
        yield wrong(
            "retention",
            f"commands were deleted unread in partitions {_some(lost)}",
            "lengthen retention.ms of task-commands; the engine refuses to skip them (G1)",
        )
    elif 0 < kept < 4 * waits:
        yield wrong(
            "retention",
            f"the oldest unread input is {_span(waits)} old, and inputs are kept {for_}",
            "start the engine, or lengthen retention.ms of task-commands, before it is lost",
        )
    else:
        unread = "nothing is unread" if oldest is None else f"the oldest unread is {_span(waits)} old"
        yield ok("retention", f"inputs are kept {for_}; {unread}")


def _transactions(f: Facts) -> Iterator[Finding]:
    hung = {place: f.now - at for place, at in f.open_since.items() if f.now - at > OPEN_MAX_MS}
    if hung:
        longest = max(hung.values())
        yield wrong(
            "transactions",
            f"not ended for {_span(longest)}: {_some(sorted(hung))}; readers wait there",
            "whose it is: kafka-transactions.sh find-hanging. Kafka 4.3.0 to 4.4.0 lose ends themselves (KAFKA-20734)",
        )
    else:
        yield ok("transactions", "none has been open for long")


def _engine(f: Facts) -> Iterator[Finding]:
    count = f.pinned or 0
    owned = {p for owner in f.group.owners for p in owner.partitions}
    free = sorted(set(range(count)) - owned)
    hosts = ", ".join(sorted({f"{o.host} ({len(o.partitions)})" for o in f.group.owners}))
    if not f.group.owners:
        yield wrong("engine", "no engine runs", "start one: perdure engine")
    elif free:
        yield wrong(
            "engine",
            f"nobody owns partitions {_some(free)}; the group is {f.group.state}",
            "wait some seconds after a start or a crash; else look into the engines' logs",
        )
    else:
        yield ok("engine", f"{count} partitions owned by {hosts}")
    commands, changes = f.topics[topics.COMMANDS.name], f.topics[topics.CHANGELOG.name]
    lag = sum(max(0, p.end - (f.committed.get(p.partition) or p.first)) for p in commands.partitions)
    late = {p: f.now - at for p, at in f.unread_at.items() if f.now - at > LAG_MAX_MS}
    newest = max((p.last_at for p in changes.partitions if p.last_at is not None), default=None)
    commit = "nothing committed yet" if newest is None else f"newest commit {_span(max(0, f.now - newest))} ago"
    if late:
        worst = max(late, key=lambda p: late[p])
        yield wrong(
            "lag",
            f"{lag:,} inputs unread, in partition {worst} for {_span(late[worst])}; {commit}",
            "if it grows: more engine processes or partitions' owners; if it stands: their logs",
        )
    else:
        yield ok("lag", f"{lag:,} inputs unread; {commit}")
    if f.group.owners and f.answers < count:
        yield wrong(
            "answers",
            f"{f.answers} of {count} partitions answered within 5 s",
            "the others are restoring, far behind, or stuck: see engine and lag",
        )
    elif f.group.owners:
        yield ok("answers", f"{count} of {count} partitions, the last after {f.answer_ms} ms")


def _workers(f: Facts) -> Iterator[Finding]:
    live = [w for w in f.workers if f.now - f.beats.get(w.session, 0) <= SILENT_MS]
    stopped = [w for w in f.workers if w.state == "stopped"]
    silent = [w for w in f.workers if w not in live and w not in stopped]
    slots, busy = sum(w.slots for w in live), sum(len(w.running) for w in live)
    if live:
        told = f"{len(live)} live on {_count(len({w.host for w in live}), 'host')}, {busy} of {slots} slots busy"
        yield ok("workers", told)
    else:
        yield note("workers", "none is live: tasks wait", "start one: perdure worker -m myapp.tasks")
    if silent:
        names = _some([f"{w.worker_id} on {w.host}" for w in silent])
        yield note("workers", f"silent: {names}", "they died, or cannot reach the broker")
    full = [f"{w.host} ({w.disk_free / 1e9:.1f} GB)" for w in live if w.disk_free < DISK_MIN]
    if full:
        yield wrong("workers", f"disk nearly full: {_some(full)}", "checkpoints will fail: free some space")
    yield from _checkpoints(live)


def _checkpoints(live: list[WorkerMetrics]) -> Iterator[Finding]:
    """A task moves between the workers of its queue: they have to see the same checkpoints."""
    if not live:
        return
    by_queue: dict[str, dict[str, str]] = {}
    for w in (w for w in live if w.checkpoint_store):
        for queue in w.queues:
            by_queue.setdefault(queue, {})[w.checkpoint_store] = w.host
    apart = {queue: hosts for queue, hosts in by_queue.items() if len(hosts) > 1}
    if apart:
        queue, hosts = sorted(apart.items())[0]
        more = f" (and {len(apart) - 1} more queues)" if len(apart) > 1 else ""
        yield wrong(
            "checkpoints",
            f"queue {queue} has workers on {_some(sorted(set(hosts.values())))} that share no checkpoint store{more}",
            "a task that moves there begins anew: give all the same shared PERDURE_CHECKPOINT_DIR",
        )
    else:
        yield ok("checkpoints", "the workers of each queue share their checkpoint store")


def _clocks(f: Facts) -> Iterator[Finding]:
    off = {who: ms for who, ms in f.skews.items() if abs(ms) > SKEW_MAX_MS}
    if off:
        told = ", ".join(
            f"{who} is {_span(abs(ms))} {'ahead' if ms > 0 else 'behind'}" for who, ms in sorted(off.items())
        )
        yield wrong(
            "clocks",
            f"against the broker's clock: {told}",
            "set the clocks (NTP): ticks of a host that is off by more than 30 s fire nothing",
        )
    else:
        worst = max((abs(ms) for ms in f.skews.values()), default=0)
        yield ok("clocks", f"{_and(f.skews)} agree with the broker within {_span(worst)}")


def _left_overs(f: Facts) -> Iterator[Finding]:
    count, newest = f.quarantined
    if count:
        yield note(
            "quarantine",
            f"{_count(count, 'record')} set aside; the newest: {newest}",
            "read the topic quarantine: cause, origin and bytes of each",
        )
    else:
        yield ok("quarantine", "empty")
    if f.dead_letters:
        yield note(
            "dead letters",
            f"{_count(f.dead_letters, 'task')} waiting for a person",
            "look and decide: perdure dlq list",
        )
    else:
        yield ok("dead letters", "none")


_CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _broker, _topics, _partitions, _replication, _retention, _transactions, _engine, _workers, _clocks, _left_overs,
)  # fmt: skip


def _span(ms: int) -> str:
    """A duration without what is nought at its end."""
    return to_text(ms).removesuffix(" 0m").removesuffix(" 0h")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _and(names: Iterable[str]) -> str:
    return " and ".join(names)


def _some(names: list[str] | list[int]) -> str:
    shown = ", ".join(map(str, names[:_NAMED]))
    return shown + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
