"""Where a replay begins, and the build that decides again: what `perdure replay` needs around `streams/replay.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from perdure.schemas import topics
from perdure.schemas.errors import ConfigurationError, EventsIncomplete, InfrastructureError, NotFound
from perdure.schemas.signing import Keys
from perdure.streams import decision, redecide
from perdure.streams.log import Log, Record
from perdure.streams.redecide import Made, Rows, to_bytes, to_text
from perdure.streams.snapshots import Place, SnapshotRefused, Snapshots
from perdure.streams.store import META, RocksStore


def begin(log: Log, snapshots: Snapshots | None, partition: int, wanted: int | None) -> tuple[int, Rows]:
    """(offset, state before it) of the latest place at or before `wanted` where the state is known exactly.

    That is a snapshot, or offset 0 as long as task-commands has it. Without a wish it is the earliest one. Raises
    `EventsIncomplete` if there is none.
    """
    reader = log.reader()
    first, _ = reader.bounds(topics.COMMANDS.name, partition)
    reader.close()
    if first == 0 and wanted is None:
        return 0, []
    place = Place("engine", partition, log.topic_id(topics.CHANGELOG.name))
    usable = []
    for name in [] if snapshots is None else snapshots.names(place):
        assert snapshots is not None, "it has just named one"
        try:
            manifest = snapshots.read(name, place, first=0, end=sys.maxsize, oldest=0)
        except (SnapshotRefused, NotFound):
            continue  # another one, or the log, will do; if none does, that is said below
        at = manifest.inputs.get(topics.COMMANDS.name, 0)
        if first <= at and (wanted is None or at <= wanted):
            usable.append((at, manifest))
    if not usable:
        if first == 0:
            return 0, []
        raise EventsIncomplete(
            f"{topics.COMMANDS.name}/{partition} begins at {first}, and no snapshot is between it and the slice: the "
            "state at its beginning is not known: give a later --from, or keep inputs and snapshots for longer"
        )
    at, manifest = (min if wanted is None else max)(usable, key=lambda found: found[0])
    assert snapshots is not None, "it has the manifest"
    with tempfile.TemporaryDirectory(prefix="perdure-replay-") as folder:
        try:
            snapshots.download(manifest, Path(folder))
        except SnapshotRefused as error:
            raise EventsIncomplete(f"the replay has to begin at a snapshot, and {error}") from error
        store = RocksStore(Path(folder))
        rows = [(key, row) for key, row in store.scan(b"") if not key.startswith(META)]
        store.close()
    return at, rows


class OtherBuild:
    """One partition's engine of another build of Perdure, in a process of its own. Used in a `with`.

    build: a folder that holds the package `perdure` (a checkout, an unpacked wheel), a virtual environment or a Python.
    Raises `ConfigurationError` if there is no other build there, `InfrastructureError` when its process ends.
    """

    def __init__(self, build: Path, partition: int, partitions: int, keys: Keys, rows: Rows) -> None:
        command, environment = _command(build)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            start_new_session=True,  # Ctrl-C is for us; it ends with its stdin
        )  # fmt: skip
        secret = {kind: {i: k.hex() for i, k in getattr(keys, kind).items()} for kind in ("worker", "engine")}
        told = self._ask({
            "partition": partition, "partitions": partitions, "keys": secret,
            "rows": [[to_text(k), to_text(v)] for k, v in rows],
        })  # fmt: skip
        self.build, self.feature_level = str(told["build"]), int(told["feature_level"])
        if Path(told["place"]).resolve() == Path(decision.__file__).resolve():
            self.close()
            raise ConfigurationError(f"{build} has no other build of Perdure: it leads to this one")

    def decide(self, inputs: list[tuple[Record, bool]]) -> Made:
        """See `redecide.Redecider`."""
        told = self._ask({"inputs": [[r.offset, r.at, to_text(r.value), killer] for r, killer in inputs]})
        return [(offset, to_bytes(event) or b"") for offset, event in told["events"]]

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message, separators=(",", ":")) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise InfrastructureError(f"the other build's process ended with {code}; its last words are on stderr")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End its process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _command(build: Path) -> tuple[list[str], dict[str, str]]:
    script = str(Path(redecide.__file__).resolve())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if build.is_file() and os.access(build, os.X_OK):
        return [str(build), "-P", script], environment
    if (build / "bin" / "python").exists():
        return [str(build / "bin" / "python"), "-P", script], environment
    if (build / "perdure" / "__init__.py").exists():
        return [sys.executable, "-P", script], environment | {"PYTHONPATH": str(build.resolve())}
    raise ConfigurationError(f"{build} is no build of Perdure: give a checkout, a virtual environment or its Python")


def first_at(found: Iterable[Record], at: int) -> int | None:
    """Offset of the first record that is not older than a log time; None if all are."""
    return next((record.offset for record in found if record.at >= at), None)


def next_after(found: Iterable[Record], at: int) -> int | None:
    """Offset behind the last record that is not newer than a log time; None without records. Those before it count,
    also where the log's clock was ahead for a while."""
    end: int | None = None
    for record in found:
        if record.at <= at:
            end = record.offset + 1
        elif end is None:
            end = record.offset
    return end
