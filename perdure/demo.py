"""`perdure demo`: a real long task on a real Kafka, killed in the middle of its work in three ways, and the proof."""

from __future__ import annotations

import os
import signal
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from perdure.cli_text import clean, eta_text
from perdure.client import Client
from perdure.demo_proof import Proof, prove
from perdure.demo_tasks import QUEUE, find_files
from perdure.handle import Handle
from perdure.schemas import ids, values
from perdure.schemas.errors import InfrastructureError, InvalidRequest, RetryLater, Unreachable, ValueTooLarge
from perdure.settings import DevStack
from perdure.status import Status
from perdure.streams.kafka_log import KafkaLog

_POLL_S = 0.1
_WIDE = 250
_KILL_AT = (0.15, 0.4, 0.65)
"""Shares of the work after which the task's process, the worker and the engine are killed."""
_WALK_S = 8.0
"""What the whole review takes at least: with few files, each is made to last."""


@dataclass(frozen=True)
class Kill:
    """A death to be survived."""

    at: float
    what: str
    hit: Callable[[], str]
    """Kills, and says what it hit."""


class Demo:
    """One run on a running stack."""

    def __init__(self, stack: DevStack, namespace: str, path: Path, files: int, console: Console) -> None:
        self._stack, self._path, self._files, self._console = stack, path, files, console
        self._pace_s = _WALK_S / files
        self._log = KafkaLog(stack.bootstrap, namespace)
        run = ids.new_local_id()
        self._task_id = ids.join(QUEUE, f"review-{run}")
        self._witness = stack.data_dir / f"witness-{run}.txt"
        self._witness.touch()

    def run(self) -> tuple[dict[str, Any], Proof]:
        """Submit, watch, kill, and prove. Raises what the task failed with."""
        self._say(f"reviewing {_counted(self._files)} of Python under {self._path}")
        with Client(self._log) as client:
            given = {"path": str(self._path), "witness": str(self._witness), "pace_s": self._pace_s}
            handle = client.submit("review_code_base", given, id=self._task_id)
            self._say(f"submitted as {handle.id}")
            kills = self._watch(handle)
            result: dict[str, Any] = handle.result(timeout=60)
        return result, prove(self._log, self._task_id, self._witness, kills)

    def _watch(self, handle: Handle) -> int:
        """Show progress until the task's end and kill on the way; returns how many kills hit."""
        pending = [
            Kill(_KILL_AT[0], "the task's process", self._kill_child),
            Kill(_KILL_AT[1], "the whole worker", lambda: self._kill_part("worker")),
            Kill(_KILL_AT[2], "the engine", lambda: self._kill_part("engine")),
        ]
        kills = begun_before = 0
        with _bar(self._console, self._files) as (progress, row):
            while True:
                status = self._ask(handle)
                if status is not None:
                    _show(progress, row, status)
                    if status.ended:
                        break
                begun = self._executions()
                if pending and begun > begun_before and begun / self._files >= pending[0].at:
                    kill = pending.pop(0)
                    self._await_middle()
                    hit = kill.hit()
                    kills += 1
                    begun_before = self._executions()
                    self._say(f"SIGKILL to {kill.what} ({hit}) in the middle of {self._last_execution()}")
                time.sleep(_POLL_S)
        if pending:
            raise InfrastructureError(
                f"the task ended before {pending[0].what} could be killed, in the middle of {_counted(self._files)}"
            )
        return kills

    def _ask(self, handle: Handle) -> Status | None:
        try:
            return handle.status()
        except (Unreachable, RetryLater):
            return None  # the engine has just been killed; it answers again when it is back

    # Aiming ----------------------------------------------------------------------------------------------------------

    def _executions(self) -> int:
        return self._witness.read_bytes().count(b"\n")

    def _last_execution(self) -> str:
        lines = self._witness.read_text().splitlines()
        return lines[-1].split("\t")[2] if lines else "its first file"

    def _await_middle(self) -> None:
        """Return as soon as another file's step has begun, or when the present one has had half of its time."""
        size = self._witness.stat().st_size
        deadline = time.monotonic() + self._pace_s / 2
        while self._witness.stat().st_size == size and time.monotonic() < deadline:
            time.sleep(0.0005)

    def _kill_child(self) -> str:
        lines = self._witness.read_text().splitlines()
        pid = int(lines[-1].split("\t")[1])
        os.kill(pid, signal.SIGKILL)
        return f"pid {pid}"

    def _kill_part(self, name: str) -> str:
        for child in psutil.Process(self._stack.pid).children():
            if name in child.cmdline()[2:5]:
                child.kill()
                return f"pid {child.pid}"
        raise InfrastructureError(f"no {name} process runs under the dev stack, pid {self._stack.pid}")

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)


def open_console(*, stderr: bool) -> Console:
    """Where the demo shows itself. What is no terminal is read by programs: nothing is wrapped there."""
    console = Console(stderr=stderr, markup=False, highlight=False)
    if not console.is_terminal:
        console.width = _WIDE
    return console


def python_files(path: Path) -> int:
    """How many files there are to review under `path`. Raises `InvalidRequest` when none, or too many to be listed."""
    found = find_files(str(path))
    if not found:
        raise InvalidRequest(f"there is no Python file under {path}", field="path")
    try:
        values.dumps(found, field="path")
    except ValueTooLarge as error:
        told = f"{len(found):,} files are more than the demo takes: name one of the folders of {path}"
        raise ValueTooLarge(told, field="path") from error
    return len(found)


@contextmanager
def _bar(console: Console, files: int) -> Iterator[tuple[Progress, Any]]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[eta]}"), TextColumn("{task.fields[step]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress, progress.add_task("PENDING", total=files, eta="", step="")


def _show(progress: Progress, row: Any, status: Status) -> None:
    left = status.eta_seconds
    progress.update(
        row, description=status.state, completed=status.units_done or 0,
        eta="" if left is None or status.ended else eta_text(left),
        step=clean(status.current_step or status.why)[-50:],
    )  # fmt: skip


def _counted(files: int) -> str:
    return "1 file" if files == 1 else f"{files:,} files"


def default_path() -> Path:
    """The interpreter's own standard library."""
    return Path(sysconfig.get_path("stdlib"))


def show_result(console: Console, result: dict[str, Any]) -> None:
    """The review, for people."""
    packages = sorted(result["packages"].items(), key=lambda p: -p[1]["lines"])
    totals = Table("package", "files", "lines", "functions", title=_counted(result["files"]))
    for column in totals.columns[1:]:
        column.justify = "right"
    for name, t in packages[:15]:
        totals.add_row(name, f"{t['files']:,}", f"{t['lines']:,}", f"{t['functions']:,}")
    rest = packages[15:]
    if rest:
        sums = [sum(t[k] for _, t in rest) for k in ("files", "lines", "functions")]
        totals.add_row(f"({len(rest)} more)", *(f"{n:,}" for n in sums))
    console.print(totals)
    for title, rows, unit in (
        ("longest functions", result["functions"], "lines"),
        ("most complex files", result["complex"], "branches"),
    ):
        table = Table("where", unit, title=title)
        table.columns[1].justify = "right"
        for where, n in rows:
            table.add_row(where, f"{n:,}")
        console.print(table)
    for name, finding in result["findings"][:10]:
        console.print(f"finding: {clean(f'{name}: {finding}')}", soft_wrap=True)
