"""The plots of the page, drawn from the results file. Runs in an environment of its own, with matplotlib."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from benchmarks.peers.results import FILE, STREAM, TASKS, Figure, Results

mpl.use("svg")
from matplotlib import pyplot as plt

_OURS, _OTHERS = "#1f6f8b", "#b8b8b8"


def main() -> None:
    """Write both files into the folder that the command line names."""
    folder, results = Path(sys.argv[1]), Results.load(FILE)
    mpl.rcParams.update(
        {"svg.hashsalt": "perdure", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}
    )
    draw(results, [f for f in TASKS if f.key != "start_p99_ms"], 2, folder / "peers-tasks.svg")
    draw(results, [f for f in STREAM if f.key.endswith("_per_s")], 1, folder / "peers-stream.svg")


def draw(results: Results, figures: Sequence[Figure], columns: int, file: Path) -> None:
    """One panel for each figure: a bar for each peer, best first, with a line from the least run to the greatest."""
    shown = [f for f in figures if any(m.values(f.key) for m in results.peers.values())]
    rows = max(1, -(-len(shown) // columns))
    plate, panels = plt.subplots(rows, columns, figsize=(5.2 * columns, 2.9 * rows), squeeze=False)
    for place in panels.flat[len(shown) :]:
        place.set_axis_off()
    for place, figure in zip(panels.flat, shown, strict=False):
        _panel(place, results, figure)
    plate.tight_layout()
    plate.savefig(file, metadata={"Date": None})


def _panel(place: plt.Axes, results: Results, figure: Figure) -> None:
    medians = {name: m.median(figure.key) for name, m in results.peers.items()}
    found = sorted(((v, n) for n, v in medians.items() if v is not None), reverse=not figure.more_is_better)
    for height, (value, name) in enumerate(found):
        runs = results.peers[name].values(figure.key)
        place.barh(height, value, color=_OURS if name.startswith("perdure") else _OTHERS)
        place.plot([min(runs), max(runs)], [height, height], color="black", linewidth=1)
        place.annotate(figure.text(value), (max(value, *runs), height), xytext=(4, 0), textcoords="offset points",
                       va="center", fontsize=8)  # fmt: skip
    place.set_yticks(range(len(found)), [results.peers[name].title for _, name in found], fontsize=8)
    values = [value for value, _ in found]
    if max(values) > 20 * max(min(values), 1e-9):
        place.set_xscale("log")
        place.minorticks_off()
    place.margins(x=0.18)
    direction = "more is better" if figure.more_is_better else "less is better"
    place.set_title(f"{figure.title}\n{figure.unit}, {direction}", fontsize=9, loc="left")
    place.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
