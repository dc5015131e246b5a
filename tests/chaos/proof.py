"""What must hold at the end of a campaign: CONTRACT section 5 for each task, and every command and record accounted for."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from perdure.schemas import topics
from tests.chaos.campaign import Campaign
from tests.chaos.load import ATTEMPTS, Wanted
from tests.chaos.watch import Life, Violation
from tests.integration.stack import Execution
from tests.integration.test_hostile import endings

_CAUSES = {"raises": "defect", "oversized": "too_large", "kills": "killer"}


def proved(c: Campaign) -> Iterator[Violation]:
    """All that is wrong, after `Campaign.end`."""
    yield from c.violations
    yield from c.observer.violations
    for task, wanted in c.load.wanted.items():
        life = c.observer.lives.get(task)
        if life is None:
            yield Violation(f"{task}: accepted and lost")
            continue
        executions = c.witness.executions.get(task, [])
        yield from (Violation(f"{task}: {what}") for what in (*wrong_life(wanted, life), *wrong_work(life, executions)))
    for command, reason in c.observer.refused.items():
        if command.startswith("probe/"):
            yield Violation(f"{command} was refused: {reason}")
    yield from _hostile(c)


def wrong_life(wanted: Wanted, life: Life) -> Iterator[str]:
    """What is wrong with what has become of it."""
    if life.end == "TaskCancelled" and wanted.cancelled:
        return
    if life.end != "TaskCompleted":
        yield f"ended with {life.end}"
        return
    if json.loads(life.result) != sum(range(wanted.count)):
        yield f"has the result {life.result!r}"
    if set(life.steps) != set(range(wanted.count)):
        yield f"{len(life.steps)} of {wanted.count} steps are recorded"
    attempts = 1 if wanted.stumbles >= ATTEMPTS else wanted.stumbles + 1
    if life.attempt != attempts:
        yield f"completed in attempt {life.attempt} instead of {attempts}: a fault was charged to the task"
    once = ("TaskSubmitted", "TaskCompleted")
    yield from (f"has {life.kinds[kind]} {kind}" for kind in once if life.kinds[kind] != 1)


def wrong_work(life: Life, executions: list[tuple[int, Execution]]) -> Iterator[str]:
    """CONTRACT section 5: no execution after the step was recorded, and each execution too many has a reason.

    What a worker that stood still does in its old epoch, before it hears that it is over, is no execution by the task.
    """
    done: dict[int, list[int]] = {}
    for epoch, execution in executions:
        number = int(execution.words[3])
        done.setdefault(epoch, []).append(number)
        recorded = life.steps.get(number)
        if recorded is not None and execution.at > recorded[1] and epoch > recorded[0]:
            yield f"step {number} ran in epoch {epoch} at {execution.at}, recorded in epoch {recorded[0]} at {recorded[1]}"
    for epoch, numbers in done.items():
        if len(set(numbers)) < len(numbers):
            yield f"steps ran twice in epoch {epoch}: {numbers}"
        recorded_here = [number for number in numbers if life.steps.get(number, (0, 0))[0] == epoch]
        if numbers[: len(recorded_here)] != recorded_here:
            yield f"epoch {epoch} ran {numbers}, and {recorded_here} are recorded: not the first ones"
        lost = len(numbers) - len(recorded_here)
        if lost > _allowed(life, epoch):
            yield f"{lost} executions of epoch {epoch}, which ended by {life.over.get(epoch)}, are not recorded"
    strays = [number for number, (epoch, _) in life.steps.items() if number not in done.get(epoch, ())]
    if strays:
        yield f"steps {strays} are recorded and never ran in that epoch"


def _allowed(life: Life, epoch: int) -> float:
    """Executions that nothing is recorded of: one for a kill; what the engine had not read yet when a lease was over."""
    if epoch == life.epoch and life.end == "TaskCompleted":
        return 0
    if epoch == life.epoch and life.end == "TaskCancelled":
        return math.inf  # a lease that is over while the task is being cancelled has no event of its own
    return 1 if life.over.get(epoch) in (None, "crashed", "drained") else math.inf


def _hostile(c: Campaign) -> Iterator[Violation]:
    """Each hostile record has ended in the one place that it belongs to (G7)."""
    quarantined = c.stack.tail(topics.QUARANTINE.name).whole()
    found: dict[tuple[int, int], set[str]] = {}
    for (place, kind), _ in endings(quarantined, c.observer.endings, set(c.hostile)).items():
        found.setdefault(place, set()).add(kind)
    for place, kind in c.hostile.items():
        if found.get(place) != {kind}:
            yield Violation(
                f"the hostile record at task-commands/{place[0]}/{place[1]} ended in {found.get(place)}, not {kind}"
            )
    causes = Counter(s.message.cause for s in quarantined)
    for kind, count in c.defects.items():
        if causes[_CAUSES[kind]] != count:
            yield Violation(
                f"{count} records that make a decision fail ({kind}): {causes[_CAUSES[kind]]} in quarantine"
            )


def audited(c: Campaign) -> Iterator[Violation]:
    """What `perdure audit` finds wrong in the whole log (G1 to G6)."""
    done = subprocess.run(
        [sys.executable, "-m", "perdure.cli", "audit", "--json"], capture_output=True, text=True, check=False,
        env=os.environ | {"PERDURE_BOOTSTRAP": c.stack.bootstrap, "PERDURE_NAMESPACE": c.stack.prefix},
    )  # fmt: skip
    found = json.loads(done.stdout)["violations"] if done.returncode in (0, 1) else []
    yield from (Violation(f"audit: {json.dumps(v)}", _log_time(c, v)) for v in found)
    if done.returncode != 0 and not found:
        yield Violation(f"audit: exit code {done.returncode}: {done.stderr.strip()[-500:]}")


def _log_time(c: Campaign, found: dict[str, Any]) -> int | None:
    """When the record that is wrong was appended."""
    if found["topic"] not in topics.BY_NAME:
        return None
    reader = c.stack.log.reader(committed=False)
    reader.assign({(found["topic"], found["partition"]): found["offset"]})
    records = reader.read(1, 5.0)
    reader.close()
    return records[0].at if records else None
