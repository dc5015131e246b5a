"""Decides inputs of one partition again, with the build of Perdure that this process has.

Run as a script it does so for another process, over pipes: `python redecide.py` with another build on PYTHONPATH. So it
names nothing of Perdure but what every build has: the engine, the store in memory, the record, the keys. A message is a
line of JSON, bytes as base64:

    -> {"partition", "partitions", "keys": {"worker": {id: hex}, "engine": ...}, "rows": [[key, value], ...]}
    <- {"build", "feature_level", "place"}
    -> {"inputs": [[offset, at, value or null, whether it is passed over unread], ...]}
    <- {"events": [[input's offset, event], ...]}
    -> {"rows": true}
    <- {"rows": [[key, value], ...]}
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterable
from typing import Any

from perdure.schemas.signing import Keys
from perdure.streams import decision
from perdure.streams.engine import Engine
from perdure.streams.log import Record
from perdure.streams.store import MemoryStore

COMMANDS, EVENTS = "task-commands", "task-events"

Rows = list[tuple[bytes, bytes]]
Made = list[tuple[int, bytes]]
"""(offset of the input, event) in order."""


class Redecider:
    """One partition's engine on rows in memory."""

    def __init__(self, partition: int, partitions: int, keys: Keys, rows: Iterable[tuple[bytes, bytes]] = ()) -> None:
        self.build, self.feature_level = decision.BUILD, decision.FEATURE_LEVEL
        self._store = MemoryStore()
        self._store.apply(dict(rows))
        self._engine = Engine(self._store, partition, partitions, keys)

    def decide(self, inputs: list[tuple[Record, bool]]) -> Made:
        """The events of some inputs, in order. With each: whether it killed the process and is passed over unread."""
        made = self._execute(inputs, careful=False)
        try:
            writes = self._engine.writes()
        except (ValueError, TypeError):  # as a shard does: executed with care, the one that cannot be written is undone
            self._engine.rolled_back()
            made = self._execute(inputs, careful=True)
            writes = self._engine.writes()
        self._store.apply(writes)
        self._engine.committed()
        return made

    def _execute(self, inputs: list[tuple[Record, bool]], *, careful: bool) -> Made:
        made: Made = []
        for record, killer in inputs:
            if killer:
                self._engine.set_aside_unread(record, "")
            else:
                self._engine.execute(record, careful=careful)
            made += [(record.offset, out.value or b"") for out in self._engine.take_out() if out.topic == EVENTS]
        return made

    def rows(self) -> Rows:
        """The state after what was decided."""
        return list(self._store.scan(b""))


def to_text(data: bytes | None) -> str | None:
    """Bytes in a line of JSON."""
    return None if data is None else base64.b64encode(data).decode()


def to_bytes(text: str | None) -> bytes | None:
    """What `to_text` was given."""
    return None if text is None else base64.b64decode(text)


def serve() -> None:
    """Answer on stdout what is asked on stdin, until its end."""
    asked: dict[str, Any] = json.loads(sys.stdin.readline())
    keys = Keys(**{kind: {i: bytes.fromhex(k) for i, k in known.items()} for kind, known in asked["keys"].items()})
    rows = [(to_bytes(k) or b"", to_bytes(v) or b"") for k, v in asked["rows"]]
    partition = asked["partition"]
    decider = Redecider(partition, asked["partitions"], keys, rows)
    _say({"build": decider.build, "feature_level": decider.feature_level, "place": decision.__file__})
    for line in sys.stdin:
        asked = json.loads(line)
        if "rows" in asked:
            _say({"rows": [[to_text(k), to_text(v)] for k, v in decider.rows()]})
            continue
        inputs = [
            (Record(COMMANDS, partition, offset, at, None, to_bytes(value)), killer)
            for offset, at, value, killer in asked["inputs"]
        ]
        _say({"events": [[offset, to_text(event)] for offset, event in decider.decide(inputs)]})


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer, separators=(",", ":")) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve()
