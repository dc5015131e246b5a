"""Files that are there whole, on the disk, or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

DRAFT = ".draft-"


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
