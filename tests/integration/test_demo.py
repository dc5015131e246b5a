"""`perdure demo` as a newcomer runs it: the hardest code base is the smallest one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240)]


def test_a_single_file_survives_three_kills(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "one.py").write_text("def f():\n    return 1\n")
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PERDURE_")}
    command = [sys.executable, "-m", "perdure.cli", "demo", "--path", "code", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["proof"]["holds"]
    assert (told["proof"]["recorded"], told["proof"]["kills"], told["proof"]["duplicates"]) == (1, 3, 0)
    assert told["result"]["packages"] == {"(top level)": {"files": 1, "lines": 2, "functions": 1}}
    assert "proved: files 1, recorded steps 1, executions 3, kills survived 3, duplicates 0\n" in done.stderr
    assert done.stderr.count("SIGKILL to ") == 3
