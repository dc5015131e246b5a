"""LittleHorse's client: 16 threads where many workflows are started; it has to ask for their ends."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import littlehorse
from littlehorse.config import LHConfig
from littlehorse.model import LHStatus, ListTaskRunsRequest, RunWfRequest, WfRunId

from benchmarks.peers import drive
from benchmarks.peers.littlehorse import app

_THREADS = 16
_POLL_S = 0.01


class LittleHorseDriver(drive.Driver):
    def __init__(self) -> None:
        self._config = LHConfig()
        self._stub = self._config.stub()

    def _run(self, name: str, **variables: object) -> WfRunId:
        values = {key: littlehorse.to_variable_value(value) for key, value in variables.items()}
        return self._stub.RunWf(RunWfRequest(wf_spec_name=name, variables=values)).id

    def _wait(self, run: WfRunId) -> None:
        while (status := self._stub.GetWfRun(run).status) != LHStatus.COMPLETED:
            if status not in (LHStatus.STARTING, LHStatus.RUNNING):
                raise RuntimeError(f"workflow {run.id} ended as {LHStatus.Name(status)}")
            time.sleep(_POLL_S)

    def _times(self, run: WfRunId) -> list[int]:
        self._wait(run)
        tasks = self._stub.ListTaskRuns(ListTaskRunsRequest(wf_run_id=run, limit=1_000)).results
        return sorted(task.attempts[-1].output.int for task in tasks)

    def tiny(self, count: int) -> None:
        with ThreadPoolExecutor(_THREADS) as threads:
            for run in list(threads.map(self._run, ["tiny"] * count)):
                self._wait(run)

    def start(self) -> int:
        return self._times(self._run("first-line"))[0]

    def steps(self, count: int) -> tuple[int, int]:
        for workflow in app.workflows(count):
            app.patiently(littlehorse.create_workflow_spec, workflow, self._config)
        times = self._times(self._run(f"steps-{count}"))
        return times[0], times[-1]

    def slow(self, count: int, witness: str) -> None:  # noqa: ARG002 - the definition has them, see app.workflows
        self._run("slow", witness=witness)


if __name__ == "__main__":
    drive.main(LittleHorseDriver())
