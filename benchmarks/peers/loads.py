"""The workloads on tasks: what is done, and what comes out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measure import percentile
from benchmarks.peers.processes import cpu, memory, until
from benchmarks.peers.work import SLOW_S, now

if TYPE_CHECKING:
    from benchmarks.peers.peer import Peer

_KILL_AT_STEP = 10
_IDLE_S = 10.0


@dataclass(frozen=True)
class Counts:
    """How much is asked of each peer."""

    tiny: int = 2_000
    starts: int = 100
    steps: int = 200


def measure(peer: Peer, workload: str, counts: Counts) -> dict[str, float]:
    """Do a workload on a peer that runs; each figure by its name. Raises `PeerError`."""
    return _LOADS[workload](peer, counts)


def _tiny(peer: Peer, counts: Counts) -> dict[str, float]:
    return {"tasks_per_s": peer.ask("tiny", str(counts.tiny))}


def _starts(peer: Peer, counts: Counts) -> dict[str, float]:
    times = peer.ask("starts", str(counts.starts))
    return {"start_p50_ms": percentile(times, 0.5), "start_p99_ms": percentile(times, 0.99)}


def _steps(peer: Peer, counts: Counts) -> dict[str, float]:
    return {"steps_per_s": peer.ask("steps", str(counts.steps))}


@dataclass(frozen=True)
class Line:
    """A step's beginning, as the witness has it."""

    at: int
    pid: int
    step: int


def _kill(peer: Peer, _: Counts) -> dict[str, float]:
    """SIGKILL for the worker in its tenth step: seconds to the next step's beginning, and to one that is new."""
    witness = peer.data / f"witness-{uuid.uuid4().hex}"
    witness.touch(mode=0o666)
    peer.ask("slow", str(witness))
    until(lambda: len(_lines(witness)) >= _KILL_AT_STEP, "the tenth slow step")
    time.sleep(SLOW_S / 2)  # into the middle of a step
    before = _lines(witness)
    killed = now()
    peer.kill_workers()
    known = {line.step for line in before}

    def after() -> list[Line]:
        return [line for line in _lines(witness) if line.at > killed]

    what = "the next step after SIGKILL of the worker"
    until(lambda: any(line.step not in known for line in after()), what, peer.kill_limit_s, pause_s=0.005)
    new = next(line for line in after() if line.step not in known)
    return {"next_step_s": (after()[0].at - killed) / 1e9, "new_step_s": (new.at - killed) / 1e9}


def _lines(witness: Path) -> list[Line]:
    whole = [line.split() for line in witness.read_text().splitlines()]
    return [Line(int(at), int(pid), int(step)) for at, pid, step in (words for words in whole if len(words) == 3)]


def _idle(peer: Peer, _: Counts) -> dict[str, float]:
    workers, servers = peer.worker_processes(), peer.server_processes()
    used = cpu([*workers, *servers], _IDLE_S)
    (worker_rss, worker_pss), (server_rss, server_pss) = memory(workers), memory(servers)
    return {
        "worker_rss_mb": worker_rss, "worker_pss_mb": worker_pss, "server_rss_mb": server_rss,
        "server_pss_mb": server_pss, "idle_cpu_percent": used,
    }  # fmt: skip


_LOADS: dict[str, Callable[[Peer, Counts], dict[str, float]]] = {
    "W5": _idle,
    "W2": _starts,
    "W1": _tiny,
    "W3": _steps,
    "W4": _kill,
}
"""In the order of a round: what is weighed at rest comes before the work, the kill last."""
ORDER = tuple(_LOADS)
