"""References: what a record carries in the place of a value that is too large for it (docs/decisions/0008).

A reference is `@` and an object. No JSON text begins with `@`, and every value of a user's is JSON text by the time it
gets near a record, so no value can be taken for a reference, whatever its author wrote. A reference says what the
value is; where it lies follows from the task that it belongs to.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from perdure.schemas import limits
from perdure.schemas.errors import DecodeError

MARK = b"@"
_DIGITS = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class Reference:
    """Stands for the JSON text of one value."""

    day: int
    """When it was written: days since 1970, UTC. Part of its name in the store."""
    sha256: str
    """Hex digest of the text."""
    size: int
    """Bytes of the text."""
    preview: str
    """How the text begins, for people."""

    def encode(self) -> bytes:
        """As a record carries it."""
        return MARK + json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


_FIELDS = {f.name: {"int": int, "str": str}[str(f.type)] for f in fields(Reference)}


def is_reference(data: bytes) -> bool:
    """Whether a recorded value is a reference; its form is not looked at."""
    return data[:1] == MARK


def parse(data: bytes) -> Reference:
    """The reference in a record. Raises `DecodeError` for what is none."""
    try:
        if not is_reference(data) or len(data) > limits.REFERENCE_MAX:
            raise ValueError(f"begins with {data[:1]!r}, {len(data):,} bytes")
        content = json.loads(data[1:].decode())
        if {name: type(value) for name, value in content.items()} != _FIELDS:
            raise ValueError("it has other fields")
        found = Reference(**content)
        if len(found.sha256) != 64 or not _DIGITS.issuperset(found.sha256) or not 0 <= found.day < 1_000_000:
            raise ValueError("digest or day are none")
        if not limits.VALUE_MAX < found.size <= limits.LARGE_VALUE_MAX:
            raise ValueError(f"{found.size:,} bytes")
    except (ValueError, AttributeError, RecursionError) as error:
        raise DecodeError(f"no reference to a value: {error}") from error
    return found


def identity(data: bytes) -> bytes:
    """What two recorded values have in common when they are the same value: when it was written does not count."""
    return MARK + parse(data).sha256.encode() if is_reference(data) else data


def shown(data: bytes | None) -> dict[str, Any] | None:
    """The fields of a recorded value that is a reference; None for every other value. Raises `DecodeError`."""
    return asdict(parse(data)) if data is not None and is_reference(data) else None
