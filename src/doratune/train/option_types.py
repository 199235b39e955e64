"""Types of options: whether a value fits one, and what one is in words. Values are as TOML has them."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

NOTHING = "none"
"""Stands for None, which TOML does not have."""


def wrong_types(options: Any, *left_out: str) -> Iterator[str]:
    """Fields of a dataclass whose values do not fit; those left out are not looked at."""
    hints = get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value, hint = getattr(options, field.name), hints[field.name]
        absent = value is None and type(None) not in get_args(hint)
        if field.name not in left_out and (absent or not fits(_as_in_toml(value), hint)):
            yield f"{field.name}: expected {describe(hint).replace(repr(NOTHING), 'None')}, found {value!r}"


def _as_in_toml(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_in_toml(one) for one in value]
    return NOTHING if value is None else str(value) if isinstance(value, Path) else value


def fits(value: Any, hint: Any) -> bool:
    """Whether a TOML value can stand for a field of this type."""
    origin = get_origin(hint)
    if origin is Annotated:
        return fits(value, get_args(hint)[0])
    if origin is Literal:
        return value in get_args(hint)
    if hint is type(None):
        return value == NOTHING
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in get_args(hint))
    if origin in (tuple, Sequence):
        return isinstance(value, list) and all(fits(item, get_args(hint)[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, dict) and all(fits(item, get_args(hint)[1]) for item in value.values())
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    if hint is Path:
        return isinstance(value, str)
    return isinstance(value, (int, float) if hint is float else hint)


def describe(hint: Any) -> str:
    """A type in words."""
    origin = get_origin(hint)
    if origin is Annotated:
        return describe(get_args(hint)[0])
    if origin is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(one) for one in get_args(hint))
    if origin in (tuple, Sequence):
        one = describe(get_args(hint)[0])
        return f"a list, each {one}" if one.startswith("one of") else f"a list of {one}s"
    if origin is Mapping:
        return f"a table of {describe(get_args(hint)[1])}s"
    names = {type(None): repr(NOTHING), int: "whole number", float: "number", bool: "true or false", Path: "path"}
    return names.get(hint, "string")


def converted(value: Any, hint: Any) -> Any:
    """TOML's lists and strings as the tuples and paths that the fields hold."""
    if value == NOTHING and type(None) in get_args(hint):
        return None
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if hint is Path else value
