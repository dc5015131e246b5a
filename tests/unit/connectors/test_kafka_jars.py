from __future__ import annotations

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from perdure.connectors import kafka_jars
from perdure.connectors.kafka_jars import Jar, pinned_jars
from perdure.schemas.errors import ConfigurationError, Unreachable


def _bytes(artifact: str) -> bytes:
    return f"jar of {artifact}".encode() * 10


def _lock_file(folder: Path, *artifacts: str) -> Path:
    rows = [
        {
            "group": "org.example",
            "artifact": artifact,
            "version": "1.0",
            "sha256": hashlib.sha256(_bytes(artifact)).hexdigest(),
            "size": len(_bytes(artifact)),
        }
        for artifact in artifacts
    ]
    path = folder / "lock.json"
    path.write_text(json.dumps({"kafka": "4.3.1", "jars": rows}))
    return path


class Origin:
    """Stands for Maven Central: gives every jar, damages the named ones, counts."""

    def __init__(self, *damaged: str) -> None:
        self.damaged = damaged
        self.fetched: list[str] = []

    def __call__(self, jar: Jar, work: Path) -> Path:
        self.fetched.append(jar.artifact)
        path = work / jar.name
        path.write_bytes(b"x" if jar.artifact in self.damaged else _bytes(jar.artifact))
        return path


def _quiet(line: str) -> None:
    pass


def test_the_shipped_lock_file_pins_46_jars_of_one_kafka() -> None:
    lock = json.loads(kafka_jars.LOCK_FILE.read_text())
    jars = [Jar(**row) for row in lock["jars"]]
    assert len({jar.name for jar in jars}) == len(jars) == 46
    assert all(len(jar.sha256) == 64 and jar.size > 0 for jar in jars)
    assert {jar.version for jar in jars if jar.group == "org.apache.kafka"} == {lock["kafka"]}
    assert not (4, 3) <= tuple(int(part) for part in lock["kafka"].split(".")) <= (4, 4, 0), "loses ends: decision 0011"
    assert "log4j-slf4j-impl" in {jar.artifact for jar in jars}  # without it the broker logs nothing


def test_the_cache_is_filled_once_and_the_class_path_is_sorted(tmp_path: Path) -> None:
    lock, origin = _lock_file(tmp_path, "b", "a"), Origin()
    said: list[str] = []
    first = pinned_jars(lock, tmp_path / "cache", fetch=origin, say=said.append)
    again = pinned_jars(lock, tmp_path / "cache", fetch=origin, say=said.append)
    assert first == again
    assert [path.name for path in first.class_path] == ["a-1.0.jar", "b-1.0.jar"]
    assert [path.read_bytes() for path in first.class_path] == [_bytes("a"), _bytes("b")]
    assert sorted(origin.fetched) == ["a", "b"]
    assert len(said) == 1  # one line, as stderr is no terminal here


def test_another_lock_file_is_another_folder(tmp_path: Path) -> None:
    first = pinned_jars(_lock_file(tmp_path, "a"), tmp_path / "cache", fetch=Origin(), say=_quiet)
    second = pinned_jars(_lock_file(tmp_path, "a", "b"), tmp_path / "cache", fetch=Origin(), say=_quiet)
    assert first.id != second.id
    assert first.class_path[0].parent != second.class_path[0].parent


def test_a_bad_hash_names_the_jar_and_nothing_is_used(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(ConfigurationError, match=r"bad-1\.0\.jar has SHA-256 .* nothing was used"):
        pinned_jars(_lock_file(tmp_path, "good", "bad"), cache, fetch=Origin("bad"), say=_quiet)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_damaged_cache_is_replaced(tmp_path: Path) -> None:
    lock = _lock_file(tmp_path, "a", "b")
    jars = pinned_jars(lock, tmp_path / "cache", fetch=Origin(), say=_quiet)
    for damage in (b"half", bytes(len(_bytes("a"))), None):
        if damage is None:
            jars.class_path[1].unlink()
        else:
            jars.class_path[0].write_bytes(damage)
        repaired = pinned_jars(lock, tmp_path / "cache", fetch=Origin(), say=_quiet)
        assert [path.read_bytes() for path in repaired.class_path] == [_bytes("a"), _bytes("b")]


def test_processes_that_ask_at_the_same_time_fetch_once(tmp_path: Path) -> None:
    lock, origin, together = _lock_file(tmp_path, "a", "b"), Origin(), threading.Barrier(4)

    def ask() -> kafka_jars.KafkaJars:
        together.wait(10)
        return pinned_jars(lock, tmp_path / "cache", fetch=origin, say=_quiet)

    with ThreadPoolExecutor(4) as pool:
        answers = [future.result(30) for future in [pool.submit(ask) for _ in range(4)]]
    assert len(set(answers)) == 1
    assert sorted(origin.fetched) == ["a", "b"]


@pytest.fixture
def local_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local Maven repository, and no way out of the machine."""
    repository = tmp_path / "repository"
    monkeypatch.setenv("M2_REPO", str(repository))
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(kafka_jars, "_BETWEEN_ATTEMPTS_S", 0.0)
    return repository


def _in_repository(repository: Path, artifact: str, content: bytes) -> None:
    path = repository / "org" / "example" / artifact / "1.0" / f"{artifact}-1.0.jar"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)


def test_a_refused_download_says_what_to_do(tmp_path: Path, local_repository: Path) -> None:
    with pytest.raises(Unreachable, match=r"a-1\.0\.jar could not be fetched .*PERDURE_KAFKA_HOME") as refused:
        pinned_jars(_lock_file(tmp_path, "a"), tmp_path / "cache", say=_quiet)
    assert "\n" not in str(refused.value)
    assert not local_repository.exists()  # nothing half-written in what Maven shares


def test_jars_of_the_local_maven_repository_need_no_network(tmp_path: Path, local_repository: Path) -> None:
    _in_repository(local_repository, "a", _bytes("a"))
    jars = pinned_jars(_lock_file(tmp_path, "a"), tmp_path / "cache", say=_quiet)
    assert jars.class_path[0].read_bytes() == _bytes("a")


def test_a_bad_copy_in_the_local_maven_repository_is_named(tmp_path: Path, local_repository: Path) -> None:
    _in_repository(local_repository, "a", b"half")
    with pytest.raises(ConfigurationError, match=r"repository/org/example/a/1\.0/a-1\.0\.jar"):
        pinned_jars(_lock_file(tmp_path, "a"), tmp_path / "cache", say=_quiet)


@pytest.mark.parametrize(("setting", "folder"), [("PERDURE_KAFKA_HOME", "libs"), ("PERDURE_KAFKA_LIBS", ".")])
def test_a_folder_named_in_the_environment_wins(tmp_path: Path, setting: str, folder: str) -> None:
    libs = tmp_path / folder
    libs.mkdir(exist_ok=True)
    for name in ("kafka_2.13-4.1.0.jar", "kafka-clients-4.1.0.jar"):
        (libs / name).write_bytes(b"jar")
    jars = kafka_jars.kafka_jars({setting: str(tmp_path)})
    assert jars.version == "4.1.0"
    assert {path.name for path in jars.class_path} == {"kafka_2.13-4.1.0.jar", "kafka-clients-4.1.0.jar"}
    (libs / "kafka-clients-4.1.0.jar").write_bytes(b"another")
    assert kafka_jars.kafka_jars({setting: str(tmp_path)}).id != jars.id


def test_a_folder_without_kafka_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"PERDURE_KAFKA_LIBS: .* must hold one kafka_2\.x-VERSION\.jar"):
        kafka_jars.kafka_jars({"PERDURE_KAFKA_LIBS": str(tmp_path)})


def test_a_cache_that_cannot_be_written_is_one_line_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "perdure").touch()
    monkeypatch.setattr(kafka_jars, "cache_folder", lambda: tmp_path / "perdure" / "kafka")
    with pytest.raises(ConfigurationError, match=r"perdure/kafka.*: Not a directory: .* PERDURE_KAFKA_LIBS") as refused:
        kafka_jars.kafka_jars({})
    assert "\n" not in str(refused.value)
