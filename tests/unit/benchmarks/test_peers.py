"""The benchmark beside the peers: its page is made of its results, and nobody is left out in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.peers import page
from benchmarks.peers.__main__ import FOLDERS, nowhere
from benchmarks.peers.loads import Counts, measure
from benchmarks.peers.peer import Peer, load
from benchmarks.peers.results import FILE, STREAM, TASKS, Measured, Results

EVERYONE = [peer for folder in FOLDERS for peer in load(folder)]


def results(**peers: dict[str, list[dict[str, float]]]) -> Results:
    machine = {
        "date": "then", "cores": 2, "processor": "x", "memory_gb": 4, "kernel": "6", "python": "3",
        "load_before": 0.1, "provisional": None,
    }  # fmt: skip
    found = {
        name.replace("_", "-"): Measured(name.upper(), "safe", "set", list(runs), runs=runs)
        for name, runs in peers.items()
    }
    return Results(machine, vars(Counts()), found)


def tasks_per_s(*values: float) -> dict[str, list[dict[str, float]]]:
    return {"W1": [{"tasks_per_s": value} for value in values]}


def test_the_page_is_made_of_the_results_file() -> None:
    text = page.PAGE.read_text()
    assert page.with_section(text, page.section(Results.load(FILE))) == text


def test_every_peer_has_its_place_in_the_results() -> None:
    assert list(Results.load(FILE).peers) == [peer.name for peer in EVERYONE]


def test_final_results_have_for_every_workload_a_figure_or_a_failure() -> None:
    known = Results.load(FILE)
    for peer in EVERYONE if not known.machine["provisional"] else ():
        found = known.peers[peer.name]
        for workload in peer.workloads:
            assert {workload, "start", "install"} & (found.runs.keys() | found.failures.keys()), (peer.name, workload)


def test_every_figure_belongs_to_a_workload_that_somebody_runs() -> None:
    assert {f.workload for f in (*TASKS, *STREAM)} == {w for peer in EVERYONE for w in peer.workloads}


def test_who_is_ahead_is_said_with_the_reason() -> None:
    text = page.section(results(perdure=tasks_per_s(100), other=tasks_per_s(199, 200, 201), near=tasks_per_s(90)))
    assert "**Tiny tasks**: Perdure 100 tasks/s. Ahead: OTHER (200): why is not known." in text
    assert "Level, within the noise: NEAR (90)." in text
    assert "| OTHER | 200 (199–201, n=3) |" in text


def test_a_failure_is_shown_in_the_table_and_in_its_own_words() -> None:
    found = results(perdure=tasks_per_s(100), other=tasks_per_s())
    found.peers["other"].failures["install"] = ["no such `thing`"]
    text = page.section(found)
    assert "| OTHER | failed |" in text
    assert "OTHER, install: failed 1 times; the first: `no such  thing `" in text


def test_a_section_takes_the_place_of_the_one_before_and_leaves_the_others() -> None:
    text = "# A\n\nwords\n\n## Beside the peers\n\nold\n\n## Last\n\nmore\n"
    assert page.with_section(text, "## Beside the peers\n\nnew\n") == text.replace("old", "new")


def test_an_error_is_shown_without_folders_and_hosts() -> None:
    said = nowhere(f"{Path.home()}/x: https://registry.example.org/a/b failed, http://127.0.0.1:80/c too")
    assert said == "~/x: https://HOST/a/b failed, http://127.0.0.1:80/c too"


class Killed(Peer):
    """A peer that does nothing but repeat its tenth step after the kill, and then the eleventh."""

    name = title = folder = durability = settings = "killed"

    def ask(self, workload: str, *argument: str, timeout_s: float = 1) -> None:
        self.witness = Path(argument[0])
        self._write(*range(10))

    def _write(self, *steps: int) -> None:
        from benchmarks.peers.work import now

        with self.witness.open("a") as out:
            out.writelines(f"{now()} 1 {step}\n" for step in steps)

    def kill_workers(self) -> None:
        self._write(9, 10)


def test_the_next_step_after_a_kill_may_be_a_repeated_one(tmp_path: Path) -> None:
    peer = Killed()
    peer.data = tmp_path
    found = measure(peer, "W4", Counts())
    assert 0 < found["next_step_s"] < found["new_step_s"]


@pytest.mark.parametrize("peer", EVERYONE, ids=lambda peer: peer.name)
def test_packages_are_pinned(peer: Peer) -> None:
    assert all("==" in package for package in peer.packages)
