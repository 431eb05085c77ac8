"""JSON objects as dataclasses, nested ones too, with every field checked against its annotated type."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from moesim.traces import InputError

T = TypeVar("T")


def record(cls: type[T], data: Any, where: str) -> T:
    """Build the dataclass `cls` from a JSON object with exactly its fields; those with a default may be missing.

    Raises InputError naming the field, which lies at `where` ("" at the top).
    """
    if not isinstance(data, dict):
        raise InputError(f"field {where!r} must be an object, got {data!r}")
    prefix = f"{where}." if where else ""
    known = {f.name: f for f in fields(cast(Any, cls))}
    if unknown := sorted(data.keys() - known.keys()):
        raise InputError(f"unknown field {prefix + unknown[0]!r}")
    for name, f in known.items():
        if name not in data and f.default is MISSING and f.default_factory is MISSING:
            raise InputError(f"missing field {prefix + name!r}")
    hints = get_type_hints(cls)
    values = {name: _value(hints[name], value, prefix + name) for name, value in data.items()}
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(prefix + str(error)) from None


def _value(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`, or InputError naming the field."""
    if isinstance(kind, UnionType):
        if value is None:
            return None
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if is_dataclass(kind):
        return record(cast(type[Any], kind), value, where)
    if get_origin(kind) is dict and isinstance(value, dict):
        return {key: _value(get_args(kind)[1], item, f"{where}.{key}") for key, item in value.items()}
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_value(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    allowed = {float: (int, float), int: (int,), str: (str,), bool: (bool,)}.get(kind, ())
    if type(value) not in allowed:
        names = {float: "a number", int: "an integer", str: "a text", bool: "true or false"}
        raise InputError(f"field {where!r} must be {names.get(kind, 'a list or an object')}, got {value!r}")
    return value
