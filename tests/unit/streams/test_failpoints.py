"""Named points of death and standstill: off unless asked for, and never asked for by a wrong name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from perdure.schemas.errors import ConfigurationError
from perdure.streams import failpoints


def test_without_the_variable_a_point_does_nothing() -> None:
    assert failpoints.passed is failpoints.entered is failpoints._off


@pytest.mark.parametrize("text", ["nowhere=kill", "after-produce", "after-produce=halt", "after-produce=kill:2"])
def test_what_is_no_point_or_no_action_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="after-commit-before-write"):
        failpoints.parse(text)


def test_points_and_probabilities() -> None:
    assert failpoints.parse("") == {}
    assert failpoints.parse("after-produce=kill:0.01, in-restore=stop") == {
        "after-produce": ("kill", 0.01), "in-restore": ("stop", 1.0),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("failpoints.passed('after-produce')", -9),
        ("failpoints.passed('before-begin')", 0),
        ("failpoints.entered('after-produce'); time.sleep(30)", -9),
    ],
)
def test_a_process_dies_where_it_is_told_to(call: str, code: int) -> None:
    program = f"import time; from perdure.streams import failpoints; {call}"
    environment = {failpoints.VARIABLE: "after-produce=kill"}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == code


def test_a_process_stands_still_where_it_is_told_to_once_until_it_is_told_to_go_on() -> None:
    program = "from perdure.streams import failpoints; failpoints.passed('in-commit'); failpoints.passed('in-commit')"
    environment = {failpoints.VARIABLE: "in-commit=stop"}
    with subprocess.Popen([sys.executable, "-c", program], env=environment) as process:
        pid, status = os.waitpid(process.pid, os.WUNTRACED)
        assert (pid, os.WIFSTOPPED(status)) == (process.pid, True)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0
