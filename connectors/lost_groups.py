"""What a broker's log says of consumer groups that the broker has lost, and will not find again by itself.

Seen with Kafka 4.2 after kills of a broker: it begins to load a group coordinator, gives the partition's leadership up
and takes it again, and begins to load it once more. Nothing stops the first load, whose end counts as that of the
second; the coordinator then finds itself out of step with its log, fails, and stays so: its groups take no members in
until the broker is started again, which loads them whole.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

_SAID = re.compile(
    r"(?:(?P<lost>Failed to load metadata from|The state machine of the coordinator)|Finished loading of metadata from)"
    r" (?P<where>__consumer_offsets-\d+)"
)


class LostGroups:
    """Follows the log of one run of a broker."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._read = 0
        self._lost: dict[str, str] = {}

    def look(self) -> list[str]:
        """The lines by which coordinators were lost that have not been loaded since. Those last said may be loading
        again: that takes seconds at the most.
        """
        for line in self._news():
            found = _SAID.search(line)
            if found is None:
                continue
            if found["lost"]:
                self._lost[found["where"]] = line[:500]
            else:
                self._lost.pop(found["where"], None)
        return list(self._lost.values())

    def _news(self) -> list[str]:
        """Whole lines that were not read yet."""
        with suppress(FileNotFoundError), self._log.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._read:  # the log has begun a new file
                self._read = 0
            file.seek(self._read)
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read += len(whole)
            return whole.decode(errors="replace").splitlines()
        return []
