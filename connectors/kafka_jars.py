"""Kafka's jars: 46 pinned files, fetched once from Maven Central into a per-user cache, each checked by its SHA-256.

`PERDURE_KAFKA_HOME` (an unpacked Kafka) and `PERDURE_KAFKA_LIBS` (a folder of jars) win over the pinned set. The cache
is one folder per lock file, put in place by a rename: it is whole or absent.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_dir

from perdure.connectors.kafka_data import file_trouble_told
from perdure.schemas.errors import ConfigurationError, Unreachable

LOCK_FILE = Path(__file__).with_name("kafka_jars.lock.json")
_FETCHERS = 8
_REQUEST_S = 15
_ATTEMPTS = 3
_BETWEEN_ATTEMPTS_S = 0.3
_OWN_KAFKA = "set PERDURE_KAFKA_HOME to an unpacked Kafka, or PERDURE_KAFKA_LIBS to a folder with its jars"
_REMEDY = f"allow access to Maven Central, or {_OWN_KAFKA}"


@dataclass(frozen=True, slots=True)
class Jar:
    """One line of the lock file; `size` is in bytes."""

    group: str
    artifact: str
    version: str
    sha256: str
    size: int

    @property
    def name(self) -> str:
        """The file's name, as Maven gives it."""
        return f"{self.artifact}-{self.version}.jar"


@dataclass(frozen=True, slots=True)
class KafkaJars:
    """A usable set: Kafka's version, the sorted class path, and an id that changes whenever a jar does."""

    version: str
    class_path: tuple[Path, ...]
    id: str


Fetch = Callable[[Jar, Path], Path]
"""Puts a jar somewhere, perhaps below the given empty folder, and returns where it is."""


def cache_folder() -> Path:
    """Return the per-user folder for jars and class-data archives; it may not exist yet."""
    return Path(user_cache_dir("perdure")) / "kafka"


def kafka_jars(environ: Mapping[str, str] | None = None, *, say: Callable[[str], None] | None = None) -> KafkaJars:
    """Return the jars to run Kafka with, fetching the pinned set if it is not in the cache (about 45 MB, seconds).

    Blocks while another process fetches. Raises Unreachable when a jar cannot be fetched and ConfigurationError when a
    jar is not the pinned one, the cache cannot be written, or a folder named in the environment holds no Kafka.
    """
    environ = os.environ if environ is None else environ
    if home := environ.get("PERDURE_KAFKA_HOME"):
        return _jars_of(Path(home, "libs"), "PERDURE_KAFKA_HOME")
    if libs := environ.get("PERDURE_KAFKA_LIBS"):
        return _jars_of(Path(libs), "PERDURE_KAFKA_LIBS")
    cache = cache_folder()
    with file_trouble_told(cache, f"make it a folder that you may write to, with 100 MB free, or {_OWN_KAFKA}"):
        return pinned_jars(LOCK_FILE, cache, say=say)


def pinned_jars(
    lock_file: Path, cache: Path, *, fetch: Fetch | None = None, say: Callable[[str], None] | None = None
) -> KafkaJars:
    """Return the set of one lock file from one cache, filling the cache first if need be; errors as `kafka_jars`."""
    content = lock_file.read_bytes()
    lock = json.loads(content)
    jars = sorted((Jar(**row) for row in lock["jars"]), key=lambda jar: jar.name)
    lock_id = hashlib.sha256(content).hexdigest()[:12]
    folder = cache / f"{lock['kafka']}-{lock_id}"
    if not _is_whole(folder, jars):
        cache.mkdir(parents=True, exist_ok=True)
        with _exclusive(cache / f"{folder.name}.lock"):
            if not _is_whole(folder, jars):
                _fill(folder, jars, fetch or _from_maven, say or _to_stderr)
    return KafkaJars(lock["kafka"], tuple(folder / jar.name for jar in jars), lock_id)


def _jars_of(folder: Path, setting: str) -> KafkaJars:
    jars = sorted(folder.absolute().glob("*.jar"))
    versions = [found[1] for jar in jars if (found := re.fullmatch(r"kafka_2\.\d+-(\d[\w.-]*)\.jar", jar.name))]
    if len(versions) != 1:
        raise ConfigurationError(f"{setting}: {folder} must hold one kafka_2.x-VERSION.jar, not {len(versions)}")
    facts = "\n".join(f"{jar.resolve()} {jar.stat().st_size} {jar.stat().st_mtime_ns}" for jar in jars)
    return KafkaJars(versions[0], tuple(jars), hashlib.sha256(facts.encode()).hexdigest()[:12])


def _is_whole(folder: Path, jars: Sequence[Jar]) -> bool:
    """Whether every jar is there and still the pinned one. Reading 45 MB takes a tenth of a second; a damaged jar would
    let the broker die later, with an error that says nothing of it.
    """
    try:
        return all(_sha256(folder / jar.name) == jar.sha256 for jar in jars)
    except FileNotFoundError:
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fill(folder: Path, jars: Sequence[Jar], fetch: Fetch, say: Callable[[str], None]) -> None:
    """Fetch and check every jar in a folder beside the final one, then rename; on any error nothing stays behind."""
    total = sum(jar.size for jar in jars)
    with (
        tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as staging,
        _progress(total, say, f"Fetching Kafka: {len(jars)} jars, {total // 1_000_000} MB, once") as advance,
    ):
        ready, work = Path(staging, "ready"), Path(staging, "work")
        ready.mkdir()
        work.mkdir()
        with ThreadPoolExecutor(_FETCHERS) as pool:
            fetched = [pool.submit(_fetch_checked, jar, fetch, work, ready) for jar in jars]
            try:
                for jar, future in zip(jars, fetched, strict=True):
                    future.result()
                    advance(jar.size)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        if folder.exists():
            folder.rename(work / "damaged")
        ready.rename(folder)


def _fetch_checked(jar: Jar, fetch: Fetch, work: Path, ready: Path) -> None:
    """Copy the jar first and hash the copy, so that what was checked is what will run."""
    source = fetch(jar, work)
    target = ready / jar.name
    shutil.copyfile(source, target)
    digest = _sha256(target)
    if digest != jar.sha256:
        raise ConfigurationError(
            f"{jar.name} has SHA-256 {digest[:16]}…, pinned is {jar.sha256[:16]}…: nothing was used. "
            f"It came from {'Maven Central' if work in source.parents else source}: "
            "delete it there if it is a damaged copy and try again; otherwise do not trust it"
        )


def _from_maven(jar: Jar, work: Path) -> Path:
    """Fetch through jgo, from the local Maven repository if it is there, else into a fresh folder below `work`.

    Never into the local repository: jgo writes in place, so an interrupted download would stay there for good.
    """
    try:
        from jgo.constants import default_maven_repo
        from jgo.maven import MavenContext
    except ImportError as error:
        raise ConfigurationError(f"fetching Kafka needs jgo: install perdure[dev]; or else {_REMEDY}") from error
    for attempt in range(1, _ATTEMPTS + 1):
        fresh = Path(tempfile.mkdtemp(dir=work))
        maven = MavenContext(repo_cache=fresh, local_repos=[default_maven_repo()], timeout=_REQUEST_S)
        try:
            path = Path(maven.project(jar.group, jar.artifact).at_version(jar.version).artifact().resolve())
            if fresh in path.parents and path.stat().st_size < jar.size:
                raise OSError("the download ended early")
            return path
        except (OSError, RuntimeError) as error:  # requests' errors are OSErrors; a bad status is jgo's RuntimeError
            if attempt == _ATTEMPTS:
                raise Unreachable(f"{jar.name} could not be fetched ({type(error).__name__}): {_REMEDY}") from error
            time.sleep(_BETWEEN_ATTEMPTS_S * attempt)
    raise AssertionError("the last attempt returns or raises")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _progress(total: int, say: Callable[[str], None], title: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances by bytes: a bar on a terminal, elsewhere only the title."""
    if not sys.stderr.isatty():
        say(title)
        yield lambda _size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda size: bar.advance(task, size)
