"""The server's process: what it hands to the API, and how it carries commands out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perdure import server_main
from perdure.projections import server
from perdure.schemas import codec, limits, topics
from perdure.schemas.commands import SubmitTask
from perdure.schemas.errors import DecodeError, InvalidRequest
from perdure.session import read_config
from perdure.settings import Settings
from perdure.streams.memory_log import MemoryLog


@pytest.fixture
def log() -> MemoryLog:
    return MemoryLog(lambda: 1_000, partitions=2)


@pytest.fixture
def carry_out(log: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> Iterator[server_main.Commands]:
    """Commands to a log without an engine."""
    monkeypatch.setattr(limits, "VERDICT_MS", 1)
    commands = server_main.Commands(log)
    yield commands
    commands.close()


def test_a_command_lands_in_the_log_and_its_verdict_may_come_later(
    log: MemoryLog, carry_out: server_main.Commands
) -> None:
    told = carry_out({"command": "SubmitTask", "type": "crunch", "queue": "etl"})
    assert (told["accepted"], told["decided"]) == (True, False)
    (record,) = log.records(topics.COMMANDS.name)
    command = codec.decode_as(SubmitTask, record.value or b"")
    assert (command.type, command.command_id) == ("crunch", told["command_id"])
    assert command.reply_to


def test_letters_beyond_ascii_do_not_make_a_command_too_large(log: MemoryLog, carry_out: server_main.Commands) -> None:
    """As escapes they would be six bytes each, and the command more than is taken."""
    carry_out({"command": "SubmitTask", "type": "crunch", "input": "é" * 90_000})
    (record,) = log.records(topics.COMMANDS.name)
    assert codec.decode_as(SubmitTask, record.value or b"").input == '"{}"'.format("é" * 90_000).encode()


BAD: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"command": "SubmitTask", "type": "crunch", "priority": 11}, InvalidRequest),
    ({"command": "SubmitTask", "type": "crunch", "input": "\ud800"}, DecodeError),
    ({"command": "Tick"}, DecodeError),
]


@pytest.mark.parametrize(("command", "error"), BAD)
def test_what_is_no_command_never_reaches_the_log(
    log: MemoryLog, carry_out: server_main.Commands, command: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        carry_out(command)
    assert log.records(topics.COMMANDS.name) == []


def test_a_group_that_could_not_be_measured_is_not_taken_for_one_that_is_well(
    log: MemoryLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = server_main.Lag(log, "engine", (topics.COMMANDS.name,))  # type: ignore[arg-type]
    assert group.problems() == []
    monkeypatch.setattr(server_main, "UNKNOWN_S", -1.0)
    (problem,) = group.problems()
    assert problem.startswith("engine: how far it is behind could not be measured for 0 s: the broker has not answered")


@pytest.mark.parametrize(("api", "names"), [("http://perdure.example.org:8765", ["perdure.example.org"]), (None, [])])
def test_the_api_answers_to_the_name_that_clients_are_given(
    tmp_path: Path, log: MemoryLog, monkeypatch: pytest.MonkeyPatch, api: str | None, names: list[str]
) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(server_main, "KafkaLog", lambda *_, **__: log)
    monkeypatch.setattr(server, "main", lambda _, **said: told.update(said) or 0)
    settings = Settings(bootstrap="localhost:9092", api=api, api_token="secret", state_dir=tmp_path)
    assert server_main.main(settings, host="0.0.0.0", port=1) == 0
    assert told["names"] == names
    assert codec.unpublished_schemas(read_config(log)) == {}, "others can read what it writes"
    assert (told["host"], told["port"], told["token"]) == ("0.0.0.0", 1, "secret")
    assert set(told["background"]) == {"progress", "dead_letters", "engine-lag"}
    assert set(told["lags"]()) == {"progress", "dead_letters", "engine"}
    assert told["problems"]() == []
    assert server_main.main(Settings(bootstrap="localhost:9092", blobs=str(tmp_path), state_dir=tmp_path)) == 0
    assert set(told["background"]) == {"progress", "dead_letters", "engine-lag", "large values"}
