"""`perdure demo`: see it survive."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import click

from perdure.cli_common import dumps, talk


@click.command()
@click.option("--path", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Code base to review; "
              "default: the interpreter's standard library.")  # fmt: skip
@click.option("--data-dir", type=click.Path(file_okay=False, path_type=Path), help="Keep data and logs here; default: "
              "a temporary place.")  # fmt: skip
@click.option("--json", is_flag=True, help="One JSON line with result and proof on stdout.")
def demo(path: Path | None, data_dir: Path | None, json: bool) -> int:
    """Review a code base with a durable task that is killed three times on the way.

    Starts Kafka, engine, worker and server in a place of its own, reviews every Python file under PATH, one recorded
    step each, kills the task's process, then the worker, then the engine in the middle of their work, and proves from
    the log that nothing was lost and nothing done twice. Exits 1 and says what failed if the proof does not hold. A
    small code base is reviewed at a walk, so that there is time for the kills.

    \b
    perdure demo
    perdure demo --path ~/src/project
    """
    if data_dir is not None:
        return _run(path, data_dir.resolve(), json=json)
    with tempfile.TemporaryDirectory(prefix="perdure-demo-", ignore_cleanup_errors=True) as place:
        return _run(path, Path(place), json=json)


def _run(path: Path | None, data_dir: Path, *, json: bool) -> int:
    from perdure.cli_dev import launch, place
    from perdure.demo import Demo, default_path, open_console, python_files, show_result
    from perdure.dev import stop_running

    code = (path or default_path()).resolve()
    files = python_files(code)
    console = open_console(stderr=json)
    talk("starting Kafka, engine, worker and server")
    began = time.monotonic()
    folder, namespace = place(data_dir)
    stack = launch(folder, ("perdure.demo_tasks",), slots=1, port=None)
    try:
        talk(f"all are up after {time.monotonic() - began:.1f} s")
        result, proof = Demo(stack, namespace, code, files, console).run()
    finally:
        stop_running(folder)
    show_result(console, result)
    console.print(proof.line(), style="bold green" if proof.holds else "bold red", soft_wrap=True)
    for fault in proof.faults:
        console.print(f"failed: {fault}", soft_wrap=True)
    if json:
        click.echo(dumps({"proof": proof.__dict__ | {"holds": proof.holds}, "result": result}))
    sys.stdout.flush()
    return 0 if proof.holds else 1
