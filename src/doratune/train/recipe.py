"""Recipes: TOML files with the same names as the flags."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from doratune import __version__
from doratune.errors import AdapterError
from doratune.files import write_whole
from doratune.train.config import ADAPTER_OPTIONS, AdapterOptions, TrainConfig, comparable
from doratune.train.option_types import NOTHING, converted, describe, fits
from doratune.train.start import decided, resolved

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]


SHIPPED = Path(__file__).parents[1] / "recipes"
NOT_IN_RECIPES = ("adapter", "recipe", "print_recipe")
"""Fields of TrainConfig that are no keys of a recipe."""


def shipped() -> list[str]:
    """Names of the recipes that come with doratune."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of a shipped one.

    Raises:
        AdapterError: if there is neither, listing the shipped ones.
    """
    path = Path(name).expanduser()
    if path.is_file() or path.suffix == ".toml" or "/" in name:
        return path
    if name in shipped():
        return SHIPPED / f"{name}.toml"
    raise AdapterError(f"recipe {name!r} is no file, and no shipped recipe; shipped are {', '.join(shipped())}")


def load_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe: arguments for ``TrainConfig``, the adapter's options gathered under ``adapter``.

    Keys are the names of the flags, with ``_`` or ``-``; the adapter's may also stand in a table ``[adapter]``.
    Relative paths are taken from the working directory, as with flags.

    Raises:
        AdapterError: if the file cannot be read or is not TOML, or listing every unknown key and wrong type.
    """
    return from_toml(read_toml(path), path)


def read_toml(path: Path) -> dict[str, Any]:
    """What a recipe says, unchecked.

    Raises:
        AdapterError: if the file cannot be read or is not TOML.
    """
    try:
        found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise AdapterError(f"recipe {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise AdapterError(f"recipe {path} is not TOML: {error}") from error
    return found


def from_toml(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Arguments for ``TrainConfig`` from what a recipe says.

    Raises:
        AdapterError: listing every unknown key and wrong type.
    """
    problems: list[str] = []
    table = raw.get("adapter", {})
    if not isinstance(table, dict):
        problems.append(f"adapter: expected a table, found {table!r}")
        table = {}
    run_types = get_type_hints(TrainConfig)
    adapter_types = {name: hint for name, hint in get_type_hints(AdapterOptions).items() if name in ADAPTER_OPTIONS}
    for name in NOT_IN_RECIPES:
        del run_types[name]
    run: dict[str, Any] = {}
    adapter: dict[str, Any] = {}
    given = [(key, value, False) for key, value in raw.items() if key != "adapter"]
    for key, value, inside in [*given, *((key, value, True) for key, value in table.items())]:
        name = key.replace("-", "_")
        home, hints = (adapter, adapter_types) if inside or name not in run_types else (run, run_types)
        if inside and name in run_types:
            problems.append(f"{key} is no option of the adapter: move it above the table [adapter]")
        elif name == "compare" and isinstance(value, dict):
            problems.append("compare: this recipe is for doratune compare; to train with it leave the table out")
        elif name not in hints:
            close = difflib.get_close_matches(name, [*run_types, *adapter_types], n=1)
            problems.append(f"unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        elif name in home:
            problems.append(f"{key} is given twice")
        elif not fits(value, hints[name]):
            problems.append(f"{key}: expected {describe(hints[name])}, found {value!r}")
        else:
            home[name] = converted(value, hints[name])
    if problems:
        raise AdapterError.of(f"recipe {path}", problems)
    if adapter:
        run["adapter"] = AdapterOptions(**adapter)
    return run


def entries(config: TrainConfig) -> dict[str, Any]:
    """Every option of a run by its key in a recipe, the adapter's among them."""
    run = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in NOT_IN_RECIPES}
    return {**run, **{name: getattr(config.adapter, name) for name in ADAPTER_OPTIONS}}


def save_recipe(path: Path, config: TrainConfig) -> None:
    """Write all options of a run as a recipe that repeats it."""
    values = {key: value for key, value in entries(config).items() if key != "resume"}
    lines = [
        f"# All options of this run, by doratune {__version__}. To repeat it: doratune train --recipe THIS --output NEW"
    ]
    write_whole(path, "\n".join([*lines, *(f"{key} = {as_toml(value)}" for key, value in values.items())]) + "\n")


def differences(path: Path, config: TrainConfig) -> list[str]:
    """Options that are not as in a recipe that was saved, one line each."""
    saved = entries(TrainConfig(**load_recipe(path)))
    ignored = ("resume", "output")
    return [
        f"{key} was {as_toml(saved[key])}, is {as_toml(value)}"
        for key, value in entries(config).items()
        if key not in ignored and as_toml(value) != as_toml(saved[key])
        if key not in ADAPTER_OPTIONS or comparable(value) != comparable(saved[key])
    ]


def explain(config: TrainConfig, flags: Collection[str]) -> str:
    """All options as a recipe, each with where its value comes from: start_from, a flag, the recipe or default."""
    given: set[str] = set()
    if config.recipe is not None:
        raw = read_toml(find_recipe(config.recipe))
        given = {key.replace("-", "_") for key in (*raw, *raw.get("adapter", {}))}
    lines = []
    sources = {"start_from": decided(config), "flag": flags, "recipe": given}
    for key, value in entries(resolved(config)).items():
        source = next((source for source, keys in sources.items() if key in keys), "default")
        lines.append((f"{key} = {as_toml(value)}", source))
    width = max(len(line) for line, _ in lines if len(line) < 60)
    return "\n".join(f"{line:<{width}}  # {source}" for line, source in lines)


def as_toml(value: Any) -> str:
    """A value of an option as TOML."""
    if value is None:
        return json.dumps(NOTHING)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {as_toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False)
    return "[" + ", ".join(as_toml(one) for one in value) + "]"
