"""Settings, from the strongest to the weakest: flags, `PERDURE_*` environment, configuration file, defaults.

The file is the nearest `perdure.toml` (its top level) or `pyproject.toml` (its `[tool.perdure]`) at or above the
current directory. With no address set anywhere, the running dev stack of the data directory is found by its lock file.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from perdure.connectors.large_values import LargeValues, Place
from perdure.schemas import topics
from perdure.schemas.errors import ConfigurationError, Unreachable
from perdure.schemas.signing import Keys

DATA_DIR = ".perdure"
_PREFIX = "PERDURE_"
_KAFKA_PREFIX = "PERDURE_KAFKA__"


@dataclass(frozen=True)
class DevStack:
    """A running `perdure dev`, as its lock file tells."""

    bootstrap: str
    api: str
    data_dir: Path
    pid: int
    keys_file: Path


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where the namespace is and how to reach it."""

    bootstrap: str | None = None
    """Kafka's bootstrap servers: host:port, separated by commas."""
    api: str | None = None
    """Address of the HTTP API: http://host:port."""
    api_token: str | None = field(default=None, repr=False)
    """Bearer token of the HTTP API."""
    namespace: Annotated[str, msgspec.Meta(pattern=r"^[a-zA-Z0-9._-]{0,100}$")] = "perdure."
    """What the names of all topics begin with."""
    keys_file: Path | None = None
    """File of the worker and engine keys."""
    data_dir: Path = field(default_factory=lambda: nearest_data_dir(Path.cwd()))
    """Where a dev stack keeps its data."""
    state_dir: Path | None = None
    """Where engines and workers keep what outlives their processes; none: a directory of the user's."""
    checkpoint_dir: Path | None = None
    """Where checkpoints are written; none: a directory of the user's."""
    blobs: str | None = None
    """What lies outside of Kafka, for all processes alike: values too large for a record, and the engine's snapshots. A
    directory that all hosts share, s3://bucket/prefix or gs://bucket/prefix; none: every value has to fit into its
    record, and a host without a store reads the whole changelog."""
    snapshot_rows: Annotated[int, msgspec.Meta(ge=1)] = 200_000
    """After how many changed rows of a partition the engine takes another snapshot of it."""
    standbys: bool = False
    """Whether an engine process keeps warm copies of the partitions that others have, to take them over at once."""
    kafka: dict[str, str] = field(default_factory=dict, repr=False)
    """Any librdkafka option, such as security.protocol."""

    @classmethod
    def load(cls, **flags: Any) -> Settings:
        """The settings that hold here; flags that are None count as not given. Raises `ConfigurationError`."""
        file = file_settings(Path.cwd())
        given = file | _environment(os.environ) | {name: value for name, value in flags.items() if value is not None}
        given["kafka"] = file.get("kafka", {}) | _kafka_environment(os.environ)
        unknown = sorted(given.keys() - SETTINGS)
        if unknown:
            known = ", ".join(sorted(SETTINGS))
            raise ConfigurationError(f"there is no setting {', '.join(unknown)}; there are {known}")
        try:
            settings = msgspec.convert(given, cls, strict=False, dec_hook=_path)
        except msgspec.ValidationError as error:
            raise ConfigurationError(_explain(error)) from error
        if settings.api:
            settings = replace(settings, api=settings.api.rstrip("/"))
        if settings.api_token is not None:
            settings = replace(settings, api_token=_token(settings.api_token))
        stack = None if settings.bootstrap or settings.api else find_dev_stack(settings.data_dir)
        if stack is None:
            return settings
        return replace(
            settings, bootstrap=stack.bootstrap, api=stack.api, data_dir=stack.data_dir,
            keys_file=settings.keys_file or stack.keys_file, blobs=settings.blobs or dev_blobs(stack.data_dir),
        )  # fmt: skip

    def environment(self) -> dict[str, str]:
        """These settings as the environment of a child process."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "kafka"}
        options = {_KAFKA_PREFIX + name.upper().replace(".", "__"): value for name, value in self.kafka.items()}
        return {_PREFIX + name.upper(): str(value) for name, value in plain.items() if value is not None} | options

    def large_values(self, topic_id: Callable[[str], str]) -> LargeValues:
        """The store of values too large for a record, or the lack of one; nothing is asked before its first use."""
        return LargeValues() if self.blobs is None else LargeValues(lambda: self._large_place(topic_id).open())

    def large_place(self, topic_id: Callable[[str], str]) -> Place | None:
        """Where that store is. `topic_id`: the log's, which asks Kafka and raises `Unreachable`.

        The topic that commands go to has an id that no other namespace has, nor this one once it is made anew: what
        lies in one store for several of them is kept apart by it, or by its digest: not every folder may have its name.
        """
        return None if self.blobs is None else self._large_place(topic_id)

    def _large_place(self, topic_id: Callable[[str], str]) -> Place:
        assert self.blobs is not None, "asked where there is a store"
        return Place(self.blobs, hashlib.sha256(topic_id(topics.COMMANDS.name).encode()).hexdigest()[:32])

    def require_bootstrap(self) -> str:
        """Kafka's address. Raises `Unreachable` when none is set and no dev stack runs."""
        if self.bootstrap is None:
            raise Unreachable("no Kafka address: start `perdure dev`, or set PERDURE_BOOTSTRAP or --bootstrap")
        return self.bootstrap

    def require_api(self) -> str:
        """The HTTP API's address. Raises `Unreachable` when none is set and no dev stack runs."""
        if self.api is None:
            raise Unreachable(
                "no HTTP API address: start `perdure dev`, or set PERDURE_API or --api to a `perdure server`"
            )
        return self.api

    def require_keys(self) -> Keys:
        """The keys for an engine or a worker. A broker on this machine alone gets a key file of its own at first use.

        Raises `ConfigurationError` without a key file and with a broker that others can reach.
        """
        if self.keys_file is not None:
            return Keys.load(self.keys_file)
        if not is_loopback(self.require_bootstrap()):
            raise ConfigurationError(
                f"the broker {self.bootstrap} can be reached by others, and there is no key file: make one with "
                "`perdure keys new FILE`, give it to every engine and worker, and set PERDURE_KEYS_FILE"
            )
        return Keys.load(shared_keys(self.data_dir))


SETTINGS = frozenset(f.name for f in fields(Settings))
"""The names of all settings."""


def shared_keys(data_dir: Path) -> Path:
    """The key file of a data directory, made if it is not there; of several processes that try, the first one wins."""
    path = data_dir.absolute() / "keys.json"
    if not path.exists():
        fresh = path.with_name(f"keys.{os.getpid()}")
        Keys.generate().save(fresh)
        try:
            os.link(fresh, path)
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
    return path


def dev_blobs(data_dir: Path) -> str:
    """Where a dev stack keeps values too large for a record."""
    return str(data_dir.absolute() / "blobs")


def nearest_data_dir(start: Path) -> Path:
    """The `.perdure` of `start` or of the nearest directory above that has one; without any, that of `start`."""
    for folder in (start, *start.parents):
        if (folder / DATA_DIR).is_dir():
            return folder / DATA_DIR
    return start / DATA_DIR


def dev_file(data_dir: Path) -> Path:
    """Where a running dev stack says how to reach it."""
    return data_dir / "dev.json"


def find_dev_stack(data_dir: Path) -> DevStack | None:
    """The dev stack that runs on a data directory; None when there is none, or its file was left by a dead one."""
    try:
        content = json.loads(dev_file(data_dir).read_text())
        stack = DevStack(
            bootstrap=content["bootstrap"],
            api=content["api"],
            data_dir=Path(content["data_dir"]),
            pid=int(content["pid"]),
            keys_file=Path(content["keys_file"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{dev_file(data_dir)} is no lock file of `perdure dev`; delete it: {error}"
        ) from error
    return stack if _lives(stack.pid) else None


def _lives(pid: int) -> bool:
    import psutil  # half as long to import as all the rest, for what only a dev stack's users ask

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def is_loopback(bootstrap: str) -> bool:
    """Whether every one of the servers can be reached from this machine only, as far as its name tells."""
    return all(_local(server.strip().rpartition(":")[0].strip("[]")) for server in bootstrap.split(","))


def _local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def file_settings(start: Path) -> dict[str, Any]:
    """The settings in the nearest configuration file; relative paths in it count from its directory."""
    for folder in (start, *start.parents):
        for name in ("perdure.toml", "pyproject.toml"):
            found = _read(folder / name)
            if found is not None:
                paths: dict[str, Any] = {n: folder / p for n, p in found.items() if n in _PATHS and isinstance(p, str)}
                if "://" not in str(found.get("blobs", "://")):
                    paths["blobs"] = str(folder / str(found["blobs"]))
                kafka = found.get("kafka", {})
                if not isinstance(kafka, Mapping):
                    raise ConfigurationError(f"{folder / name}: kafka is a table of librdkafka's options")
                return found | paths | {"kafka": _flattened(kafka)}
    return {}


_PATHS = ("keys_file", "data_dir", "state_dir", "checkpoint_dir")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = tomllib.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as TOML: {error}") from error
    table: dict[str, Any] | None = content.get("tool", {}).get("perdure")
    return content if table is None and path.name == "perdure.toml" else table


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What is set by name; Kafka's options have a way of their own."""
    names = {_PREFIX + name.upper(): name for name in SETTINGS if name != "kafka"}
    return {name: environment[variable] for variable, name in names.items() if variable in environment}


def _kafka_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """PERDURE_KAFKA__SASL__MECHANISM=PLAIN is the option sasl.mechanism."""
    return {
        name.removeprefix(_KAFKA_PREFIX).lower().replace("__", "."): value
        for name, value in environment.items()
        if name.startswith(_KAFKA_PREFIX)
    }


def _flattened(table: Mapping[str, Any]) -> dict[str, str]:
    """TOML's tables of tables as librdkafka's names: {"sasl": {"mechanism": ...}} is sasl.mechanism."""
    found: dict[str, str] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": text for inner, text in _flattened(value).items()}
        else:
            found[name] = str(value).lower() if isinstance(value, bool) else str(value)
    return found


def _path(kind: type, value: Any) -> Any:
    """What msgspec has no way of its own for. Raises `ValueError`, which it gives a place."""
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    raise ValueError(f"Expected a path, got {value!r}")


def _token(text: str) -> str:
    """A token without what a file or a secret ends with. Raises `ConfigurationError`, which does not show it."""
    token = text.strip()
    if bool(token) != bool(text) or not token.isascii() or not token.isprintable():
        raise ConfigurationError("setting 'api_token' (PERDURE_API_TOKEN): letters, digits and signs of ASCII only")
    return token


def _explain(error: msgspec.ValidationError) -> str:
    told, _, place = str(error).partition(" - at `$.")
    name = place.rstrip("`")
    return f"setting {name!r} ({_PREFIX}{name.upper()}): {told[:1].lower()}{told[1:]}"
