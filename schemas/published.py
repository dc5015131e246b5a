"""Whether a schema that somebody has published can be trusted as that of a record class in another build.

Everybody who may write `config` can publish one. So it has to be in the small language that `records.avro_schema`
writes, which has no recursion and no value without bytes outside of a union: no record of it can claim more than it
holds. And what it shares with this build's schema has to be of the same types.
"""

from __future__ import annotations

from typing import Any

_PRIMITIVES = frozenset(("null", "boolean", "long", "double", "bytes", "string"))
_OF_NODE = frozenset(("type", "name", "namespace", "doc", "fields", "items", "values", "perdure"))
_OF_FIELD = frozenset(("type", "name", "doc", "default"))
_DEEPEST = 20
Named = dict[str, dict[str, Any]]


def check_published(schema: Any, known: dict[str, Any]) -> None:
    """Hold a schema against this build's of the same name. Raises `ValueError`, `KeyError` or `TypeError` if it is none
    that another build would publish.
    """
    theirs: Named = {}
    ours: Named = {}
    _read(schema, theirs, 0, arm=True)
    _read(known, ours, 0, arm=True)
    _compare(schema, known, theirs, ours, set())


def _read(node: Any, found: Named, depth: int, *, arm: bool) -> None:
    """Refuse what `avro_schema` does not write. `found`: the records that were defined before, each of them once."""
    if depth > _DEEPEST:
        raise ValueError("nested too deep")
    if isinstance(node, list):
        for inner in node:
            _read(inner, found, depth + 1, arm=True)
        return
    if isinstance(node, str):
        free = node == "null" or (node in found and not found[node]["fields"])
        if node not in _PRIMITIVES | found.keys() or (free and not arm):
            raise ValueError(f"{node} is no type here")
        return
    if not isinstance(node, dict) or not node.keys() <= _OF_NODE:
        raise ValueError("what is to be a type is none")
    match node["type"]:
        case "array":
            _read(node["items"], found, depth + 1, arm=False)
        case "map":
            _read(node["values"], found, depth + 1, arm=False)
        case "bytes":
            pass
        case "record":
            _read_record(node, found, depth, arm=arm)
        case other:
            raise ValueError(f"{other!r:.100} is no type here")


def _read_record(node: dict[str, Any], found: Named, depth: int, *, arm: bool) -> None:
    name = f"{node['namespace']}.{node['name']}"
    if not name.startswith("perdure.") or name in found or not (node["fields"] or arm):
        raise ValueError(f"{name} is no record that can be defined here")
    for field in node["fields"]:
        if not field.keys() <= _OF_FIELD or not isinstance(field["name"], str):
            raise ValueError(f"{name} has a field that is none")
        _read(field["type"], found, depth + 1, arm=False)
    found[name] = node


def _compare(theirs: Any, ours: Any, named: Named, known: Named, seen: set[str]) -> None:
    """Refuse another type for what both have. Fields, and records in a union, may have been added or dropped."""
    if isinstance(theirs, list) and isinstance(ours, list):
        mine = {_kind(arm): arm for arm in ours}
        for arm in theirs:
            if _kind(arm) in mine:
                _compare(arm, mine[_kind(arm)], named, known, seen)
            elif not _kind(arm).startswith("perdure."):
                raise ValueError(f"a union has no {_kind(arm)} here")
        return
    if isinstance(theirs, list) or isinstance(ours, list) or _kind(theirs) != _kind(ours):
        raise ValueError("a field is of another type here")
    match _kind(theirs):
        case "array":
            _compare(theirs["items"], ours["items"], named, known, seen)
        case "map":
            _compare(theirs["values"], ours["values"], named, known, seen)
        case name if name in named and name not in seen:
            seen.add(name)
            mine = {field["name"]: field["type"] for field in known[name]["fields"]}
            for field in named[name]["fields"]:
                if field["name"] in mine:
                    _compare(field["type"], mine[field["name"]], named, known, seen)


def _kind(node: Any) -> str:
    """What tells types apart: the name of a record, else the word."""
    if isinstance(node, str):
        return node
    return f"{node['namespace']}.{node['name']}" if node["type"] == "record" else str(node["type"])
