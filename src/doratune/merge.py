"""Merging: plain layers again, with the adapter in their weights, checked."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from doratune.distributed import is_fully_sharded
from doratune.errors import AdapterError
from doratune.layers import AdaptedLayer, Part, SavedModule, sharded
from doratune.layers.holder import plain_parameters
from doratune.layers.quantised import requantisation_loss
from doratune.layers.weights import is_offloaded
from doratune.merged_config import forget_quantisation, tie_nothing
from doratune.model import active_adapter, unhold
from doratune.ops import row_norm
from doratune.ops.autocast import without_autocast
from doratune.ops.hardware import full_precision
from doratune.ops.low_rank import adapted_weight
from doratune.ops.stacked import own_factor
from doratune.preparation import thaw, trained_before
from doratune.targets import adapted_layers, holders, plain_path, shared_parameters, unwrap

log = logging.getLogger("doratune")


@dataclass(frozen=True)
class MergeCheck:
    """Merged against unmerged output of one layer on random inputs."""

    path: str
    difference: float
    """Largest difference, relative to the largest unmerged output."""
    tolerance: float
    """What rounding to the layer's dtype explains."""
    requantisation: float | None = None
    """For a quantised base: relative change of the merged weight if it were quantised the same way again."""

    @property
    def holds(self) -> bool:
        """True if the difference is within the tolerance."""
        return self.difference <= self.tolerance


@torch.no_grad()
@full_precision()
def merged_weight(layer: AdaptedLayer, name: str) -> Tensor:
    """``W' = g (W + s B A)``, ``[out, in]`` in W's dtype, by row tiles, in float32 or float64; parts stay parts."""
    rows = layer.weight_rows()
    A, B, _ = layer.whole_parts(name)
    parts = []
    with without_autocast(rows.stored.device):
        g = exact_scale(layer, name)
        if g is not None and rows.part is not None:
            g = g[rows.part[0]]
        if A is not None and B is not None:
            A, B = rows.own(A, B)
        for here, tile in rows.small_tiles():
            a, b = (None, None) if A is None or B is None else (own_factor(A, B, here), B[here])
            parts.append(adapted_weight(tile, a, b, None if g is None else g[here], layer.adapters[name].scale))
    merged = torch.cat(parts)
    return merged if rows.part is None else sharded.as_part_of(rows.stored, merged)


def exact_scale(layer: AdaptedLayer, name: str) -> Tensor | None:
    """g of one adapter, float32 ``[out]``, from a norm of dense tiles; None without magnitudes."""
    if name not in layer.magnitude:
        return None
    return row_norm.row_scale(sharded.whole(layer.magnitude[name]), layer.squared_norm(name), layer.base_squared())


@torch.no_grad()
@full_precision()
def verify_merge(model: nn.Module) -> list[MergeCheck]:
    """Compare every adapted layer's output with what it would be after merging; the model stays as it is.

    The comparison runs in the layer's own dtype, on fixed random inputs.
    """
    checks = []
    generator = torch.Generator().manual_seed(0)
    for path, layer in adapted_layers(model).items():
        name = layer.active
        if name is None:
            continue
        rows = layer.weight_rows()
        x = sharded.on_all(rows.stored, layer.kind.probe(layer.base_layer, generator))
        merged = merged_weight(layer, name)
        layer.decide(name)  # training may have led to where the factored norm loses digits
        training = layer.training
        layer.eval()
        try:
            unmerged = layer(x).float()
            new = merged_layer(layer, name, merged).eval()
            difference = (_output_as(layer.base_layer, new, x).float() - unmerged).abs().max()
        finally:
            layer.train(training)
        loss = requantisation_loss(layer.base_layer, merged)
        # Merging rounds each weight once; the unmerged path rounds its sums a few times. A quantised base may
        # compute with other numbers than it dequantises to.
        tolerance = _tolerance(layer, name, merged.dtype) if not rows.transient else 0.05
        scale = unmerged.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        checks.append(MergeCheck(path, sharded.largest(rows.stored, float(difference / scale)), tolerance, loss))
    return checks


def _tolerance(layer: AdaptedLayer, name: str, dtype: torch.dtype) -> float:
    """The difference that rounding explains; it is larger where a row has become much shorter than W's."""
    base, squared = layer.base_squared(), layer.squared_norm(name)
    shorter = (base / squared)[squared > 0].sqrt()
    worst = float(shorter.clamp_min(1).max()) if len(shorter) else 1.0
    roundings = 16 if dtype.itemsize > 2 else 4
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)  # adapters are float32, whatever the base is
    return min(roundings * eps * worst, 0.125)


def merged_layer(layer: AdaptedLayer, name: str, weight: Tensor) -> nn.Module:
    """The plain layer with the adapter in its weight; the layer itself stays as it is."""
    bias: Tensor | None = getattr(layer.base_layer, "bias", None)
    if bias is not None:
        bias = (layer.adapter_bias[name] if name in layer.adapter_bias else bias).detach().to(bias.dtype)
    return layer.kind.merged_layer(layer.base_layer, weight, bias)


def _output_as(base: nn.Module, new: nn.Module, x: Tensor) -> Tensor:
    """The output of ``base`` if it had the parameters of ``new``; hooks and a forward of the instance included."""
    if not _may_adopt(base, new):
        return new(x)
    before = base._parameters
    try:
        base._parameters = new._parameters
        return base(x)
    finally:
        base._parameters = before


def _may_adopt(base: nn.Module, new: nn.Module) -> bool:
    return type(base) is type(new) and not isinstance(base, Part)


def merge(model: nn.Module, verify: bool = False) -> nn.Module:
    """Put the active adapter into the weights, in place; the layers are plain again and all adapters gone.

    Quantised layers become layers of full precision; a warning says what quantising them again would lose. Where others
    stay quantised, a transformers model's options name those that are not, so that it can be saved and loaded.
    Weights tied to others (an embedding and the output head) are untied, all of a transformers model, and its
    ``tie_word_embeddings`` is set to False.

    Args:
        verify: compare merged with unmerged outputs first, layer by layer, and log the differences.

    Returns:
        The same model, with plain layers.

    Raises:
        AdapterError: if no adapter is active, a merged weight would not be finite, or ``verify`` finds a difference
            that rounding does not explain. The model is then unchanged.
    """
    root = unwrap(model)
    name = active_adapter(root)
    if name is None:
        raise AdapterError("merge: no adapter is active; call set_adapter first")
    if is_fully_sharded(root):
        raise AdapterError(
            "merge: FSDP2 holds the model's weights and would not see merged ones; save the adapter, and merge it in "
            "one process: doratune merge ADAPTER --base MODEL --output FOLDER"
        )
    layers = {path: layer for path, layer in adapted_layers(root).items() if layer.active is not None}
    problems = [f"{path}: {problem}" for path, layer in layers.items() if (problem := _problem(layer, name))]
    if verify and not problems:
        problems += _differences(root)
    if problems:
        raise AdapterError.of("merge", problems)
    shared = shared_parameters(root)
    trained = trained_before(root)
    dtype = next((p.dtype for _, p in plain_parameters(root) if p.is_floating_point()), torch.float32)
    untied = False
    losses: list[float] = []
    for layer in layers.values():
        rows, base = layer.weight_rows(), layer.base_layer
        untied |= id(rows.stored) in shared
        weight = merged_weight(layer, name)
        loss = requantisation_loss(base, weight)
        losses += [] if loss is None else [loss]
        new = merged_layer(layer, name, weight.to(dtype) if rows.transient else weight)
        if _may_adopt(base, new):
            base._parameters = new._parameters  # the same object: its hooks and whoever refers to it see the merge
        else:
            layer.base_layer = new
        unhold(root, layer)  # at once: after an interruption a layer is merged or adapted, never both
    for holder in holders(root):
        if isinstance(holder, SavedModule) and holder.active is not None:
            untied |= any(id(p) in shared for _, p in plain_parameters(holder.base_layer))
            holder.base_layer = holder.merged()
        unhold(root, holder)
    thaw(root)
    for n, p in root.named_parameters():
        p.requires_grad_(plain_path(n) in trained)
    forget_quantisation(root)
    if losses:
        log.warning(
            "merge: %d quantised layers are now of full precision; quantising them the same way again would change "
            "their weights by %.1f %% on average, %.1f %% at most",
            len(losses),
            100 * sum(losses) / len(losses),
            100 * max(losses),
        )
    if untied:
        tie_nothing(root)
    return model


def _differences(root: nn.Module) -> Iterator[str]:
    """Layers whose outputs merging would change by more than rounding explains; all are logged."""
    for check in verify_merge(root):
        log.info("merge %s: difference %.2e, tolerance %.2e", check.path, check.difference, check.tolerance)
        if not check.holds:
            yield (
                f"{check.path}: merged and unmerged outputs differ by {check.difference:.2e}, "
                f"rounding explains {check.tolerance:.2e}"
            )


def _problem(layer: AdaptedLayer, name: str) -> str | None:
    """Why a layer cannot be merged, or None."""
    if is_offloaded(layer.base_layer):
        return "accelerate keeps its weight elsewhere between forwards; load the model whole, or use doratune merge"
    if hasattr(layer.base_layer, "parametrizations") and not isinstance(layer.base_layer, nn.Linear):
        return "its weight is parametrised; remove that first (torch.nn.utils.parametrize.remove_parametrizations)"
    if "weight" in layer.base_layer.__dict__:
        return (
            "its weight is made anew from others before each forward (torch.nn.utils.weight_norm or prune); end that "
            "first (remove_weight_norm, prune.remove)"
        )
    tensors = [merged_weight(layer, name)]
    if name in layer.adapter_bias:
        tensors.append(layer.adapter_bias[name].to(tensors[0].dtype))
    finite = all(torch.isfinite(sharded.local(t)).all() for t in tensors)
    if sharded.largest(tensors[0], float(not finite)):
        return "the merged weight or bias is not finite; the adapter holds NaN, infinite or far too large values"
    return None
