"""What `perdure dev` says of the processes that it looks after."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from perdure.dev import Process


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (b"first\nlast\n\n", "last"),
        (b"x" * 100_000 + b"\nerror: no room\n", "error: no room"),
        (b"\xff\xfe half a letter", "\ufffd\ufffd half a letter"),
        (b"", "it said nothing"),
        (None, "it said nothing"),
    ],
)
def test_last_words_are_the_last_line_of_the_log(tmp_path: Path, log: bytes | None, words: str) -> None:
    file = tmp_path / "worker.log"
    if log is not None:
        file.write_bytes(log)
    assert Process("worker", [], {}, file).last_words() == words


@pytest.mark.parametrize("gives_way", [True, False])
def test_what_only_shows_gives_way_to_what_works(tmp_path: Path, gives_way: bool) -> None:
    process = Process("server", ["--version"], dict(os.environ), tmp_path / "log", gives_way=gives_way)
    process.start()
    assert process.running is not None
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, process.running.pid) == (max(10, ours) if gives_way else ours)
    process.running.wait()
