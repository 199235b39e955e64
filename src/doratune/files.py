"""Reading and writing adapter folders: whole files or none, and never pickle."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from doratune.errors import AdapterError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"


@contextlib.contextmanager
def writing(folder: Path, what: str) -> Iterator[Path]:
    """A temporary folder inside ``folder``; its files move to ``folder`` together when all are written.

    Raises:
        AdapterError: if the folder cannot be written to; nothing is left behind then.
    """
    staging = folder / f".{secrets.token_hex(4)}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
        for file in staging.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        for file in sorted(staging.iterdir()):
            os.replace(file, folder / file.name)
    except FileExistsError as error:
        raise AdapterError(f"cannot write {what}: {folder} is a file; name a folder") from error
    except OSError as error:
        raise AdapterError(f"cannot write {what} to {folder}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            for file in staging.iterdir():
                file.unlink()
            staging.rmdir()


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], metadata: dict[str, str]) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with writing(folder, "the adapter") as staging:
        try:
            save_file(tensors, staging / WEIGHTS, metadata={"format": "pt", **metadata})
        except SafetensorError as error:
            raise AdapterError(f"cannot write {folder / WEIGHTS}: {error}") from error
        (staging / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``.

    Raises:
        AdapterError: if there is no folder or file, or it is not a JSON object.
    """
    path = folder / CONFIG
    if not folder.exists():
        raise AdapterError(f"{folder} does not exist; name a folder with {CONFIG} and {WEIGHTS}")
    if not folder.is_dir():
        raise AdapterError(f"{folder} is a file; name the folder with {CONFIG} and {WEIGHTS}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{folder} has no {CONFIG}; it is not an adapter's folder") from error
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read ``adapter_model.safetensors``: tensors on the CPU, and the file's metadata.

    Raises:
        AdapterError: if the file is missing, truncated or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLED).exists():
            raise AdapterError(
                f"{folder} holds {PICKLED}, a pickle file, which can run code and is never read; "
                f"save the adapter as {WEIGHTS} with the program that made it"
            )
        raise AdapterError(f"{folder} has no {WEIGHTS}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}; it may be truncated or no safetensors file") from error
