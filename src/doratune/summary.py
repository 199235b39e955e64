"""What adapters do to a model, in words: what is adapted, what was left alone and why, what trains, which path runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from doratune.layers import kind_of
from doratune.layers.adapted import AdaptedLayer
from doratune.layers.bypass import held_aside, reader
from doratune.layers.kind import outputs_are_overwritten
from doratune.layers.quantised import unpacked_sizes
from doratune.model import active_adapter, adapter_names, trainable_parameters
from doratune.targets import adapted_layers, own_parameters, plain_modules, refusal, saved_modules, unwrap


@dataclass(frozen=True)
class LayerSummary:
    """One adapted layer under the active adapter."""

    path: str
    kind: str
    method: str
    rank: int
    direction: int
    """Parameters of A and B."""
    magnitude: int
    """Parameters of m."""


@dataclass
class Summary:
    """What ``doratune.summary`` found; ``print`` it, or read its fields."""

    adapters: list[str]
    active: str | None
    layers: list[LayerSummary] = field(default_factory=list)
    saved: dict[str, int] = field(default_factory=dict)
    """Modules trained whole, with the number of parameters of the adapter's copy."""
    left_alone: dict[str, str] = field(default_factory=dict)
    """Weights that no adapter changes, each with the reason."""
    base: int = 0
    """Parameters of the base model."""
    trained: int = 0
    """Parameters that get gradients."""

    @property
    def direction(self) -> int:
        """Parameters of all A and B."""
        return sum(layer.direction for layer in self.layers)

    @property
    def magnitude(self) -> int:
        """Parameters of all m."""
        return sum(layer.magnitude for layer in self.layers)

    @property
    def extra_over_lora(self) -> float:
        """Magnitude parameters per LoRA parameter: what DoRA adds to LoRA."""
        return self.magnitude / self.direction if self.direction else 0.0

    @property
    def extra_over_model(self) -> float:
        """Magnitude parameters per parameter of the base model: the usual "0.01 %"."""
        return self.magnitude / self.base if self.base else 0.0

    def __str__(self) -> str:
        lines = [
            f"adapters: {', '.join(self.adapters) or 'none'}; active: {self.active}",
            f"adapted layers: {len(self.layers)}; modules trained whole: {len(self.saved)}",
            f"parameters: {self.base:,} in the base, {self.trained:,} trained ({self.trained / max(1, self.base):.3%})",
            f"direction (A, B): {self.direction:,}; magnitude (m): {self.magnitude:,}, "
            f"{self.extra_over_lora:.2%} of LoRA's parameters, {self.extra_over_model:.4%} of the base model's",
        ]
        groups = Counter((x.path.rpartition(".")[2], x.kind, x.method, x.rank) for x in self.layers)
        for (name, kind, method, rank), count in groups.items():
            lines.append(f"  {count:4d} x {name} ({kind}): {method}, rank {rank}")
        for path, size in self.saved.items():
            lines.append(f"  trained whole: {path}, {size:,} parameters")
        alike: dict[tuple[str, str], list[str]] = {}
        for path, reason in self.left_alone.items():
            alike.setdefault((path.rpartition(".")[2], reason), []).append(path)
        for (name, reason), paths in alike.items():
            which = paths[0] if len(paths) == 1 else f"{len(paths)} x {name}"
            lines.append(f"  left alone: {which} ({reason})")
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Say what is adapted, what was left alone and why, what trains, and DoRA's share."""
    root = unwrap(model)
    active = active_adapter(root)
    result = Summary(adapter_names(root), active)
    for path, layer in adapted_layers(root).items():
        if layer.active is None:
            continue
        adapter, groups = layer.adapters[layer.active], (layer.lora_A, layer.lora_B, layer.magnitude)
        A, B, m = (group[layer.active].numel() if layer.active in group else 0 for group in groups)
        result.layers.append(LayerSummary(path, layer.kind.name, adapter.config.method, adapter.rank, A + B, m))
    for path, saved in saved_modules(root).items():
        if saved.active is not None:
            result.saved[path] = sum(p.numel() for p in saved.adapter_parameters(saved.active))
    own, unpacked = own_parameters(root), unpacked_sizes(root)
    result.base = sum(unpacked.get(id(p), p.numel()) for p in root.parameters() if id(p) not in own)
    result.trained = sum(p.numel() for p in trainable_parameters(root).values())
    result.left_alone = _left_alone(root, {layer.path for layer in result.layers} | set(result.saved))
    return result


def _left_alone(root: nn.Module, adapted: set[str]) -> dict[str, str]:
    modules = plain_modules(root)
    found: dict[str, str] = {}
    aside = held_aside(modules)
    for path, module in modules.items():
        if path in adapted or any(path.startswith(other + ".") for other in adapted):
            continue
        if kind_of(module) is not None:
            why = refusal(modules, path) or reader(modules, path) or aside.get(id(module))
            found[path] = why or "not among the targets"
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and f"{path}.{name}" not in modules:
                shape = "x".join(str(n) for n in parameter.shape)
                found[f"{path}.{name}".lstrip(".")] = (
                    f"a bare {shape} parameter of {type(module).__name__}, which no kind of layer serves"
                )
    return found


def explain(model: nn.Module) -> dict[str, tuple[str, str]]:
    """For every adapted layer: which path its forward takes, and why not a faster one ("" if it is the fastest)."""
    return {path: _explain(layer) for path, layer in adapted_layers(model).items()}


def _explain(layer: AdaptedLayer) -> tuple[str, str]:
    path, reason = layer.kind.explain(layer.base_layer)
    reasons = [reason] if reason else []
    if layer.active is not None and layer.active in layer.magnitude:
        adapter = layer.adapters[layer.active]
        if adapter.dense_norm:
            reasons.append("W and the change nearly cancel in a row, so the norm is computed from dense tiles")
        if adapter.keep_output and not adapter.eight_bit and outputs_are_overwritten():
            reasons.append("liger_kernel, which is loaded, overwrites outputs unseen, so a tensor more is kept for m")
        if adapter.config.norm_gradient == "exact":
            reasons.append("norm_gradient is exact: the backward pass walks W once more")
    return path, "; ".join(reasons)
