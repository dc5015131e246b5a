"""Values too large for a record, through every process of the stack, and with a death in between."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pytest

from perdure.connectors.large_values import SLICES, LargeValues, today
from perdure.schemas import limits, references, topics
from perdure.server_main import Commands
from perdure.value_sweeper import Sweeper
from tests.integration.stack import Stack, stack_on, until
from tests.integration.stack_tasks import BULKY_STEPS

pytestmark = pytest.mark.kafka


@pytest.fixture
def stack(kafka_bootstrap: str, topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    with stack_on(kafka_bootstrap, topic_prefix, tmp_path) as made:
        yield made


def test_ten_megabytes_in_and_out_and_a_megabyte_a_step_survive_their_worker(stack: Stack) -> None:
    stack.engine()
    worker = stack.worker("--slots", "1", name="w")
    gate, data = stack.folder / "gate", os.urandom(5_000_000).hex()
    handle = stack.submit("bulky", {"witness": str(stack.witness), "gate": str(gate), "data": data}, key="once")
    stack.await_witness("part", str(BULKY_STEPS // 2))
    worker.kill()
    gate.touch()
    worker.start()

    assert stack.result(handle) == {"epoch": 2, "data": data.upper()}
    ran = Counter(line.split()[-1] for line in stack.witness.read_text().splitlines() if " part " in line)
    again = {number for number, times in ran.items() if times > 1}
    assert again <= {str(BULKY_STEPS // 2)}, "a recorded step runs again"
    assert len(stack.events(handle.id, "StepCompleted")) == BULKY_STEPS
    same = stack.submit("bulky", {"witness": str(stack.witness), "gate": str(gate), "data": data}, key="once")
    assert same.status().state == "COMPLETED", "another writing of the same input is the same input"

    for event in stack.events(handle.id, "StepCompleted"):
        assert references.parse(event.result).size == len(data) // BULKY_STEPS + 2
    for topic in (topics.COMMANDS, topics.EVENTS, topics.INBOX, topics.CHANGELOG, topics.REPLIES):
        assert all(len(s.record.value or b"") < 64 * 1024 for s in stack.tail(topic.name).whole()), topic.name
    _check_server(stack, handle.id, data)
    _check_sweep(stack, handle.id)
    assert stack.result(handle)["data"] == data.upper()


def _check_server(stack: Stack, task_id: str, data: str) -> None:
    address = f"{stack.server()}/api/v1/tasks/{quote(task_id, safe='')}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def download(name: str) -> bytes | None:
        try:
            with closing(opener.open(f"{address}/{name}", timeout=60)) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != 404:  # then the views are not filled yet
                raise
            return None

    text = until("the result", lambda: download("result"))
    assert json.loads(text) == {"epoch": 2, "data": data.upper()}
    assert json.loads(download("input") or b"")["data"] == data
    with closing(opener.open(address, timeout=60)) as answer:
        shown = json.loads(answer.read())
    assert (shown["result"], shown["result_ref"]["size"]) == (None, len(text))


def _check_sweep(stack: Stack, task_id: str) -> None:
    """Two days later, only what belongs to no task goes: nobody ever heard of the submit of etl/never."""
    assert stack.large_place is not None
    large = stack.client.large_values
    large.carried("etl/never", large.text("v" * limits.VALUE_MAX, "input"))
    later = LargeValues(stack.large_place.open, day=lambda: today() + 2)
    with closing(Commands(stack.log)) as commands:
        known = Sweeper(later, commands).known
        assert (known(task_id), known("etl/never")) == (True, False)
        assert sum(later.sweep(part, known) for part in range(SLICES)) == 1
