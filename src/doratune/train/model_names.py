"""Which model is meant: a folder, or a name on the hub; found out without loading it."""

from __future__ import annotations

import os
from pathlib import Path

from doratune.files import CONFIG, read_config
from doratune.hub import is_path
from doratune.train.information import Information

NAMELESS = "{} does not name its base model; give it with --base"


def model_problem(name: str) -> str | None:
    """What is wrong with a model's name as far as one can see without loading it, or None."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            return f"model {name}: the folder has no config.json; name the folder of a transformers model"
        return None
    if folder.exists():
        return f"model {name} is a file; name the folder of a transformers model"
    if is_path(name):
        return f"model {name}: no such folder"
    return None


def is_model(folder: Path) -> bool:
    """Whether this is a folder of a whole model rather than of an adapter, beside which Axolotl puts a config.json."""
    return (folder / "config.json").is_file() and not (folder / CONFIG).is_file()


def place_of(name: str) -> str:
    """Where a model is: one folder may have several names."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.exists() else name


def base_name(folder: str | os.PathLike[str], given: str | None = None) -> str | None:
    """The base model of an adapter's folder: the one given, else the one that PEFT's file or ``doratune.json`` names.

    A relative path is taken from the working directory, as PEFT does, else from the adapter's folder.

    Raises:
        AdapterError: if the folder holds no adapter, or one of the two files is broken.
    """
    raw, about = read_config(Path(folder)), Information.load(folder)
    if given:
        return given
    name = str(raw.get("base_model_name_or_path") or (about.base if about else None) or "")
    return found_beside(Path(folder), name) if name else None


def found_beside(folder: Path, name: str) -> str:
    """The base model that an adapter's folder names; a path that is nowhere else may start from that folder."""
    beside = folder / name
    return str(beside) if not Path(name).expanduser().exists() and beside.is_dir() else name
