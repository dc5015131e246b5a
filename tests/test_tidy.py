"""The house rules that no linter knows: who imports whom, what the core may not do, how large things may grow."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from perdure.schemas import topics

ROOT = Path(__file__).resolve().parent.parent
HOUSE = ("perdure", "schemas", "streams", "projections", "connectors")
"""The folders that are installed."""
BESIDE = ("tests", "tools", "docs", "examples", "benchmarks")

SHELL = frozenset(
    {
        "admission",
        "config_view",
        "crash_marks",
        "duties",
        "engine",
        "failpoints",
        "generations",
        "host",
        "host_slots",
        "join_watch",
        "kafka_connection",
        "kafka_consumers",
        "kafka_log",
        "kafka_producers",
        "lane",
        "local_engine",
        "log",
        "memory_log",
        "past",
        "processor",
        "redecide",
        "replay",
        "rebuild",
        "recovery",
        "restore_watch",
        "runner",
        "schema_lookup",
        "shard",
        "snapshot_taker",
        "snapshots",
        "standbys",
        "store",
        "survey",
        "topology",
    }
)
"""Modules of streams that touch the world: the log, the disk, threads, the clock."""
CORE = frozenset(file.stem for file in (ROOT / "streams").glob("*.py")) - SHELL - {"__init__"}
"""All others decide: functions of state, input and log time, and nothing else. A new module is one of them."""
AUDIT = frozenset(file.stem for file in (ROOT / "projections").glob("audit*.py"))
PURE = tuple(f"streams/{name}.py" for name in sorted(CORE | {"engine"})) + tuple(
    f"projections/{name}.py" for name in ("progress", "dead_letters", "history", "inputs", *sorted(AUDIT))
)
"""Modules that have to give the same result wherever and whenever they run."""
INTERFACES = {"perdure.streams.store": {"Store"}, "perdure.streams.log": {"Record"}}
"""What the core may know of the shell: names of values that it is handed."""


@cache
def tree(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_text(), str(file))
    except (
        SystemError
    ):  # Python 3.11.7: what another thread parses meanwhile, as for a traceback, disturbs it (gh-106905)
        return ast.parse(file.read_text(), str(file))


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def modules(*folders: str) -> list[Path]:
    """Python files of the folders, not followed through the links in perdure/."""
    found = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    return sorted(f for f in found if not any(parent.is_symlink() for parent in f.parents))


def texts() -> list[Path]:
    """Every file that a person writes."""
    kinds = {".py", ".md", ".toml", ".yml", ".yaml", ".avsc", ".json", ".properties", ".js", ".css", ".html", ".svg"}
    inside = [f for folder in (*HOUSE, *BESIDE) for f in (ROOT / folder).rglob("*") if f.suffix in kinds]
    files = [f for f in [*inside, *ROOT.iterdir()] if f.is_file() and not any(p.is_symlink() for p in f.parents)]
    return sorted(f for f in files if "results" not in f.parts and f.name != ".git")


def imports(file: Path) -> Iterator[tuple[str, str | None]]:
    """(module, name taken from it) of every import, wherever it stands in the file."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}:{node.lineno}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                module = (ROOT / whole.removeprefix("perdure.").replace(".", "/")).with_suffix(".py")
                yield (whole, None) if module.exists() else (node.module or "", alias.name)


def ours(file: Path) -> set[str]:
    """The modules of perdure that a file imports."""
    return {module for module, _ in imports(file) if module.split(".")[0] == "perdure"}


every_module = pytest.mark.parametrize("file", modules(*HOUSE), ids=name_of)
every_source = pytest.mark.parametrize("file", modules(*HOUSE, *BESIDE), ids=name_of)


# Who imports whom ----------------------------------------------------------------------------------------------------

ALLOWED = {
    "schemas": ("perdure.schemas",),
    "connectors": ("perdure.schemas", "perdure.connectors"),
    "streams": ("perdure.schemas", "perdure.streams"),
    "projections": ("perdure.schemas", "perdure.streams", "perdure.projections"),
    "perdure": ("perdure",),
}


@every_module
def test_imports_point_one_way(file: Path) -> None:
    allowed = ALLOWED[file.relative_to(ROOT).parts[0]]
    strays = {m for m in ours(file) if not any(m == a or m.startswith(f"{a}.") for a in allowed)}
    assert not strays


@pytest.mark.parametrize("file", modules("projections"), ids=name_of)
def test_projections_use_the_shell_of_streams_and_never_its_decisions(file: Path) -> None:
    assert not ours(file) & {f"perdure.streams.{name}" for name in CORE | {"engine", "duties"}}


@every_source
def test_folders_are_imported_by_their_one_name(file: Path) -> None:
    """`import streams` from the checkout would load a second copy of every module."""
    assert not {module for module, _ in imports(file) if module.split(".")[0] in HOUSE[1:]}


@pytest.mark.parametrize(
    ("library", "places"),
    [
        ("fastavro", {"schemas/codec.py", "projections/audit_records.py"}),
        ("rocksdict", {"streams/store.py"}),
        ("sqlite3", {"projections/views.py", "projections/view_writer.py", "projections/api.py"}),
    ],
)
def test_a_library_is_used_in_its_place_only(library: str, places: set[str]) -> None:
    used = {name_of(f) for f in modules(*HOUSE) if any(m.split(".")[0] == library for m, _ in imports(f))}
    assert used <= places


# The pure core -------------------------------------------------------------------------------------------------------

IMPURE = frozenset(
    {
        "asyncio",
        "confluent_kafka",
        "getpass",
        "logging",
        "multiprocessing",
        "os",
        "platform",
        "psutil",
        "random",
        "rocksdict",
        "secrets",
        "shutil",
        "signal",
        "socket",
        "sqlite3",
        "structlog",
        "subprocess",
        "tempfile",
        "threading",
        "time",
    }
)
IMPURE_NAMES = frozenset({"uuid1", "uuid4", "utcnow", "today", "urandom", "new_id", "new_local_id", "getenv"})
IMPURE_BUILTINS = frozenset({"open", "print", "input", "hash", "id", "breakpoint"})
"""`hash` and `id` differ from process to process."""


@pytest.mark.parametrize(
    "file", [*ROOT.glob("projections/audit*.py"), ROOT / "perdure" / "audit_reader.py"], ids=name_of
)
def test_the_audit_shares_nothing_with_what_it_audits(file: Path) -> None:
    """No decision, no fold and no codec of the engine: a defect there must not hide itself."""
    constants = {"errors", "limits", "topics"}
    schemas = {taken for module, taken in imports(file) if module == "perdure.schemas"}
    schemas |= {module.rpartition(".")[2] for module in ours(file) if module.startswith("perdure.schemas.")}
    assert schemas - {None} <= constants
    rest = {module for module in ours(file) if not module.startswith(("perdure.schemas", "perdure.projections.audit"))}
    assert not rest


def test_the_core_is_where_this_test_looks() -> None:
    assert {name_of(file) for file in modules("streams", "projections")} >= set(PURE)
    assert {"decide", "evolve", "task_lifecycle", "timers", "leases", "ready_queue", "state"} <= CORE


@pytest.mark.parametrize("name", PURE)
def test_the_core_has_no_clock_no_chance_and_no_io(name: str) -> None:
    file = ROOT / name
    found = {module for module, _ in imports(file) if module.split(".")[0] in IMPURE}
    found |= {taken for _, taken in imports(file) if taken in IMPURE_NAMES}
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Attribute) and (
            node.attr in IMPURE_NAMES or ast.unparse(node).endswith("datetime.now")
        ):
            found.add(f"{ast.unparse(node)} in line {node.lineno}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_BUILTINS:
            found.add(f"{node.func.id}() in line {node.lineno}")
        if isinstance(node, ast.Global | ast.AsyncFunctionDef | ast.Await):
            found.add(f"{type(node).__name__} in line {node.lineno}")
    assert not found


@pytest.mark.parametrize("name", sorted(CORE))
def test_the_core_imports_only_itself_and_the_schemas(name: str) -> None:
    known = {f"perdure.streams.{other}" for other in CORE}
    for module, taken in imports(ROOT / "streams" / f"{name}.py"):
        if module.startswith("perdure.streams"):
            assert module in known or taken in INTERFACES.get(module, ()), f"{module} {taken or ''}"


# Size ----------------------------------------------------------------------------------------------------------------


@every_source
def test_functions_have_at_most_70_lines(file: Path) -> None:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= 70, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("file", modules(*HOUSE, "tools", "examples", "benchmarks"), ids=name_of)
def test_modules_have_at_most_500_lines(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 500


# What must not be written --------------------------------------------------------------------------------------------


@every_source
def test_no_error_is_swallowed(file: Path) -> None:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            blind = re.search(r"\b(Base)?Exception\b", caught) is not None
            does_nothing = all(
                isinstance(s, ast.Pass | ast.Continue)
                or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
                for s in node.body
            )
            assert caught, f"bare except in line {node.lineno}"
            assert not (blind and does_nothing), f"swallowed error in line {node.lineno}"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            kinds = {ast.unparse(arg) for arg in node.args}
            assert not kinds & {"Exception", "BaseException"}, f"swallowed error in line {node.lineno}"


@every_source
def test_nothing_is_unpickled_or_evaluated(file: Path) -> None:
    loaders = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml"}
    assert not {module for module, _ in imports(file) if module.split(".")[0] in loaders}
    compiles_its_own = name_of(file) == "schemas/encoder.py"
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not compiles_its_own:
            assert node.func.id not in ("eval", "exec", "__import__"), f"{node.func.id} in line {node.lineno}"


@every_source
def test_rocksdict_is_always_raw(file: Path) -> None:
    """Its other mode pickles keys and values."""
    if not any(module.split(".")[0] == "rocksdict" for module, _ in imports(file)):
        return
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if node.func.id in ("Options", "WriteBatch"):
                assert given.get("raw_mode") == "True", f"line {node.lineno}"
            if node.func.id == "Rdict":
                assert "options" in given, f"line {node.lineno}"


def test_no_markers_are_left() -> None:
    marker = re.compile(r"\b(T" + r"ODO|FIX" + r"ME|X" + r"XX|HA" + r"CK|WI" + r"P)\b|<<<" + r"<<<<|>>>" + r">>>>")
    found = [
        f"{name_of(file)}:{number}"
        for file in texts()
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1)
        if marker.search(line)
    ]
    assert not found


def test_no_file_names_a_machine_or_a_registry() -> None:
    path = re.compile(r"(?<![\w.~/$}-])/(work|root|tmp|Users)/[\w.]")
    host = re.compile(
        r"pypi\.|pythonhosted|maven\.org|maven\.apache|artifactory|jfrog|/nexus|docker\.io|ghcr\.io|quay\.io"
    )
    found = [
        f"{name_of(file)}:{number}: {line.strip()[:100]}"
        for file in texts()
        if file != Path(__file__)
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1)
        if path.search(line) or host.search(line)
    ]
    assert not found


# Topics --------------------------------------------------------------------------------------------------------------

WRITERS = {
    "clients": {"perdure/client.py", "perdure/server_main.py"},
    "workers": {"perdure/session.py", "perdure/reporter.py", "perdure/worker_logs.py", "perdure/testing_worker.py"},
    "CLI": {"perdure/catalog.py", "perdure/cli_upgrade.py", "streams/topology.py"},
    "API": {"perdure/server_main.py"},
    "engine hosts": {"streams/duties.py", "streams/host.py"},
    "engine": {"streams/engine.py", "streams/local_engine.py", "streams/processor.py", "streams/rebuild.py"},
    "progress projection": {"projections/progress.py"},
    "dead-letter projection": {"projections/dead_letters.py"},
    "every reader": {
        "streams/engine.py",
        "streams/processor.py",
        "projections/view_writer.py",
        "perdure/session.py",
    },
}
"""Who, in the words of the table of topics, is which module."""


def written(file: Path) -> Iterator[tuple[str, int]]:
    """(constant of the topic, line) of every place that hands a record to a topic, or names its changelog."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
            if called.lstrip("_") in ("append", "append_all", "emit", "produce", "Out"):
                yield from _topic_in(node.args[0])
        if isinstance(node, ast.keyword) and node.arg == "changelog":
            yield from _topic_in(node.value)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "changelog":
            yield from _topic_in(node.value)


def _topic_in(node: ast.expr) -> Iterator[tuple[str, int]]:
    found = re.fullmatch(r"topics\.([A-Z_]+)\.name", ast.unparse(node))
    if found:
        yield found[1], node.lineno


def test_topics_are_written_by_whom_the_table_names() -> None:
    strays = []
    for file in modules(*HOUSE):
        for constant, line in written(file):
            allowed = {place for who in getattr(topics, constant).writers for place in WRITERS.get(who, ())}
            if name_of(file) not in allowed:
                strays.append(f"{name_of(file)}:{line} writes {constant}")
    assert not strays


def test_every_topic_of_the_engine_and_the_projections_is_written() -> None:
    """The test above sees the places where records are handed over; here it is shown that it does."""
    seen = {constant for file in modules(*HOUSE) for constant, _ in written(file)}
    assert seen >= {"COMMANDS", "EVENTS", "TELEMETRY", "REPLIES", "INBOX", "CHANGELOG", "PROGRESS", "DEAD_LETTERS"}


# Documents -----------------------------------------------------------------------------------------------------------


def documents() -> list[Path]:
    return sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])


def prose(file: Path) -> list[str]:
    """The lines of a document outside of its code."""
    lines, code = [], False
    for line in file.read_text().splitlines():
        code ^= line.lstrip().startswith("```")
        lines.append("" if code else line)
    return lines


@pytest.mark.parametrize("file", documents(), ids=name_of)
def test_a_document_has_one_title_and_begins_with_it(file: Path) -> None:
    titles = [number for number, line in enumerate(prose(file)) if line.startswith("# ")]
    assert titles == [0]


@pytest.mark.parametrize("file", documents(), ids=name_of)
def test_links_between_files_resolve(file: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose(file)))
    inside = [t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:", t)]
    assert not [target for target in inside if target and not (file.parent / target).exists()]


def test_the_page_of_messages_is_up_to_date() -> None:
    tool = [sys.executable, str(ROOT / "tools" / "write_docs.py"), "--check"]
    done = subprocess.run(tool, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_installation_by_compose_is_closed_and_has_the_kafka_that_is_tested() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    lock = json.loads((ROOT / "connectors" / "kafka_jars.lock.json").read_text())
    assert re.findall(r"image: apache/kafka:(\S+)", text) == [lock["kafka"]]
    ports = [port for listed in re.findall(r"ports: \[(.*)\]", text) for port in listed.split(",")]
    assert text.count("ports:") == len(ports) == 4
    assert all(port.strip().startswith('"127.0.0.1:') for port in ports)


def test_the_installation_by_compose_loses_nothing_with_one_broker() -> None:
    """Three copies of everything, two of them acknowledged: a copy too few is a loss, one too many a standstill."""
    text = (ROOT / "docker-compose.yml").read_text()
    copies = re.findall(r"(\w*REPLICATION_FACTOR): (\d)", text)
    acknowledged = re.findall(r"(\w*(?:MIN_ISR|MIN_INSYNC_REPLICAS)): (\d)", text)
    assert len(copies) == 4, "topics, offsets, transactions, share groups"
    assert len(acknowledged) == 3, "the offsets' own follow that of topics"
    assert {n for _, n in copies} == {"3"}
    assert {n for _, n in acknowledged} == {"2"}
    assert "replication=3" in text
    brokers = re.findall(r"KAFKA_NODE_ID: (\d)", text)
    assert brokers == re.findall(r"(\d)@kafka-\1:9093", text) == ["1", "2", "3"]


# Packaging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", HOUSE[1:])
def test_the_links_resolve(folder: str) -> None:
    link = ROOT / "perdure" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder
    assert link.resolve() == ROOT / folder


def test_every_package_folder_is_in_the_map() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    hidden = {f.name for f in ROOT.iterdir() if f.name.startswith(".")}
    folders = {f.name for f in ROOT.iterdir() if f.is_dir() and list(f.rglob("*.py"))} - hidden - set(BESIDE)
    assert folders - {"build", "dist"} == set(HOUSE)
    assert settings["package-dir"] == {("perdure" if f == "perdure" else f"perdure.{f}"): f for f in HOUSE}
    assert sorted(settings["packages"]) == sorted(settings["package-dir"])


@every_module
def test_packages_are_flat(file: Path) -> None:
    assert len(file.relative_to(ROOT).parts) == 2


def test_the_wheel_holds_perdure_and_all_of_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
    for name in HOUSE:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert {name.split("/")[0] for name in names} == {"perdure"}
    wanted = set()
    for folder in HOUSE:
        files = [f for f in (source / folder).rglob("*") if f.is_file() and not any(p.is_symlink() for p in f.parents)]
        below = "" if folder == "perdure" else f"{folder}/"
        wanted |= {f"perdure/{below}{f.relative_to(source / folder).as_posix()}" for f in files}
    assert names == wanted
