"""What user code prints and logs, on its way out of a child.

A process child lends descriptors 1 and 2 to the attempt it runs, as pipes that the supervisor reads: everything written
there counts, by whatever language or process. An async child runs many attempts on the same descriptors, so there
`sys.stdout` and `sys.stderr` look up the attempt in whose context they are written to. `logging` goes by attempt in
both.
"""

from __future__ import annotations

import ctypes
import io
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any, TextIO

from perdure.schemas import limits

_LINE_END = re.compile(r"\r\n|\n|\r")
_libc = ctypes.CDLL(None)

Emit = Callable[[str, str, str], None]
"""Takes (stream, level, text) of one line."""


class Lines:
    """One attempt's text, line by line."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._open: dict[str, str] = {}

    def write(self, stream: str, text: str) -> None:
        """Take printed text; what follows the last line end waits for its own."""
        *lines, rest = _LINE_END.split(self._open.get(stream, "") + text)
        for line in lines:
            self._emit(stream, "", line)
        if len(rest) > limits.LINE_MAX:
            self._emit(stream, "", rest)
            rest = ""
        self._open[stream] = rest

    def log(self, level: str, text: str) -> None:
        """Take a log message."""
        self._emit("log", level, text)

    def close(self) -> None:
        """Give out what has no line end."""
        for stream, rest in self._open.items():
            if rest:
                self._emit(stream, "", rest)
        self._open.clear()


Find = Callable[[], Lines | None]
"""The lines of the attempt whose code is running here, if there is one."""


class LogHandler(logging.Handler):
    """Sends log records to the attempt that made them, and others to this process's own stderr."""

    def __init__(self, find: Find) -> None:
        super().__init__()
        self._find = find

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record."""
        lines = self._find()
        if lines is not None:
            lines.log(record.levelname, self.format(record))
        elif logging.lastResort is not None:
            logging.lastResort.handle(record)


def capture_logging(find: Find) -> None:
    """Hand all log records to the attempts that make them.

    A handler that the user's modules put on the root logger for the standard streams gives way, so that no line comes
    twice; its format and level are kept. Where nothing was set up, INFO and above are taken.
    """
    root = logging.getLogger()
    handler = LogHandler(find)
    if not root.handlers and root.level == logging.WARNING:
        root.setLevel(logging.INFO)
    for other in list(root.handlers):
        if isinstance(other, logging.StreamHandler) and other.stream in _standard_streams():
            root.removeHandler(other)
            handler.setFormatter(other.formatter)
            handler.setLevel(other.level)
    root.addHandler(handler)


class TaskStream(io.TextIOBase):
    """`sys.stdout` or `sys.stderr` of an async child: text goes to the attempt in whose context it is written."""

    def __init__(self, name: str, own: TextIO, find: Find) -> None:
        self._name, self._own, self._find = name, own, find

    def write(self, text: str) -> int:
        """Take text."""
        lines = self._find()
        if lines is None:
            return self._own.write(text)
        lines.write(self._name, text)
        return len(text)

    def flush(self) -> None:
        """Flush what belongs to no attempt."""
        self._own.flush()

    def writable(self) -> bool:
        """True."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]  # io.TextIOBase only says that there may be one
        """That of the process's own stream."""
        return self._own.encoding

    def fileno(self) -> int:
        """The process's own descriptor; what is written there directly belongs to no attempt."""
        return self._own.fileno()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)  # buffer and the like


class Descriptors:
    """Descriptors 1 and 2 of a process child: its own between attempts, pipes during one."""

    def __init__(self) -> None:
        self._own = os.dup(1), os.dup(2)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True)

    def lend(self, stdout: int, stderr: int) -> None:
        """Put two pipes in place; their descriptors are closed."""
        flush()
        for lent, number in ((stdout, 1), (stderr, 2)):
            os.dup2(lent, number)
            os.close(lent)

    def take_back(self) -> bool:
        """End the attempt's output. False: user code has closed a standard stream, so the process is of no more use."""
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        whole = flush()
        for own, number in zip(self._own, (1, 2), strict=True):
            os.dup2(own, number)
        return whole


def flush() -> bool:
    """Write out what this process's streams hold, C's included. False: a stream is closed."""
    _libc.fflush(None)
    streams = _standard_streams()
    for stream in streams:
        if not stream.closed:
            stream.flush()
    return not any(stream.closed for stream in streams)


def _standard_streams() -> list[TextIO]:
    found = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return [stream for stream in found if stream is not None]
