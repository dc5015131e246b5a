"""Whether a Docker daemon answers here."""

from __future__ import annotations

from functools import cache

import docker
import pytest
from docker.errors import DockerException


@cache
def _answers() -> bool:
    try:
        client = docker.from_env(timeout=5)
        client.close()
    except DockerException:
        return False
    return True


needs_docker = pytest.mark.skipif(not _answers(), reason="no Docker daemon answers here")
