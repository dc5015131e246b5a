"""Perdure's client: what a user calls, from 64 threads where many tasks are submitted."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from benchmarks.peers import drive
from perdure import Client
from perdure.schemas import codec, events, ids, topics

_THREADS = 64
_QUEUE = "bench"


class PerdureDriver(drive.Driver):
    def __init__(self) -> None:
        self._client = Client()

    def tiny(self, count: int) -> None:
        log = self._client.log
        reader = log.reader()
        where = (topics.EVENTS.name, ids.partition_of(_QUEUE, log.partitions))
        reader.assign({where: reader.bounds(*where)[1]})
        header = codec.header_of(events.TaskCompleted)
        with ThreadPoolExecutor(_THREADS) as threads:
            submitted = threads.map(self._client.submit, ["tiny"] * count)
            done = 0
            while done < count:
                done += sum((r.value or b"").startswith(header) for r in reader.read(5_000, 30.0))
            list(submitted)
        reader.close()

    def start(self) -> int:
        return int(self._client.submit("first_line").result(timeout=60))

    def steps(self, count: int) -> tuple[int, int]:
        first, last = self._client.submit("steps", {"count": count}).result(timeout=600)
        return first, last

    def slow(self, count: int, witness: str) -> None:
        self._client.submit("slow", {"count": count, "witness": witness})

    def close(self) -> None:
        self._client.close()


if __name__ == "__main__":
    drive.main(PerdureDriver())
