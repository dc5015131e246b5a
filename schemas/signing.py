"""Proof of origin: HMAC-SHA256 over a record's own bytes, and the keys it is made with.

A signed record ends with `key_id` and a 32-byte `hmac` as its last Avro fields, so the last 33 bytes (length, digest)
are the signature and all before them is what is signed, schema fingerprint included.
"""

from __future__ import annotations

import hmac
import itertools
import json
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from perdure.schemas.codec import encode, replace
from perdure.schemas.errors import ConfigurationError

DIGEST = 32
_TAIL = DIGEST + 1
_LENGTH = bytes([DIGEST * 2])
R = TypeVar("R")


@dataclass(frozen=True)
class Keys:
    """The worker keys and engine keys of a namespace: key id -> secret. The newest of each signs, all verify."""

    worker: dict[str, bytes] = field(repr=False)
    engine: dict[str, bytes] = field(repr=False)

    @classmethod
    def generate(cls) -> Keys:
        """Fresh keys."""
        return cls(worker={"w1": secrets.token_bytes(32)}, engine={"e1": secrets.token_bytes(32)})

    def rotated(self) -> Keys:
        """These keys and a newer one of each kind; the old ones still verify."""
        return Keys(worker=_with_newer(self.worker, "w"), engine=_with_newer(self.engine, "e"))

    def newest_worker(self) -> tuple[str, bytes]:
        """(key id, secret) that workers sign with."""
        return list(self.worker.items())[-1]

    def newest_engine(self) -> tuple[str, bytes]:
        """(key id, secret) that engines sign with."""
        return list(self.engine.items())[-1]

    def save(self, path: Path) -> None:
        """Write the keys, readable by their owner only (0600)."""
        text = json.dumps({kind: {i: k.hex() for i, k in getattr(self, kind).items()} for kind in ("worker", "engine")})
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(path.name + ".new")
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as out:
            out.write(text + "\n")
        fresh.rename(path)

    @classmethod
    def load(cls, path: Path) -> Keys:
        """The keys in a file. Raises `ConfigurationError` if it is missing, open to others, or no key file."""
        try:
            mode = path.stat().st_mode
            content: dict[str, dict[str, str]] = json.loads(path.read_text())
            keys = cls(
                **{kind: {i: bytes.fromhex(k) for i, k in content[kind].items()} for kind in ("worker", "engine")}
            )
        except FileNotFoundError as error:
            raise ConfigurationError(f"no key file at {path}; make one with: perdure keys new {path}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(f"{path} is no Perdure key file ({type(error).__name__})") from error
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigurationError(f"{path} can be read by others; run: chmod 600 {path}")
        if not keys.worker or not keys.engine:
            raise ConfigurationError(f"{path} holds no worker key or no engine key; make new ones: perdure keys new")
        if any(len(key) < DIGEST for key in (*keys.worker.values(), *keys.engine.values())):
            raise ConfigurationError(f"{path} holds a key of less than {DIGEST} bytes; make new ones: perdure keys new")
        return keys


def _with_newer(keys: dict[str, bytes], prefix: str) -> dict[str, bytes]:
    """`keys` and a fresh one under an id that none of them has, also when old ones were taken out."""
    number = next(n for n in itertools.count(len(keys) + 1) if f"{prefix}{n}" not in keys)
    return keys | {f"{prefix}{number}": secrets.token_bytes(DIGEST)}


def signed(message: Any, key_id: str, key: bytes) -> bytes:
    """The encoded record with its signature in place."""
    data = encode(replace(message, key_id=key_id, hmac=bytes(DIGEST)))
    return data[:-DIGEST] + hmac.digest(key, data[:-_TAIL], "sha256")


def authentic(data: bytes, message: Any, keys: dict[str, bytes]) -> bool:
    """Whether the record `message`, read from `data`, was signed with one of `keys`."""
    key = keys.get(message.key_id)
    if key is None or len(message.hmac) != DIGEST or data[-_TAIL:-DIGEST] != _LENGTH:
        return False
    return hmac.compare_digest(message.hmac, hmac.digest(key, data[:-_TAIL], "sha256"))
