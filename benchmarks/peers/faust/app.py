"""The stream workload on Faust."""

from __future__ import annotations

import os

import faust

_NOTE = "x" * 100
app = faust.App(
    "bench", broker=f"kafka://{os.environ['PEER_BOOTSTRAP']}", store="rocksdb://", datadir=os.environ["PEER_STATE"],
    topic_partitions=4, topic_replication_factor=1, web_enabled=False, consumer_auto_offset_reset="earliest",
)  # fmt: skip
source = app.topic("input", value_serializer="json", key_serializer="raw", partitions=4)
output = app.topic("output", value_serializer="json", key_serializer="raw", partitions=4)
rows = app.Table("rows", partitions=4, options={"driver": "rocksdict"})


@app.agent(source)
async def count(stream: faust.Stream) -> None:
    """Count each record's key and keep its payload."""
    async for key, value in stream.items():
        name = key.decode()
        before = rows.get(name)
        number = 1 + (0 if before is None else before["count"])
        rows[name] = {"count": number, "last": value, "note": _NOTE}
        await output.send(key=key, value={"key": name, "count": number})


if __name__ == "__main__":
    app.main()
