"""Parsed JSON or TOML -> frozen dataclasses. All wrong fields are reported at once."""

import dataclasses
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


def decode(cls: type[T], raw: object, problems: list[str], where: str = "") -> T | None:
    """Build the dataclass `cls` from `raw`; on any problem append to `problems` and return None.

    Understands nested dataclasses, tuple[X, ...], dict[str, X], Literal, X | None, bool, int, float
    and str. Where a float is expected, an int is accepted. Fields with a default can be absent.
    """
    value = _decode(cls, raw, where, problems)
    return None if problems else typing.cast(T, value)


def _decode(kind: Any, raw: object, where: str, problems: list[str]) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(typing.cast(type, kind), raw, where, problems)
    if origin in (types.UnionType, typing.Union):
        if raw is None and type(None) in args:
            return None
        return _decode(next(a for a in args if a is not type(None)), raw, where, problems)
    if origin is typing.Literal:
        if raw not in args:
            problems.append(f"{where} is {raw!r}, expected one of {', '.join(map(repr, args))}")
        return raw
    if origin is tuple and isinstance(raw, list | tuple):
        return tuple(_decode(args[0], x, f"{where}[{i}]", problems) for i, x in enumerate(raw))
    if origin is dict and isinstance(raw, dict):
        return {k: _decode(args[1], x, f"{where}.{k}", problems) for k, x in raw.items()}
    if isinstance(raw, bool):
        if kind is bool:
            return raw
    elif kind is float and isinstance(raw, int | float) and abs(raw) < 2**1023:
        return float(raw)
    elif kind in (int, float, str) and isinstance(raw, kind):
        return raw
    wanted = {tuple: "a list", dict: "a table"}.get(origin) or getattr(kind, "__name__", str(kind))
    problems.append(f"{where} is {raw!r}, expected {wanted}")
    return None


def _decode_dataclass(cls: type, raw: object, where: str, problems: list[str]) -> Any:
    if not isinstance(raw, dict):
        problems.append(f"{where or 'the document'} is {raw!r}, expected a table")
        return None
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    dot = f"{where}." if where else ""
    problems += [f"unknown field {dot}{key}" for key in raw if key not in fields]
    values: dict[str, Any] = {}
    for name, f in fields.items():
        if name in raw:
            values[name] = _decode(hints[name], raw[name], dot + name, problems)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            problems.append(f"missing field {dot}{name}")
    return None if problems else cls(**values)


def encode(value: Any) -> Any:
    """The inverse: dataclasses, tuples and dicts to what json.dump takes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [encode(x) for x in value]
    if isinstance(value, dict):
        return {k: encode(x) for k, x in value.items()}
    return value
