"""Lines, log records and the streams of async tasks, without processes."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from perdure.capture import Lines, TaskStream, capture_logging
from perdure.schemas import limits


class Taken(list[tuple[str, str, str]]):
    """Takes lines."""

    def __call__(self, stream: str, level: str, text: str) -> None:
        self.append((stream, level, text))


@contextmanager
def bare_logging() -> Iterator[logging.Logger]:
    """The root logger as a fresh process has it."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    root.handlers.clear()
    root.setLevel(logging.WARNING)
    try:
        yield root
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def test_lines_are_cut_at_their_ends_and_streams_do_not_mix() -> None:
    taken = Taken()
    lines = Lines(taken)
    for stream, text in [("stdout", "a"), ("stderr", "x\n"), ("stdout", "b\nc\r\n\nd\re"), ("stdout", "")]:
        lines.write(stream, text)
    assert taken == [("stderr", "", "x"), *(("stdout", "", line) for line in ("ab", "c", "", "d"))]
    lines.close()
    lines.close()
    assert taken[-1] == ("stdout", "", "e")
    assert len(taken) == 6


def test_a_line_without_end_is_not_kept_for_ever() -> None:
    taken = Taken()
    lines = Lines(taken)
    for _ in range(limits.LINE_MAX // 1000 + 2):
        lines.write("stdout", "x" * 1000)
    assert len(taken) == 1


def test_log_records_go_to_their_attempt_and_others_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    taken = Taken()
    lines: list[Lines] = [Lines(taken)]
    with bare_logging():
        capture_logging(lambda: lines[0] if lines else None)
        logging.getLogger("a").info("one")
        try:
            _ = 1 / 0
        except ZeroDivisionError:
            logging.getLogger("a").exception("two")
        logging.getLogger("a").debug("not asked for")
        lines.clear()
        logging.getLogger("a").warning("nobody's")
    assert taken[0] == ("log", "INFO", "one")
    assert taken[1][:2] == ("log", "ERROR")
    assert taken[1][2].startswith("two\nTraceback")
    assert len(taken) == 2
    assert "nobody's" in capsys.readouterr().err


def test_the_users_own_set_up_is_kept_but_no_line_comes_twice(capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = logging.StreamHandler(io.StringIO())
    to_stderr = logging.StreamHandler(sys.stderr)
    to_stderr.setFormatter(logging.Formatter("<%(message)s>"))
    to_stderr.setLevel(logging.ERROR)
    taken = Taken()
    lines = Lines(taken)
    with bare_logging() as root:
        root.addHandler(elsewhere)
        root.addHandler(to_stderr)
        capture_logging(lambda: lines)
        logging.getLogger("a").warning("low")
        logging.getLogger("a").error("high")
        assert elsewhere in root.handlers
    assert taken == [("log", "ERROR", "<high>")]
    assert capsys.readouterr().err == ""


def test_a_task_stream_looks_up_whose_text_it_is() -> None:
    taken = Taken()
    lines = Lines(taken)
    whose: list[Lines | None] = [lines]
    own = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    stream = TaskStream("stdout", own, lambda: whose[0])
    print("mine", file=stream)
    whose[0] = None
    print("nobody's", file=stream, flush=True)
    assert taken == [("stdout", "", "mine")]
    assert stream.encoding == "utf-8"
    assert own.buffer.getvalue() == b"nobody's\n"
