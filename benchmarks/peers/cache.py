"""What the peers are made of, installed once into a cache of its own; nothing of it becomes part of Perdure.

Each peer's Python packages have a virtual environment of their own. Servers come by the ordinary clients of the
package registries: pip, npm, go, mvn, apt-get. Whatever fails raises `Missing` with the tool's own last words.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import platformdirs

from benchmarks.peers.errors import Missing

FOLDER = Path(os.environ.get("PERDURE_PEERS_CACHE") or platformdirs.user_cache_path("perdure-peers"))
_SLOW_S = 1_800
_may_install = True


def forbid_installs() -> None:
    """From now on, what is missing is refused."""
    global _may_install
    _may_install = False


def _install(command: Sequence[str | Path], **how: Any) -> None:
    if not _may_install:
        raise Missing(f"not installed, and nothing may be: {Path(command[0]).name} {command[-1]}")
    _run(command, **how)


def _run(command: Sequence[str | Path], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    text = [str(part) for part in command]
    try:
        done = subprocess.run(
            text,
            cwd=cwd,
            env=os.environ | dict(env or {}),
            capture_output=True,
            text=True,
            timeout=_SLOW_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{text[0]}: {error}") from error
    if done.returncode:
        words = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise Missing(f"{' '.join(text[:3])} ended with {done.returncode}: {' | '.join(words[-3:])}")
    return done.stdout


def venv(peer: str, packages: Sequence[str]) -> Path:
    """The interpreter of an environment with these packages; made anew when the list has changed."""
    folder = FOLDER / "venv" / peer
    python, note = folder / "bin" / "python", folder / "packages"
    wanted = "\n".join(packages)
    if not note.exists() or note.read_text() != wanted:
        _install([sys.executable, "-m", "venv", "--clear", folder])
        _install([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages])
        note.write_text(wanted)
    return python


def version(python: Path, package: str) -> str:
    """The version of a package in an environment."""
    return _run([python, "-c", f"import importlib.metadata as m; print(m.version({package!r}))"]).strip()


def npm(package: str, binary: str) -> Path:
    """A binary below an npm package's folder; `package` with its version."""
    found = FOLDER / "npm" / "node_modules" / binary
    if not found.exists():
        (FOLDER / "npm").mkdir(parents=True, exist_ok=True)
        _install(["npm", "install", "--prefix", FOLDER / "npm", "--no-fund", "--no-audit", package])
    return found


def go(package: str, name: str) -> Path:
    """A binary built by `go install`; `package` with its version."""
    found = FOLDER / "bin" / name
    if not found.exists():
        build = FOLDER / "go"
        env = {
            "GOBIN": str(FOLDER / "bin"),
            "GOPATH": str(build),
            "GOCACHE": str(build / "cache"),
            "GOFLAGS": "-modcacherw",
        }
        _install(["go", "install", package], env=env)
        shutil.rmtree(build, ignore_errors=True)
    return found


def jars(name: str, coordinates: Sequence[str]) -> Path:
    """A folder with Java libraries and all they need; coordinates as group:artifact:version."""
    folder = FOLDER / "jars" / name
    note = folder / "coordinates"
    wanted = "\n".join(coordinates)
    if not note.exists() or note.read_text() != wanted:
        folder.mkdir(parents=True, exist_ok=True)
        fields = ("groupId", "artifactId", "version")
        named = ["".join(f"<{f}>{v}</{f}>" for f, v in zip(fields, c.split(":"), strict=True)) for c in coordinates]
        needs = "".join(f"<dependency>{name}</dependency>" for name in named)
        own = "<groupId>local</groupId><artifactId>peer</artifactId><version>1</version>"
        (folder / "pom.xml").write_text(
            f"<project><modelVersion>4.0.0</modelVersion>{own}<dependencies>{needs}</dependencies></project>"
        )
        _install(["mvn", "-q", "-B", "dependency:copy-dependencies", "-DoutputDirectory=lib", "-DincludeScope=runtime"],
                 cwd=folder)  # fmt: skip
        note.write_text(wanted)
    return folder / "lib"


def debs(name: str, packages: Sequence[str]) -> Path:
    """The root of a tree with the files of Debian packages, unpacked and not installed."""
    folder = FOLDER / "debs" / name
    if not (folder / "usr").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _install(["apt-get", "download", *packages], cwd=folder)
        for package in folder.glob("*.deb"):
            _run(["dpkg", "-x", package, folder])
    return folder


def java(major: int) -> Path:
    """The home of a Java of at least this version: PATH's, or one beside it."""
    homes = [Path(p).resolve().parent.parent for p in [shutil.which("java")] if p]
    homes += [home for around in {h.parent for h in homes} for home in sorted(around.iterdir())]
    for home in homes:
        if (home / "bin" / "javac").exists() and int(java_version(home).split(".")[0]) >= major:
            return home
    raise Missing(f"no Java {major} or newer with a compiler is on this machine")


def java_version(home: Path) -> str:
    """The version of a Java."""
    lines = (home / "release").read_text().splitlines() if (home / "release").exists() else []
    return next((line.split('"')[1] for line in lines if line.startswith("JAVA_VERSION=")), "0")


def classes(home: Path, source: Path, libraries: Path) -> str:
    """The class path of a compiled source file and its libraries."""
    out = FOLDER / "classes" / source.parent.name
    path = f"{libraries}{os.sep}*"
    _run([home / "bin" / "javac", "-d", out, "-cp", path, source])
    return f"{out}{os.pathsep}{path}"


def redis() -> tuple[Path, dict[str, str]]:
    """(redis-server, the environment it needs)."""
    found = shutil.which("redis-server")
    if found:
        return Path(found), {}
    root = debs("redis", ["redis-server", "redis-tools", "libjemalloc2", "liblzf1", "libatomic1"])
    libraries = {f.parent for f in (root / "usr" / "lib").rglob("*.so*")}
    return root / "usr" / "bin" / "redis-server", {"LD_LIBRARY_PATH": os.pathsep.join(map(str, sorted(libraries)))}


def postgres() -> Path:
    """The folder of PostgreSQL's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    if not found:
        raise Missing("no PostgreSQL server is on this machine: apt-get install postgresql")
    return found[-1].parent
