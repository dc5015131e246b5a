from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from perdure.connectors import kafka_data
from perdure.connectors.kafka_data import HOST, Identity, KafkaData
from perdure.schemas.errors import ConfigurationError


@pytest.fixture
def data(tmp_path: Path) -> KafkaData:
    return KafkaData(tmp_path / "kafka")


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind((HOST, 0))
        server.listen()
        yield server.getsockname()[1]


def _meta_properties(data: KafkaData, cluster_id: str) -> None:
    (data.folder / "data").mkdir()
    (data.folder / "data" / "meta.properties").write_text(f"#\nversion=1\ncluster.id={cluster_id}\nnode.id=1\n")


def test_identity_and_ports_outlive_a_restart(data: KafkaData) -> None:
    with data.locked():
        first = data.claim("4.3.1", None)
    with data.locked():
        assert data.claim("4.3.1", None) == first
    assert first.port != first.controller_port
    assert {first.port, first.controller_port}.isdisjoint({9092, 19092})


def test_a_remembered_port_that_is_taken_gives_way(data: KafkaData, taken_port: int) -> None:
    with data.locked():
        first = data.claim("4.3.1", None)
        (data.folder / "broker.json").write_text(
            json.dumps({"kafka_version": "4.3.1", "cluster_id": first.cluster_id, "port": taken_port})
        )
        second = data.claim("4.3.1", None)
    assert second.cluster_id == first.cluster_id
    assert second.port != taken_port


def test_a_port_asked_for_that_is_taken_is_refused(data: KafkaData, taken_port: int) -> None:
    with data.locked(), pytest.raises(ConfigurationError, match=f"port {taken_port} is taken"):
        data.claim("4.3.1", taken_port)


def test_data_of_another_kafka_are_refused(data: KafkaData) -> None:
    with data.locked():
        data.claim("4.2.0", None)
        with pytest.raises(ConfigurationError, match=r"written by Kafka 4\.2\.0, this is Kafka 4\.3\.1"):
            data.claim("4.3.1", None)


def test_data_of_another_cluster_are_refused(data: KafkaData) -> None:
    with data.locked():
        data.claim("4.3.1", None)
        _meta_properties(data, "somebody-elses-cluster")
        with pytest.raises(ConfigurationError, match="cluster somebody-elses-cluster"):
            data.claim("4.3.1", None)


def test_data_that_perdure_did_not_set_up_are_refused(data: KafkaData) -> None:
    with data.locked():
        _meta_properties(data, "x")
        with pytest.raises(ConfigurationError, match="did not set up"):
            data.claim("4.3.1", None)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"cluster_id": "x"}'])
def test_a_damaged_identity_is_refused_not_replaced(data: KafkaData, content: str) -> None:
    with data.locked():
        (data.folder / "broker.json").write_text(content)
        with pytest.raises(ConfigurationError, match=r"broker\.json is damaged"):
            data.claim("4.3.1", None)


def test_a_locked_folder_names_its_holder(data: KafkaData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_data, "_PROBE_S", 0.05)
    with data.locked() as fd:
        os.write(fd, b'{"pid": 4711, "keeper": 4710}')
        assert data.is_locked()
        with pytest.raises(ConfigurationError, match=r"already runs on .*kafka \(pid 4711\)"), data.locked():
            pass
    assert not data.is_locked()


def test_a_note_that_nobody_holds_is_stale(data: KafkaData) -> None:
    with data.locked() as fd:
        os.write(fd, b'{"pid": 4711, "keeper": 4710}')
    with data.locked():
        assert data.holder() == {}


@pytest.mark.parametrize("note", [b'{"pid": 4711, "keeper": 4710, "stopping": true}', b""], ids=["stopping", "new"])
def test_a_broker_that_is_stopping_or_being_prepared_is_waited_for(
    data: KafkaData, monkeypatch: pytest.MonkeyPatch, note: bytes
) -> None:
    data.logs.mkdir(parents=True)
    held = os.open(data.folder / "broker.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    os.write(held, note)
    monkeypatch.setattr(kafka_data, "_PROBE_S", 0.0)
    monkeypatch.setattr(time, "sleep", lambda _s: os.close(held))  # the first wait sees it end
    with data.locked():
        assert data.is_locked()


def test_cluster_ids_never_begin_with_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    class Uuid:
        def __init__(self, first: int) -> None:
            self.bytes = bytes([first, *range(15)])

    drawn = iter([Uuid(0xFB), Uuid(0x10)])  # 0xFB begins with "-" in this alphabet
    monkeypatch.setattr(uuid, "uuid4", lambda: next(drawn))
    cluster_id = kafka_data.new_cluster_id()
    assert len(cluster_id) == 22
    assert cluster_id.startswith("EA")


def test_extra_settings_win_and_are_escaped(data: KafkaData) -> None:
    with data.locked():
        data.write_properties(Identity("4.3.1", "c", 20_001, 20_002), {"num.io.threads": "7", "x": "a\\b\nc"})
    lines = data.properties_file.read_text().splitlines()
    assert "num.io.threads=7" in lines
    assert "x=a\\\\b\\nc" in lines
    assert "advertised.listeners=PLAINTEXT://127.0.0.1:20001" in lines
    assert "auto.create.topics.enable=false" in lines


def test_a_folder_that_cannot_be_made_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    data = KafkaData(tmp_path / "file" / "kafka")
    refused = r"file/kafka/logs: Not a directory: .*use a data folder that you may write to"
    with pytest.raises(ConfigurationError, match=refused), data.file_trouble_told(), data.locked():
        pass
