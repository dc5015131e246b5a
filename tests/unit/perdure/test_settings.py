"""Settings: which source wins, what a dev stack adds, and who may run without keys."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from perdure.schemas import limits
from perdure.schemas.errors import ConfigurationError, Unreachable
from perdure.schemas.signing import Keys
from perdure.settings import Settings, find_dev_stack, is_loopback, shared_keys


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory and an environment without settings."""
    for name in [n for n in os.environ if n.startswith("PERDURE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_dev(folder: Path, pid: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"bootstrap": "127.0.0.1:1", "api": "http://127.0.0.1:2", "pid": pid}
    content |= {"data_dir": str(folder), "keys_file": str(folder / "keys.json")}
    (folder / "dev.json").write_text(json.dumps(content))


def dead_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_defaults(elsewhere: Path) -> None:
    settings = Settings.load()
    assert (settings.bootstrap, settings.api, settings.namespace) == (None, None, "perdure.")
    assert settings.data_dir == elsewhere / ".perdure"


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere / "pyproject.toml").write_text(
        '[tool.perdure]\nbootstrap = "file:1"\napi = "http://file"\nnamespace = "file."\n'
    )
    monkeypatch.setenv("PERDURE_BOOTSTRAP", "environment:1")
    monkeypatch.setenv("PERDURE_API", "http://environment/")
    settings = Settings.load(bootstrap="flag:1", api=None)
    assert (settings.bootstrap, settings.api, settings.namespace) == ("flag:1", "http://environment", "file.")


@pytest.mark.parametrize("text", ['bootstrap = "a:1"', '[tool.perdure]\nbootstrap = "a:1"'])
def test_perdure_toml_may_leave_the_table_name_out(elsewhere: Path, text: str) -> None:
    (elsewhere / "perdure.toml").write_text(text)
    assert Settings.load().bootstrap == "a:1"


def test_the_file_of_a_directory_above_is_found_and_its_paths_count_from_there(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere / "perdure.toml").write_text('bootstrap = "a:1"\nkeys_file = "keys.json"\n')
    (elsewhere / "deep" / "er").mkdir(parents=True)
    (elsewhere / "deep" / "pyproject.toml").write_text("[project]\nname = 'no settings of ours'\n")
    monkeypatch.chdir(elsewhere / "deep" / "er")
    assert Settings.load().keys_file == elsewhere / "keys.json"


def test_librdkafka_options_from_everywhere(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "perdure.toml").write_text(
        '[kafka]\nsecurity.protocol = "PLAINTEXT"\n"socket.timeout.ms" = 1000\nsocket.keepalive.enable = true\n'
    )
    monkeypatch.setenv("PERDURE_KAFKA__SECURITY__PROTOCOL", "SASL_SSL")
    monkeypatch.setenv("PERDURE_KAFKA__SASL__PASSWORD", "1.10")
    monkeypatch.setenv("PERDURE_KAFKA__LOG_LEVEL", "3")
    assert Settings.load().kafka == {
        "security.protocol": "SASL_SSL",
        "sasl.password": "1.10",
        "log_level": "3",
        "socket.timeout.ms": "1000",
        "socket.keepalive.enable": "true",
    }


def test_a_child_process_gets_the_same_settings(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "perdure.toml").write_text('keys_file = "k"\n[kafka]\nsasl.mechanism = "PLAIN"\nlog_level = 3\n')
    settings = Settings.load(bootstrap="a:1", api="http://b", data_dir=elsewhere / "d")
    (elsewhere / "perdure.toml").unlink()
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings.load() == settings


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_API_TOKEN", "hush")
    monkeypatch.setenv("PERDURE_KAFKA__SASL__PASSWORD", "hush")
    assert "hush" not in repr(Settings.load())


BAD_FILES: list[tuple[str, str]] = [
    ("bootstap = 'a:1'", "bootstap"),
    ("bootstrap = [1]", "PERDURE_BOOTSTRAP"),
    ("namespace = 'a b'", r"namespace.*\[a-zA-Z0-9"),
    ("kafka = 5", "kafka"),
    ("no toml", "TOML"),
]


@pytest.mark.parametrize(("text", "named"), BAD_FILES)
def test_a_bad_file_is_refused_by_name(elsewhere: Path, text: str, named: str) -> None:
    (elsewhere / "perdure.toml").write_text(text)
    with pytest.raises(ConfigurationError, match=named):
        Settings.load()


def test_without_an_address_the_running_dev_stack_is_found(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dev(elsewhere / ".perdure", os.getpid())
    (elsewhere / "deep").mkdir()
    monkeypatch.chdir(elsewhere / "deep")
    settings = Settings.load()
    assert (settings.bootstrap, settings.api) == ("127.0.0.1:1", "http://127.0.0.1:2")
    assert settings.keys_file == elsewhere / ".perdure" / "keys.json"
    assert settings.blobs == str(elsewhere / ".perdure" / "blobs")
    monkeypatch.setenv("PERDURE_BLOBS", "s3://bucket/x")
    assert Settings.load().blobs == "s3://bucket/x"


@pytest.mark.parametrize(
    ("given", "found"), [("blobs", "{here}/blobs"), ("/mnt/b", "/mnt/b"), ("gs://b/p", "gs://b/p")]
)
def test_the_place_of_large_values_in_a_file(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, given: str, found: str
) -> None:
    (elsewhere / "perdure.toml").write_text(f'blobs = "{given}"')
    (elsewhere / "deep").mkdir()
    monkeypatch.chdir(elsewhere / "deep")
    assert Settings.load(bootstrap="localhost:1").blobs == found.format(here=elsewhere)


def test_large_values_lie_where_the_setting_says_under_the_id_of_the_topic(tmp_path: Path) -> None:
    ids = {"task-commands": "a+topic/id=="}
    home = hashlib.sha256(b"a+topic/id==").hexdigest()[:32]
    settings = Settings(blobs=str(tmp_path))
    assert settings.large_place(ids.__getitem__) == (str(tmp_path), home)
    large = settings.large_values(ids.__getitem__)
    large.carried("etl/1", large.text("v" * limits.VALUE_MAX, "input"))
    assert [p.name for p in (tmp_path / "values").iterdir()] == [home]
    assert Settings().large_place(ids.__getitem__) is None
    Settings(blobs=str(tmp_path)).large_values(lambda _: pytest.fail("nothing is asked before it is needed"))


def test_an_address_that_is_set_keeps_the_dev_stack_out(elsewhere: Path) -> None:
    run_dev(elsewhere / ".perdure", os.getpid())
    settings = Settings.load(bootstrap="a:1")
    assert (settings.bootstrap, settings.api, settings.keys_file) == ("a:1", None, None)


def test_the_lock_file_of_a_dead_stack_counts_as_none(elsewhere: Path) -> None:
    run_dev(elsewhere / ".perdure", dead_pid())
    assert Settings.load().bootstrap is None
    with pytest.raises(Unreachable, match="perdure dev"):
        Settings.load().require_bootstrap()
    with pytest.raises(Unreachable, match="perdure dev"):
        Settings.load().require_api()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"bootstrap": 1}'])
def test_a_broken_lock_file_is_named(elsewhere: Path, text: str) -> None:
    (elsewhere / ".perdure").mkdir()
    (elsewhere / ".perdure" / "dev.json").write_text(text)
    with pytest.raises(ConfigurationError, match=r"dev\.json"):
        find_dev_stack(elsewhere / ".perdure")


LOOPBACK: list[tuple[str, bool]] = [
    ("localhost:9092", True),
    ("127.0.0.1:9092, 127.8.9.1:1", True),
    ("[::1]:9092", True),
    ("10.0.0.1:9092", False),
    ("127.0.0.1:1,kafka.example.org:9092", False),
    ("localhost.example.org:9092", False),
    ("0.0.0.0:9092", False),
]


@pytest.mark.parametrize(("bootstrap", "expected"), LOOPBACK)
def test_which_brokers_are_only_here(bootstrap: str, expected: bool) -> None:
    assert is_loopback(bootstrap) is expected


def test_a_broker_that_others_reach_needs_a_key_file(elsewhere: Path) -> None:
    with pytest.raises(ConfigurationError, match="perdure keys new"):
        Settings.load(bootstrap="kafka.example.org:9092").require_keys()
    Keys.generate().save(elsewhere / "keys.json")
    keys = Settings.load(bootstrap="kafka.example.org:9092", keys_file=elsewhere / "keys.json").require_keys()
    assert keys == Keys.load(elsewhere / "keys.json")


def test_a_local_broker_gets_keys_that_its_processes_share(elsewhere: Path) -> None:
    first = Settings.load(bootstrap="localhost:9092").require_keys()
    assert Settings.load(bootstrap="localhost:9092").require_keys() == first
    assert shared_keys(elsewhere / ".perdure").stat().st_mode & 0o777 == 0o600
    assert [p.name for p in (elsewhere / ".perdure").iterdir()] == ["keys.json"]


def test_the_end_of_a_line_is_no_part_of_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a secret made of a file has one."""
    monkeypatch.setenv("PERDURE_API_TOKEN", "s3cret\n")
    assert Settings.load(api="http://localhost:1").api_token == "s3cret"
    for bad in ("s3\ncret", "s3crét", " \n"):  # the last is a secret that was left empty, and not the wish for none
        monkeypatch.setenv("PERDURE_API_TOKEN", bad)
        with pytest.raises(ConfigurationError, match="PERDURE_API_TOKEN") as caught:
            Settings.load(api="http://localhost:1")
        assert "cr" not in str(caught.value)
