"""Files that are there whole, on the disk, or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from perdure.schemas.errors import ConfigurationError, InfrastructureError, Unreachable

DRAFT = ".draft-"
_WRONG = frozenset({
    errno.EACCES, errno.EPERM, errno.EEXIST, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EROFS, errno.ENAMETOOLONG,
})  # fmt: skip
"""Not what a store makes: somebody has put another thing in its place, or has closed it."""


def kind_of(error: OSError) -> type[InfrastructureError]:
    """What an `OSError` means to who needs the file: that somebody has to put something right, or that it may pass."""
    return ConfigurationError if error.errno in _WRONG else Unreachable


def write(path: Path, data: bytes, draft: str = DRAFT) -> None:
    """Write a file (0600), replacing what is there; it survives a crash of the machine from here on.

    `draft`: how the name of its unfinished self begins, which a crash leaves behind. Raises `OSError`.
    """
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=draft)
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.rename(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Have the names in a directory on the disk. Raises `OSError`."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
