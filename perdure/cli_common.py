"""What the commands share: options to reach the namespace, output for people and for programs, and exit codes."""

from __future__ import annotations

import functools
import json as json_module
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from perdure.schemas import errors

if TYPE_CHECKING:
    from perdure.client import Client
    from perdure.handle import Handle
    from perdure.settings import Settings
    from perdure.streams.kafka_log import KafkaLog

REFUSED, USAGE, NOT_FOUND, UNREACHABLE = 1, 2, 3, 4
_INTERRUPTED = 130

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Session:
    """One run of a command: how to reach the namespace, and how to answer."""

    flags: dict[str, Any]
    json: bool

    def settings(self) -> Settings:
        """The settings, with this command's flags on top."""
        from perdure.settings import Settings

        return Settings.load(**self.flags)

    def client(self) -> Client:
        """A client; it connects at its first use."""
        from perdure.client import Client

        return Client(settings=self.settings())

    def kafka(self) -> KafkaLog:
        """The namespace's place on its brokers, whether or not its topics are there."""
        from perdure.streams.kafka_log import KafkaLog

        settings = self.settings()
        return KafkaLog(settings.require_bootstrap(), settings.namespace, options=settings.kafka, partitions=1)

    def handle(self, client: Client, text: str, *, past: bool = False) -> Handle:
        """The task that a person means by an id, a local id or a unique beginning of either.

        past: a whole id will do for a task that the engine has forgotten, or cannot be asked about: the log may tell.
        """
        whole = past and client.catalog.is_whole(text)
        try:
            return client.get(client.resolve(text))
        except (errors.NotFound, errors.Unreachable):
            if whole:
                return client.get(text)
            raise

    def answer(self, data: Any, text: str | None = None) -> None:
        """Data on stdout: as one JSON line, or as text for people."""
        click.echo(dumps(data) if self.json or text is None else text)


def dumps(data: Any) -> str:
    """One line of JSON."""
    return json_module.dumps(data, ensure_ascii=False, separators=(",", ":"))


def talk(line: str) -> None:
    """A line to a person, on stderr."""
    click.echo(line, err=True)


def session(command: F) -> F:
    """Give a command the options that reach a namespace, `--json`, and a `Session` as its first argument."""

    @click.option("--bootstrap", metavar="HOST:PORT", help="Kafka's address (PERDURE_BOOTSTRAP).")
    @click.option("--api", metavar="URL", help="The HTTP API's address (PERDURE_API).")
    @click.option("--namespace", metavar="PREFIX", help="What topic names begin with (PERDURE_NAMESPACE).")
    @click.option("--data-dir", type=click.Path(file_okay=False, path_type=Path), help="Where a dev stack lives.")
    @click.option("--json", is_flag=True, help="JSON on stdout.")
    @functools.wraps(command)
    def run(
        bootstrap: str | None, api: str | None, namespace: str | None, data_dir: Path | None, json: bool, **rest: Any
    ) -> Any:
        flags = {"bootstrap": bootstrap, "api": api, "namespace": namespace, "data_dir": data_dir}
        return command(Session(flags, json), **rest)

    return run  # type: ignore[return-value]


def report(error: Exception, *, json: bool) -> int:
    """Tell an error as the command line does, and return the exit code. What is no expected error is raised again."""
    if isinstance(error, click.exceptions.Abort):
        talk("interrupted")
        return _INTERRUPTED
    if isinstance(error, click.ClickException):
        if not json:
            error.show()
        else:
            _tell("usage", error.format_message(), _field_of(error))
        return error.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        error = errors.ConfigurationError(f"{error.filename}: {error.strerror}")
    if not isinstance(error, errors.PerdureError):
        raise error
    field = getattr(error, "field", None)
    if json:
        _tell(error.code, str(error), field)
    else:
        talk(f"error: {error}")
    return exit_code(error)


def exit_code(error: errors.PerdureError) -> int:
    """What a program learns from an error."""
    if isinstance(error, errors.NotFound):
        return NOT_FOUND
    if isinstance(error, errors.Unreachable):
        return UNREACHABLE
    refused = (errors.CommandRefused, errors.UnknownType, errors.ValueTooLarge)
    if isinstance(error, errors.InvalidRequest) and not isinstance(error, refused):
        return USAGE
    return REFUSED


def _tell(code: str, message: str, field: str | None) -> None:
    click.echo(dumps({"error": {"code": code, "message": message, "field": field}}))


def _field_of(error: click.ClickException) -> str | None:
    """The option or argument that a usage error is about."""
    parameter = getattr(error, "param", None)
    if parameter is not None and parameter.name:
        return str(parameter.name)
    option = getattr(error, "option_name", None)
    return str(option).lstrip("-").replace("-", "_") if option else None


def read_json(text: str, field: str) -> Any:
    """A JSON value given on the command line: itself, `@FILE`, or `-` for stdin. Raises `InvalidRequest`."""
    from perdure.schemas.json_commands import strict_loads

    try:
        if text == "-":
            data = sys.stdin.buffer.read()
        else:
            data = Path(text[1:]).read_bytes() if text.startswith("@") else text.encode()
        return strict_loads(data)
    except (OSError, UnicodeError) as error:
        raise errors.InvalidRequest(f"{field}: {error}", field=field) from error
    except errors.DecodeError as error:
        raise errors.InvalidRequest(
            f"""{field}: {error}; write --{field} '{{"name": "value"}}', @FILE or -""", field=field
        ) from error
