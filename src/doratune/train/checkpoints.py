"""Checkpoints of a training run: which ones are whole, which is the last, and putting one back into a model.

A checkpoint is a Trainer's folder whose weights are an adapter in PEFT's format. Its marker is written last and lists
the files with their sizes: a folder without a marker, or with a file of another size, was cut short and is never used.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path

import torch
from torch import nn

from doratune.checkpoint import load_adapter
from doratune.errors import AdapterError
from doratune.model import active_adapter, adapter_names, delete_adapter, set_adapter
from doratune.targets import adapted_layers, holders, saved_modules, unwrap

log = logging.getLogger("doratune")

MARKER = "complete.json"
NAME = re.compile(r"checkpoint-(\d+)")
_SCRATCH = "doratune-restore"


def mark_complete(folder: str | os.PathLike[str]) -> None:
    """Write the marker; call it when everything else is written."""
    folder = Path(folder)
    sizes = {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MARKER
    }
    partial = folder / f"{MARKER}.partial"
    partial.write_text(json.dumps({"files": sizes}, indent=2))
    os.replace(partial, folder / MARKER)


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
    """The complete checkpoint of the highest step, or None; incomplete ones are passed over with a warning."""
    for path in reversed(checkpoints(folder)):
        if is_complete(path):
            return path
        log.warning("%s has no completion marker, or files that do not fit it: it is not used", path)
    return None


def remove_incomplete(folder: str | os.PathLike[str]) -> list[Path]:
    """Delete checkpoints that were cut short, which nothing can go on from; returns their folders."""
    cut_short = [path for path in checkpoints(folder) if not is_complete(path)]
    for path in cut_short:
        shutil.rmtree(path, ignore_errors=True)
    return cut_short


def rotate(folder: str | os.PathLike[str], keep: int | None, best: str | None = None) -> None:
    """Delete all but the ``keep`` newest complete checkpoints; the best one and incomplete ones are never deleted.

    Incomplete ones do not count: deleting good checkpoints in their favour would leave nothing to go on from.
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


@torch.no_grad()
def restore_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Copy an adapter's file into the model's active adapter, in place: an optimiser's parameters stay its own.

    Raises:
        AdapterError: if the file is broken, or of an adapter with other layers or ranks; the model is then unchanged.
    """
    root = unwrap(model)
    name = active_adapter(root)
    if name is None:
        raise AdapterError("no adapter is active; attach one before a checkpoint is restored")
    random_state = torch.get_rng_state()
    load_adapter(root, folder, _SCRATCH, trainable=True)  # with all its checks, beside the other
    try:
        _compare(root, name, folder)
        for holder in holders(root):
            if name in holder.adapter_names():
                pairs = zip(holder.adapter_parameters(name), holder.adapter_parameters(_SCRATCH), strict=True)
                for own, restored in pairs:
                    own.copy_(restored)
        for saved in saved_modules(root).values():
            if name in saved.copies:
                buffers = dict(saved.copies[_SCRATCH].named_buffers())
                for key, buffer in saved.copies[name].named_buffers():
                    buffer.copy_(buffers[key])
        for layer in adapted_layers(root).values():
            if name in layer.adapters:
                layer.decide(name)
    finally:
        if _SCRATCH in adapter_names(root):
            delete_adapter(root, _SCRATCH)
        set_adapter(root, name)
        torch.set_rng_state(random_state)


def _compare(root: nn.Module, name: str, folder: str | os.PathLike[str]) -> None:
    problems = []
    for holder in holders(root):
        own, restored = (
            [tuple(p.shape) for p in holder.adapter_parameters(n)] if n in holder.adapter_names() else None
            for n in (name, _SCRATCH)
        )
        if own != restored:
            problems.append(
                f"{holder.path}: the model's adapter has {own or 'nothing'}, the checkpoint {restored or 'nothing'}"
            )
    if problems:
        heading = f"{folder} holds an adapter of another kind; go on with the options it was made with"
        raise AdapterError.of(heading, problems[:10] + ([f"and {len(problems) - 10} more"] if problems[10:] else []))
