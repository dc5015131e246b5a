"""Creating a namespace's topics, pinning its partition count, and verifying both at start-up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import ConfigEntry, ConfigResource, ConfigSource, NewTopic  # type: ignore[attr-defined]

from perdure.schemas import codec, limits, topics
from perdure.schemas.errors import ConfigurationError, Unreachable
from perdure.schemas.public import ConfigRecord
from perdure.schemas.topics import Topic
from perdure.streams.config_view import ConfigView
from perdure.streams.log import append_one

if TYPE_CHECKING:
    from perdure.streams.kafka_log import KafkaLog

TOPOLOGY = "topology"
_CALL_S = 15.0
_REACH_S = limits.VERDICT_MS / 1000


def create_topics(
    bootstrap: str,
    prefix: str = "perdure.",
    *,
    partitions: int = limits.DEFAULT_PARTITIONS,
    replication: int = 1,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Create what is missing and pin the partition count; does nothing to what exists. Blocks for seconds.

    Raises `Unreachable`, or `ConfigurationError` if the namespace is pinned to another partition count.
    """
    from perdure.streams.kafka_log import KafkaLog

    log = KafkaLog(bootstrap, prefix, options=options, partitions=partitions)
    admin = log.admin()
    wanted = [
        NewTopic(t.on(prefix), partitions if t.partitioned else 1, replication, config=t.settings) for t in topics.ALL
    ]
    for name, done in admin.create_topics(wanted, request_timeout=_CALL_S).items():
        try:
            done.result(_CALL_S)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise Unreachable(f"topic {name} cannot be created on {bootstrap}: {error.args[0].str()}") from error
    _await_topics(log)
    _pin(log, partitions)


def replace_topic(log: KafkaLog, topic: Topic) -> None:
    """Delete a topic, if it is there, and create it again: empty, with the settings that were made for it.

    Its replication is that of `task-events`, from which it is made anew, or its own if that was greater. Blocks for
    seconds. Raises `Unreachable`, or `KafkaException` when the broker refuses.
    """
    admin, name = log.admin(), topic.on(log.prefix)
    known = admin.list_topics(timeout=_CALL_S).topics
    there = name in known
    like = [known[topics.EVENTS.on(log.prefix)], *([known[name]] if there else [])]
    replication = max(len(p.replicas) for found in like for p in found.partitions.values())
    own = _own_settings(log, topic) if there else {}
    needed = {n: topic.settings[n] for n in _STRICT if n in topic.settings}
    needed |= {n: max(own.get(n, ""), topic.settings[n], key=_number) for n in _LEAST if n in topic.settings}
    count = log.partitions if topic.partitioned else 1
    if there:
        admin.delete_topics([name], request_timeout=_CALL_S)[name].result(_CALL_S)
        _await(lambda: name not in admin.list_topics(timeout=_CALL_S).topics, f"{name} is still there")
    new = NewTopic(name, count, replication, config=topic.settings | own | needed)
    admin.create_topics([new], request_timeout=_CALL_S)[name].result(_CALL_S)
    _await_topics(log)


def _own_settings(log: KafkaLog, topic: Topic) -> dict[str, str]:
    """What somebody has set for this topic alone."""
    entries = _described(log, [topic])[topic.name].items()
    return {n: str(e.value) for n, e in entries if ConfigSource(e.source) is ConfigSource.DYNAMIC_TOPIC_CONFIG}


def _await(found: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + _CALL_S
    while not found():
        if time.monotonic() > deadline:
            raise Unreachable(f"{otherwise} after {_CALL_S:.0f} s")
        time.sleep(0.05)


def _await_topics(log: KafkaLog) -> None:
    """Wait until every broker knows the topics: creation is answered before metadata has spread."""

    def there() -> bool:
        known = log.admin().list_topics(timeout=_CALL_S).topics
        return all(t.on(log.prefix) in known and known[t.on(log.prefix)].partitions for t in topics.ALL)

    _await(there, f"the topics of {log.prefix} have not all appeared on {log.bootstrap}")


def _pin(log: KafkaLog, partitions: int) -> None:
    name = f"{TOPOLOGY}/partitions"
    known = pinned(log)
    if known is None:
        content = json.dumps({"partitions": partitions, "feature_level": 1}).encode()
        append_one(log, topics.CONFIG.name, 0, name.encode(), codec.encode(ConfigRecord(name=name, content=content)))
    elif known != partitions:
        raise ConfigurationError(f"the namespace {log.prefix!r} is pinned to {known} partitions, not {partitions}")


def pinned_partitions(log: KafkaLog, besides: Collection[Topic] = ()) -> int:
    """The namespace's partition count. Raises `ConfigurationError` if it has none, or the broker has another.

    besides: topics that are about to be made anew: they may be gone, or as a broker makes what is asked for.
    """
    known = log.admin().list_topics(timeout=_CALL_S).topics if _reachable(log) else {}
    config = topics.CONFIG.on(log.prefix)
    if config not in known:
        raise ConfigurationError(f"{log.bootstrap} has no namespace {log.prefix!r}: create its topics first")
    count = pinned(log)
    if count is None:
        raise ConfigurationError(f"the namespace {log.prefix!r} on {log.bootstrap} has no pinned partition count")
    for topic in topics.ALL:
        found = len(known[topic.on(log.prefix)].partitions) if topic.on(log.prefix) in known else 0
        wanted = count if topic.partitioned else 1
        if topic in besides:
            continue
        if found != wanted and topic is topics.CHANGELOG:
            gone = f"has {found} partitions and not {wanted}" if found else "is gone"
            raise ConfigurationError(
                f"topic {topic.on(log.prefix)} {gone}: stop every engine, and make it anew with "
                f"`perdure rebuild --from-events`"
            )
        if found != wanted:
            raise ConfigurationError(
                f"topic {topic.on(log.prefix)} has {found} partitions, but the namespace is pinned to {wanted}: "
                f"adding partitions would send routing keys elsewhere. Use a new namespace, or restore the topic"
            )
    return count


def _reachable(log: KafkaLog) -> bool:
    try:
        log.admin().list_topics(timeout=_REACH_S)
    except KafkaException as error:
        raise Unreachable(f"no Kafka answers at {log.bootstrap}: {error.args[0].str()}") from error
    return True


def pinned(log: KafkaLog) -> int | None:
    """The partition count in `config`, which has to exist; None if none is pinned. Raises `Unreachable`."""
    view = ConfigView(log)
    try:
        view.refresh()
        known = view.names.get(f"{TOPOLOGY}/partitions")
        return None if known is None or known[1] is None else int(json.loads(known[1])["partitions"])
    finally:
        view.close()


def verify_topics(log: KafkaLog) -> None:
    """Compare each topic's settings with the table. Raises `ConfigurationError` naming everything that is off."""
    found = settings_of(log, topics.ALL)
    wrong = [f"{t.on(log.prefix)}: {line}" for t in topics.ALL for line in settings_off(t, found[t.name])]
    if wrong:
        raise ConfigurationError("topics are not set up as Perdure needs them: " + "; ".join(wrong))


def settings_of(log: KafkaLog, wanted: Iterable[Topic]) -> dict[str, dict[str, str]]:
    """What the broker has for topics that exist: topic -> setting -> value. Raises `Unreachable`."""
    described = _described(log, wanted)
    return {name: {n: str(entry.value) for n, entry in entries.items()} for name, entries in described.items()}


def _described(log: KafkaLog, wanted: Iterable[Topic]) -> dict[str, dict[str, ConfigEntry]]:
    asked = {t.name: ConfigResource(ConfigResource.Type.TOPIC, t.on(log.prefix)) for t in wanted}
    found = log.admin().describe_configs(list(asked.values()), request_timeout=_CALL_S)
    described = {}
    for name, resource in asked.items():
        try:
            described[name] = found[resource].result(_CALL_S)
        except KafkaException as error:
            raise Unreachable(f"no settings of {log.prefix}{name}: {error.args[0].str()}") from error
    return described


def _number(text: str) -> int:
    return int(text or -1)


def settings_off(topic: Topic, found: Mapping[str, str]) -> list[str]:
    """What of a topic's settings is not as the guarantees need it, a line for each."""
    wanted = topic.settings
    exactly = [f"{n} is {found[n]}, should be {wanted[n]}" for n in _STRICT if n in wanted and found[n] != wanted[n]]
    least = [
        f"{n} is {found[n]}, should be at least {wanted[n]}"
        for n in _LEAST
        if n in wanted and int(found[n]) < int(wanted[n])
    ]
    return exactly + least


_STRICT = ("cleanup.policy", "message.timestamp.type", "max.message.bytes")
_LEAST = ("delete.retention.ms",)
"""Settings that guarantees depend on: by the last recovery counts which stores and snapshots are too old. The retention
of topics that are not compacted is the operator's to choose."""
