"""Engine and worker processes of a benchmark, in a namespace of its own on a running Kafka."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from benchmarks.measure import until
from perdure.schemas import ids
from perdure.schemas.signing import Keys
from perdure.streams.kafka_log import KafkaLog
from perdure.streams.topology import create_topics


class Hosts:
    """Processes by name, each with a state directory and a log file in `folder`."""

    def __init__(self, bootstrap: str, folder: Path, partitions: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.partitions = folder, partitions
        prefix = f"b{ids.new_local_id()[-6:]}."
        create_topics(bootstrap, prefix, partitions=partitions)
        self.log = KafkaLog(bootstrap, prefix)
        self.keys = Keys.generate()
        self.keys.save(folder / "keys.json")
        self._environment = os.environ | {
            "PERDURE_BOOTSTRAP": bootstrap, "PERDURE_NAMESPACE": prefix, "PERDURE_KEYS_FILE": str(folder / "keys.json"),
        }  # fmt: skip
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """`perdure COMMAND` with a state directory of this name; its log begins anew."""
        own = self._environment | {"PERDURE_STATE_DIR": str(self.state(name))} | environment
        with self._log_file(name).open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "perdure.cli", *command], env=own, stdout=output, stderr=output
            )
        self._running[name] = process
        return process

    def state(self, name: str) -> Path:
        """A host's state directory."""
        return self.folder / name

    def said(self, name: str) -> str:
        """What a process has said in its present life."""
        return self._log_file(name).read_text(errors="replace")

    def await_words(self, name: str, words: str, count: int = 1, timeout_s: float = 600.0) -> None:
        """Wait until it has said something so many times. Raises `TimeoutError`, and `RuntimeError` if it ends."""

        def heard() -> bool:
            if self._running[name].poll() is not None:
                raise RuntimeError(f"{name} has ended: {self.said(name)[-2_000:]}")
            return self.said(name).count(words) >= count

        until(heard, f"{words!r} of {name}", timeout_s, pause_s=0.02)

    def most_memory(self, name: str) -> float:
        """The most that a process has held in memory, MB."""
        status = Path(f"/proc/{self._running[name].pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def memory(self, name: str) -> float:
        """What a process and all below it hold now, shared pages counted once, MB."""
        root = psutil.Process(self._running[name].pid)
        return sum(p.memory_full_info().pss for p in [root, *root.children(recursive=True)]) / 1e6

    def pids(self) -> list[int]:
        """All processes, and all below them."""
        roots = [psutil.Process(p.pid) for p in self._running.values()]
        return [p.pid for root in roots for p in [root, *root.children(recursive=True)]]

    def stop(self, name: str) -> None:
        """SIGTERM, and wait."""
        process = self._running.pop(name)
        process.send_signal(signal.SIGTERM)
        process.wait(120)

    def kill(self, name: str) -> None:
        """SIGKILL, and wait."""
        process = self._running.pop(name)
        process.kill()
        process.wait(60)

    def forget(self, name: str) -> None:
        """Lose a host's disk."""
        shutil.rmtree(self.state(name))

    def close(self) -> None:
        """End what still runs."""
        for name in list(self._running):
            self.stop(name)

    def _log_file(self, name: str) -> Path:
        return self.folder / f"{name}.log"
