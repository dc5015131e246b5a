"""`perdure kafka`: the embedded broker by itself, for a person or a script that wants only Kafka."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from perdure.cli_common import REFUSED, dumps, report, talk
from perdure.schemas.errors import PerdureError


def _options(command: Callable[..., None]) -> Callable[..., None]:
    folder = click.Path(file_okay=False, path_type=Path)
    data_dir = click.option(
        "--data-dir", type=folder, default=Path(".perdure/kafka"), show_default=True, help="Where the data are."
    )
    json = click.option("--json", is_flag=True, help="One JSON line on stdout.")
    return data_dir(json(command))


@click.group()
def kafka() -> None:
    """The embedded Kafka broker, for development.

    \b
    perdure kafka start
    """


@kafka.command()
@click.option("--port", type=click.IntRange(1, 65535), help="Default: the port it had before, else a free one.")
@_options
def start(port: int | None, data_dir: Path, json: bool) -> None:
    """Start a broker and print its address.

    Returns when it is ready; it stays until `perdure kafka stop`.

    \b
    perdure kafka start --data-dir broker
    """
    from perdure.connectors.embedded_kafka import EmbeddedKafka

    broker = EmbeddedKafka(data_dir, port=port, detached=True, log=talk)
    with _refusals(json):
        bootstrap = broker.start()
    talk(f"Kafka is ready; `perdure kafka stop --data-dir {broker.data_dir}` stops it and keeps its data")
    facts = {"bootstrap": bootstrap, "pid": broker.pid, "cluster_id": broker.cluster_id}
    _print({**facts, "data_dir": str(broker.data_dir)}, bootstrap, json)


@kafka.command()
@_options
def stop(data_dir: Path, json: bool) -> None:
    """Stop the broker on a data folder; done also when none runs.

    \b
    perdure kafka stop
    """
    from perdure.connectors.embedded_kafka import stop_running

    with _refusals(json):
        stopped = stop_running(data_dir)
    _print({"stopped": stopped}, "stopped" if stopped else f"no broker runs on {data_dir.absolute()}", json)


@kafka.command()
@_options
def status(data_dir: Path, json: bool) -> None:
    """Say whether a broker runs and answers: exit 0 if so, else 1.

    \b
    perdure kafka status
    """
    from perdure.connectors.embedded_kafka import running

    with _refusals(json):
        broker = running(data_dir)
    if broker is None:
        _print({"running": False}, f"no broker runs on {data_dir.absolute()}", json)
        raise SystemExit(REFUSED)
    facts = {"bootstrap": broker.bootstrap, "pid": broker.pid, "cluster_id": broker.cluster_id}
    line = f"{broker.bootstrap}  pid {broker.pid}  cluster {broker.cluster_id}  Kafka {broker.kafka_version}"
    _print({"running": True, **facts, "data_dir": str(broker.data_dir)}, line, json)


@contextmanager
def _refusals(json: bool) -> Iterator[None]:
    """End on our errors as every command does, also where this group is run by itself."""
    try:
        yield
    except PerdureError as error:
        raise SystemExit(report(error, json=json)) from error


def _print(facts: dict[str, Any], line: str, json: bool) -> None:
    click.echo(dumps(facts) if json else line)
