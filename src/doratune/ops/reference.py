"""From LoRA to DoRA, in float64: the definition, and the oracle of every test.

A linear layer computes ``y = W x + b``. ``W`` is ``[out, in]``, one row per output feature.

**LoRA** (Hu et al., 2021) keeps W frozen and learns a change of low rank::

    W' = W + s B A        A: [r, in]   B: [out, r]   s = alpha / r

B starts at 0, so training starts at the pretrained model.

**DoRA** (Liu et al., ICML 2024, arXiv 2402.09353, eq. 5) first splits every row of W into its length and its
direction. LoRA then moves the direction only, and the lengths, called magnitudes, are trained on their own::

    W' = m * (W + s B A) / |W + s B A|        m: [out]   |.|: the norm of each row

m starts at |W|, so training starts at the pretrained model here, too. That is the whole upgrade of a LoRA layer:
one vector, and one division by a norm.

The paper writes W as ``[in, out]`` and says "column"; both mean one magnitude per *output* feature.
Section 4.3 of the paper treats the norm as a constant in the backward pass ("detached"); eq. 6 does not ("exact").
"""

from __future__ import annotations

import torch
from torch import Tensor


def lora_weight(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """LoRA's weight ``W + s B A``, ``[out, in]``."""
    return W + scale * (B @ A)


def dora_scale(W: Tensor, A: Tensor, B: Tensor, m: Tensor, scale: float, norm_gradient: str = "detached") -> Tensor:
    """The factor ``g = m / n`` of each row, ``[out]``, with ``n = |W + s B A|``.

    A zero row of W has no direction. With m = 0 it is trained as a plain LoRA row, g = 1.
    """
    V = lora_weight(W, A, B, scale)
    if norm_gradient == "detached":
        V = V.detach()
    squared = V.square().sum(1)
    n = torch.where(squared > 0, squared, 1.0).sqrt()
    plain = (W == 0).all(1) & (m == 0)
    return torch.where(plain, 1.0, m / n)


def dora_weight(W: Tensor, A: Tensor, B: Tensor, m: Tensor, scale: float, norm_gradient: str = "detached") -> Tensor:
    """DoRA's weight ``m (W + s B A) / |W + s B A|``, ``[out, in]`` (arXiv 2402.09353, eq. 5)."""
    g = dora_scale(W, A, B, m, scale, norm_gradient)
    return g[:, None] * lora_weight(W, A, B, scale)


def dora_linear(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    m: Tensor,
    scale: float,
    norm_gradient: str = "detached",
) -> Tensor:
    """``y = W' x + b`` for ``x`` of ``[..., in]``; the bias is never scaled."""
    y = x @ dora_weight(W, A, B, m, scale, norm_gradient).T
    return y if b is None else y + b
