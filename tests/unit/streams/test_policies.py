"""Which policy holds, and which configuration is none."""

from __future__ import annotations

from typing import Any

import pytest

from perdure.schemas.commands import SubmitTask
from perdure.schemas.common import Retry
from perdure.streams import policies


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("type/a", b"{"), ("type/a", b"[]"), ("type/a", b"null"), ("type/a", b'{"policy":[]}'),
        ("type/a", b'{"policy":{"run_timeout":"soon"}}'), ("type/a", b'{"policy":{"retry":{"max_attempts":0}}}'),
        ("type/a", b'{"policy":{"on_shutdown":"explode"}}'), ("type/a", b'{"queue":"No Queue"}'),
        ("type/a", b'{"queue":5}'), ("queue/a", b'{"routing_keys":["UP"]}'), ("queue/a", b'{"routing_keys":7}'),
        ("queue/a", b'{"routing_keys":"abc"}'), ("queue/a", b'{"routing_keys":null}'), ("queue/a", b"\xff"),
        ("queue/Not A Queue", b"{}"),
    ],
)  # fmt: skip
def test_configuration_that_cannot_be_used_is_told(name: str, content: bytes) -> None:
    assert policies.fault(name, content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("type/a", b"{}"), ("type/a", None), ("type/a", b'{"policy":{"from_the_future":1}}'), ("queue/a", b"{}"),
        ("queue/a", b'{"routing_keys":["a","a~1"]}'), ("type/a", b'{"queue":null,"policy":{}}'), ("rule/x", b"{}"),
    ],
)  # fmt: skip
def test_configuration_that_can_be_used_is_not_held_up(name: str, content: bytes | None) -> None:
    assert policies.fault(name, content) is None


def command(**fields: Any) -> SubmitTask:
    return SubmitTask(command_id="c", type="t", **fields)


def test_what_a_submit_sets_of_its_own_is_what_it_names() -> None:
    assert policies.overrides_of(command()) is None
    assert policies.overrides_of(command(run_timeout=5)) == b'{"run_timeout":5}'
    assert b'"max_attempts":2' in (policies.overrides_of(command(retry=Retry(max_attempts=2))) or b"")
