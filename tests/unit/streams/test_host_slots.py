from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from perdure.schemas.errors import ConfigurationError
from perdure.streams.host_slots import HostSlot, host_id, worker_name


def test_the_host_id_stays(tmp_path: Path) -> None:
    first = host_id(tmp_path / "state")
    assert uuid.UUID(first)
    assert host_id(tmp_path / "state") == first
    assert host_id(tmp_path / "other") != first


def test_a_damaged_host_id_is_named(tmp_path: Path) -> None:
    (tmp_path / "host-id").write_text("nonsense\n")
    with pytest.raises(ConfigurationError, match="host-id holds no host id"):
        host_id(tmp_path)


def test_a_state_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="is unusable"):
        host_id(tmp_path / "file" / "state")


def test_two_holders_get_two_slots_and_a_released_one_is_taken_again(tmp_path: Path) -> None:
    first, second = HostSlot(tmp_path, "worker"), HostSlot(tmp_path, "worker")
    assert (first.number, second.number) == (0, 1)
    assert HostSlot(tmp_path, "engine").number == 0, "kinds are counted apart"
    first.release()
    assert HostSlot(tmp_path, "worker").number == 0


def test_the_slot_of_a_killed_process_is_free_again(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from perdure.streams.host_slots import HostSlot\n"
        "slot = HostSlot(pathlib.Path(sys.argv[1]), 'worker'); print(slot.number, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "0\n"
        mine = HostSlot(tmp_path, "worker")
        assert mine.number == 1
        other.kill()
        other.wait()
    assert HostSlot(tmp_path, "worker").number == 0


def test_unnamed_workers_are_named_by_host_and_slot(tmp_path: Path) -> None:
    host = host_id(tmp_path)
    assert worker_name(host, HostSlot(tmp_path, "worker")) == f"{host[:8]}-w0"
    assert worker_name(host, HostSlot(tmp_path, "worker")) == f"{host[:8]}-w1"
