"""Checkpoints of a training run: which ones are whole, which is the last, and putting one back into a model.

A checkpoint is a Trainer's folder whose weights are an adapter in PEFT's format. Its marker is written last and lists
the files with their sizes: a folder without a marker, or with a file of another size, was cut short and is never used.
Nor is one with a file that cannot be read.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import zipfile
from pathlib import Path

from torch import nn

from doratune.checkpoint import fill, read_adapter
from doratune.contents import BIAS, Contents
from doratune.errors import AdapterError
from doratune.files import write_whole
from doratune.model import active_adapter
from doratune.targets import adapted_layers, saved_modules, unwrap
from doratune.weight_files import header

log = logging.getLogger("doratune")

MARKER = "complete.json"
NAME = re.compile(r"checkpoint-(\d+)")


def mark_complete(folder: str | os.PathLike[str]) -> None:
    """Write the marker; call it when everything else is written."""
    folder = Path(folder)
    sizes = {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MARKER
    }
    write_whole(folder / MARKER, json.dumps({"files": sizes}, indent=2))


def unmark(folder: str | os.PathLike[str]) -> None:
    """Remove the marker, before a checkpoint of the same name is written over."""
    (Path(folder) / MARKER).unlink(missing_ok=True)


def is_complete(folder: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint was written to its end."""
    folder = Path(folder)
    try:
        sizes = dict(json.loads((folder / MARKER).read_text())["files"]).items()
        return all((folder / name).stat().st_size == size for name, size in sizes)
    except (OSError, ValueError, KeyError, TypeError):  # absent, cut short, or not ours
        return False


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """Folders of checkpoints, complete or not, in the order of their steps."""
    if not Path(folder).is_dir():
        return []
    found = [(int(m[1]), path) for path in Path(folder).iterdir() if path.is_dir() and (m := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def last_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The whole checkpoint of the highest step, or None; incomplete and damaged ones are passed over with a warning."""
    last, passed_over = find_last(folder)
    for line in passed_over:
        log.warning(line)
    return last


def find_last(folder: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """The whole checkpoint of the highest step, and what is wrong with those after it."""
    passed_over: list[str] = []
    for path in reversed(checkpoints(folder)):
        problem = problem_of(path)
        if problem is None:
            return path, passed_over
        passed_over.append(f"{path} {problem}: it is not used")
    return None, passed_over


def problem_of(folder: str | os.PathLike[str]) -> str | None:
    """Why a run cannot resume from a checkpoint; None if it can."""
    folder = Path(folder)
    if not is_complete(folder):
        return "has no completion marker, or files that do not fit it"
    return _damage(folder, (folder / MARKER).stat().st_mtime_ns)


@functools.cache
def _damage(folder: Path, written: int) -> str | None:
    """Which file has the right size but cannot be read, as after a power cut."""
    broken = next((file.name for file in sorted(folder.iterdir()) if not _is_readable(file)), None)
    return broken and f"is damaged, {broken} cannot be read"


def _is_readable(file: Path) -> bool:
    """Whether a file is whole, as far as its kind tells; torch's files hold checksums."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_bytes())
        elif file.suffix == ".safetensors":
            header(file)
        elif file.suffix in (".bin", ".pt", ".pth"):
            with zipfile.ZipFile(file) as archive:
                return archive.testzip() is None
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
    return True


def remove_incomplete(folder: str | os.PathLike[str]) -> list[Path]:
    """Delete incomplete checkpoints, from which no run can resume; returns their folders."""
    cut_short = [path for path in checkpoints(folder) if not is_complete(path)]
    for path in cut_short:
        shutil.rmtree(path, ignore_errors=True)
    return cut_short


def rotate(folder: str | os.PathLike[str], keep: int | None, best: str | None = None) -> None:
    """Delete all but the ``keep`` newest complete checkpoints; the best one and incomplete ones are never deleted.

    Incomplete ones do not count: deleting good checkpoints in their favour would leave nothing to resume from.
    """
    if not keep or keep < 1:
        return
    complete = [path for path in checkpoints(folder) if is_complete(path)]
    complete.sort(key=lambda path: ((path / MARKER).stat().st_mtime_ns, path.name))
    protected = {complete[-1]} if complete else set()
    if best is not None:
        protected |= {path for path in complete if path.resolve() == Path(best).resolve()}
    excess = len(complete) - max(keep, len(protected))
    for path in [path for path in complete if path not in protected][: max(0, excess)]:
        unmark(path)  # first, so that a deletion cut short does not leave a folder that looks whole
        shutil.rmtree(path, ignore_errors=True)


def restore_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Copy an adapter's file into the model's active adapter, in place: an optimiser's parameters stay its own.

    Where parameters lie in parts on several processes, each takes its parts; how many there were when the file was
    written does not matter.

    Raises:
        AdapterError: if the file is broken, or of an adapter with other layers, ranks or scales; the model is then
            unchanged.
    """
    root = unwrap(model)
    name = active_adapter(root)
    if name is None:
        raise AdapterError("no adapter is active; attach one before a checkpoint is restored")
    contents = read_adapter(root, Path(folder))
    _compare(root, name, contents, folder)
    fill(root, contents, name)


def _compare(root: nn.Module, name: str, contents: Contents, folder: str | os.PathLike[str]) -> None:
    own: dict[str, object] = {
        path: (adapter.config.method, adapter.rank, adapter.config.scale_of(path), name in layer.adapter_bias)
        for path, layer in adapted_layers(root).items()
        if (adapter := layer.adapters.get(name))
    }
    config = contents.config
    found: dict[str, object] = {
        path: (config.method, config.rank_of(path), config.scale_of(path), BIAS in parts)
        for path, parts in contents.layers.items()
    }
    own |= {path: "trained whole" for path, saved in saved_modules(root).items() if name in saved.copies}
    found |= dict.fromkeys(contents.saved, "trained whole")
    problems = [
        f"{path}: the model's adapter has {_told(own.get(path))}, the checkpoint {_told(found.get(path))}"
        for path in dict.fromkeys((*own, *found))
        if own.get(path) != found.get(path)
    ]
    if problems:
        heading = f"{folder} holds an adapter of another kind; go on with the options it was made with"
        raise AdapterError.of(heading, problems, at_most=10)


def _told(kind: object) -> str:
    if isinstance(kind, tuple):
        method, rank, scale, bias = kind
        return f"{method} of rank {rank}, scaled by {scale:g}" + (", and a bias" if bias else "")
    return str(kind or "nothing")
