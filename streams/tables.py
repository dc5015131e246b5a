"""Key layout of the engine's state.

A key is a scope and a suffix. A scope is what is ever scanned as a whole. Texts inside keys end with NUL and hold none
(00 becomes 01 01, 01 becomes 01 02), so no text's key is the beginning of another's, and order is kept.
All keys of a task lie in one scope, its steps as keys of their own.
"""

from __future__ import annotations

import re
from functools import lru_cache

from perdure.schemas import ids

TIMERS = b"d"
SOFT_TIMERS = b"D"
START_TIMERS = b"e"
"""Start times that somebody gave: wall time, where all other timers count partition time."""
NOT_BEFORE = "not_before"
"""Kind of the timers among them."""
CONFIG = b"c"
COUNTERS = b"n"
SESSIONS = b"S"
MARKS = b"m"
CLOCK = b"k"
WINDOW = b"W"
KEYS = b"K"
"""Idempotency keys of tasks whose id was chosen otherwise."""
POSITION = b"z"
LEASES = b"g"

SPEC = b"c"
STATE = b"s"
RESULT = b"r"
LIVE = b"l"
ANSWERS = b"a"
STEPS = b"p"
BEGUN = b"b"

_SESSION_CLASS = {SOFT_TIMERS, SESSIONS, MARKS, POSITION, b"w"}


def text(value: str) -> bytes:
    """A text as part of a key."""
    return value.encode().replace(b"\x01", b"\x01\x02").replace(b"\x00", b"\x01\x01") + b"\x00"


def number(value: int) -> bytes:
    """A number from 0 as part of a key."""
    return value.to_bytes(8, "big")


@lru_cache(maxsize=65_536)
def task(task_id: str) -> bytes:
    """Scope of a task. The local id comes first, so that a task is found without its routing key."""
    routing_key, local = ids.split(task_id)
    return b"t" + text(local) + text(routing_key)


def tasks_from(local_prefix: str) -> bytes:
    """Prefix of the scopes of all tasks whose local id begins with a text."""
    return b"t" + text(local_prefix)[:-1]


def task_of(key: bytes) -> tuple[bytes, str]:
    """(scope, task id) of any key of a task."""
    local, at = _read_text(key, 1)
    routing_key, at = _read_text(key, at)
    return key[:at], ids.join(routing_key, local)


def _read_text(key: bytes, at: int) -> tuple[str, int]:
    end = key.index(b"\x00", at)
    return key[at:end].replace(b"\x01\x01", b"\x00").replace(b"\x01\x02", b"\x01").decode(), end + 1


def answer(command_id: str) -> bytes:
    """Suffix of a stored answer."""
    return ANSWERS + text(command_id)


def step(step_id: str) -> bytes:
    """Suffix of a step; ordered as the ids are."""
    return STEPS + step_id.encode()


def begun(step_id: str) -> bytes:
    """Suffix of an at-most-once step that has begun and not ended."""
    return BEGUN + step_id.encode()


def step_id(suffix: bytes) -> str:
    """The step id in a suffix of either kind."""
    return suffix[1:].decode()


@lru_cache(maxsize=4_096)
def ready(queue: str, task_type: str) -> bytes:
    """Scope of the ready queue of one queue and type."""
    return b"q" + text(queue) + text(task_type)


@lru_cache(maxsize=4_096)
def held(queue: str, task_type: str) -> bytes:
    """Scope of the tasks that are ready, but whose submitter saw a version of the type that is not applied here."""
    return b"h" + text(queue) + text(task_type)


def place(priority: int, order: int) -> bytes:
    """Suffix of a place in the ready queue: higher priority first, then lower order."""
    return bytes([9 - priority]) + number(order)


@lru_cache(maxsize=4_096)
def leases(session: str) -> bytes:
    """Scope of the leases of a session; the suffix is the grant's number."""
    return LEASES + text(session)


def session_of_lease(key: bytes) -> str:
    """The session in the whole key of a lease."""
    return _read_text(key, 1)[0]


def timer(due: int, kind: str, task_id: str) -> bytes:
    """Suffix of a timer."""
    return number(max(due, 0)) + text(kind) + text(task_id)


def timers(kind: str) -> bytes:
    """Scope of a task's timers of a kind."""
    return START_TIMERS if kind == NOT_BEFORE else TIMERS


def timer_due(suffix: bytes) -> int:
    """The due time in a timer's suffix."""
    return int.from_bytes(suffix[:8], "big")


def timer_of(suffix: bytes) -> tuple[str, str]:
    """(kind, task id) of a timer's suffix."""
    kind, at = _read_text(suffix, 8)
    return kind, _read_text(suffix, at)[0]


def outbox(target: int) -> bytes:
    """Scope of the records for one partition; the suffix is their number."""
    return b"o" + target.to_bytes(4, "big")


def key(queue: str, task_type: str, value: str) -> bytes:
    """Suffix of an idempotency key."""
    return text(queue) + text(task_type) + text(value)


def unbound(task_type: str) -> bytes:
    """Scope of the tasks of a type whose policy is not bound; the suffix is the task id."""
    return b"u" + text(task_type)


def waiters(task_id: str) -> bytes:
    """Scope of the clients that wait for a task; the suffix is the command id."""
    return b"w" + text(task_id)


def is_durable(key: bytes) -> bool:
    """Whether a row belongs to the durable class: a fold of task-events."""
    return key[:1] not in _SESSION_CLASS and _LIVE_KEY.fullmatch(key) is None


_LIVE_KEY = re.compile(rb"t[^\x00]*\x00[^\x00]*\x00l")
