"""Whether a schema that somebody has published can be trusted as that of a record class in another build.

Everybody who may write `config` can publish one. So its fields have to be of the types that this build knows under
their names, and no record of it may claim more than its bytes hold: a list of nothings has any length in ten bytes.
"""

from __future__ import annotations

from typing import Any

from fastavro import parse_schema

_PRIMITIVES = frozenset(("null", "boolean", "int", "long", "float", "double", "bytes", "string"))
Named = dict[str, Any]


def check_published(schema: dict[str, Any], known: dict[str, Any]) -> None:
    """Hold a schema against this build's of the same name. Raises `ValueError`, or what fastavro raises for what is no
    schema at all.
    """
    theirs: Named = {}
    ours: Named = {}
    parsed, of_ours = parse_schema(schema, theirs), parse_schema(known, ours)
    _refuse_free(parsed, theirs, set(), ())
    _refuse_other(parsed, of_ours, theirs, ours, set())


def _refuse_free(schema: Any, named: Named, seen: set[str], inside: tuple[str, ...]) -> None:
    """Refuse recursion, and items that take no bytes."""
    schema = _resolved(schema, named)
    if isinstance(schema, list):
        for arm in schema:
            _refuse_free(arm, named, seen, inside)
        return
    match schema["type"]:
        case "array" | "map" as kind:
            item = schema["items" if kind == "array" else "values"]
            _refuse_free(item, named, seen, inside)
            if _is_free(item, named):
                raise ValueError(f"the items of an {kind} take no bytes")
        case "record":
            name = schema["name"]
            if name in inside:
                raise ValueError(f"{name} holds itself")
            if name not in seen:
                for field in schema["fields"]:
                    _refuse_free(field["type"], named, seen, (*inside, name))
                seen.add(name)


def _is_free(schema: Any, named: Named) -> bool:
    """Whether each value takes no bytes. Of a schema without recursion."""
    schema = _resolved(schema, named)
    if isinstance(schema, list):
        return False
    match schema["type"]:
        case "null":
            return True
        case "fixed":
            return bool(schema["size"] == 0)
        case "record":
            return all(_is_free(field["type"], named) for field in schema["fields"])
        case _:
            return False


def _refuse_other(theirs: Any, ours: Any, named: Named, known: Named, seen: set[tuple[str, str]]) -> None:
    """Refuse another type for what both have. Fields, and records in a union, may have been added or dropped."""
    theirs, ours = _resolved(theirs, named), _resolved(ours, known)
    if isinstance(theirs, list) and isinstance(ours, list):
        mine = {_kind(arm, known): arm for arm in ours}
        for arm in theirs:
            kind = _kind(arm, named)
            if kind in mine:
                _refuse_other(arm, mine[kind], named, known, seen)
            elif kind in _PRIMITIVES or kind in ("array", "map"):
                raise ValueError(f"{kind} in a union that has no such arm here")
        return
    if isinstance(theirs, list) or isinstance(ours, list) or _kind(theirs, named) != _kind(ours, known):
        raise ValueError("a field is of another type here")
    if theirs.get("logicalType") != ours.get("logicalType") or theirs.get("size") != ours.get("size"):
        raise ValueError("a field means something else here")
    match theirs["type"]:
        case "array":
            _refuse_other(theirs["items"], ours["items"], named, known, seen)
        case "map":
            _refuse_other(theirs["values"], ours["values"], named, known, seen)
        case "record" if (pair := (theirs["name"], ours["name"])) not in seen:
            seen.add(pair)
            mine = {field["name"]: field["type"] for field in ours["fields"]}
            for field in theirs["fields"]:
                if field["name"] in mine:
                    _refuse_other(field["type"], mine[field["name"]], named, known, seen)


def _kind(schema: Any, named: Named) -> str:
    """What tells the arms of a union apart: the name of what has one, else the type."""
    schema = _resolved(schema, named)
    return str(schema.get("name", schema["type"]))


def _resolved(schema: Any, named: Named) -> Any:
    """The schema itself: a list of arms, or a dictionary whose type is a word."""
    while not isinstance(schema, list):
        if isinstance(schema, str):
            if schema in _PRIMITIVES:
                return {"type": schema}
            schema = named[schema]
        elif isinstance(schema["type"], str) and (schema["type"] in _PRIMITIVES or schema["type"] not in named):
            return schema
        else:
            schema = schema["type"]
    return schema
