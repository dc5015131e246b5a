"""Writes connectors/kafka_jars.lock.json: the pinned jars of the embedded Kafka.

    python tools/lock_kafka_jars.py

Maven works out the closure (`mvn` must be on PATH; a temporary pom and local repository are used, so nothing but the
lock file changes), and each file it fetched is hashed. Edit the versions below, run, read the
difference, run the tests.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from pathlib import Path

KAFKA = "4.2.2"
ROOTS = (
    ("org.apache.kafka", "kafka_2.13", KAFKA),
    ("org.apache.logging.log4j", "log4j-slf4j-impl", "2.25.4"),  # Kafka pulls slf4j 1.7; without a binding: no logs
)
LOCK_FILE = Path(__file__).parents[1] / "connectors" / "kafka_jars.lock.json"
_LISTED = re.compile(r"^\s+([\w.-]+):([\w.-]+):jar:([\w.-]+):(?:compile|runtime)", re.MULTILINE)


def main() -> None:
    """Resolve, hash, write; raises CalledProcessError when Maven fails."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [_row(Path(folder, "repository"), *found) for found in _closure(Path(folder))]
    lock = {"kafka": KAFKA, "jars": sorted(rows, key=lambda row: (row["group"], row["artifact"]))}
    LOCK_FILE.write_text(json.dumps(lock, indent=1) + "\n", encoding="utf-8")
    print(f"{LOCK_FILE.name}: {len(rows)} jars, {sum(int(row['size']) for row in rows) / 1e6:.1f} MB")


def _closure(folder: Path) -> list[tuple[str, str, str]]:
    dependencies = "".join(
        f"<dependency><groupId>{group}</groupId><artifactId>{artifact}</artifactId><version>{version}</version></dependency>"
        for group, artifact, version in ROOTS
    )
    (folder / "pom.xml").write_text(
        "<project><modelVersion>4.0.0</modelVersion>"
        "<groupId>perdure</groupId><artifactId>lock</artifactId><version>1</version>"
        f"<dependencies>{dependencies}</dependencies></project>",
        encoding="utf-8",
    )
    listing = folder / "list.txt"
    subprocess.run(
        ["mvn", "-q", "-B", f"-Dmaven.repo.local={folder / 'repository'}", "dependency:list", "-DincludeScope=runtime",
         f"-DoutputFile={listing}"],
        cwd=folder,
        check=True,
    )  # fmt: skip
    return _LISTED.findall(listing.read_text(encoding="utf-8"))


def _row(repository: Path, group: str, artifact: str, version: str) -> dict[str, str | int]:
    content = (repository / group.replace(".", "/") / artifact / version / f"{artifact}-{version}.jar").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return {"group": group, "artifact": artifact, "version": version, "sha256": digest, "size": len(content)}


if __name__ == "__main__":
    main()
