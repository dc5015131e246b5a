"""The commands that look at a namespace, on a real one: `doctor`, `topics`, `asof`."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
)

from perdure.schemas import topics
from perdure.streams.survey import open_since, survey_group, survey_topics
from tests.integration.stack import Stack, stack_on, until

pytestmark = pytest.mark.kafka


@pytest.fixture
def stack(kafka_bootstrap: str, topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    with stack_on(kafka_bootstrap, topic_prefix, tmp_path) as made:
        yield made


def perdure(stack: Stack, *args: str) -> tuple[int, Any]:
    """(exit code, answer) of a command with --json."""
    command = stack.process("command", "-m", "perdure.cli", *args, "--json").start()
    code = command.ended()
    return code, json.loads(command.text().splitlines()[-1])


def _events_seen(said: str) -> int:
    """How far a shadow is, by its own last word."""
    return int(re.findall(r"([\d,]+) events of", said)[-1].replace(",", ""))


def findings(stack: Stack) -> tuple[int, dict[str, dict[str, str]]]:
    code, told = perdure(stack, "doctor")
    return code, {f["check"]: f for f in told["findings"]}


def test_the_doctor_sees_a_namespace_that_works_and_one_that_does_not(stack: Stack) -> None:
    engine = stack.engine()
    worker = stack.worker(name="w")
    handle = stack.submit("add", {"a": 1, "b": 2})
    assert stack.result(handle) == 3

    code, found = findings(stack)
    assert (code, [f for f in found.values() if f["state"] == "wrong"]) == (0, [])
    assert found["answers"]["told"].startswith("4 of 4 partitions")
    assert found["workers"]["told"].startswith("1 live on 1 host")
    until("no lag", lambda: findings(stack)[1]["lag"]["told"].startswith("0 inputs unread"))  # told once a second
    assert found["checkpoints"]["state"] == "ok"

    worker.kill()
    engine.kill()
    stack.produce(b"{")
    stack.flush()
    (stack.folder / "keys.json").chmod(0o644)
    until("the group without members", lambda: not survey_group(stack.log, "engine").owners)
    code, found = findings(stack)
    assert code == 1
    assert found["engine"]["told"] == "no engine runs"
    assert "the oldest unread" in found["retention"]["told"]
    assert found["keys"]["state"] == "wrong"

    code, told = perdure(stack, "doctor", "--bootstrap", "127.0.0.1:1")
    assert (code, told["error"]["code"]) == (4, "unreachable")


def test_a_transaction_without_an_end_is_seen(stack: Stack) -> None:
    stranger = Producer({"bootstrap.servers": stack.bootstrap, "transactional.id": f"{stack.prefix}x", "log_level": 0})
    stranger.init_transactions(30.0)
    stranger.begin_transaction()
    stranger.produce(topics.COMMANDS.on(stack.prefix), b"{}", partition=2)
    stranger.flush(30.0)
    (at,) = open_since(stack.log, survey_topics(stack.log)).values()
    assert abs(at - time.time_ns() // 1_000_000) < 60_000
    assert open_since(stack.log, survey_topics(stack.log)).keys() == {f"{topics.COMMANDS.name}/2"}
    stranger.abort_transaction(30.0)
    until("no open transaction", lambda: not open_since(stack.log, survey_topics(stack.log)))


def test_topics_that_are_missing_or_off_are_named_and_made(stack: Stack) -> None:
    code, told = perdure(stack, "topics")
    assert (code, told["partitions"], len(told["topics"])) == (0, 4, len(topics.ALL))
    by_name = {t["topic"].removeprefix(stack.prefix): t for t in told["topics"]}
    assert (by_name["task-events"]["retention_ms"], by_name["config"]["records"] > 0) == (None, True)

    admin = stack.log.admin()
    alerts, events = topics.ALERTS.on(stack.prefix), topics.EVENTS.on(stack.prefix)
    admin.delete_topics([alerts])[alerts].result()
    compact = ConfigEntry("cleanup.policy", "compact", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ConfigResource.Type.TOPIC, events, incremental_configs=[compact])
    admin.incremental_alter_configs([resource])[resource].result()

    def wrong() -> dict[str, list[str]] | None:
        code, told = perdure(stack, "topics")
        named = {t["topic"].removeprefix(stack.prefix): t["wrong"] for t in told["topics"] if t["wrong"]}
        return named if code == 1 and len(named) == 2 else None

    named = until("the topics to be off", wrong)
    assert named["alerts"] == ["is missing"]
    assert named["task-events"][0].startswith("cleanup.policy is compact, should be delete")

    code, told = perdure(stack, "topics", "create", "--partitions", "5")
    assert (code, "pinned to 4" in told["error"]["message"]) == (1, True)
    assert alerts not in admin.list_topics(timeout=10).topics, "nothing was made under another partition count"
    assert perdure(stack, "topics", "create")[1] == {"created": [alerts], "partitions": 4, "replication": 1}


def test_a_task_and_the_fleet_as_they_were(stack: Stack) -> None:
    engine = stack.engine()
    worker = stack.worker("--slots", "1", name="w")
    gate = stack.folder / "gate"
    held = stack.submit("gated", {"witness": str(stack.witness), "gate": str(gate)})
    stack.await_witness("gate", held.id, "1")
    waiting = stack.submit("add", {"a": 1, "b": 2})
    queued = stack.await_event(waiting.id, "TaskQueued")
    gate.touch()
    assert stack.result(waiting) == 3
    worker.stop()
    engine.stop()  # what follows needs neither

    then = f"{stack.home()}:{queued.cause.offset}"
    code, told = perdure(stack, "asof", then)
    assert code == 0
    assert told["queues"] == [{"queue": "etl", "total": 2, "states": {"RUNNING": 1, "PENDING": 1}}]
    assert ("w", "live", 1, 1) in [(w["worker_id"], w["state"], w["slots"], w["running"]) for w in told["workers"]]
    assert {t["task_id"]: t["state"] for t in told["tasks"]} == {held.id: "RUNNING", waiting.id: "PENDING"}
    code, told = perdure(stack, "asof", then, waiting.id.partition("/")[2])
    assert (code, told["task"]["state"]) == (0, "PENDING")
    assert "every slot is taken" in told["task"]["why"]
    code, told = perdure(stack, "asof", "now", waiting.id)
    assert (code, told["task"]["state"], told["task"]["result"]) == (0, "COMPLETED", 3)
    assert perdure(stack, "asof", "1 hour ago", waiting.id)[0] == 3


def test_what_the_engine_did_is_decided_again_and_its_shadow_follows(stack: Stack) -> None:
    """G5."""
    engine = stack.engine()
    stack.worker("--slots", "2", name="w")
    handles = [stack.submit("add", {"a": n, "b": 1}) for n in range(5)]
    assert [stack.result(h) for h in handles] == [1, 2, 3, 4, 5]
    code, told = perdure(stack, "replay")
    assert (code, told["equal"]) == (0, True)
    assert sum(p["events"] for p in told["partitions"]) >= 5 * 5

    shadow = stack.process("shadow", "-m", "perdure.cli", "replay", "--shadow", "--json").start()
    shadow.await_text("following the engine")
    engine.kill()
    engine.start()
    stack.await_engine(engine)
    assert stack.result(stack.submit("add", {"a": 20, "b": 1})) == 21
    before = sum(p["events"] for p in told["partitions"])
    until("the shadow has seen the last task", lambda: _events_seen(shadow.text()) >= before + 5, 30)
    shadow.signal(signal.SIGINT)
    assert shadow.ended() == 0, shadow.text()
    followed = json.loads(shadow.text().splitlines()[-1])
    assert followed["equal"]
    assert sum(p["events"] for p in followed["partitions"]) >= before + 5
