"""`python -m benchmarks.peers`: install what is missing, measure everything in turn, write the results and the page."""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.peers import cache, loads, page
from benchmarks.peers.errors import PeerError
from benchmarks.peers.peer import Peer, load
from benchmarks.peers.processes import ROOT
from benchmarks.peers.results import FILE, Measured, Results
from benchmarks.peers.stream import STREAM_WORKLOADS, StreamPeer

FOLDERS = (
    "perdure", "restate", "dbos", "temporal", "rq", "celery", "dramatiq", "littlehorse",
    "kafka_streams", "quix", "faust",
)  # fmt: skip
PLOTS = ("matplotlib==3.10.7",)
WORKLOADS = (*loads.ORDER, *STREAM_WORKLOADS)


def say(text: str) -> None:
    """What is going on; the whole takes an hour."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # what was started has to be ended here too
    asked = _arguments()
    if asked.page_only:
        _publish(Results.load(FILE))
        return 0
    if asked.skip_install:
        cache.forbid_installs()
    everyone: list[Peer | StreamPeer] = [peer for folder in FOLDERS for peer in load(folder)]
    names = [peer.name for peer in everyone]
    if strays := {*(asked.peers or ()), *(asked.workloads or ())} - {*names, *WORKLOADS}:
        raise SystemExit(f"unknown: {', '.join(sorted(strays))}; there are {', '.join((*names, *WORKLOADS))}")
    chosen = [peer for peer in everyone if not asked.peers or peer.name in asked.peers]
    counts = loads.Counts(asked.tasks, asked.starts, asked.steps)
    results = _begun(asked, vars(counts))
    ready = [peer for peer in chosen if _installed(peer, results, asked.workloads)]
    results.save(asked.out)
    for run in range(1, asked.runs + 1):
        for peer in ready:
            wanted = [w for w in WORKLOADS if w in peer.workloads and w in (asked.workloads or WORKLOADS)]
            if wanted:
                say(f"run {run} of {asked.runs}: {peer.title}")
                _round(peer, wanted, counts, results.peers[peer.name])
                results.save(asked.out)
    if asked.out == FILE:
        _publish(results)
    return 0


def _publish(results: Results) -> None:
    """Write the page's section and draw its plots."""
    page.write(results)
    python = cache.venv("plots", PLOTS)
    subprocess.run([python, "-m", "benchmarks.peers.plots", page.PAGE.parent], cwd=ROOT, check=True)
    say(f"written to {page.PAGE.name}")


def _begun(asked: argparse.Namespace, counts: dict[str, int]) -> Results:
    """A part of it goes on in the file that is there; the whole begins a new one."""
    if not (asked.peers or asked.workloads) or not asked.out.exists():
        return Results.begin(counts, asked.provisional)
    known = Results.load(asked.out)
    if known.counts != counts:
        raise SystemExit(f"{asked.out.name} was measured with {known.counts}, not with {counts}: they do not compare")
    known.machine["provisional"] = asked.provisional or known.machine["provisional"]
    return known


def _arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--peers", type=names, help="only these, separated by commas; the others' results stay")
    parser.add_argument("--workloads", type=names, help=f"only these, of {','.join(WORKLOADS)}")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=loads.Counts.tiny, help="tiny tasks of W1")
    parser.add_argument("--starts", type=int, default=loads.Counts.starts, help="starts of W2")
    parser.add_argument("--steps", type=int, default=loads.Counts.steps, help="steps of W3")
    parser.add_argument("--skip-install", action="store_true", help="what is missing fails in place of being installed")
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write the page from the results")
    parser.add_argument("--provisional", metavar="WHY", help="why the page is to call its figures provisional")
    parser.add_argument("--out", type=Path, default=FILE, help="the results file; another one leaves the page alone")
    return parser.parse_args()


def _installed(peer: Peer | StreamPeer, results: Results, workloads: list[str] | None) -> bool:
    """Whether the peer is here now; its place in the results is made, or emptied of what is measured anew."""
    before = results.peers.get(peer.name)
    fresh = Measured(
        peer.title, peer.durability, peer.settings, list(peer.workloads), not_run=dict(peer.not_run)
    )  # fmt: skip
    if before is not None and workloads:
        fresh.runs = {w: r for w, r in before.runs.items() if w not in workloads}
        fresh.failures = {w: f for w, f in before.failures.items() if w not in workloads}
    results.peers[peer.name] = fresh
    say(f"{peer.title}: installing what is missing")
    with _told(peer, "install", fresh):
        fresh.versions = peer.install()
    return "install" not in fresh.failures


def _round(peer: Peer | StreamPeer, workloads: list[str], counts: loads.Counts, measured: Measured) -> None:
    """One peer's share of a run: started on empty data, warmed, measured, stopped."""
    with tempfile.TemporaryDirectory(prefix="perdure-peers-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)  # a database that refuses to run as root has to get through
        with _told(peer, "start", measured):
            try:
                peer.start(folder)
                peer.warm()
                for workload in workloads:
                    with _told(peer, workload, measured):
                        figures = peer.measure(workload, counts)
                        measured.runs.setdefault(workload, []).append(figures)
                        say(f"  {workload}: " + ", ".join(f"{name} {value:,.2f}" for name, value in figures.items()))
            finally:
                peer.stop()


@contextmanager
def _told(peer: Peer | StreamPeer, doing: str, measured: Measured) -> Iterator[None]:
    """What fails is a result too, shown as it is; it must not cost the other peers theirs."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - see above
        said = nowhere(str(error) if isinstance(error, PeerError) else f"{type(error).__name__}: {error}")
        measured.failures.setdefault(doing, []).append(said)
        say(f"  {peer.title}, {doing}: {said}")


def nowhere(text: str) -> str:
    """An error's words without this machine's folders and without the hosts that packages come from."""
    folders = {str(cache.FOLDER): "CACHE", str(ROOT): ".", tempfile.gettempdir(): "TEMP", str(Path.home()): "~"}
    for folder in sorted(folders, key=len, reverse=True):  # one may lie in another
        text = text.replace(folder, folders[folder])
    return re.sub(r"https?://(?!127\.0\.0\.1|localhost)[^\s/'\")]+", "https://HOST", text)


if __name__ == "__main__":
    raise SystemExit(main())
