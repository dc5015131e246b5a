"""The schema files are enough: with them and fastavro alone, every record of every topic can be read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from perdure.cli import main
from perdure.schemas import topics
from tests.integration.stack import Stack, stack_on, until
from tools.write_docs import READER

pytestmark = pytest.mark.kafka
AVRO = Path(__file__).parents[2] / "schemas" / "avro"
EMPTY = {topics.INTAKE.name, topics.ALERTS.name}
"""Nobody writes these yet."""

FOREIGN = (
    READER
    + """
import struct
import sys

def check_json(schema, value):
    # Values that users gave are JSON inside of Avro bytes, at any depth.
    if isinstance(schema, list):
        given = [arm for arm in schema if arm != "null"] if value is not None else []
        if len(given) > 1:
            name, value = value
            given = [arm for arm in given if arm["name"] == name]
        for arm in given:
            check_json(arm, value)
    elif isinstance(schema, dict) and schema["type"] == "record":
        for field in schema["fields"]:
            check_json(field["type"], value[field["name"]])
    elif isinstance(schema, dict) and schema["type"] == "array":
        for item in value:
            check_json(schema["items"], item)
    elif isinstance(schema, dict) and schema.get("perdure") == "json":
        json.loads(value)

schemas = load(sys.argv[1])
assert len(schemas) == len(list(Path(sys.argv[1]).rglob("*.avsc")))
data = sys.stdin.buffer
found, published, used = [], {}, set()
while head := data.read(8):
    size, topic_size = struct.unpack(">II", head)
    topic, value = data.read(topic_size).decode(), data.read(size)
    if value[:1] == b"{" and topic == "task-commands":
        found.append((topic, json.loads(value)["command"]))
        continue
    name, record = read(value, schemas)
    check_json(schemas[value[2:10]], record)
    found.append((topic, name.rpartition(".")[2]))
    used.add(value[2:10].hex())
    if name in ("perdure.hosts.Forwarded", "perdure.events.ForwardQueued", "perdure.rows.Outbox"):
        found.append((topic, "inside: " + read(record["record"], schemas)[0]))
    if topic == "config" and record["name"].startswith("schema/"):
        published[record["name"].removeprefix("schema/")] = json.loads(record["content"])
for fingerprint_hex, schema in published.items():
    assert identity(schema).hex() == fingerprint_hex
assert used <= set(published), "a record whose schema is not in config"
assert not [name for name in sys.modules if name.partition(".")[0] == "perdure"]
print(json.dumps(found))
"""
)


@pytest.fixture
def stack(kafka_bootstrap: str, topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    with stack_on(kafka_bootstrap, topic_prefix, tmp_path) as made:
        yield made


def test_a_program_with_fastavro_and_the_schema_files_reads_everything(stack: Stack) -> None:
    _live_a_little(stack)
    program = [sys.executable, "-I", "-c", FOREIGN, str(AVRO)]
    done = subprocess.run(program, input=_dump(stack), capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    found = Counter((topic, kind) for topic, kind in json.loads(done.stdout))
    assert {topic for topic, _ in found} == {t.name for t in topics.ALL} - EMPTY
    kinds = {kind for _, kind in found}
    assert {"SubmitTask", "ReportBatch", "WorkerBeat", "Tick", "ApplyConfig", "Forwarded", "ForwardedAck"} <= kinds
    assert {"StepCompleted", "CheckpointRecorded", "TaskCompleted", "TaskFailed", "CommandRejected"} <= kinds
    assert {
        "RunAttempt",
        "CommandReply",
        "TaskProgress",
        "DeadLetter",
        "LogLine",
        "WorkerMetrics",
        "Quarantined",
    } <= kinds
    assert {"inside: perdure.commands.SubmitTask", "inside: perdure.commands.PauseTask"} <= kinds
    _audit(stack)


def _audit(stack: Stack) -> None:
    """The command line's audit of the running namespace."""
    flags = ["audit", "--json", "--bootstrap", stack.bootstrap, "--namespace", stack.prefix]
    done = CliRunner().invoke(main, flags)
    answer = json.loads(done.stdout)
    assert (done.exit_code, answer["violations"], answer["clean"]) == (0, [], True)
    assert set(answer["rules"].values()) == {0}
    assert answer["read"]["tasks"] >= 5
    assert answer["read"]["partial"] == 0


def _live_a_little(stack: Stack) -> None:
    """Let everything happen that leaves records."""
    stack.engine()
    stack.server()
    stack.worker("--slots", "2", name="w")
    handles = [
        stack.submit("files", {"witness": str(stack.witness), "count": 30}),
        stack.submit("talk", {"number": 7}),
        stack.submit("flaky"),
    ]
    failed = stack.submit("broken")
    elsewhere = (stack.home() + 1) % stack.log.partitions
    stack.produce({"command": "SubmitTask", "type": "add", "input": {"a": 1, "b": 2}}, partition=elsewhere)
    stack.produce({"command": "PauseTask", "task_id": "etl/nobody"}, partition=elsewhere)
    stack.produce(b"no record at all", partition=0)
    stack.flush()
    for handle in handles:
        stack.result(handle)
    stack.await_event(failed.id, "TaskFailed")
    for topic in {t.name for t in topics.ALL} - EMPTY:
        until(f"a record in {topic}", stack.tail(topic).look)
    until("an acknowledgement", lambda: _acknowledged(stack))


def _acknowledged(stack: Stack) -> bool:
    kinds = [type(s.message).__name__ for s in stack.tail(topics.COMMANDS.name).look()]
    return "ForwardedAck" in kinds


def _dump(stack: Stack) -> bytes:
    """Every record of every topic: sizes, topic, value. Left out: what the engine, too, could not read."""
    bad = {(s.message.topic, s.message.partition, s.message.offset) for s in stack.tail("quarantine").whole()}
    out = []
    for topic in topics.ALL:
        for s in stack.tail(topic.name).whole():
            place = (topic.name, s.record.partition, s.record.offset)
            if s.record.value is not None and place not in bad:
                name = topic.name.encode()
                out += [len(s.record.value).to_bytes(4, "big"), len(name).to_bytes(4, "big"), name, s.record.value]
    return b"".join(out)
