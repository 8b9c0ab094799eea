"""Values to plain data that JSON can hold, and back, by their types.

Everything in a plan is a frozen dataclass or a named tuple of numbers, words, tuples, mappings and more of the same. So
the types say how to read what was written, and no class needs a reader of its own:

    restore(Plan, json.loads(json.dumps(plain(plan)))) == plan
"""

import collections.abc
import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

Value = TypeVar("Value")


def plain(value: Any) -> Any:
    """`value` in dicts, lists, strings and numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value) if _is_saved(field)
        }
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(part) for name, part in value._asdict().items()}  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON: {value!r}")


def restore(kind: type[Value], data: Any, where: str = "") -> Value:
    """The value of type `kind` that `plain` made `data` of; `where` names it in errors."""
    return _restore(kind, data, where or getattr(kind, "__name__", str(kind)))


def _restore(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if origin in (Union, types.UnionType):
        return _restore_one_of(arguments, data, where)
    if origin is Literal:
        if data not in arguments:
            raise ValueError(f"{where}={data!r} is none of {', '.join(map(repr, arguments))}.")
        return data
    if dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"):
        return _restore_record(kind, data, where)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        _expect(data in list(kind), f"one of {', '.join(member.value for member in kind)}", data, where)
        return kind(data)
    if origin is tuple:
        _expect(isinstance(data, list), "a list", data, where)
        kinds = [arguments[0]] * len(data) if arguments[1:] == (...,) else arguments
        _expect(len(data) == len(kinds), f"of {len(kinds)} parts", data, where)
        return tuple(_restore(k, part, f"{where}[{i}]") for i, (k, part) in enumerate(zip(kinds, data, strict=True)))
    if origin in (dict, collections.abc.Mapping):
        _expect(isinstance(data, dict), "an object", data, where)
        return {key: _restore(arguments[1], part, f"{where}.{key}") for key, part in data.items()}
    if kind is float:
        _expect(isinstance(data, int | float) and not isinstance(data, bool), "a number", data, where)
        return data  # JSON writes 2.0 and 2 apart, and so do we
    _expect(type(data) is kind, f"of type {getattr(kind, '__name__', kind)}", data, where)
    return data


def _restore_one_of(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and types.NoneType in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not types.NoneType)
    exact = [kind for kind in kinds if isinstance(kind, type) and type(data) is kind]
    return _restore(exact[0] if exact else kinds[-1], data, where)


def _restore_record(kind: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), "an object", data, where)
    hints, needed = _fields(kind)
    unknown, missing = [name for name in data if name not in hints], [name for name in needed if name not in data]
    if unknown or missing:
        raise ValueError(
            f"{where} has {f'unknown fields {unknown}' if unknown else f'no {missing}'}: "
            "it was written by another release, or is damaged."
        )
    return kind(**{name: _restore(hints[name], part, f"{where}.{name}") for name, part in data.items()})


@functools.lru_cache
def _fields(kind: Any) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The types of a record's fields, and those that have no default."""
    hints = typing.get_type_hints(kind)
    if not dataclasses.is_dataclass(kind):
        return {name: hints[name] for name in kind._fields}, tuple(
            name for name in kind._fields if name not in kind._field_defaults
        )
    saved = [field for field in dataclasses.fields(kind) if _is_saved(field)]
    return {field.name: hints[field.name] for field in saved}, tuple(
        field.name
        for field in saved
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )


def _is_saved(field: dataclasses.Field[Any]) -> bool:
    return field.init


def _expect(met: bool, what: str, data: Any, where: str) -> None:
    if not met:
        raise ValueError(f"{where} must be {what}, not {data!r}.")
