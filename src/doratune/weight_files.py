"""Safetensors files of models and adapters, read one tensor at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from doratune.errors import AdapterError


def weight_files(source: Path) -> list[Path]:
    """The safetensors files of a model's folder.

    Raises:
        AdapterError: if there are none, or the index names one that is not there.
    """
    if source.is_file() and source.suffix == ".safetensors":
        return [source]
    if not source.is_dir():
        what = "is no safetensors file" if source.exists() else "does not exist"
        raise AdapterError(f"{source} {what}; name a folder with safetensors files")
    indices = sorted(source.glob("*.safetensors.index.json"))
    if indices:
        try:
            names = sorted(set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values()))
            files = [source / name for name in names]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterError(f"{indices[0]} cannot be read: {error}") from error
        missing = [f"{file.name}: named in {indices[0].name}, but not there" for file in files if not file.is_file()]
        if missing:
            raise AdapterError.of(f"{source} is incomplete", missing)
        return files
    whole = source / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(source.glob("*.safetensors"))
    if not files:
        pickled = next((file.name for end in ("bin", "pt", "pth") for file in sorted(source.glob(f"*.{end}"))), None)
        if pickled:
            raise AdapterError(
                f"{source} holds {pickled}, a pickle file, which can run code and is never read; "
                "save the model as safetensors with the program that made it"
            )
        raise AdapterError(f"{source} holds no safetensors file")
    return files


def header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of each tensor in a file.

    Raises:
        AdapterError: if the file is truncated or no safetensors file.
    """
    with opened(file) as mapped:
        found = {}
        for key in mapped.keys():  # noqa: SIM118
            view = mapped.get_slice(key)
            found[key] = (view.get_dtype(), view.get_shape())
        return found


def read_tensor(file: Path, key: str) -> Tensor:
    """One tensor, mapped; its memory goes with it."""
    with opened(file) as mapped:
        tensor: Tensor = mapped.get_tensor(key)
        return tensor


def read_metadata(file: Path) -> dict[str, str]:
    """What a file says about itself."""
    with opened(file) as mapped:
        return mapped.metadata() or {}


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file, as ``safe_open`` maps it.

    Raises:
        AdapterError: if it may not be read, is truncated or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file.open("rb").close()  # of what may not be read safetensors says that it is not there
        with safe_open(file, framework="pt") as mapped:
            yield mapped
    except PermissionError as error:
        raise AdapterError(f"{file} cannot be read: {error.strerror}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read: {error}; it may be truncated or no safetensors file") from error
