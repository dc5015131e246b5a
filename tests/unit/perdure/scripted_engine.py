"""An engine by script, for tests of what talks to one: it answers commands on a log in memory as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from perdure.schemas import codec, ids
from perdure.schemas.commands import Command
from perdure.schemas.inbox import CommandReply
from perdure.schemas.public import ConfigRecord
from perdure.streams.log import END, Record
from perdure.streams.memory_log import MemoryLog

Answer = tuple[bool, dict[str, Any]]
"""(accepted, other fields of the reply; `body` as a Python value)."""
Script = Callable[[Any, int], Answer | None]
"""From a command and its partition to its answer; None: silence."""


class ScriptedEngine:
    """Answers by `script`, which a test may replace at any time; `seen` holds the commands with their partitions."""

    def __init__(self, log: MemoryLog, script: Script) -> None:
        self.log = log
        self.script = script
        self.seen: list[tuple[int, Command]] = []
        self._stop = threading.Event()
        self._reader = log.reader(committed=False)
        self._reader.assign({("task-commands", p): END for p in range(log.partitions)})

    def run(self) -> None:
        while not self._stop.is_set():
            for record in self._reader.read(100, 0.05):
                self._answer(record)

    def stop(self) -> None:
        self._stop.set()
        configure(self.log, "rule/wake", {})  # whoever waits for a record on this log looks up

    def _answer(self, record: Record) -> None:
        command = codec.decode(record.value or b"")
        self.seen.append((record.partition, command))
        answer = self.script(command, record.partition)
        if answer is not None and command.reply_to:
            reply(self.log, command, record.partition, answer)


def reply(log: MemoryLog, command: Any, partition: int, answer: Answer) -> None:
    """Answer a command now."""
    accepted, more = answer
    if "body" in more:
        more = more | {"body": json.dumps(more["body"]).encode()}
    content = {"task_id": command.task_id} | more
    made = CommandReply(
        client_id=command.reply_to, command_id=command.command_id, accepted=accepted, at=log.clock(), **content
    )
    log.producer().append("command-replies", partition, command.reply_to.encode(), codec.encode(made))


@contextmanager
def running(log: MemoryLog, script: Script) -> Iterator[ScriptedEngine]:
    """A scripted engine at work."""
    engine = ScriptedEngine(log, script)
    thread = threading.Thread(target=engine.run, daemon=True)
    thread.start()
    try:
        yield engine
    finally:
        engine.stop()
        thread.join(10)


def configure(log: MemoryLog, name: str, content: dict[str, Any]) -> None:
    """Set a configuration name."""
    record = ConfigRecord(name=name, content=json.dumps(content).encode())
    log.producer().append("config", 0, name.encode(), codec.encode(record))


def append_event(log: MemoryLog, event: Any) -> None:
    """Append an event of a task, as the engine would."""
    partition = ids.partition_of(ids.split(event.task_id)[0], log.partitions)
    log.producer().append("task-events", partition, event.task_id.encode(), codec.encode(event))


def status(task_id: str = "etl/1", state: str = "RUNNING", **more: Any) -> dict[str, Any]:
    """The body of an answer to DescribeTask."""
    return {"task_id": task_id, "type": "t", "state": state} | more


NOT_FOUND: Answer = (False, {"reason": "not_found"})
