"""The embedded broker against the real thing: every test has a broker of its own, and ends all that it started."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from click.testing import CliRunner
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from perdure.cli_kafka import kafka
from perdure.connectors import embedded_kafka, kafka_data
from perdure.connectors.embedded_kafka import EmbeddedKafka, running, stop_running
from perdure.connectors.kafka_data import HOST, KafkaData
from perdure.connectors.kafka_jars import kafka_jars
from perdure.schemas.errors import ConfigurationError, InfrastructureError

pytestmark = pytest.mark.kafka


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    """A data folder; whatever broker a test leaves on it is stopped."""
    folder = tmp_path / "kafka"
    yield folder
    stop_running(folder)


def _until(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def _gone(*pids: int) -> bool:
    def ended(pid: int) -> bool:
        try:
            return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True

    return all(ended(pid) for pid in pids)


def _produce(bootstrap: str, *values: bytes) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
    if "t" not in admin.list_topics(timeout=10).topics:
        admin.create_topics([NewTopic("t", 1, 1)])["t"].result(10)
    producer = Producer({"bootstrap.servers": bootstrap, "acks": "all", "log_level": 0})
    for value in values:
        producer.produce("t", value)
    assert producer.flush(20) == 0


def _consume(bootstrap: str, count: int) -> list[bytes | None]:
    settings = {"bootstrap.servers": bootstrap, "group.id": "g", "auto.offset.reset": "earliest", "log_level": 0}
    consumer = Consumer(settings | {"enable.auto.commit": False})
    try:
        consumer.subscribe(["t"])
        return [message.value() for message in consumer.consume(count, timeout=20)]
    finally:
        consumer.close()


def test_a_clean_restart_keeps_data_port_and_cluster(data_dir: Path) -> None:
    with EmbeddedKafka(data_dir) as first:
        before = (first.bootstrap, first.cluster_id)
        _produce(first.bootstrap, b"1", b"2")
        found = running(data_dir)
        assert found is not None
        assert (found.bootstrap, found.cluster_id, found.pid) == (*before, first.pid)
    assert not first.alive()
    assert running(data_dir) is None
    with EmbeddedKafka(data_dir) as second:
        assert (second.bootstrap, second.cluster_id) == before
        assert _consume(second.bootstrap, 2) == [b"1", b"2"]


def test_a_killed_jvm_loses_nothing_that_was_acknowledged(data_dir: Path) -> None:
    broker = EmbeddedKafka(data_dir)
    bootstrap = broker.start()
    _produce(bootstrap, b"1", b"2")
    keeper = KafkaData(data_dir).holder()["keeper"]
    os.kill(broker.pid, signal.SIGKILL)
    _until(lambda: _gone(broker.pid, keeper), "the JVM and its keeper end")
    assert not broker.alive()
    assert running(data_dir) is None
    assert broker.start() == bootstrap
    _produce(bootstrap, b"3")
    assert _consume(bootstrap, 3) == [b"1", b"2", b"3"]
    broker.stop()


def test_a_second_start_is_refused_and_harms_nothing(data_dir: Path) -> None:
    with EmbeddedKafka(data_dir) as first:
        for again in (EmbeddedKafka(data_dir), first):
            with pytest.raises(ConfigurationError, match=rf"already runs on .* \(pid {first.pid}\)"):
                again.start()
        assert running(data_dir) is not None


_OWNER = """
import os, sys, threading, time
from pathlib import Path
from perdure.connectors.embedded_kafka import EmbeddedKafka
broker = EmbeddedKafka(Path(sys.argv[1]))
starter = threading.Thread(target=broker.start)
starter.start()
starter.join()
child = os.fork()
if not child:
    time.sleep(600)
print(broker.pid, child, flush=True)
time.sleep(600)
"""


def test_the_broker_outlives_the_thread_that_started_it_but_not_the_process(data_dir: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", _OWNER, str(data_dir)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    with owner.stdout:
        pid, fork = map(int, owner.stdout.readline().split())
    try:
        assert running(data_dir) is not None
        owner.kill()
        owner.wait()
        _until(lambda: _gone(pid), "the JVM ends with its owner, although a fork of the owner lives on")
        assert not _gone(fork)
    finally:
        os.kill(fork, signal.SIGKILL)
    with EmbeddedKafka(data_dir) as again:  # waits, if need be, for the keeper's last steps
        assert again.alive()


def test_a_killed_keeper_takes_the_jvm_with_it(data_dir: Path) -> None:
    broker = EmbeddedKafka(data_dir)
    broker.start()
    os.kill(KafkaData(data_dir).holder()["keeper"], signal.SIGKILL)
    _until(lambda: _gone(broker.pid) and not KafkaData(data_dir).is_locked(), "the JVM ends")


def test_a_hanging_jvm_is_killed(data_dir: Path) -> None:
    broker = EmbeddedKafka(data_dir)
    broker.start()
    os.kill(broker.pid, signal.SIGSTOP)
    broker.stop(timeout_s=0.2)
    assert _gone(broker.pid)
    assert not KafkaData(data_dir).is_locked()


def test_a_port_lost_in_the_last_moment_is_named(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_data, "is_free", lambda port: True)
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"port {port} is taken"):
            EmbeddedKafka(data_dir, port=port).start()
    _until(lambda: not KafkaData(data_dir).is_locked(), "nothing is left running")


def test_a_broker_that_cannot_start_says_why(data_dir: Path) -> None:
    with pytest.raises(InfrastructureError, match=r"num\.io\.threads.*\(logs: .*logs\)"):
        EmbeddedKafka(data_dir, properties={"num.io.threads": "none"}).start()
    _until(lambda: not KafkaData(data_dir).is_locked(), "nothing is left running")


def test_a_disk_without_room_is_named_although_the_logs_have_no_word_of_it(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(ConfigurationError, match=r"the disk of .*kafka is full: make room there"):
        EmbeddedKafka(data_dir, properties={"num.io.threads": "none"}).start()


_PREPARING = """
import subprocess, sys
from pathlib import Path
from perdure.connectors import embedded_kafka
def run(command, **options):  # the storage tool, as one that takes its time
    options["stdout"].close()
    tool = subprocess.Popen([sys.executable, "-c", "input()"], stdin=sys.stdin, pass_fds=options["pass_fds"])
    print("formatting", flush=True)
    tool.wait()
embedded_kafka.subprocess.run = run
embedded_kafka.find_java = lambda: embedded_kafka.Java(Path("java"), 17, "")
embedded_kafka.EmbeddedKafka(Path(sys.argv[1])).start()
"""


def test_a_folder_stays_locked_while_a_killed_start_is_still_formatting_it(data_dir: Path) -> None:
    command = [sys.executable, "-c", _PREPARING, str(data_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as start:
        assert start.stdin is not None
        assert start.stdout is not None
        assert start.stdout.readline() == b"formatting\n"
        start.kill()
        start.wait()
        assert KafkaData(data_dir).is_locked()
        start.stdin.close()
    _until(lambda: not KafkaData(data_dir).is_locked(), "the tool ends")


def test_not_ready_in_time_leaves_nothing_running(data_dir: Path) -> None:
    with pytest.raises(InfrastructureError, match=r"not ready in 0 s: see .*broker\.log"):
        EmbeddedKafka(data_dir).start(timeout_s=0)
    assert not KafkaData(data_dir).is_locked()


def test_a_clean_first_stop_leaves_an_archive_and_a_damaged_one_does_no_harm(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERDURE_KAFKA_LIBS", str(kafka_jars().class_path[0].parent))
    monkeypatch.setattr(embedded_kafka, "cache_folder", lambda: tmp_path / "cache")
    with EmbeddedKafka(data_dir):
        pass
    archives = list((tmp_path / "cache").iterdir())
    assert len(archives) == 1
    with EmbeddedKafka(data_dir) as broker:
        assert any(part.endswith(str(archives[0])) for part in psutil.Process(broker.pid).cmdline())
    archives[0].chmod(0o644)
    archives[0].write_bytes(b"no archive")
    with EmbeddedKafka(data_dir) as broker:
        assert broker.alive()


def test_the_command_line_starts_finds_and_stops_a_broker(data_dir: Path) -> None:
    def call(*arguments: str) -> tuple[int, dict[str, object]]:
        done = CliRunner().invoke(kafka, [*arguments, "--data-dir", str(data_dir), "--json"])
        assert done.stdout.count("\n") == 1
        return done.exit_code, json.loads(done.stdout)

    assert call("status") == (1, {"running": False})
    status, facts = call("start")
    assert status == 0
    assert call("status") == (0, {"running": True, **facts})
    status, refusal = call("start")
    assert (status, str(facts["pid"]) in str(refusal)) == (1, True)
    assert refusal["error"]["code"] == "configuration"  # type: ignore[index]
    assert call("stop") == (0, {"stopped": True})
    assert _gone(int(str(facts["pid"])))
    assert call("stop") == (0, {"stopped": False})


def test_the_shared_broker_serves_the_run(kafka_bootstrap: str, topic_prefix: str) -> None:
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap})
    topic = f"{topic_prefix}a"
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(10)
    assert topic in admin.list_topics(timeout=10).topics
