"""Step identities and tracks: where in a task the code is, in names that are the same in every attempt.

A step at the root is `/read-schema`; in item 12 of the track `files` it is `files@000000000012/review`; nested tracks
repeat that. A key follows in brackets, an occurrence from the second on behind `#`. Item numbers have 12 digits, so in
the order of ids all steps of the items before n of a track t lie between `t@` and `t@<n>`: that is how the engine finds
what a checkpoint has made unnecessary.

The order in which concurrent sections (threads, asyncio tasks) reach a name is not the same in every attempt. So a
repeat is numbered only within one section, after the use before it has ended; anything else is `DuplicateStep`.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence, Set, Sized
from contextvars import ContextVar
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from perdure.schemas import limits
from perdure.schemas.errors import DuplicateStep, StepError

if TYPE_CHECKING:
    from perdure.attempt import Attempt, Flow

_SPECIAL = re.compile(r"[/@\[\]#%\x00-\x1f\x7f-\x9f]")


@lru_cache(maxsize=4096)
def quoted(name: str) -> str:
    """A user's name as part of an identity: `/ @ [ ] # %` and control characters are percent-encoded.

    Raises `StepError` for what is no name.
    """
    if not isinstance(name, str) or not name:
        raise StepError(f"{name!r} is no name for a step or track; give a text")
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise StepError(f"the name {name!r} is no valid text: {error}") from error
    if size > limits.TEXT_MAX:
        raise StepError(f"the name {name[:40]!r}... is {size:,} bytes long; at most {limits.TEXT_MAX:,} are taken")
    return _SPECIAL.sub(lambda found: quote(found[0], safe=""), name)


class Scope:
    """The root of a task or one item of a track: what its steps and tracks are numbered within."""

    __slots__ = ("_counts", "_open", "_sections", "path")

    def __init__(self, path: str = "") -> None:
        self.path = path
        self._counts: dict[str, int] = {}
        self._sections: dict[str, int] = {}
        self._open: set[str] = set()

    def step(self, name: str, key: str | None, section: int) -> str:
        """The identity of a step that begins now, until `ended`. Raises `DuplicateStep` or `StepError`."""
        base = f"{self.path}/{quoted(name)}" if key is None else f"{self.path}/{quoted(name)}[{quoted(str(key))}]"
        step_id = self._numbered(base, base, section)
        if len(step_id) * 4 > limits.STEP_ID_MAX and len(step_id.encode()) > limits.STEP_ID_MAX:
            raise StepError(f"the step {step_id[:80]!r}... has an identity of more than {limits.STEP_ID_MAX:,} bytes; "
                            "use shorter names and keys")  # fmt: skip
        self._open.add(base)
        return step_id

    def ended(self, step_id: str) -> None:
        """The step of that identity has ended, in whatever way."""
        self._open.discard(step_id.partition("#")[0])

    def track(self, name: str, section: int) -> str:
        """The path of a track that begins now. Raises `DuplicateStep` or `StepError`."""
        path = f"{self.path}/{quoted(name)}" if self.path else quoted(name)
        return self._numbered(path + "@", path, section)

    def repeats(self) -> dict[str, int]:
        """Name in this scope -> uses, of those used more than once."""
        return {name: count for name, count in self._counts.items() if count > 1}

    def _numbered(self, name: str, base: str, section: int) -> str:
        count = self._counts.get(name, 0) + 1
        if count > 1 and (name in self._open or self._sections.get(name, 0) != section):
            raise DuplicateStep(f"{base} is used by two concurrent sections, so which is which depends on chance; "
                                "tell them apart with key=")  # fmt: skip
        self._counts[name] = count
        if section:
            self._sections[name] = section
        return base if count == 1 else f"{base}#{count}"


current_scope: ContextVar[Scope] = ContextVar("perdure_scope")
"""Where this section is; unset: where the task's own section is."""
