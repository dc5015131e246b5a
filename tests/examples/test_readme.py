"""The README's task, as it stands there."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

from perdure.testing import Kit

README = Path(__file__).parents[2] / "README.md"


def test_the_task_of_the_readme_runs(perdure_kit: Callable[..., Kit], tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    code = code.replace("process_large_dataset", "task_of_the_readme")  # the examples have a task of that name too
    source, dataset = tmp_path / "readme_tasks.py", tmp_path / "large.csv"
    source.write_text(code)
    dataset.write_text("amount\n" + "".join(f"{n}\n" for n in range(1, 251)))
    spec = importlib.util.spec_from_file_location(source.stem, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handle = perdure_kit([module]).submit("task_of_the_readme", {"dataset_path": str(dataset)})
    assert handle.result() == {"sum": 31_375}
    assert (handle.status().units_done, handle.status().units_total) == (3, 3)
