"""The engine as a process: `perdure engine`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from perdure.process import collect_seldom
from perdure.supervise import on_stop_signals, supervise

if TYPE_CHECKING:
    from perdure.settings import Settings


def main(settings: Settings, *, processes: int = 1, ready: Callable[[int], None] = lambda _: None) -> int:
    """Run the engine until SIGTERM or SIGINT; returns the exit code. Blocks.

    With several processes this one supervises: each takes a slot of the host and its share of the partitions, and is
    started again when it dies. `ready` is told each partition whose state is up to date. Raises what made the engine
    fail: `LogTruncated`, `ConfigurationError`, `Fenced`, `Unreachable`.
    """
    if processes > 1:
        return supervise([sys.executable, "-m", "perdure.cli", "engine"], processes)
    collect_seldom()
    from perdure.connectors.blobs import open_blobs
    from perdure.streams.decision import BUILD
    from perdure.streams.host import EngineHost
    from perdure.streams.kafka_log import KafkaLog
    from perdure.streams.snapshot_taker import Often, SnapshotTaker
    from perdure.streams.snapshots import Snapshots

    keys = settings.require_keys()
    log = KafkaLog(settings.require_bootstrap(), settings.namespace, options=settings.kafka)
    taker = None
    if settings.blobs is not None:
        taker = SnapshotTaker(Snapshots(open_blobs(settings.blobs)), BUILD, Often(rows=settings.snapshot_rows))
    host = EngineHost(log, keys, state_directory(settings), taker=taker, standbys=settings.standbys, on_ready=ready)
    on_stop_signals(host.stop)
    host.run()
    return 0


def state_directory(settings: Settings) -> Path:
    """Where this host's engines and workers keep what outlives their processes."""
    if settings.state_dir is not None:
        return settings.state_dir
    from platformdirs import user_state_dir

    return Path(user_state_dir("perdure"))
