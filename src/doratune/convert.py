"""Conversion: a plain LoRA adapter that does what another adapter, magnitudes and all, does, as nearly as it can.

Many programs serve LoRA adapters and no others. A magnitude changes a weight in every direction, so a low-rank change
can only come near; how near is measured for every layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from doratune.config import AdapterConfig
from doratune.distributed import is_fully_sharded, is_spread
from doratune.errors import AdapterError
from doratune.layers import AdaptedLayer
from doratune.layers.weights import on_device
from doratune.merge import exact_scale
from doratune.model import adapter_names, attach
from doratune.ops import approximation
from doratune.ops.autocast import without_autocast
from doratune.ops.hardware import full_precision
from doratune.ops.stacked import own_factor
from doratune.targets import as_targets, layers_of, plain_modules, saved_modules, unwrap

NOT_FINITE = "its change is not finite; the adapter or the weight holds NaN, infinite or far too large values"


@dataclass(frozen=True)
class LayerFit:
    """How near the LoRA adapter comes on one layer."""

    path: str
    change: float
    """``|D|^2``, where D is what the adapter adds to the weight, magnitude and all."""
    lost: float
    """``|D - B A|^2``."""

    @property
    def kept(self) -> float:
        """Share of ``|D|^2`` that is kept."""
        return 1 - self.lost / self.change if self.change else 1.0


@dataclass(frozen=True)
class Conversion:
    """What ``convert_to_lora`` did."""

    rank: int
    layers: tuple[LayerFit, ...]

    @property
    def kept(self) -> float:
        """Share of ``|D|^2``, summed over all layers, that is kept."""
        change = sum(layer.change for layer in self.layers)
        return 1 - sum(layer.lost for layer in self.layers) / change if change else 1.0


@torch.no_grad()
@full_precision()
def convert_to_lora(
    model: nn.Module, rank: int | None = None, *, name: str = "default", to: str = "lora"
) -> Conversion:
    """Attach a plain LoRA adapter that comes as near as its rank allows to another adapter, and make it active.

    Of every layer the whole change of its weight, ``D = W' - W = (g - 1) W + g s B A``, is replaced by the ``B A`` that
    is nearest to it (truncated SVD), with the scale 1. Biases and modules trained whole are copied. A plain LoRA
    adapter can be converted, too: to a lower rank, or to one rank for all layers.

    Args:
        model: with the adapter attached.
        rank: of the new adapter, the same for all layers; None: the highest of the adapter's own, or 16 where that has
            magnitudes only.
        name: the adapter to convert; it stays.
        to: what to call the new one.

    Returns:
        How much of the change is kept, layer by layer.

    Raises:
        AdapterError: if there is no such adapter, the rank cannot be, the weights lie in parts on several processes, or
            a weight's change is not finite. The model is then unchanged.
    """
    root = unwrap(model)
    layers = layers_of(root, name)
    if not layers:
        raise AdapterError(
            f"the model has no adapter {name!r} to convert; it has {', '.join(adapter_names(root)) or 'none'}"
        )
    if to in adapter_names(root):
        raise AdapterError(f"the model already has an adapter {to!r}; choose another name or delete that one first")
    if is_fully_sharded(root) or is_spread(root):
        raise AdapterError(
            "convert: the model's weights lie in parts on several processes; save the adapter, and convert it in one "
            "process: doratune convert ADAPTER --output FOLDER"
        )
    config = _plain_config(root, layers, name, rank)
    fits, factors = _fit(layers, name, config.rank)
    attach(root, config, to, trainable=False)
    for layer, (A, B) in zip(layers.values(), factors, strict=True):
        layer.lora_A[to].copy_(A)
        layer.lora_B[to].copy_(B)
        if name in layer.adapter_bias:
            layer.adapter_bias[to].copy_(layer.adapter_bias[name])
        layer.decide(to)
    for saved in saved_modules(root).values():
        if name in saved.copies:
            saved.copies[to].load_state_dict(saved.copies[name].state_dict())
    return Conversion(config.rank, tuple(fits))


def _fit(layers: dict[str, AdaptedLayer], name: str, rank: int) -> tuple[list[LayerFit], list[tuple[Tensor, Tensor]]]:
    """A and B for every layer, and how near they come; the layers stay as they are.

    Raises:
        AdapterError: listing layers whose change is not finite, or that hold no data yet.
    """
    problems: list[str] = []
    fits: list[LayerFit] = []
    factors: list[tuple[Tensor, Tensor]] = []
    for path, layer in layers.items():
        if name in layer.waiting:
            problems.append(f"{path}: holds no data yet (meta device)")
            continue
        with on_device(layer.base_layer), without_autocast(layer.weight_rows().stored.device):
            D = _change(layer, name)
            size = approximation.squared_size(D)
            if not math.isfinite(size):
                problems.append(f"{path}: {NOT_FINITE}")
            if not problems:  # else nothing will come of it
                found = [approximation.nearest_low_rank(d, rank) for d in D.chunk(layer.weight_rows().matrices)]
                errors = [approximation.squared_error(d, *f) for d, f in zip(D.chunk(len(found)), found, strict=True)]
                A, B = (torch.cat(parts) for parts in zip(*found, strict=True))
                factors.append((A, B))
                fits.append(LayerFit(path, size, sum(errors)))
    if problems:
        raise AdapterError.of(f"adapter {name!r} cannot be converted", problems)
    return fits, factors


def _plain_config(root: nn.Module, layers: dict[str, AdaptedLayer], name: str, rank: int | None) -> AdapterConfig:
    """The new adapter's options; its rank is checked."""
    own = [layer.adapters[name] for layer in layers.values()]
    rows = [layer.weight_rows() for layer in layers.values()]
    highest = max(min(W.shape[0] // W.matrices, W.shape[1]) for W in rows)
    if rank is None:
        rank = min(max(adapter.rank for adapter in own) or AdapterConfig.rank, highest)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= highest:
        raise AdapterError(
            f"rank must be a whole number from 1 to {highest}, with which nothing is lost of any of these weights; "
            f"found {rank!r}"
        )
    return AdapterConfig(
        method="lora",
        rank=rank,
        alpha=rank,
        targets=as_targets(list(layers), plain_modules(root)),
        bias=own[0].config.bias,
        modules_to_save=own[0].config.modules_to_save,
    )


def _change(layer: AdaptedLayer, name: str) -> Tensor:
    """D, float32 ``[out, in]``, made by row tiles."""
    rows = layer.weight_rows()
    A, B, _ = layer.whole_parts(name)
    g = exact_scale(layer, name)
    D = torch.empty(rows.shape, dtype=torch.float32, device=rows.stored.device)
    if g is None:
        g = D.new_ones(rows.shape[0])
    for here, tile in rows.small_tiles():
        a, b = (None, None) if A is None or B is None else (own_factor(A, B, here), B[here])
        D[here] = approximation.weight_change(tile, a, b, g[here], layer.adapters[name].scale)
    return D
