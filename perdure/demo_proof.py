"""The demo's proof, from the topics and the witness file alone (CONTRACT section 5)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perdure.demo_tasks import TRACK
from perdure.schemas import codec, events, ids, topics
from perdure.streams.log import BEGIN, Log


@dataclass
class Proof:
    """What was counted, and what is wrong with it."""

    files: int
    recorded: int
    executions: int
    kills: int
    duplicates: int
    faults: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether every claim is true."""
        return not self.faults

    def line(self) -> str:
        """The proof in one line."""
        verdict = "proved" if self.holds else "NOT PROVED"
        return (
            f"{verdict}: files {self.files}, recorded steps {self.recorded}, executions {self.executions}, "
            f"kills survived {self.kills}, duplicates {self.duplicates}"
        )


def prove(log: Log, task_id: str, witness: Path, kills: int) -> Proof:
    """Read the task's events from the log and the executions from the witness, and hold them against each other."""
    recorded: Counter[int] = Counter()
    recorded_at: dict[int, int] = {}
    files: list[str] = []
    for event in task_events(log, task_id):
        if not isinstance(event, events.StepCompleted):
            continue
        if event.name == "find-files":
            files = json.loads(event.result)
        elif event.step_id.startswith(f"{TRACK}@"):
            index = int(event.step_id.removeprefix(f"{TRACK}@").partition("/")[0])
            recorded[index] += 1
            recorded_at.setdefault(index, event.at)
    executions = [line.split("\t") for line in witness.read_text().splitlines()]
    proof = Proof(
        files=len(files),
        recorded=sum(recorded.values()),
        executions=len(executions),
        kills=kills,
        duplicates=sum(n - 1 for n in recorded.values()),
    )
    _check(proof, files, recorded, recorded_at, executions)
    return proof


def _check(
    proof: Proof, files: list[str], recorded: Counter[int], recorded_at: dict[int, int], executions: list[list[str]]
) -> None:
    place = {name: index for index, name in enumerate(files)}
    missing = [name for name, index in place.items() if not recorded[index]]
    if missing:
        proof.faults.append(f"{len(missing)} files have no recorded step, the first: {missing[0]}")
    twice = [files[index] for index, n in recorded.items() if n > 1]
    if twice:
        proof.faults.append(f"{len(twice)} files have more than one recorded step, the first: {twice[0]}")
    if proof.executions > proof.files + proof.kills:
        proof.faults.append(f"{proof.executions} executions are more than {proof.files} files and {proof.kills} kills")
    ran = {name for _, _, name in executions}
    unseen = [name for name, index in place.items() if recorded[index] and name not in ran]
    if unseen:
        proof.faults.append(f"{len(unseen)} files have a recorded step and no execution, the first: {unseen[0]}")
    late = [name for at, _, name in executions if int(at) > recorded_at.get(place.get(name, -1), int(at))]
    if late:
        proof.faults.append(f"{len(late)} executions began after the step was recorded, the first: {late[0]}")


def task_events(log: Log, task_id: str) -> Iterator[Any]:
    """Every event of a task, from the beginning of the log to its present end."""
    name = topics.EVENTS.name
    partition = ids.partition_of(ids.split(task_id)[0], log.partitions)
    reader = log.reader()
    try:
        _, end = reader.bounds(name, partition)
        reader.assign({(name, partition): BEGIN})
        while not reader.caught_up(name, partition, end):
            for record in reader.read(1_000, 0.5):
                if record.key == task_id.encode() and record.value is not None:
                    yield codec.decode(record.value)
    finally:
        reader.close()
