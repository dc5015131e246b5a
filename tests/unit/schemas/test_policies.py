"""Policies from JSON, and what a submitter overrides."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from perdure.schemas.common import Policy, Retry
from perdure.schemas.errors import InvalidRequest
from perdure.schemas.policies import apply_overrides, policy_from_json, policy_to_json

BASE = Policy(retry=Retry(max_attempts=3, delay=2_000), run_timeout=60_000, on_failure="notify:ops")


def test_json_and_back() -> None:
    assert policy_from_json(policy_to_json(BASE)) == BASE
    assert policy_from_json({}) == Policy(retry=Retry()), "everything has a default"
    assert policy_from_json({"from_a_newer_worker": 1, "run_timeout": 5}).run_timeout == 5


def test_the_first_policies_may_come_on_many_threads() -> None:
    """msgspec ends the process when two threads make it look at a dataclass for the first time."""
    for _ in range(5):
        assert subprocess.run([sys.executable, "-c", _MANY_THREADS], check=False).returncode == 0


_MANY_THREADS = """
import sys, threading
from perdure.schemas.policies import policy_from_json

def convert():
    together.wait()
    policy_from_json({})

sys.setswitchinterval(1e-6)
together = threading.Barrier(8)
threads = [threading.Thread(target=convert) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_overrides_replace_only_what_they_name() -> None:
    changed = apply_overrides(BASE, {"run_timeout": 1_000, "retry": {"delay": 5}, "on_success": None})
    assert changed == Policy(retry=Retry(max_attempts=3, delay=5), run_timeout=1_000, on_failure="notify:ops")
    assert apply_overrides(BASE, {}) == apply_overrides(BASE, {"queue_timeout": None}) == BASE
    assert apply_overrides(BASE, {"retry": Retry(max_attempts=9)}).retry == Retry(max_attempts=9)


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"strict_lease": True}, "strict_lease"),
        ({"run_timeout": "60s"}, "run_timeout"),
        ({"run_timeout": 0}, "run_timeout"),
        ({"checkpoint_interval": -1}, "checkpoint_interval"),
        ({"retry": 5}, "retry"),
        ({"retry": {"max_attempts": 0}}, "retry.max_attempts"),
        ({"retry": {"max_attempts": 1 << 64}}, "retry.max_attempts"),
        ({"retry": {"delay": "5s"}}, "retry.delay"),
        ({"retry": {"often": 1}}, "retry.often"),
        ({"on_failure": "sms:me"}, "on_failure"),
    ],
)
def test_bad_overrides_are_refused_by_name(overrides: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        apply_overrides(BASE, overrides)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "content",
    [{"retry": None}, {"retry": {"jitter": "yes"}}, {"executor": "thread"}, {"cancel_grace": -1}, {"strict_lease": 1}],
)
def test_a_policy_that_cannot_be_carried_out_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        policy_from_json(content)
