"""An image to run Kafka from: the one that `docker-compose.yml` names, or a stand-in of the same Kafka.

The stand-in is made of what the embedded Kafka runs on, this machine's Java and the pinned jars, so that no registry is
needed. It is told its settings as the official image is: both leave that to Kafka's own `KafkaDockerWrapper`.
"""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import docker
from docker.errors import ImageNotFound

from perdure.connectors.java import find_java
from perdure.connectors.kafka_jars import KafkaJars, kafka_jars

IMAGE_VARIABLE = "PERDURE_TEST_KAFKA_IMAGE"
"""Names an image to use in place of the stand-in, such as `apache/kafka:4.2.2`."""
_LIBRARY = re.compile(r"(/\S+) \(0x")
_START = """#!/bin/sh
set -e
told=$(java -cp '/opt/kafka/libs/*' kafka.docker.KafkaDockerWrapper setup --default-configs-dir /etc/kafka/docker \\
  --mounted-configs-dir /mnt/shared/config --final-configs-dir /opt/kafka/config 2>&1) || case "$told" in
    *"already formatted"*) ;; # a broker that comes back, as the official image has it
    *) echo "$told"; exit 1 ;;
  esac
exec java -Xmx384m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 \\
  -Dlog4j2.configurationFile=/opt/kafka/config/log4j2.yaml -cp '/opt/kafka/libs/*' \\
  kafka.Kafka /opt/kafka/config/server.properties
"""
_LOG_SETTINGS = """Configuration:
  Appenders:
    Console:
      name: STDOUT
      PatternLayout: { pattern: "%d %p %c{1} %m%n" }
  Loggers:
    Root:
      level: INFO
      AppenderRef: { ref: STDOUT }
"""
_FILES = {
    "start.sh": _START,
    "etc/kafka/docker/server.properties": "",
    "etc/kafka/docker/log4j2.yaml": _LOG_SETTINGS,
    "etc/kafka/docker/tools-log4j2.yaml": _LOG_SETTINGS,
}
_NEEDLESS = (".zip", ".jsa", ".jmod")
"""Sources, shared classes, modules to build other Javas from."""
_FOLDERS = ("tmp", "mnt/shared/config", "opt/kafka/config", "var/lib/kafka/data")


def kafka_image() -> str:
    """The image's name; the stand-in is made at the first call on a machine (some 300 MB, seconds)."""
    given = os.environ.get(IMAGE_VARIABLE)
    if given:
        return given
    jars = kafka_jars()
    client = docker.from_env()
    try:
        name, tag = "perdure-test-kafka", f"{jars.version}-{jars.id}"
        try:
            client.images.get(f"{name}:{tag}")
        except ImageNotFound:
            with tempfile.TemporaryFile() as file:
                _pack(file, jars)  # type: ignore[arg-type]
                file.seek(0)
                changes = ['ENTRYPOINT ["/bin/sh", "/start.sh"]', "ENV PATH=/opt/java/bin"]
                client.api.import_image_from_data(file, repository=name, tag=tag, changes=changes)
        return f"{name}:{tag}"
    finally:
        client.close()


def _pack(file: BytesIO, jars: KafkaJars) -> None:
    home = find_java().path.resolve().parent.parent
    programs = [Path("/bin/sh"), home / "bin" / "java", *(home / "lib").rglob("*.so")]
    with tarfile.open(fileobj=file, mode="w", dereference=True) as tar:
        for folder in _FOLDERS:
            info = tarfile.TarInfo(folder)
            info.type, info.mode = tarfile.DIRTYPE, 0o1777
            tar.addfile(info)
        for name, text in _FILES.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(text.encode()), 0o755
            tar.addfile(info, BytesIO(text.encode()))
        tar.add("/bin/sh", "bin/sh")
        for path in sorted(home.rglob("*")):
            if path.is_file() and path.suffix not in _NEEDLESS:  # a link that leads nowhere is none
                tar.add(path, f"opt/java/{path.relative_to(home)}")
        for jar in jars.class_path:
            tar.add(jar, f"opt/kafka/libs/{jar.name}")
        for library in sorted({lib for program in programs for lib in _libraries(program, home)}):
            tar.add(library, library.lstrip("/"))


def _libraries(program: Path, home: Path) -> Iterator[str]:
    """What a program or library loads at its start, from outside of Java's own folder."""
    told = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    return (path for path in _LIBRARY.findall(told) if not Path(path).resolve().is_relative_to(home))
