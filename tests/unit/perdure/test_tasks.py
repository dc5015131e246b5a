"""@task: registration, policy, input binding, and the JSON that workers publish."""

from __future__ import annotations

import datetime as dt
import sys
from pathlib import Path
from typing import Any

import pytest

from perdure.schemas.common import Retry as RetryRecord
from perdure.schemas.errors import ConfigurationError, InvalidRequest
from perdure.schemas.policies import policy_from_json
from perdure.tasks import InputMismatch, Registry, Retry, code_version, retry_record, task, type_config
from tests.unit.perdure.attempting import type_of


def test_bare_and_with_arguments_on_def_and_async_def() -> None:
    registry = Registry()

    @task(registry=registry)
    def plain(ctx: Any) -> int:
        return 1

    @task(registry=registry, name="other", queue="etl", timeout="12h", cancel_grace=dt.timedelta(seconds=3))
    async def later(ctx: Any) -> int:
        return 2

    found = {t.name: t for t in registry}
    assert plain(None) == 1, "the function stays what it was"
    assert (found["plain"].queue, found["plain"].is_async, found["plain"].policy.executor) == (
        "default",
        False,
        "process",
    )
    assert (found["other"].queue, found["other"].is_async, found["other"].policy.executor) == ("etl", True, "async")
    assert (found["other"].policy.run_timeout, found["other"].policy.cancel_grace) == (12 * 3_600_000, 3_000)
    assert found["plain"].policy.retry == RetryRecord(max_attempts=1)


def test_bare_decorator_uses_the_default_registry() -> None:
    from perdure.tasks import default_registry

    @task
    def registered_by_default(ctx: Any) -> None: ...

    found = default_registry.get("registered_by_default")
    assert found is not None
    assert found.function is registered_by_default


def test_one_name_for_two_functions_is_refused_and_a_reload_is_not() -> None:
    registry = Registry()

    def define() -> None:
        @task(registry=registry, name="job")
        def first(ctx: Any) -> None: ...

    define()
    define()
    with pytest.raises(ConfigurationError, match=r"first.*second"):

        @task(registry=registry, name="job")
        def second(ctx: Any) -> None: ...


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"timeout": "soon"}, "timeout"),
        ({"no_progress_timeout": 0}, "no_progress_timeout"),
        ({"queue": "Not A Queue"}, "queue"),
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"on_shutdown": "sleep"}, "on_shutdown"),
        ({"step_mismatch": "ignore"}, "step_mismatch"),
        ({"on_failure": "mail:me"}, "on_failure"),
        ({"on_success": "task:"}, "on_success"),
        ({"retry": 3}, "retry"),
        ({"retry": {"attempts": 3}}, "retry.attempts"),
        ({"retry": {"max_attempts": 0}}, "retry.max_attempts"),
        ({"retry": {"max_attempts": "3"}}, "retry.max_attempts"),
        ({"retry": {"backoff": "linear"}}, "retry.backoff"),
        ({"retry": {"delay": "-1s"}}, "retry.delay"),
        ({"retry": {"retry_on": "NetworkError"}}, "retry.retry_on"),
        ({"retry": {"retry_on": ValueError}}, "retry.retry_on"),
        ({"retry": {"never_on": [ValueError()]}}, "retry.never_on"),
        ({"retry": {"jitter": "no"}}, "retry.jitter"),
        ({"retry": {"delay": True}}, "retry.delay"),
        ({"queue": 5}, "queue"),
        ({"name": 5}, "name"),
        ({"name": "\ud800"}, "name"),
        ({"on_failure": 5}, "on_failure"),
        ({"checkpoint_storage": 5}, "checkpoint_storage"),
        ({"strict_lease": "no"}, "strict_lease"),
        ({"on_shutdown": None}, "on_shutdown"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], field: str) -> None:
    def job(ctx: Any) -> None: ...

    with pytest.raises(InvalidRequest) as caught:
        task(registry=Registry(), **options)(job)
    assert caught.value.field == field


def test_what_is_no_task_function_is_refused() -> None:
    def no_ctx() -> None: ...

    def only_keywords(*, ctx: Any) -> None: ...

    def generator(ctx: Any) -> Any:
        yield 1

    async def async_generator(ctx: Any) -> Any:
        yield 1

    class Jobs:
        def method(self, ctx: Any) -> None: ...
        @classmethod
        def of_class(cls, ctx: Any) -> None: ...

    register: Any = task(registry=Registry(), name="x")
    for bad in (no_ctx, only_keywords, 7, generator, async_generator, Jobs, Jobs.method, vars(Jobs)["of_class"]):
        with pytest.raises(InvalidRequest) as caught:
            register(bad)
        assert caught.value.field == "function", bad


def test_a_lambda_needs_a_name() -> None:
    with pytest.raises(InvalidRequest) as caught:
        task(registry=Registry())(lambda ctx: 1)
    assert caught.value.field == "name"
    task(registry=Registry(), name="job")(lambda ctx: 1)


def test_methods_that_need_no_self_are_task_functions() -> None:
    class Jobs:
        def bound(self, ctx: Any) -> None: ...
        @staticmethod
        def static(ctx: Any) -> None: ...

    registry = Registry()
    task(registry=registry)(Jobs().bound)
    task(registry=registry)(Jobs.static)
    assert [found.name for found in registry] == ["bound", "static"]


def test_retry_given_as_object_mapping_or_nothing() -> None:
    class NetworkError(Exception): ...

    assert retry_record(None).max_attempts == 1
    assert retry_record(Retry()) == RetryRecord(max_attempts=3)
    assert retry_record({"delay": "2s", "jitter": False}) == RetryRecord(max_attempts=3, delay=2_000, jitter=False)
    both = retry_record(Retry(retry_on=[NetworkError, "app.errors.Busy"]))
    assert both.retry_on is not None
    assert both.retry_on[0].endswith("NetworkError")
    assert both.retry_on[1] == "app.errors.Busy"


def test_input_becomes_arguments() -> None:
    def job(ctx: Any, path: str, limit: int = 5, *, fast: bool = False) -> None: ...

    bound = type_of(job)
    assert bound.bind({"path": "/a", "fast": True}) == ((), {"path": "/a", "fast": True})
    assert bound.bind("/a") == (("/a",), {})
    with pytest.raises(InputMismatch, match="'nope'"):
        bound.bind({"path": "/a", "nope": 1})
    with pytest.raises(InputMismatch, match="'path'"):
        bound.bind(None)

    def nothing(ctx: Any) -> None: ...

    assert type_of(nothing).bind(None) == ((), {})
    with pytest.raises(InputMismatch):
        type_of(nothing).bind([1])


def test_published_configuration_gives_the_policy_back() -> None:
    def job(ctx: Any) -> None: ...

    made = type_of(
        job, queue="etl", timeout="1h", retry=Retry(retry_on=["X"]), on_failure="notify_admin", strict_lease=True
    )
    content = type_config(made)
    assert content["queue"] == "etl"
    assert content["code_version"] == made.policy.code_version == "v1"
    assert policy_from_json(content["policy"]) == made.policy


def test_code_version_follows_the_users_sources_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "versioned_app"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "jobs.py").write_text("import versioned_beside\n")
    (tmp_path / "versioned_beside.py").write_text("A = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import importlib

    importlib.import_module("versioned_app.jobs")
    try:
        first = code_version(["versioned_app.jobs"])
        assert first == code_version(["versioned_app.jobs"])
        (tmp_path / "versioned_beside.py").write_text("A = 2\n")
        second = code_version(["versioned_app.jobs"])
        (package / "jobs.py").write_text("import versioned_beside  # changed\n")
        assert len({first, second, code_version(["versioned_app.jobs"])}) == 3
    finally:
        for name in ("versioned_app", "versioned_app.jobs", "versioned_beside"):
            del sys.modules[name]
