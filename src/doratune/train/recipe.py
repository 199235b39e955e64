"""Recipes: TOML files with the same names as the flags."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from doratune.errors import AdapterError
from doratune.train.config import AdapterOptions, TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]


def load_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe: arguments for ``TrainConfig``, the adapter's options gathered under ``adapter``.

    Keys are the names of the flags, with ``_`` or ``-``; the adapter's may also stand in a table ``[adapter]``.
    Relative paths are taken from the working directory, as with flags.

    Raises:
        AdapterError: if the file cannot be read or is not TOML, or listing every unknown key and wrong type.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"recipe {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise AdapterError(f"recipe {path} is not TOML: {error}") from error
    problems: list[str] = []
    table = raw.pop("adapter", {})
    if not isinstance(table, dict):
        problems.append(f"adapter: expected a table, found {table!r}")
        table = {}
    run_types = get_type_hints(TrainConfig)
    adapter_types = {f.name: get_type_hints(AdapterOptions)[f.name] for f in dataclasses.fields(AdapterOptions)}
    del adapter_types["method"], run_types["adapter"], run_types["recipe"]
    run: dict[str, Any] = {}
    adapter: dict[str, Any] = {}
    entries = [*((key, value, False) for key, value in raw.items()), *((k, v, True) for k, v in table.items())]
    for key, value, inside in entries:
        name = key.replace("-", "_")
        home, hints = (adapter, adapter_types) if inside or name not in run_types else (run, run_types)
        if inside and name in run_types:
            problems.append(f"{key} is no option of the adapter: move it above the table [adapter]")
        elif name not in hints:
            close = difflib.get_close_matches(name, [*run_types, *adapter_types], n=1)
            problems.append(f"unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        elif name in home:
            problems.append(f"{key} is given twice")
        elif not fits(value, hints[name]):
            problems.append(f"{key}: expected {describe(hints[name])}, found {value!r}")
        else:
            home[name] = _converted(value, hints[name])
    if problems:
        raise AdapterError.of(f"recipe {path}", problems)
    if adapter:
        run["adapter"] = AdapterOptions(**adapter)
    return run


def fits(value: Any, hint: Any) -> bool:
    """Whether a TOML value can stand for a field of this type."""
    origin = get_origin(hint)
    if origin is Annotated:
        return fits(value, get_args(hint)[0])
    if origin is Literal:
        return value in get_args(hint)
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
        return " or ".join(describe(one) for one in get_args(hint) if one is not type(None))
    if origin in (tuple, Sequence):
        return f"a list of {describe(get_args(hint)[0])}s"
    if origin is Mapping:
        return f"a table of {describe(get_args(hint)[1])}s"
    names = {int: "whole number", float: "number", bool: "true or false", Path: "path"}
    return names.get(hint, "string")


def _converted(value: Any, hint: Any) -> Any:
    """TOML's lists and strings as the tuples and paths that the fields hold."""
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if hint is Path else value
