"""The stream workload on Quix Streams."""

from __future__ import annotations

import os
from typing import Any

from quixstreams import Application, State

_NOTE = "x" * 100


def count(value: dict[str, Any], state: State) -> dict[str, Any]:
    """Count the record's key and keep its payload."""
    before = state.get("row")
    number = 1 + (0 if before is None else before["count"])
    state.set("row", {"count": number, "last": value, "note": _NOTE})
    return {"key": value["key"], "count": number}


def main() -> None:
    """Work until killed."""
    app = Application(
        broker_address=os.environ["PEER_BOOTSTRAP"], consumer_group="bench", auto_offset_reset="earliest",
        processing_guarantee="exactly-once", commit_interval=float(os.environ["PEER_COMMIT"]),
        state_dir=os.environ["PEER_STATE"], loglevel="WARNING",
    )  # fmt: skip
    frame = app.dataframe(app.topic("input", value_deserializer="json"))
    frame = frame.apply(count, stateful=True)
    frame.to_topic(app.topic("output", value_serializer="json"))
    app.run()


if __name__ == "__main__":
    main()
