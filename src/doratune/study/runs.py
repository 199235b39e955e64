"""What a path given to ``doratune analyze`` holds: one checkpoint, or several over time."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from doratune.errors import AdapterError
from doratune.files import CONFIG, PICKLED, WEIGHTS
from doratune.study.stored import StoredWeights, Weights
from doratune.study.stored_adapter import StoredAdapter
from doratune.train.output import CHECKPOINTS, RESULTS

FINAL = ("adapter", "model")
"""Folders in a run of ``doratune train`` with what was trained, as it was in the end."""


@dataclass(frozen=True)
class Snapshot:
    """Weights as they were at one moment of training."""

    name: str
    step: int | None
    """None where nothing tells it."""
    folder: Path

    def open(self) -> Weights:
        """Read the headers.

        Raises:
            AdapterError: if that is not possible.
        """
        if (self.folder / CONFIG).is_file():
            return StoredAdapter(self.folder)
        return StoredWeights(self.folder)


def snapshots(source: Path) -> list[Snapshot]:
    """The checkpoints at a path, in their order.

    Args:
        source: an adapter's folder, a model's, a safetensors file, a run of ``doratune train``, a folder of
            ``checkpoint-N``, or any folder of numbered folders with weights.

    Raises:
        AdapterError: if nothing of that kind is there.
    """
    if not source.exists():
        raise AdapterError(f"{source} does not exist; name a checkpoint, an adapter or a folder of them")
    inner = source / CHECKPOINTS
    if inner.is_dir():
        return _of_run(source, _numbered(inner))
    if _holds_weights(source):
        return [Snapshot(source.name, _number(source.name), source)]
    found = _numbered(source) or _of_run(source, [])
    if not found:
        raise AdapterError(
            f"{source} holds neither weights (*.safetensors) nor an adapter ({CONFIG}) nor folders of checkpoints"
        )
    return found


def labels_of(sources: Sequence[Path]) -> list[str]:
    """A short name for each path: its last part, with as much before it as tells them apart."""
    for depth in range(1, 1 + max(len(path.resolve().parts) for path in sources)):
        names = ["/".join(path.resolve().parts[-depth:]) for path in sources]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({index})" for index, path in enumerate(sources, 1)]


def _of_run(source: Path, found: list[Snapshot]) -> list[Snapshot]:
    """The checkpoints of a run and, unless the last of them is that, what was there in the end."""
    last = found[-1].step if found else None
    final = next((source / name for name in FINAL if _holds_weights(source / name)), None)
    steps = _steps(source)
    if final is not None and (last is None or (steps or 0) > last):
        found.append(Snapshot(final.name if steps is None else f"step {steps}", steps, final))
    return found


def _numbered(folder: Path) -> list[Snapshot]:
    found = [
        (number, path)
        for path in folder.iterdir()
        if path.is_dir() and (number := _number(path.name)) is not None and _holds_weights(path)
    ]
    return [Snapshot(f"step {number}", number, path) for number, path in sorted(found)]


def _holds_weights(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".safetensors"
    names = (WEIGHTS, CONFIG, PICKLED, "pytorch_model.bin")
    return any((path / name).is_file() for name in names) or any(path.glob("*.safetensors"))


def _number(name: str) -> int | None:
    """The last number in a name: checkpoint-200, epoch_3, step0400."""
    found = re.findall(r"\d+", name)
    return int(found[-1]) if found else None


def _steps(run: Path) -> int | None:
    """After how many steps the weights were what the run has kept."""
    try:
        results = json.loads((run / RESULTS).read_text(encoding="utf-8"))
        steps = results.get("best_step") or results["steps"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return steps if isinstance(steps, int) else None
