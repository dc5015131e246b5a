"""Task ids, routing keys and the partition that each belongs to.

A task id is `<routing key>/<local id>`. The partition of a routing key is Kafka's own default for that key
(`murmur2(key) & 0x7fffffff % partitions`), computed here against the pinned partition count, so that every client and
every engine agree whatever partitioner a producer has.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import time
import uuid
from functools import lru_cache

from perdure.schemas import limits
from perdure.schemas.errors import InvalidRequest

ROUTING_KEY = re.compile(r"[a-z0-9._~-]+")
_MASK = 0xFFFFFFFF


def murmur2(data: bytes) -> int:
    """Kafka's 32-bit murmur2 with its seed, unsigned."""
    m = 0x5BD1E995
    h = (0x9747B28C ^ len(data)) & _MASK
    whole = len(data) & ~3
    for i in range(0, whole, 4):
        k = int.from_bytes(data[i : i + 4], "little")
        k = (k * m) & _MASK
        k ^= k >> 24
        k = (k * m) & _MASK
        h = ((h * m) & _MASK) ^ k
    rest = data[whole:]
    if rest:
        h ^= int.from_bytes(rest, "little")
        h = (h * m) & _MASK
    h ^= h >> 13
    h = (h * m) & _MASK
    return h ^ (h >> 15)


@lru_cache(maxsize=4096)
def partition_of(routing_key: str, partitions: int) -> int:
    """The partition that owns a routing key."""
    return (murmur2(routing_key.encode()) & 0x7FFFFFFF) % partitions


def is_routing_key(text: str) -> bool:
    """Whether `text` has the form of a routing key."""
    return len(text) <= limits.ROUTING_KEY_MAX and ROUTING_KEY.fullmatch(text) is not None


def check_queue(name: str, field: str = "queue") -> str:
    """`name`, if it may name a queue; raises `InvalidRequest` otherwise."""
    if not is_routing_key(name):
        raise InvalidRequest(
            f"{field} {name!r} is no queue name: use 1 to {limits.ROUTING_KEY_MAX} of a-z 0-9 . _ ~ -", field=field
        )
    return name


def check_local_id(local_id: str, field: str = "task_id") -> str:
    """`local_id`, if it may be one; raises `InvalidRequest` otherwise."""
    size = len(local_id.encode("utf-8", "surrogatepass"))
    if not local_id or size > limits.LOCAL_ID_MAX or "\x00" in local_id or not _is_text(local_id):
        raise InvalidRequest(
            f"{field}: a local id is 1 to {limits.LOCAL_ID_MAX} bytes of text without NUL, not {size}", field=field
        )
    return local_id


def _is_text(value: str) -> bool:
    return value.isascii() or not any(0xD800 <= ord(c) <= 0xDFFF for c in value)


def split(task_id: str) -> tuple[str, str]:
    """(routing key, local id) of a whole task id; the routing key is empty where there is no slash."""
    head, slash, tail = task_id.partition("/")
    return (head, tail) if slash else ("", task_id)


def join(routing_key: str, local_id: str) -> str:
    """The whole task id."""
    return f"{routing_key}/{local_id}"


def new_local_id() -> str:
    """A fresh local id, ordered by time to the millisecond (the layout of UUID version 7, RFC 9562)."""
    return _uuid7(int(time.time() * 1000), os.urandom(10))


def derived_local_id(at: int, partition: int, offset: int, index: int | None = None) -> str:
    """The local id of a submit that brought none: the same for the same place in the log."""
    seed = hashlib.sha256(f"{partition}:{offset}:{index}".encode()).digest()
    return _uuid7(at, seed[:10])


def keyed_local_id(queue: str, task_type: str, key: str) -> str:
    """The local id of a submit with an idempotency key and no id of its own."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"perdure\x00{queue}\x00{task_type}\x00{key}"))


def derived_command_id(partition: int, offset: int, index: int | None = None) -> str:
    """The command id of a command that brought none."""
    return f"log-{partition}-{offset}" + ("" if index is None else f"-{index}")


def new_id(prefix: str = "") -> str:
    """A fresh id, ordered by time: for commands, sessions, clients."""
    return prefix + new_local_id()


def _uuid7(at_ms: int, rest: bytes) -> str:
    value = (at_ms & ((1 << 48) - 1)) << 80 | int.from_bytes(rest, "big")
    value = value & ~(0xF << 76) | (0x7 << 76)
    value = value & ~(0x3 << 62) | (0x2 << 62)
    return str(uuid.UUID(int=value))


def grant_token(engine_key: bytes, task_id: str, epoch: int, session: str) -> bytes:
    """The proof of a grant: HMAC-SHA256 over length-prefixed task id and session and the epoch (RFC 2104).

    Takes any epoch that a record can carry, so that a forged one is refused like every other bad token.
    """
    task, who = task_id.encode(), session.encode()
    text = len(task).to_bytes(4, "big") + task + epoch.to_bytes(8, "big", signed=True) + who
    return hmac.digest(engine_key, text, "sha256")


def tokens_equal(one: bytes, other: bytes) -> bool:
    """Compare two tokens in constant time."""
    return hmac.compare_digest(one, other)
