"""What makes a function a task: `@task`, its policy, and the registry that a worker offers the engine."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, overload

from perdure.schemas import limits
from perdure.schemas.codec import replace as replace_record
from perdure.schemas.common import Policy
from perdure.schemas.common import Retry as RetryRecord
from perdure.schemas.durations import Duration, to_ms
from perdure.schemas.errors import ConfigurationError, InvalidRequest
from perdure.schemas.ids import check_queue
from perdure.schemas.policies import check_retry, policy_from_json, policy_to_json

F = TypeVar("F", bound=Callable[..., Any])


class InputMismatch(InvalidRequest):
    """The input does not fit the task function's parameters."""

    code = "input_mismatch"


@dataclass(frozen=True)
class Retry:
    """When a failed attempt is followed by another one. `retry_on` and `never_on` hold classes or their names, bare or
    dotted, looked for along the error's MRO; `never_on` wins. Raises `InvalidRequest` naming the field.
    """

    max_attempts: int = 3
    backoff: str = "exponential"
    delay: Duration = "1s"
    max_delay: Duration = "5m"
    jitter: bool = True
    retry_on: Sequence[str | type] | None = None
    never_on: Sequence[str | type] | None = None

    def __post_init__(self) -> None:
        self.record()

    def record(self) -> RetryRecord:
        """The same, as the engine reads it."""
        if not isinstance(self.max_attempts, int) or isinstance(self.max_attempts, bool):
            raise InvalidRequest(
                f"retry.max_attempts is {self.max_attempts!r}; give a number", field="retry.max_attempts"
            )
        if not isinstance(self.jitter, bool):
            raise InvalidRequest(f"retry.jitter is {self.jitter!r}; give True or False", field="retry.jitter")
        return check_retry(
            RetryRecord(
                max_attempts=self.max_attempts,
                backoff=self.backoff,
                delay=to_ms(self.delay, field="retry.delay", positive=False),
                max_delay=to_ms(self.max_delay, field="retry.max_delay", positive=False),
                jitter=self.jitter,
                retry_on=_names(self.retry_on, "retry.retry_on"),
                never_on=_names(self.never_on, "retry.never_on"),
            )
        )


def retry_record(value: Retry | Mapping[str, Any] | None) -> RetryRecord:
    """What a user gave as `retry=`: a `Retry`, a mapping of its names, or None, which means one attempt.

    Raises `InvalidRequest` naming the field.
    """
    if value is None:
        return RetryRecord()
    if isinstance(value, Retry):
        return value.record()
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"retry is Retry(...) or a mapping of its names, not {value!r}", field="retry")
    known = {f.name for f in fields(Retry)}
    for name in value:
        if name not in known:
            raise InvalidRequest(f"retry.{name} is unknown; known: {', '.join(sorted(known))}", field=f"retry.{name}")
    return Retry(**value).record()


@dataclass(frozen=True)
class TaskType:
    """A registered function with its policy."""

    name: str
    function: Callable[..., Any]
    policy: Policy
    queue: str
    is_async: bool
    code_version: str = ""

    @property
    def place(self) -> str:
        """Dotted name of the function."""
        return f"{self.function.__module__}.{self.function.__qualname__}"

    def bind(self, value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments behind `ctx` for an input: an object gives keyword arguments, null none, anything else the single
        positional one. Raises `InputMismatch`.
        """
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if isinstance(value, dict):
            kwargs = value
        elif value is not None:
            args = (value,)
        signature = inspect.signature(self.function)
        try:
            signature.bind(None, *args, **kwargs)
        except TypeError as error:
            given = f"the fields {', '.join(kwargs) or '(none)'}" if isinstance(value, dict) else type(value).__name__
            raise InputMismatch(
                f"the input ({given}) does not fit {self.place}{signature}: {error}; an object gives the arguments "
                "behind the first by name, null gives none, any other value one", field="input",
            ) from error  # fmt: skip
        return args, kwargs


class Registry:
    """Task types by name."""

    def __init__(self) -> None:
        self._types: dict[str, TaskType] = {}

    def __iter__(self) -> Iterator[TaskType]:
        return iter(self._types.values())

    def __len__(self) -> int:
        return len(self._types)

    def get(self, name: str) -> TaskType | None:
        """The type of that name, if there is one."""
        return self._types.get(name)

    def add(self, task_type: TaskType) -> None:
        """Register a type. Raises `ConfigurationError` when another function has its name; the same function again
        (a module imported anew) takes the place of the old one.
        """
        other = self._types.get(task_type.name)
        if other is not None and _home(other.function) != _home(task_type.function):
            raise ConfigurationError(
                f"two functions are registered as task {task_type.name!r}: {other.place} and {task_type.place}; "
                "give one of them another name: @task(name=...)"
            )
        self._types[task_type.name] = task_type

    def stamp(self, code_version: str) -> None:
        """Mark all types with the code version that holds them."""
        for name, found in self._types.items():
            policy = replace_record(found.policy, code_version=code_version)
            self._types[name] = replace(found, code_version=code_version, policy=policy)


default_registry = Registry()


@overload
def task(function: F) -> F: ...
@overload
def task(
    *,
    name: str | None = None,
    queue: str = limits.DEFAULT_QUEUE,
    timeout: Duration | None = None,
    queue_timeout: Duration | None = None,
    total_timeout: Duration | None = None,
    no_progress_timeout: Duration | None = None,
    retry: Retry | Mapping[str, Any] | None = None,
    checkpoint_interval: Duration | None = None,
    checkpoint_storage: str | None = None,
    on_failure: str | None = None,
    on_success: str | None = None,
    on_shutdown: str = "drain",
    step_mismatch: str = "warn",
    strict_lease: bool = False,
    cancel_grace: Duration = "10s",
    registry: Registry = default_registry,
) -> Callable[[F], F]: ...


def task(function: F | None = None, *, registry: Registry = default_registry, **options: Any) -> F | Callable[[F], F]:
    """Register a function as a task type and return it unchanged, so that a test can call it with any `ctx`.

    `timeout` bounds the running time of one attempt. Everything not given has the default of its field in
    `perdure.schemas.common.Policy`. Raises `InvalidRequest` naming the option, or `ConfigurationError`.
    """

    def register(made: F) -> F:
        registry.add(_task_type(made, **options))
        return made

    return register if function is None else register(function)


def _task_type(function: Callable[..., Any], *, name: str | None = None, queue: str = limits.DEFAULT_QUEUE,
               **options: Any) -> TaskType:  # fmt: skip
    if not inspect.isroutine(function) or not callable(function):
        raise InvalidRequest(f"@task takes a function, not {function!r}", field="function")
    chosen = _check_name(function.__name__ if name is None else name)
    first = next(iter(inspect.signature(function).parameters.values()), None)
    if first is None or first.kind in (first.KEYWORD_ONLY, first.VAR_KEYWORD) or first.name in ("self", "cls"):
        raise InvalidRequest(f"task {chosen!r}: its function takes ctx first: def {chosen}(ctx, ...)", field="function")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise InvalidRequest(f"task {chosen!r}: its function yields; it returns its result instead", field="function")
    is_async = inspect.iscoroutinefunction(function)
    policy = _policy(executor="async" if is_async else "process", **options)
    return TaskType(chosen, function, policy, check_queue(_check_text(queue, "queue")), is_async)


def _policy(*, executor: str, timeout: Duration | None = None, queue_timeout: Duration | None = None,
            total_timeout: Duration | None = None, no_progress_timeout: Duration | None = None,
            retry: Retry | Mapping[str, Any] | None = None, checkpoint_interval: Duration | None = None,
            checkpoint_storage: str | None = None, on_failure: str | None = None, on_success: str | None = None,
            on_shutdown: str = "drain", step_mismatch: str = "warn", strict_lease: bool = False,
            cancel_grace: Duration = "10s") -> Policy:  # fmt: skip
    made = Policy(
        retry=retry_record(retry),
        run_timeout=_ms(timeout, "timeout"),
        queue_timeout=_ms(queue_timeout, "queue_timeout"),
        total_timeout=_ms(total_timeout, "total_timeout"),
        no_progress_timeout=_ms(no_progress_timeout, "no_progress_timeout"),
        checkpoint_interval=_ms(checkpoint_interval, "checkpoint_interval"),
        checkpoint_storage=checkpoint_storage,
        on_failure=on_failure,
        on_success=on_success,
        on_shutdown=on_shutdown,
        step_mismatch=step_mismatch,
        strict_lease=strict_lease,
        cancel_grace=to_ms(cancel_grace, field="cancel_grace", positive=False),
        executor=executor,
    )
    return policy_from_json(policy_to_json(made))  # as the engine will read it: what it would refuse is refused here


def type_config(task_type: TaskType) -> dict[str, Any]:
    """What a worker publishes as `config/type/<name>`: the type as a JSON object."""
    return {
        "queue": task_type.queue,
        "policy": policy_to_json(task_type.policy),
        "code_version": task_type.code_version,
    }


def code_version(modules: Iterable[str]) -> str:
    """A hash over the sources of the loaded modules that belong to the user: those in the packages of `modules`, and
    those that lie beside them and were not installed.
    """
    tops = {name.partition(".")[0] for name in modules}
    folders = {folder for top in tops for folder in _folders(top)}
    digest = hashlib.sha256()
    for name, module in sorted(sys.modules.items()):
        source = getattr(module, "__file__", None)
        if source is None or not source.endswith(".py") or not _is_users(name.partition(".")[0], source, tops, folders):
            continue
        body = Path(source).read_bytes()
        digest.update(f"{name}\0{len(body)}\0".encode() + body)
    return digest.hexdigest()[:16]


def _is_users(top: str, source: str, tops: set[str], folders: set[Path]) -> bool:
    if top in tops:
        return True
    path = Path(source).resolve()
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return top != "perdure" and not installed and any(path.is_relative_to(folder) for folder in folders)


def _folders(top: str) -> list[Path]:
    """Where a top-level module lies: the folder that holds the file, or the package's folder."""
    module = sys.modules.get(top)
    places = list(getattr(module, "__path__", ())) or [getattr(module, "__file__", None)]
    return [Path(place).resolve().parent for place in places if place]


def _home(function: Callable[..., Any]) -> tuple[str, str]:
    code = getattr(function, "__code__", None)
    return (code.co_filename if code is not None else function.__module__), function.__qualname__


def _names(value: Sequence[str | type] | None, field: str) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise InvalidRequest(f"{field} is a list of classes or their names, not {value!r}", field=field)
    names = [f"{item.__module__}.{item.__qualname__}" if isinstance(item, type) else item for item in value]
    if not all(isinstance(name, str) and name for name in names):
        raise InvalidRequest(f"{field} holds class names, got {names!r}", field=field)
    return names


def _ms(value: Duration | None, field: str) -> int | None:
    return None if value is None else to_ms(value, field=field)


def _check_text(value: str, field: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{field} is a text, not {value!r}", field=field)
    return value


def _check_name(name: str) -> str:
    _check_text(name, "name")
    if not name or not name.isprintable() or len(name.encode()) > limits.TEXT_MAX:
        raise InvalidRequest(
            f"{name!r} is no name for a task type: printable text, at most {limits.TEXT_MAX} bytes", field="name"
        )
    if name == "<lambda>":
        raise InvalidRequest("a lambda has no name; give the task one: @task(name=...)", field="name")
    return name
