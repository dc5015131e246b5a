"""How a Python dataclass states an Avro record.

A record class is a frozen dataclass whose fields are `Annotated[type, "what the field means"]`. `avro_schema` derives
the Avro schema from it: the shipped `avro/<group>/<Name>.avsc` files are exactly that output (a test compares them),
so a program that knows only the files and a program that knows only the classes read the same bytes.

The dataclasses are frozen but not slotted: the codec makes them from the dict that it has read. They share methods that
`dataclass` would compile for each of them: a process that starts makes a hundred classes, a fifth of its imports.

Times are milliseconds since 1970 UTC, durations milliseconds, sizes bytes, unless a field's text says otherwise.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, FrozenInstanceError, dataclass, fields, is_dataclass
from operator import attrgetter
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class JsonText:
    """Marks `bytes` that hold canonical JSON text (Avro property `perdure: json`), or a reference to one that is too
    large for a record (`perdure.schemas.references`)."""


Json = Annotated[bytes, JsonText()]

T = TypeVar("T")
Schema = dict[str, Any]

_PRIMITIVES: dict[type, str] = {str: "string", int: "long", float: "double", bool: "boolean", bytes: "bytes"}
_registered: dict[str, type] = {}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def record(group: str) -> Callable[[type[T]], type[T]]:
    """Make a frozen dataclass of `cls` and register it as the Avro record `perdure.<group>.<Name>`."""

    def register(cls: type[T]) -> type[T]:
        made: Any = dataclass(init=False, repr=False, eq=False, kw_only=True)(cls)
        made.avro_name = f"perdure.{group}.{cls.__name__}"
        made.avro_group = group
        known = fields(made)
        made._names = tuple(f.name for f in known)
        made._values = attrgetter(*made._names) if known else _no_values
        made._given = {f.name: None if f.default is MISSING else f.default for f in known}
        made._made = tuple((f.name, f.default_factory) for f in known if f.default_factory is not MISSING)
        made._needed = frozenset(
            f.name for f in known if f.default is MISSING and f.default_factory is MISSING
        )  # fmt: skip
        for method in (_init, _repr, _eq, _hash, _setattr, _delattr):
            setattr(made, f"_{method.__name__}__", method)
        _registered[made.avro_name] = made
        return made  # type: ignore[no-any-return]

    return register


@dataclass_transform(frozen_default=True, kw_only_default=True)
def shared(cls: type[T]) -> type[T]:
    """Make a dataclass of the fields that several records begin with; it is none itself."""
    return dataclass(init=False, repr=False, eq=False, kw_only=True)(cls)


def _init(self: Any, **said: Any) -> None:
    cls = type(self)
    values = cls._given | said
    if len(values) != len(cls._names) or not said.keys() >= cls._needed:
        unknown, missing = sorted(said.keys() - set(cls._names)), sorted(cls._needed - said.keys())
        told = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has no {', '.join(unknown)}"] * bool(unknown)
        raise TypeError(f"{cls.__name__} {' and '.join(told)}")
    for name, factory in cls._made:
        if name not in said:
            values[name] = factory()
    self.__dict__.update(values)


def _no_values(_: Any) -> tuple[()]:
    return ()


def _repr(self: Any) -> str:
    return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self._names)})"


def _eq(self: Any, other: Any) -> bool:
    values = type(self)._values
    return bool(values(self) == values(other)) if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash(type(self)._values(self))


def _setattr(self: Any, name: str, value: Any) -> None:  # noqa: ARG001
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _delattr(self: Any, name: str) -> None:  # noqa: ARG001
    raise FrozenInstanceError(f"cannot delete field {name!r}")


def registered() -> dict[str, type]:
    """Every record class by its full Avro name."""
    return dict(_registered)


def avro_schema(cls: type) -> Schema:
    """The Avro schema of a record class; nested records are written out at their first use."""
    return _record(cls, set())


def field_types(cls: type) -> dict[str, Any]:
    """Field name -> resolved annotation, `Annotated` parts kept."""
    return get_type_hints(cls, include_extras=True)


def _record(cls: type, seen: set[str]) -> Schema:
    name: str = cls.avro_name  # type: ignore[attr-defined]
    seen.add(name)
    hints = field_types(cls)
    return {
        "type": "record",
        "name": name.rpartition(".")[2],
        "namespace": name.rpartition(".")[0],
        "doc": " ".join((cls.__doc__ or "").split()),
        "fields": [_field(f.name, hints[f.name], f.default, f.default_factory, seen) for f in fields(cls)],
    }


def _field(name: str, hint: Any, default: Any, factory: Any, seen: set[str]) -> Schema:
    inner, doc = _split(hint)
    out: Schema = {"name": name, "type": _type(inner, seen), "doc": doc}
    if factory is not MISSING:
        out["default"] = factory()
    elif default is not MISSING:
        out["default"] = default.decode("latin-1") if isinstance(default, bytes) else default
    return out


def _split(hint: Any) -> tuple[Any, str]:
    """The bare type and the field's text."""
    if get_origin(hint) is not Annotated:
        raise TypeError(f"a record field needs Annotated[type, text]: {hint!r}")
    base, *marks = get_args(hint)
    texts = [m for m in marks if isinstance(m, str)]
    rest = [m for m in marks if not isinstance(m, str)]
    if len(texts) != 1:
        raise TypeError(f"a record field needs exactly one text: {hint!r}")
    return (Annotated[base, *rest] if rest else base), texts[0]


def _type(hint: Any, seen: set[str]) -> Any:
    origin = get_origin(hint)
    if origin is Annotated:
        return {"type": "bytes", "perdure": "json"}
    if origin in (types.UnionType, typing.Union):
        arms = get_args(hint)
        return sorted((_type(a, seen) for a in arms), key=lambda a: a != "null")
    if origin in (list, tuple):
        return {"type": "array", "items": _type(get_args(hint)[0], seen)}
    if origin is dict:
        return {"type": "map", "values": _type(get_args(hint)[1], seen)}
    if hint is type(None):
        return "null"
    if isinstance(hint, type) and is_dataclass(hint):
        full: str = hint.avro_name  # type: ignore[attr-defined]
        return full if full in seen else _record(hint, seen)
    return _PRIMITIVES[hint]
