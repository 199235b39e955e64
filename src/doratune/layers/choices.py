"""What an adapter's values ask of its layer's forward and backward, decided away from the hot path."""

from __future__ import annotations

import torch
from torch import Tensor

from doratune.layers.cache import ScaleCache
from doratune.layers.weights import WeightRows
from doratune.ops.autocast import without_autocast

BIAS_DROWNS = 8.0
"""Keep a tensor of our own for the magnitude's gradient where a bias is this many times its magnitude."""
CANCELLATION = 1e-2
"""Use the dense norm where ``n^2 / |W|^2`` falls below this: the factored one would lose digits."""


def choices(
    cache: ScaleCache,
    rows: WeightRows,
    A: Tensor | None,
    B: Tensor | None,
    m: Tensor,
    scale: float,
    bias: Tensor | None,
) -> tuple[bool, bool]:
    """``dense_norm`` and ``keep_output`` of ``Options``, from the adapter's values; this makes the device wait."""
    with torch.no_grad(), without_autocast(rows.stored.device):
        base, m = cache.base_squared(rows), m.detach().float()
        squared = base
        if A is not None and B is not None:
            squared = cache.squared_norm(rows, A, B, scale)
        near = (squared < CANCELLATION * base) & (base > 0)
        usable = (m != 0) | (base == 0)
        if bias is not None:
            usable &= bias.detach().abs().float() <= BIAS_DROWNS * m.abs()
        return bool(near.any()), bool(usable.all())
