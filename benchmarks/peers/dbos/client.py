"""DBOS's clients: in the process that runs the workflows, or through the queue."""

from __future__ import annotations

import os
from typing import Any

from dbos import DBOS, DBOSClient, WorkflowHandle

from benchmarks.peers import drive
from benchmarks.peers.dbos import app

_POLL_S = 0.02


class InProcess(drive.Driver):
    """The application runs its own workflows: there is no worker."""

    def __init__(self) -> None:
        app.configure()
        DBOS.launch()

    def tiny(self, count: int) -> None:
        for handle in [DBOS.start_workflow(app.tiny) for _ in range(count)]:
            handle.get_result()

    def start(self) -> int:
        return DBOS.start_workflow(app.first_line).get_result()

    def steps(self, count: int) -> tuple[int, int]:
        first, last = DBOS.start_workflow(app.steps, count).get_result()
        return first, last

    def slow(self, count: int, witness: str) -> None:  # noqa: ARG002 - the interface
        raise AssertionError("kills are measured through the queue: here the killed process is the one that submits")

    def close(self) -> None:
        DBOS.destroy()


class Queued(drive.Driver):
    """A client that only submits."""

    def __init__(self) -> None:
        self._client = DBOSClient(system_database_url=os.environ["PEER_POSTGRES"])

    def _submit(self, name: str, *arguments: Any) -> WorkflowHandle[Any]:
        return self._client.enqueue({"queue_name": app.QUEUE, "workflow_name": name}, *arguments)

    def tiny(self, count: int) -> None:
        for handle in [self._submit("tiny") for _ in range(count)]:
            handle.get_result(polling_interval_sec=_POLL_S)

    def start(self) -> int:
        return int(self._submit("first_line").get_result(polling_interval_sec=_POLL_S))

    def steps(self, count: int) -> tuple[int, int]:
        first, last = self._submit("steps", count).get_result(polling_interval_sec=_POLL_S)
        return first, last

    def slow(self, count: int, witness: str) -> None:
        self._submit("slow", count, witness)


if __name__ == "__main__":
    drive.main(InProcess() if "PEER_IN_PROCESS" in os.environ else Queued())
