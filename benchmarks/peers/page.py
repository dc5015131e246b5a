"""The section "Beside the peers" of docs/benchmarks.md, made from the results file alone."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.peers.processes import ROOT
from benchmarks.peers.reasons import reason
from benchmarks.peers.results import STREAM, TASKS, Figure, Measured, Results

PAGE = ROOT / "docs" / "benchmarks.md"
HEADING = "## Beside the peers"
_NOISE = 1.5
"""Differences below this factor come and go on a shared machine."""


def write(results: Results) -> None:
    """Put the section into the page, in place of the one that is there."""
    PAGE.write_text(with_section(PAGE.read_text(), section(results)))


def with_section(page: str, text: str) -> str:
    """A page with this text from the heading to the next one of its rank, or at the end."""
    before, _, behind = page.partition(f"{HEADING}\n")
    _, next_heading, rest = behind.partition("\n## ")
    return f"{before.rstrip()}\n\n{text.rstrip()}\n" + (f"{next_heading}{rest}" if next_heading else "")


def section(results: Results) -> str:
    """All of it."""
    parts = [
        HEADING,
        _introduction(results),
        "### Tasks",
        _how_tasks(results),
        _table(results, TASKS),
        "![Tasks beside the peers](peers-tasks.svg)",
        *_standings(results, TASKS, "perdure"),
        "### Stream of records",
        _how_stream(),
        _table(results, STREAM),
        "![Stream beside the peers](peers-stream.svg)",
        *_standings(results, STREAM, "perdure-stream"),
        "### What ran, and what did not",
        _settings(results),
        *_troubles(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(results: Results) -> str:
    machine = results.machine
    here = (
        f"{machine['cores']} cores ({machine['processor']}), {machine['memory_gb']} GB, Linux {machine['kernel']}, "
        f"Python {machine['python']}; load of the machine before the first run: {machine['load_before']}"
    )
    text = (
        f"`make bench-peers` installs each peer into a cache of its own, runs everything on one machine in turn, and "
        f"writes this section; no figure in it is typed by hand. Measured {machine['date']} on {here}. In each round "
        f"every peer is started on empty data, warmed for seconds, measured and stopped before the next. Figures are "
        f"medians, in brackets the least and the greatest run and the number of runs. Read differences below a factor "
        f"of {_NOISE} as none."
    )
    if machine["provisional"]:
        text += f"\n\n**These figures are provisional: {machine['provisional']}.**"
    return text


def _how_tasks(results: Results) -> str:
    tiny, starts, steps = (results.counts[name] for name in ("tiny", "starts", "steps"))
    return f"""\
- *Tiny tasks*: {tiny:,} tasks that do nothing, as fast as the client may, until the last result is known.
- *Submit to start*: {starts} tasks one at a time, at random distances; to the first line of user code.
- *Durable steps*: {steps} steps one after another in one task, each recorded before the next begins; queues: a chain.
- *SIGKILL*: the worker and all below it, in the middle of a step of 0.2 s; it is started again at once.
- *Idle*: after the warm-up; memory is the proportional set size, CPU that of worker and servers together."""


def _how_stream() -> str:
    return """\
Records of 155 bytes JSON in 4 partitions, 20,000 keys. For each record: a counter and the last payload of its key
(about 300 bytes JSON) in RocksDB with a changelog, and one output. The rate is from the first output to the last that a
reader of committed records can see; the time from the start has the start of the process in it. Each application has
one process and a broker of its own, with the same records. No rate is given where most outputs came with one commit."""


def _table(results: Results, figures: Sequence[Figure]) -> str:
    workloads = {f.workload for f in figures}
    lines = [
        "| peer | " + " | ".join(f"{f.title}, {f.unit}" for f in figures) + " |",
        "|---" * (len(figures) + 1) + "|",
    ]
    for measured in results.peers.values():
        if workloads & set(measured.workloads):
            lines.append(f"| {measured.title} | " + " | ".join(_cell(measured, f) for f in figures) + " |")
    return "\n".join(lines)


def _cell(measured: Measured, figure: Figure) -> str:
    values = measured.values(figure.key)
    if values:
        median = measured.median(figure.key)
        assert median is not None
        spread = f"{figure.text(min(values))}–{figure.text(max(values))}, " if len(values) > 1 else ""
        return f"{figure.text(median)} ({spread}n={len(values)})"
    if {figure.workload, "start", "install"} & measured.failures.keys() and figure.workload in measured.workloads:
        return "failed"
    return "–"


def _standings(results: Results, figures: Sequence[Figure], ours: str) -> list[str]:
    """For each figure where Perdure stands, and for each peer that is ahead, why."""
    lines = []
    for figure in figures:
        own = results.peers[ours].median(figure.key) if ours in results.peers else None
        if own is None:
            continue
        others = {n: v for n, m in results.peers.items() if n != ours and (v := m.median(figure.key)) is not None}
        lead = {n: (v / own if figure.more_is_better else own / max(v, 1e-9)) for n, v in others.items()}
        ahead = sorted((n for n in lead if lead[n] >= _NOISE), key=lambda n: -lead[n])
        level = sorted((n for n in lead if 1 / _NOISE < lead[n] < _NOISE), key=lambda n: -lead[n])
        text = f"- **{figure.title}**: Perdure {figure.text(own)} {figure.unit}. "
        if not others:
            text += "Nobody else was measured."
        elif not ahead:
            text += "Nobody is ahead."
        else:
            text += "Ahead: " + "; ".join(_whys(results, figure, {n: others[n] for n in ahead})) + "."
        if level:
            text += " Level, within the noise: " + ", ".join(
                f"{results.peers[n].title} ({figure.text(others[n])})" for n in level) + "."  # fmt: skip
        lines.append(text)
    return ["\n".join(lines)]


def _whys(results: Results, figure: Figure, ahead: dict[str, float]) -> list[str]:
    """Each reason once, behind those that it holds for."""
    together: dict[str, list[str]] = {}
    for name, value in ahead.items():
        shown = f"{results.peers[name].title} ({figure.text(value)})"
        together.setdefault(reason(figure, name), []).append(shown)
    return [f"{', '.join(names)}: {why}" for why, names in together.items()]


def _settings(results: Results) -> str:
    lines = ["| peer | versions | durability | settings |", "|---|---|---|---|"]
    for m in results.peers.values():
        versions = ", ".join(f"{name} {version}" for name, version in m.versions.items()) or "not installed"
        lines.append(f"| {m.title} | {versions} | {m.durability} | {m.settings} |")
    return "\n".join(lines)


def _troubles(results: Results) -> list[str]:
    left_out = [
        f"- {m.title}, {workload}: left out: {why}."
        for m in results.peers.values()
        for workload, why in m.not_run.items()
    ]
    failed = [
        f"- {m.title}, {workload}: failed {len(errors)} times; the first: `{errors[0].replace('`', ' ')}`"
        for m in results.peers.values()
        for workload, errors in m.failures.items()
    ]
    lines = left_out + failed
    return ["\n".join(lines)] if lines else []
