"""The command line. Each command lives in a `cli_*` module, which is imported when the command is asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from perdure.cli_common import report

_COMMANDS = {
    "dev": "cli_dev",
    "demo": "cli_demo",
    "engine": "cli_run",
    "worker": "cli_run",
    "server": "cli_run",
    "kafka": "cli_kafka",
    "keys": "cli_run",
    "submit": "cli_submit",
    "status": "cli_tasks",
    "list": "cli_lists",
    "watch": "cli_watch",
    "wait": "cli_tasks",
    "history": "cli_tasks",
    "why": "cli_tasks",
    "pause": "cli_control",
    "resume": "cli_control",
    "cancel": "cli_control",
    "retry": "cli_control",
    "logs": "cli_tasks",
    "dlq": "cli_dlq",
    "workers": "cli_lists",
    "queues": "cli_lists",
    "audit": "cli_audit",
    "rebuild": "cli_rebuild",
    "upgrade": "cli_upgrade",
    "asof": "cli_asof",
    "replay": "cli_replay",
    "doctor": "cli_doctor",
    "topics": "cli_topics",
}
"""Command -> module; in the order of the help."""


class Commands(click.Group):
    """A group that imports a command's module at its first use, and ends with Perdure's exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The commands, in the table's order."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command of that name; None if there is none."""
        module = _COMMANDS.get(cmd_name)
        if module is None:
            return None
        found = getattr(importlib.import_module(f"perdure.{module}"), _attribute(cmd_name))
        assert isinstance(found, click.Command)
        return found

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run a command line and exit: 0 done, 1 refused or failed, 2 usage, 3 not found, 4 unreachable."""
        given = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(given, prog_name, **(extra | {"standalone_mode": False}))
        except Exception as error:  # noqa: BLE001 - `report` raises again what it has no words for
            code = report(error, json="--json" in given)
        sys.exit(code if isinstance(code, int) else 0)


def _attribute(command: str) -> str:
    """The name of a command's object: Python's own words get an underscore."""
    return {"list": "list_"}.get(command, command)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="perdure", prog_name="perdure")
def main() -> None:
    """Durable long-running tasks on Kafka.

    \b
    perdure dev --tasks myapp.tasks        everything on this machine, in one command
    perdure submit process_large_dataset --input '{"dataset_path": "large.csv"}'
    perdure watch 0192f3aa

    Every command takes --json. Exit codes: 0 done, 1 refused, failed, cancelled or timed out, 2 usage or ambiguous id,
    3 not found, 4 unreachable.
    """


if __name__ == "__main__":
    main()
