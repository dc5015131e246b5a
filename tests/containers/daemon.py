"""Whether a Docker daemon listens here."""

from __future__ import annotations

import os
import socket

import pytest

_UNIX = "unix://"


def _listens() -> bool:
    """At its own place, or where DOCKER_HOST says: an address on the network is taken at its word."""
    host = os.environ.get("DOCKER_HOST", f"{_UNIX}/var/run/docker.sock")
    if not host.startswith(_UNIX):
        return True
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(host.removeprefix(_UNIX))
    except OSError:
        return False
    return True


needs_docker = pytest.mark.skipif(not _listens(), reason="no Docker daemon listens here")
