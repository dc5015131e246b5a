"""The client: where submits go, what is refused before the log, how answers find their question."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from typing import Any

import pytest

from perdure import client as client_module
from perdure.client import Client
from perdure.connectors.blobs import Blobs, MemoryBlobs
from perdure.connectors.large_values import LargeValues
from perdure.schemas import codec, ids, limits, references, values
from perdure.schemas.commands import DescribeTask, FindTasks, SubmitTask
from perdure.schemas.common import Retry
from perdure.schemas.errors import (
    AmbiguousId,
    Busy,
    CommandRefused,
    InfrastructureError,
    InvalidRequest,
    NotFound,
    NotSerializable,
    UnknownType,
    Unreachable,
    ValueTooLarge,
)
from perdure.streams import admission
from perdure.streams.memory_log import MemoryLog
from tests.unit.perdure.scripted_engine import NOT_FOUND, Answer, configure, reply, running, status

NOW = 1_800_000_000_000


@pytest.fixture
def log() -> MemoryLog:
    made = MemoryLog(lambda: NOW)
    configure(made, "type/t", {"queue": "etl"})
    return made


@pytest.fixture
def client(log: MemoryLog) -> Iterator[Client]:
    with Client(log, clock=lambda: NOW) as made:
        yield made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is told after a moment."""
    monkeypatch.setattr(client_module, "_VERDICT_S", 0.05)


def submitted(log: MemoryLog) -> list[tuple[int, SubmitTask]]:
    return [(r.partition, codec.decode_as(SubmitTask, r.value or b"")) for r in log.records("task-commands")]


# Submit ---------------------------------------------------------------------------------------------------------------


def test_a_submit_is_in_the_partition_of_its_types_queue_when_it_returns(log: MemoryLog, client: Client) -> None:
    handle = client.submit("t", {"b": 1, "a": 2})
    [(partition, command)] = submitted(log)
    assert partition == ids.partition_of("etl", log.partitions)
    assert command.task_id == handle.id
    assert ids.split(handle.id)[0] == command.queue == "etl"
    assert (command.input, command.policy_version, command.reply_to) == (b'{"a":2,"b":1}', 0, client.id)
    assert log.records("task-commands")[0].key == b"etl"


def test_a_flood_is_told_when_to_come_again(log: MemoryLog, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BUSY_LAG": 6, "FREE_SUBMITS": 3, "RETRY_AFTER_S": 0}.items():
        monkeypatch.setattr(admission, name, value)
    with pytest.raises(Busy, match=r"engine is 8 records behind in task-commands") as busy:
        for n in range(50):
            client.submit("t", n)
    assert busy.value.retry_after == 0
    assert len(submitted(log)) == 8, "nothing that was refused is in the log"


def test_every_option_reaches_the_command(log: MemoryLog, client: Client) -> None:
    client.submit(
        "t", None, id="mine", key="k", queue="gpu", priority=7, timeout="6h", queue_timeout=60,
        total_timeout=dt.timedelta(days=1), no_progress_timeout="90s", retry={"max_attempts": 5, "delay": "2s"},
        labels={"a": "b"}, user="u", concurrency_key="c", after=("etl/1",), resources={"cpu": 2},
        estimated_duration="6 hours", agent_config={"model": "x"}, checkpoint_interval="5m", checkpoint_storage="s",
        callback_url="https://example.org", on_success="task:next", on_failure="notify_admin", notify=["me"],
    )  # fmt: skip
    [(_, command)] = submitted(log)
    expected = SubmitTask(
        command_id=command.command_id, issued_by=command.issued_by, reply_to=client.id, policy_version=0,
        task_id="gpu/mine", type="t", key="k", queue="gpu", priority=7, run_timeout=21_600_000, queue_timeout=60_000,
        total_timeout=86_400_000, no_progress_timeout=90_000, retry=Retry(max_attempts=5, delay=2000),
        labels={"a": "b"}, user="u", concurrency_key="c", after=["etl/1"], resources=b'{"cpu":2}',
        estimated_duration=21_600_000, agent_config=b'{"model":"x"}', checkpoint_interval=300_000,
        checkpoint_storage="s", callback_url="https://example.org", on_success="task:next", on_failure="notify_admin",
        notify=["me"],
    )  # fmt: skip
    assert command == expected


IDS: list[tuple[str, dict[str, Any], str]] = [
    ("a local id", {"id": "2026-11"}, "etl/2026-11"),
    ("a whole id", {"id": "etl/x"}, "etl/x"),
    ("a whole id of another queue", {"id": "gpu/x"}, "gpu/x"),
    ("a local id with a slash", {"id": "a/b/c"}, "etl/a/b/c"),
    ("a whole id of a queue named only now", {"id": "adhoc/x", "queue": "adhoc"}, "adhoc/x"),
    ("a key", {"key": "2026-11"}, "etl/" + ids.keyed_local_id("etl", "t", "2026-11")),
    ("a key in another queue", {"key": "k", "queue": "gpu"}, "gpu/" + ids.keyed_local_id("gpu", "t", "k")),
]


@pytest.mark.parametrize(("options", "expected"), [row[1:] for row in IDS], ids=[row[0] for row in IDS])
def test_the_id_of_a_submit(log: MemoryLog, client: Client, options: Any, expected: str) -> None:
    configure(log, "queue/gpu", {})
    assert client.submit("t", **options).id == expected


def test_a_queue_with_several_routing_keys_spreads_and_each_id_has_one_place(log: MemoryLog, client: Client) -> None:
    configure(log, "queue/etl", {"routing_keys": ["etl", "etl~1", "etl~2"]})
    places = {n: ids.split(client.submit("t", id=str(n)).id)[0] for n in range(50)}
    assert set(places.values()) == {"etl", "etl~1", "etl~2"}
    assert {n: ids.split(client.submit("t", id=str(n)).id)[0] for n in range(50)} == places
    assert client.submit("t", id="etl~1/7", queue="etl").id == "etl~1/7"


@pytest.mark.parametrize(
    "content", [{"routing_keys": None}, {"routing_keys": "abc"}, {"routing_keys": ["a b"]}], ids=str
)
def test_a_configuration_that_the_engine_refuses_changes_nothing_here_either(
    log: MemoryLog, client: Client, content: Any
) -> None:
    configure(log, "queue/etl", {"routing_keys": ["etl", "etl~1"]})
    before = {n: client.submit("t", id=str(n)).id for n in range(20)}
    configure(log, "queue/etl", content)
    client.catalog.refresh(force=True)
    assert {n: client.submit("t", id=str(n)).id for n in range(20)} == before
    assert client.submit("t", id="etl~1/x", queue="etl").id == "etl~1/x"


def test_a_type_that_is_published_later_is_found_then(log: MemoryLog, client: Client) -> None:
    with pytest.raises(UnknownType) as caught:
        client.submit("late")
    assert caught.value.field == "type"
    assert log.records("task-commands") == []
    configure(log, "type/late", {})
    assert ids.split(client.submit("late").id)[0] == limits.DEFAULT_QUEUE


def test_an_unknown_type_may_wait_in_a_queue_that_is_named(log: MemoryLog, client: Client) -> None:
    client.submit("unheard", queue="somewhere")
    client.submit("unheard", id="etl/1")
    assert {(c.queue, c.policy_version) for _, c in submitted(log)} == {("somewhere", None), ("etl", None)}


def test_a_configuration_record_that_nobody_can_read_changes_nothing(log: MemoryLog, client: Client) -> None:
    log.producer().append("config", 0, b"type/t", b"\xc3\x01garbage")
    log.producer().append("config", 0, b"type/t", b'{"queue": "other"}')
    assert ids.split(client.submit("t").id)[0] == "etl"


def test_a_type_that_was_deleted_is_unknown(log: MemoryLog, client: Client) -> None:
    log.producer().append("config", 0, b"type/t", None)
    with pytest.raises(UnknownType):
        client.submit("t")


STARTS: list[tuple[dict[str, Any], int]] = [
    ({"delay": "5 minutes"}, NOW + 300_000),
    ({"delay": 0}, NOW),
    ({"at": "2030-01-01T00:00:00Z"}, 1_893_456_000_000),
    ({"at": dt.datetime(2030, 1, 1, tzinfo=dt.UTC)}, 1_893_456_000_000),
    ({"at": 1_893_456_000.5}, 1_893_456_000_500),
]


@pytest.mark.parametrize(("options", "expected"), STARTS)
def test_the_start_of_a_submit(log: MemoryLog, client: Client, options: Any, expected: int) -> None:
    client.submit("t", **options)
    assert submitted(log)[0][1].not_before == expected


BIG = "x" * 190_000
REFUSED: list[tuple[dict[str, Any], str, type[InvalidRequest]]] = [
    ({"priority": 10}, "priority", InvalidRequest),
    ({"priority": "high"}, "priority", InvalidRequest),
    ({"queue": "No Queue"}, "queue", InvalidRequest),
    ({"timeout": "soon"}, "timeout", InvalidRequest),
    ({"total_timeout": -1}, "total_timeout", InvalidRequest),
    ({"delay": "1s", "at": 5}, "delay", InvalidRequest),
    ({"at": "tomorrow"}, "at", InvalidRequest),
    ({"at": dt.datetime(2030, 1, 1)}, "at", InvalidRequest),  # noqa: DTZ001
    ({"id": ""}, "task_id", InvalidRequest),
    ({"id": "x" * 600}, "task_id", InvalidRequest),
    ({"id": "etl/x", "queue": "gpu"}, "task_id", InvalidRequest),
    ({"key": ""}, "key", InvalidRequest),
    ({"retry": {"max_attempts": 0}}, "retry.max_attempts", InvalidRequest),
    ({"retry": 3}, "retry", InvalidRequest),
    ({"labels": {"a": 1}}, "labels", InvalidRequest),
    ({"on_failure": "mail:me"}, "on_failure", InvalidRequest),
    ({"agent_config": [1]}, "agent_config", InvalidRequest),
    ({"input": {1, object()}}, "input", NotSerializable),
    ({"input": "x" * limits.VALUE_MAX}, "input", ValueTooLarge),
    ({"input": BIG, "agent_config": {"a": BIG}, "resources": {"a": BIG}}, "command", ValueTooLarge),
]  # fmt: skip


@pytest.mark.parametrize(("options", "field", "kind"), REFUSED)
def test_what_cannot_be_right_is_refused_before_the_log(
    log: MemoryLog, client: Client, options: Any, field: str, kind: type[InvalidRequest]
) -> None:
    with pytest.raises(kind) as caught:
        client.submit("t", **options)
    assert caught.value.field == field
    assert log.records("task-commands") == []


def test_a_large_input_is_in_the_store_before_its_submit_is_in_the_log(log: MemoryLog) -> None:
    blobs = MemoryBlobs()
    large = LargeValues(lambda: (blobs, "home"), day=lambda: 7)
    with Client(log, clock=lambda: NOW, large_values=large) as client:
        handle = client.submit("t", "x" * limits.VALUE_MAX, queue="etl", key="k")
        client.submit("t", {"day": 7, "sha256": "ab"}, queue="etl")
    first, second = (codec.decode_as(SubmitTask, r.value or b"") for r in log.records("task-commands"))
    assert references.parse(first.input).day == 7
    assert values.loads(large.fetched(handle.id, first.input)) == "x" * limits.VALUE_MAX
    assert second.input == b'{"day":7,"sha256":"ab"}'


def test_a_store_that_is_away_keeps_the_submit_out_of_the_log(log: MemoryLog) -> None:
    def away() -> tuple[Blobs, str]:
        raise Unreachable("the store is away")

    with Client(log, large_values=LargeValues(away)) as client, pytest.raises(Unreachable, match="store is away"):
        client.submit("t", "x" * limits.VALUE_MAX, queue="etl")
    assert log.records("task-commands") == []


def test_an_option_that_does_not_exist_is_a_type_error(client: Client) -> None:
    with pytest.raises(TypeError, match="urgency"):
        client.submit("t", urgency=1)  # type: ignore[call-arg]


class BrokenProducer:
    """Kafka says no."""

    def append(self, *args: Any) -> None:
        args[-1](-1, InfrastructureError("no leader"))

    def close(self) -> None:
        pass


def test_a_submit_that_kafka_did_not_take_raises(log: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "producer", BrokenProducer)
    with Client(log) as client, pytest.raises(InfrastructureError, match="no leader"):
        client.submit("t")


def test_a_submit_that_kafka_never_acknowledges_is_unreachable(log: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BrokenProducer, "append", lambda *_: None)
    monkeypatch.setattr(log, "producer", BrokenProducer)
    monkeypatch.setattr(client_module, "_ACK_S", 0.01)
    with Client(log) as client, pytest.raises(Unreachable, match="same id or key"):
        client.submit("t")


# Ids ------------------------------------------------------------------------------------------------------------------


def known_ids(*task_ids: str) -> Any:
    """An engine that knows some tasks."""

    def script(command: Any, partition: int) -> Answer | None:
        here = [t for t in task_ids if ids.partition_of(ids.split(t)[0], 8) == partition]
        if isinstance(command, DescribeTask):
            exact = [t for t in task_ids if command.task_id in (t, ids.split(t)[1])]
            return (True, {"task_id": exact[0], "body": status(exact[0])}) if exact else NOT_FOUND
        if isinstance(command, FindTasks):
            found = [t for t in here if t.startswith(command.prefix) or ids.split(t)[1].startswith(command.prefix)]
            return True, {"body": {"ids": found}}
        return True, {}

    return script


def test_get_takes_whole_ids_local_ids_and_unique_prefixes(log: MemoryLog, client: Client) -> None:
    with running(log, known_ids("etl/0192f3aa-1", "gpu/0192f3bb-2", "etl/short")):
        assert client.get("etl/0192f3aa-1").id == "etl/0192f3aa-1"
        assert client.get("gpu/0192f3bb-2").id == "gpu/0192f3bb-2"
        assert client.get("short").id == "etl/short"
        assert client.get("0192f3aa").id == "etl/0192f3aa-1"
        assert client.get("gpu/0192f3").id == "gpu/0192f3bb-2"


def test_an_ambiguous_prefix_lists_what_it_could_mean(log: MemoryLog, client: Client) -> None:
    with running(log, known_ids("etl/0192f3aa-1", "gpu/0192f3aa-2")):
        with pytest.raises(AmbiguousId) as caught:
            client.get("0192f3aa")
        assert "etl/0192f3aa-1, gpu/0192f3aa-2" in str(caught.value)


@pytest.mark.parametrize("text", ["0192f3", "99999999", "gpu/99999999"])
def test_an_id_of_nothing_is_not_found(log: MemoryLog, client: Client, text: str) -> None:
    with running(log, known_ids("etl/0192f3aa-1")), pytest.raises(NotFound):
        client.get(text)


def test_find_needs_every_partition(log: MemoryLog, client: Client, impatient: None) -> None:
    def script(command: Any, partition: int) -> Answer | None:
        if isinstance(command, FindTasks):
            return None if partition == 3 else (True, {"body": {"ids": []}})
        return NOT_FOUND

    with running(log, script), pytest.raises(Unreachable, match="every partition"):
        client.get("0192f3aa")


# Answers --------------------------------------------------------------------------------------------------------------


def test_silence_is_unreachable_for_a_query_and_undecided_for_a_command(
    log: MemoryLog, client: Client, impatient: None
) -> None:
    handle = client.get("etl/1")
    with pytest.raises(Unreachable, match="engine"):
        handle.status()
    assert handle.pause() is False
    assert [type(codec.decode(r.value or b"")).__name__ for r in log.records("task-commands")] == [
        "DescribeTask",
        "PauseTask",
    ]


def test_only_the_answer_to_this_client_and_this_command_counts(log: MemoryLog, client: Client) -> None:
    def script(command: Any, partition: int) -> Answer | None:
        other_client = codec.replace(command, reply_to="someone else")
        reply(log, other_client, partition, NOT_FOUND)
        other_command = codec.replace(command, command_id="another")
        reply(log, other_command, partition, NOT_FOUND)
        log.producer().append("command-replies", partition, client.id.encode(), b"no record")
        return True, {"body": status(state="PAUSED")}

    with running(log, script):
        assert client.get("etl/1").status().state == "PAUSED"


def test_answers_from_before_the_question_are_not_read(log: MemoryLog, client: Client) -> None:
    query = DescribeTask(command_id="c", task_id="etl/1", reply_to=client.id)
    reply(log, query, 0, NOT_FOUND)
    with running(log, lambda *_: (True, {"body": status()})):
        assert client.ask(query).accepted


def test_a_refusal_carries_reason_and_field(log: MemoryLog, client: Client) -> None:
    with running(log, lambda *_: (False, {"reason": "the task is COMPLETED", "field": "task_id"})):
        with pytest.raises(CommandRefused, match="COMPLETED") as caught:
            client.get("etl/1").pause()
        assert caught.value.field == "task_id"


def test_an_error_while_reading_answers_reaches_who_waits_and_the_next_question_starts_anew(
    log: MemoryLog, client: Client
) -> None:
    with running(log, lambda *_: None) as engine:

        def break_reading(command: Any, partition: int) -> None:
            log.truncate("command-replies", partition, 10_000)  # as when retention overtakes a reader
            log._data["command-replies", partition].first = 10_000

        engine.script = break_reading
        with pytest.raises(InfrastructureError, match="below the log's start"):
            client.get("etl/1").status()
        engine.script = lambda *_: (True, {"body": status()})
        assert client.get("etl/1").status().state == "RUNNING"


def test_a_client_without_address_and_without_dev_stack_is_unreachable(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PERDURE_BOOTSTRAP", raising=False)
    with Client() as client, pytest.raises(Unreachable, match="perdure dev"):
        client.submit("t")


def test_bad_input_is_told_before_anything_is_connected(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Client() as client, pytest.raises(InvalidRequest, match="priority"):
        client.submit("t", priority=99)
