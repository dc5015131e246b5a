"""What the documents name exists: files, folders, tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"])
_HOUSE = "perdure|schemas|streams|projections|connectors|tests|docs|examples|benchmarks|tools"
_NAMED = re.compile(rf"`((?:{_HOUSE})/[\w./-]*)(?:::(\w+))?`")


def missing(text: str) -> list[str]:
    """What a document's text names and is not there."""
    return [path + (f"::{name}" if name else "") for path, name in _NAMED.findall(text) if not exists(path, name)]


def exists(path: str, name: str) -> bool:
    """Whether a file or folder is there, and if a name is given, at the top level of the module."""
    place = ROOT / path
    if not name:
        return place.exists()
    defined = re.compile(rf"^(?:(?:async )?def|class) {name}\b|^{name} = ", re.MULTILINE)
    return place.is_file() and defined.search(place.read_text()) is not None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_what_a_document_names_exists(document: Path) -> None:
    assert missing(document.read_text()) == []


def test_a_name_that_is_not_there_is_found() -> None:
    text = "`tests/test_docs.py::missing`, `streams/`, `tests/test_docs.py::gone`, `streams/gone.py`, `no/path.py`"
    assert missing(text) == ["tests/test_docs.py::gone", "streams/gone.py"]


def test_every_guarantee_names_its_tests_or_is_not_built() -> None:
    rows = re.findall(r"^\| (G\d) \|.*\| (.*) \|$", (ROOT / "docs" / "guarantees.md").read_text(), re.MULTILINE)
    assert [number for number, _ in rows] == [f"G{i}" for i in range(1, 10)]
    for number, held_by in rows:
        names = [name for _, name in _NAMED.findall(held_by)]
        assert held_by == "not built yet" if not names else all(names), f"{number} is held by whole files: {held_by}"
