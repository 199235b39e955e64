"""Reading and writing adapter folders and small files: whole files or none, and never pickle."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from doratune.errors import AdapterError
from doratune.weight_files import opened

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
MLX_WEIGHTS = "adapters.safetensors"
"""The weights of an adapter of Apple's mlx-lm, whose options have the same name as PEFT's."""

DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
"""An adapter of an image generator, alone in its folder."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A text file that takes its name when all is written: a run killed meanwhile leaves the old one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    with whole_file(path) as file:
        file.write(text)


def output_problem(folder: Path) -> str | None:
    """Why an output folder cannot be made or written to, as far as one can see beforehand; None if it can."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        return f"output {folder}{'' if there == folder else f': {there}'} is a file; name a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"output {folder}: {there} is not writable; name another folder"
    return None


@contextlib.contextmanager
def writing(folder: Path, what: str) -> Iterator[Path]:
    """A temporary folder inside ``folder``; its files move to ``folder`` together when all are written.

    Raises:
        AdapterError: if the folder cannot be written to; what was there before is still there then, and nothing else.
    """
    staging = folder / f".{secrets.token_hex(4)}.partial"
    fresh = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
        _publish(staging, folder)
    except OSError as error:
        reason = error.strerror or str(error)
        if folder.exists() and not folder.is_dir():
            reason = "it is a file; name a folder"
        raise AdapterError(f"cannot write {what} to {folder}: {reason}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if fresh:
            with contextlib.suppress(OSError):
                folder.rmdir()  # which only an empty one lets happen


def _publish(staging: Path, folder: Path) -> None:
    """Move all files to the folder, or none.

    One file replaces its predecessor in one step. Of several, the predecessors are withdrawn first: whoever reads in
    between finds files missing, never new options with old weights.
    """
    files = [file for file in sorted(staging.iterdir(), reverse=True) if not _same_bytes(file, folder / file.name)]
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        if (folder / file.name).is_dir():
            raise IsADirectoryError(f"{file.name} is a folder there")
    withdrawn = staging / "old"
    withdrawn.mkdir()
    placed: list[Path] = []
    try:
        for file in files:
            if len(files) > 1 and (folder / file.name).exists():
                os.replace(folder / file.name, withdrawn / file.name)
        for file in files:
            os.replace(file, folder / file.name)
            placed.append(folder / file.name)
    except BaseException:
        for path in placed:
            path.unlink()
        for old in withdrawn.iterdir():
            os.replace(old, folder / old.name)
        raise


def _same_bytes(file: Path, other: Path) -> bool:
    small = file.stat().st_size < 2**20
    return small and other.is_file() and other.read_bytes() == file.read_bytes()


def write_adapter(
    folder: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    metadata: dict[str, str] | None = None,
    weights: str = WEIGHTS,
) -> None:
    """Write the two files of an adapter: its weights under that name, and ``adapter_config.json``.

    Raises:
        AdapterError: if the folder cannot be written to, or holds an adapter of the other format, whose options would
            be replaced and whose weights would stay.
    """
    folder = folder.expanduser()  # as for reading
    other = MLX_WEIGHTS if weights == WEIGHTS else WEIGHTS
    if (folder / other).exists():
        raise AdapterError(f"cannot write {weights} to {folder}: it holds {other} of another format; name a new folder")
    with writing(folder, "the adapter") as staging:
        _write_weights(staging / weights, folder, tensors, metadata or {})
        # Of patterns the first that fits counts: only the options themselves are sorted.
        (staging / CONFIG).write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")


def write_weights(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write an adapter that is one safetensors file, whole or not at all."""
    file = file.expanduser()
    with writing(file.parent, file.name) as staging:
        _write_weights(staging / file.name, file.parent, tensors, metadata)


def _write_weights(staged: Path, folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    staged.touch()
    usual = staged.stat().st_mode
    try:
        save_file(tensors, staged, metadata={"format": "pt", **metadata})
        staged.chmod(usual)  # safetensors 0.8 makes files that nobody but their owner may read, such as a server
    except SafetensorError as error:
        raise AdapterError(f"cannot write {folder / staged.name}: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json`` of PEFT's format.

    Raises:
        AdapterError: if there is no folder or file, it is not a JSON object, or it is mlx-lm's.
    """
    config = read_any_config(folder)
    if is_mlx(config):
        raise AdapterError(
            f"{folder} holds an adapter of Apple's mlx-lm; make it one of PEFT's with doratune convert {folder} --to "
            "peft --output FOLDER, or read it in Python with doratune.mlx.load_adapter"
        )
    return config


def is_mlx(config: dict[str, Any]) -> bool:
    """Whether these are mlx-lm's options, which have the same file name as PEFT's."""
    return "peft_type" not in config and not config.keys().isdisjoint(("fine_tune_type", "lora_parameters"))


def read_any_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``, whoever wrote it.

    Raises:
        AdapterError: if there is no folder or file, or it is not a JSON object.
    """
    path = folder / CONFIG
    if not folder.exists():
        raise AdapterError(f"{folder} does not exist; name a folder with {CONFIG} and {WEIGHTS}")
    if not folder.is_dir():
        others = "; files of image generators are read by dt.kohya.load_adapter and dt.diffusers.load_adapter"
        others = others if folder.suffix == ".safetensors" and folder.name != WEIGHTS else ""
        raise AdapterError(f"{folder} is a file; name the folder with {CONFIG} and {WEIGHTS}{others}")
    if not path.is_file():
        if (folder / DIFFUSERS_WEIGHTS).is_file():
            raise AdapterError(f"{folder} holds {DIFFUSERS_WEIGHTS}, which dt.diffusers.load_adapter reads")
        whole = ", but a whole model's" if (folder / "config.json").is_file() else ""
        raise AdapterError(f"{folder} has no {CONFIG}; it is not an adapter's folder{whole}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


@contextlib.contextmanager
def reading_adapter(folder: Path, or_model: bool = False) -> Iterator[None]:
    """Runs keep what they trained one folder further down: an error about a run's folder names that one.

    Args:
        folder: that is read as an adapter's.
        or_model: whether a whole model's would do as well.
    """
    try:
        yield
    except AdapterError as error:
        meant = [folder / "adapter" / CONFIG, *([folder / "model" / "config.json"] if or_model else [])]
        inner = next((path.parent for path in meant if path.is_file()), None)
        if inner is None or (folder / CONFIG).is_file():
            raise
        raise AdapterError(f"{error} (did you mean {inner}?)") from error


def weights_file(folder: Path, name: str = WEIGHTS) -> Path:
    """Where the adapter's weights are.

    Raises:
        AdapterError: if they are missing.
    """
    path = folder / name
    if path.is_file():
        return path
    if (folder / PICKLED).exists():
        raise AdapterError(
            f"{folder} holds {PICKLED}, a pickle file, which can run code and is never read; "
            f"save the adapter as {name} with the program that made it"
        )
    raise AdapterError(f"{folder} has no {name}")


def read_weights(folder: Path, name: str = WEIGHTS) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the adapter's weights: tensors on the CPU, and the file's metadata.

    Raises:
        AdapterError: if the file is missing, truncated or no safetensors file.
    """
    return read_file(weights_file(folder, name))


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: tensors on the CPU, and the file's metadata.

    Raises:
        AdapterError: if the file is truncated or no safetensors file.
    """
    with opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
