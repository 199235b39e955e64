"""What an adapter's folder holds, without its base model: ranks, targets, sizes, and values that look wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from doratune.config import AdapterConfig, matches
from doratune.contents import KEY, PREFIX
from doratune.errors import AdapterError
from doratune.files import CONFIG, WEIGHTS, read_config, read_weights
from doratune.own_options import with_own_options
from doratune.peft_config import PeftOptions, from_peft
from doratune.peft_experts import parameter_at
from doratune.study.names import natural

HUGE = 1e3
"""No trained A, B or m has values like this: where they are, training diverged."""


@dataclass(frozen=True)
class StoredLayer:
    """One adapted layer in a file."""

    path: str
    rank: int
    parameters: int
    a_largest: float
    b_largest: float
    m_smallest: float | None
    """Smallest and largest magnitude; None for LoRA."""
    m_largest: float | None


@dataclass
class FileReport:
    """What ``inspect_adapter`` found."""

    folder: str
    method: str
    config: AdapterConfig
    base_model: str | None
    task: str | None
    bytes: int
    layers: list[StoredLayer] = field(default_factory=list)
    saved: dict[str, int] = field(default_factory=dict)
    """Tensors of modules trained whole and of biases, with their sizes."""
    broken: list[str] = field(default_factory=list)
    """What keeps the file from being used."""
    suspicious: list[str] = field(default_factory=list)
    """What is allowed, but rarely meant."""

    @property
    def parameters(self) -> int:
        """Numbers in the file."""
        return sum(layer.parameters for layer in self.layers) + sum(self.saved.values())


def inspect_adapter(folder: Path) -> FileReport:
    """Read an adapter's folder and look at its values.

    Raises:
        AdapterError: if it cannot be read at all: no folder, no JSON, a truncated file, another kind of adapter.
    """
    raw = read_config(folder)
    options = from_peft(raw, str(folder / CONFIG))
    config = options.config
    tensors, metadata = read_weights(folder)
    report = FileReport(
        str(folder),
        config.method,
        config,
        raw.get("base_model_name_or_path"),
        raw.get("task_type"),
        (folder / WEIGHTS).stat().st_size,
    )
    try:
        with_own_options(config, metadata)
    except AdapterError as error:
        report.broken += error.problems
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            report.broken.append(f"{key}: holds {str(tensor.dtype).removeprefix('torch.')}, not floating-point numbers")
            continue
        if not torch.isfinite(tensor).all():
            report.broken.append(f"{key}: holds NaN or infinite values")
        match = KEY.fullmatch(key.removeprefix(PREFIX))
        if not key.startswith(PREFIX):
            report.broken.append(f"{key}: unknown key; expected it to start with {PREFIX!r}")
        elif match and match["part"].startswith("lora"):
            layers.setdefault(match["path"], {})[match["part"]] = tensor.float()
        else:
            report.saved[key.removeprefix(PREFIX)] = tensor.numel()
    if not layers:
        report.broken.append(f"{WEIGHTS} holds no adapted layer")
    for path, parts in sorted(layers.items(), key=lambda item: natural(item[0])):
        _look_at(report, options, path, parts)
    return report


def _look_at(report: FileReport, options: PeftOptions, path: str, parts: dict[str, Tensor]) -> None:
    config = report.config
    A = parts.get("lora_A.weight", parts.get("lora_embedding_A"))
    B = parts.get("lora_B.weight", parts.get("lora_embedding_B"))
    m = parts.get("lora_magnitude_vector")
    if A is None or B is None:
        report.broken.append(f"{path}: {'lora_A' if A is None else 'lora_B'} is missing")
        return
    if empty := [name for name, tensor in (("A", A), ("B", B), ("m", m)) if tensor is not None and not tensor.numel()]:
        report.broken.append(f"{path}: {', '.join(empty)} without a single number")
        return
    # Experts' matrices lie under each other, each with an A of its own; only doratune writes those.
    if A.ndim < 2 or B.ndim < 2 or A.shape[0] % B.shape[1] or (A.shape[0] != B.shape[1] and not options.own_type):
        report.broken.append(f"{path}: A {tuple(A.shape)} and B {tuple(B.shape)} do not belong together")
        return
    experts = bool(options.parameters) and not matches(path, options.modules)
    if experts:
        path = parameter_at(path, options.parameters)
    rank, expected = B.shape[1], max(1, config.rank_of(path))
    if experts and rank % expected == 0:
        rank = expected  # PEFT's B has the ranks of all experts side by side
    if rank != expected:
        report.broken.append(f"{path}: A and B have rank {rank}, adapter_config.json says {config.rank_of(path)}")
    if config.method == "dora" and m is None:
        report.broken.append(f"{path}: use_dora is set, but there is no magnitude")
    if config.method == "lora" and m is not None:
        report.broken.append(f"{path}: there is a magnitude, but use_dora is not set")
    if m is not None and m.numel() != B.shape[0]:
        report.broken.append(f"{path}: {m.numel()} magnitudes for {B.shape[0]} rows of B")
    report.suspicious += (f"{path}: {line}" for line in _rarely_meant(A, B, m))
    report.layers.append(
        StoredLayer(
            path,
            rank,
            sum(t.numel() for t in (A, B, m) if t is not None),
            float(A.abs().max()),
            float(B.abs().max()),
            None if m is None else float(m.min()),
            None if m is None else float(m.max()),
        )
    )


def _rarely_meant(A: Tensor, B: Tensor, m: Tensor | None) -> Iterator[str]:
    """Values that are allowed, but look wrong."""
    for name, tensor in (("A", A), ("B", B), ("m", m)):
        if tensor is not None and tensor.isfinite().all() and float(tensor.abs().max()) > HUGE:
            yield f"{name} has values up to {float(tensor.abs().max()):.3g}"
    if not A.any():
        yield "A is 0, so the direction does not change and cannot be trained further"
    elif not B.any():
        yield "B is 0, as before training: the direction does not change"
    if m is not None and (negative := int((m < 0).sum())):
        yield f"{negative} magnitudes are negative: their rows point the other way"
    if m is not None and (zero := int((m == 0).sum())):
        yield f"{zero} magnitudes are 0: their rows give 0"
