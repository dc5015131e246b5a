"""Who this process is: a host id kept in the state directory, and a numbered slot held until the process ends.

Two unnamed workers of one host take host slots 0 and 1. When one of them restarts it takes the same slot again and is
the same worker to the engine: its former session ends at once instead of after a lease.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from pathlib import Path

from perdure.schemas.errors import ConfigurationError

SLOTS_MAX = 10_000


def host_id(state_dir: Path) -> str:
    """The host's random id, made at the first call. Raises `ConfigurationError` if the directory cannot be used."""
    path = state_dir / "host-id"
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _create(path, str(uuid.uuid4()))
        return str(uuid.UUID(path.read_text().strip()))
    except OSError as error:
        raise ConfigurationError(f"state directory {state_dir} is unusable: {error.strerror}; take another") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} holds no host id; delete it, and a new one is made") from error


def _create(path: Path, text: str) -> None:
    """Write the file whole or not at all; of several processes that try, the first one wins."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(text + "\n")
    try:
        os.link(fresh, path)
    except FileExistsError:
        pass
    finally:
        fresh.unlink()


class HostSlot:
    """A numbered slot of this host, held by a file lock until `release` or the end of the process, however it ends."""

    def __init__(self, state_dir: Path, kind: str) -> None:
        """Take the first free slot among those of `kind`; does not wait. Raises `ConfigurationError`."""
        folder = state_dir / f"{kind}-slots"
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(SLOTS_MAX):
            descriptor = os.open(folder / str(number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            self.number = number
            self._descriptor = descriptor
            return
        raise ConfigurationError(f"all {SLOTS_MAX:,} slots in {folder} are taken")

    def release(self) -> None:
        """Let another process have the slot."""
        os.close(self._descriptor)


def worker_name(host: str, slot: HostSlot) -> str:
    """The id of an unnamed worker."""
    return f"{host[:8]}-w{slot.number}"
