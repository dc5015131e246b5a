"""The demo's task: reviews a code base file by file, one recorded step for each."""

from __future__ import annotations

import ast
import os
import time
from pathlib import Path
from typing import Any

from perdure.context import Context
from perdure.tasks import task

QUEUE = "demo"
TRACK = "files"
_BRANCHES = (
    ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.With, ast.AsyncWith, ast.Assert, ast.IfExp,
    ast.comprehension, ast.match_case,
)  # fmt: skip
_TOP = 10


@task(queue=QUEUE, checkpoint_interval="2s")
def review_code_base(ctx: Context, path: str, witness: str, pace_s: float = 0.0) -> dict[str, Any]:
    """Per-package totals, the longest functions and the most complex files of everything under `path`.

    witness: a file that gets a line for each execution of a step; nothing of Perdure ever reads it but the proof.
    pace_s: what each file takes at least, so that there is time to kill also where there are few files.
    """
    files = ctx.step("find-files", find_files, path)
    ctx.state.setdefault("packages", {})
    ctx.state.setdefault("functions", [])
    ctx.state.setdefault("complex", [])
    ctx.state.setdefault("findings", [])
    for name in ctx.track(files, name=TRACK):
        _add(ctx.state, name, ctx.step(f"review {name}", review_file, path, name, witness, pace_s))
    ctx.milestone("reviewed")
    return {"files": len(files), **ctx.state}


def find_files(path: str) -> list[str]:
    """Every Python file under `path`, relative to it, in a fixed order; third-party packages are left out."""
    root = Path(path)
    found = (p.relative_to(root) for p in root.rglob("*.py") if p.is_file())
    return sorted(str(p) for p in found if not {"site-packages", "__pycache__", ".git", ".venv"} & set(p.parts))


def review_file(path: str, name: str, witness: str, pace_s: float) -> dict[str, Any]:
    """What there is to say about one file."""
    end = time.monotonic() + pace_s
    with open(witness, "a") as out:  # one write: lines of several processes never mix
        out.write(f"{time.time_ns() // 1_000_000}\t{os.getpid()}\t{name}\n")
    found = examine(Path(path) / name, name)
    time.sleep(max(0.0, end - time.monotonic()))
    return found


def examine(path: Path, name: str) -> dict[str, Any]:
    """Lines, functions and branches. A file that cannot be read or does not parse is a finding, not a failure."""
    lines = 0
    try:
        source = path.read_bytes()
        lines = source.count(b"\n")
        tree = ast.parse(source, filename=name)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {"lines": lines, "functions": [], "branches": 0, "finding": f"{type(error).__name__}: {error}"}
    functions: list[tuple[str, int]] = [
        (f"{name}:{n.lineno} {n.name}", (n.end_lineno or n.lineno) - n.lineno + 1)
        for n in ast.walk(tree)
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    branches = sum(isinstance(n, _BRANCHES) for n in ast.walk(tree))
    longest = sorted(functions, key=lambda f: -f[1])[:_TOP]
    return {"lines": lines, "functions": longest, "count": len(functions), "branches": branches, "finding": None}


def _add(state: dict[str, Any], name: str, found: dict[str, Any]) -> None:
    """Add one file to the totals."""
    package = name.split(os.sep)[0] if os.sep in name else "(top level)"
    packages = dict(state["packages"])
    total = packages.get(package, {"files": 0, "lines": 0, "functions": 0})
    packages[package] = {
        "files": total["files"] + 1,
        "lines": total["lines"] + found["lines"],
        "functions": total["functions"] + found.get("count", 0),
    }
    state["packages"] = packages
    state["functions"] = sorted([*state["functions"], *found["functions"]], key=lambda f: (-f[1], f[0]))[:_TOP]
    state["complex"] = sorted([*state["complex"], [name, found["branches"]]], key=lambda c: (-c[1], c[0]))[:_TOP]
    if found["finding"]:
        state["findings"] = [*state["findings"], [name, found["finding"]]]
