"""Which elements dropout takes away, one byte each: with the input, that is all the backward pass needs."""

from __future__ import annotations

import torch
from torch import Tensor

from doratune.ops.once import transformed


def dropped_elements(x: Tensor, probability: float) -> Tensor:
    """True with ``probability`` for each element of x, bool of x's shape, from torch's generator of x's device."""
    if transformed():  # each example may have its own
        return torch.rand(x.shape, device=x.device) < probability
    if x.device.type != "cpu":
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(probability)
    # bernoulli_ takes most of a layer's time on a CPU. Sixteen random bits an element, four elements a draw, are six
    # times as fast, and the probability is right to 1 / 65,536.
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device="cpu").random_(-(2**63), None)
    below = round(probability * 65536) - 32768
    return (bits.view(torch.int16)[: x.numel()] < below).view(x.shape)
