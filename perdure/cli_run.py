"""Commands that run a process or prepare one: `engine`, `worker`, `server`, `keys`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from perdure.cli_common import Session, session, talk
from perdure.schemas.errors import InvalidRequest

if TYPE_CHECKING:
    from perdure.schemas.signing import Keys
    from perdure.settings import Settings

OWNER = "PERDURE_OWNER"
"""In the environment of a process that is to end with its parent: the parent's process id."""

C = TypeVar("C", bound=Callable[..., Any])


def _files(command: C) -> C:
    """Options for the files of a process."""
    folder, file = click.Path(file_okay=False, path_type=Path), click.Path(dir_okay=False, path_type=Path)
    state_dir = click.option("--state-dir", type=folder, help="What outlives the process (PERDURE_STATE_DIR).")
    keys_file = click.option("--keys-file", type=file, help="Worker and engine keys (PERDURE_KEYS_FILE).")
    return state_dir(keys_file(command))


@click.command()
@click.option("--processes", type=click.IntRange(1, 64), default=1, show_default=True, help="Engine processes to run.")
@click.option(
    "--standbys", is_flag=True, default=None, help="Keep warm copies of the partitions of others (PERDURE_STANDBYS)."
)
@_files
@session
def engine(session: Session, processes: int, **flags: Any) -> int:
    """Run the engine until SIGTERM.

    \b
    perdure engine --bootstrap localhost:9092
    """
    settings = _begin(session, flags)
    from perdure import engine_main

    os.environ.update(settings.environment())  # several processes: each is started with the same settings
    return engine_main.main(settings, processes=processes, ready=lambda p: _log.info("partition %d is up to date", p))


@click.command()
@click.option("-m", "--module", "modules", multiple=True, required=True, help="Module with tasks; may be repeated.")
@click.option("--queue", "queues", multiple=True, help="Queue to serve; may be repeated. Default: those of the tasks.")
@click.option("--slots", type=click.IntRange(min=1), help="Tasks at the same time; default: the machine's cores.")
@click.option(
    "--async-slots", type=click.IntRange(min=1), default=1_000, show_default=True, help="Async tasks at the same time."
)
@click.option("--name", help="Worker id; default: made of host and slot.")
@click.option(
    "--start", type=click.Choice(["fork", "spawn"]), default="fork", show_default=True, help="How children begin."
)
@click.option(
    "--max-tasks-per-child", type=click.IntRange(min=1), default=100, show_default=True, help="Then a fresh one."
)
@click.option("--drain-timeout", default="60s", show_default=True, metavar="DURATION", help="Time to hand tasks back.")
@click.option("--checkpoint-dir", type=click.Path(file_okay=False, path_type=Path), help="Where checkpoints are.")
@_files
@session
def worker(
    session: Session,
    modules: tuple[str, ...],
    queues: tuple[str, ...],
    slots: int | None,
    async_slots: int,
    name: str | None,
    start: str,
    max_tasks_per_child: int,
    drain_timeout: str,
    **flags: Any,
) -> int:
    """Run tasks until SIGTERM.

    Then it hands back what still runs; a second SIGTERM kills that.

    \b
    perdure worker -m myapp.tasks --queue etl --slots 8
    """
    _end_with_owner()
    from perdure.forkserver import ForkServer

    forks = ForkServer(modules, start_method=start, max_tasks=max_tasks_per_child)
    with ExitStack() as stack:
        # First of all: to import the tasks takes as long as all that follows here, and goes on meanwhile.
        forks.start()
        stack.callback(forks.stop, 0)
        settings = _begin(session, flags)
        from perdure.schemas.ids import check_queue

        for queue in queues:
            check_queue(queue)
        from perdure.engine_main import state_directory
        from perdure.schemas.durations import to_ms
        from perdure.streams.kafka_log import KafkaLog
        from perdure.worker import Worker

        keys = settings.require_keys()
        state_dir = state_directory(settings)
        log = KafkaLog(settings.require_bootstrap(), settings.namespace, options=settings.kafka)
        return Worker(
            log,
            keys,
            forks,
            queues=list(queues) or None,
            slots=slots or os.cpu_count() or 1,
            async_slots=async_slots,
            name=name,
            state_dir=state_dir,
            checkpoint_dir=settings.checkpoint_dir or state_dir / "checkpoints",
            drain_timeout_s=to_ms(drain_timeout, field="drain_timeout", positive=False) / 1000,
            large=settings.large_place(log.topic_id),
        ).run()


@click.command()
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; beyond loopback needs a token."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="0 takes a free one.")
@_files
@session
def server(session: Session, host: str, port: int, **flags: Any) -> int:
    """Run the HTTP API until SIGTERM.

    Its token is PERDURE_API_TOKEN; beyond loopback it needs one.

    \b
    perdure server --port 8765
    """
    settings = _begin(session, flags)
    from perdure import server_main

    return server_main.main(
        settings, host=host, port=port, ready=lambda url: session.answer({"api": url}, f"the API answers at {url}")
    )


@click.group()
def keys() -> None:
    """The keys by which engines and workers know each other.

    \b
    perdure keys new keys.json
    """


_FILE = click.argument("file", type=click.Path(dir_okay=False, path_type=Path), required=False)


@keys.command()
@_FILE
@session
def new(session: Session, file: Path | None) -> None:
    """Make a key file, readable by you alone. Default FILE: the one in the settings, else the data directory's.

    \b
    perdure keys new keys.json && export PERDURE_KEYS_FILE=$PWD/keys.json
    """
    from perdure.schemas.signing import Keys

    path = _key_file(session, file)
    if path.exists():
        raise InvalidRequest(f"{path} is there already; add newer keys with: perdure keys rotate {path}", field="file")
    _save(session, Keys.generate(), path)


@keys.command()
@_FILE
@session
def rotate(session: Session, file: Path | None) -> None:
    """Add newer keys to a key file.

    The older ones still verify what they signed.

    \b
    perdure keys rotate keys.json
    """
    from perdure.schemas.signing import Keys

    path = _key_file(session, file)
    _save(session, Keys.load(path).rotated(), path)


def _key_file(session: Session, file: Path | None) -> Path:
    settings = session.settings()
    return (file or settings.keys_file or settings.data_dir / "keys.json").absolute()


def _save(session: Session, made: Keys, path: Path) -> None:
    made.save(path)
    facts = {"file": str(path), "worker_keys": list(made.worker), "engine_keys": list(made.engine)}
    session.answer(facts, f"{path}: give it to every engine and worker, as PERDURE_KEYS_FILE")


_log = logging.getLogger("perdure")


def _begin(session: Session, flags: dict[str, Any]) -> Settings:
    """Make this process ready to run: its end tied to its owner's, a log on stderr, settings with all flags."""
    _end_with_owner()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    from perdure.process import tell_crashes
    from perdure.settings import Settings

    tell_crashes()
    return Settings.load(**session.flags, **flags)


def _end_with_owner() -> None:
    """Have the kernel kill this process when the one that started it for itself (`perdure dev`) ends."""
    owner = os.environ.pop(OWNER, None)
    if owner is None:
        return
    from perdure.process import die_with_parent

    die_with_parent()
    if os.getppid() != int(owner):
        talk(f"the process {owner} that started this one has ended")
        raise SystemExit(1)
