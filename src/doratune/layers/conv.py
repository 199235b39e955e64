"""Convolutions: ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d`` with every option.

W is the stored weight as a matrix, ``[out, in / groups * kernel]``; A is ``[r, in / groups * kernel]``, B ``[out, r]``.
So the update has W's own shape and merges exactly, grouped or not: the groups share A, each sees its own channels.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from doratune.config import AdapterConfig
from doratune.layers.kind import Kind, Options
from doratune.layers.weights import WeightRows, conv_rows, on_device
from doratune.ops.autocast import autocast_of_now, without_autocast
from doratune.ops.compose import OutputGuard, scale_rows

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
POINTWISE = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def forward(
    base: nn.Module,
    x: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    magnitude: Tensor | None,
    scale: float,
    options: Options,
) -> Tensor:
    """``y = g (conv(x; W) + s B conv(x; A)) + b`` for x ``[batch, channels, ...]`` or ``[channels, ...]``."""
    base = cast(Conv, base)
    if x.ndim == len(base.kernel_size) + 1:
        batch = forward(base, x[None], A, B, magnitude, scale, options)
        return batch.squeeze(0)
    low = F.dropout(x, options.dropout) if options.dropout else x
    if options.dropout and options.dropout_on_base and magnitude is not None:
        # As for linear layers: two convolutions with W.
        return _without_bias(base, x - low) + forward(base, low, A, B, magnitude, scale, options._replace(dropout=0.0))
    u = base(x)
    if A is not None and B is not None:
        u = u + low_rank(base, low, A, B, scale, u.dtype)
    bias = base.bias
    outer = bias if options.bias is None else options.bias
    if magnitude is None:
        if outer is bias or outer is None:
            return u
        change = outer if bias is None else outer - bias
        return u + _along_channels(base, change.to(u.dtype))
    with on_device(base):
        g = options.row_scale(conv_rows(base), A, B, magnitude, scale)
    guard = _guard(base, x, low, A, B, scale) if options.guards_output(g) else None
    channels = -1 - len(base.kernel_size)
    return scale_rows(u, g, bias, outer, dim=channels, guard=guard, keep=options.keep(), fresh=A is not None)


def low_rank(base: Conv, x: Tensor, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``s B conv(x; A)`` with the base's stride, padding, dilation and groups, in ``dtype``."""
    ones = [1] * len(base.kernel_size)
    kernel = A.to(dtype).view(A.shape[0], -1, *base.kernel_size)
    with without_autocast(x.device):
        h = base._conv_forward(x.to(dtype), kernel.repeat(base.groups, 1, *ones), None)
        pointwise = (B * scale).to(dtype).view(*B.shape, *ones)
        kind = next(c for c in CONVS if isinstance(base, c))
        return POINTWISE[kind](h, pointwise, groups=base.groups)


def _without_bias(base: Conv, x: Tensor) -> Tensor:
    """The base's own output less its bias."""
    z: Tensor = base(x)
    return z if base.bias is None else z - _along_channels(base, base.bias.to(z.dtype))


def _along_channels(base: Conv, values: Tensor) -> Tensor:
    """Values of the output channels, to be broadcast over a batch."""
    return values.view(-1, *[1] * len(base.kernel_size))


def _guard(base: Conv, x: Tensor, low: Tensor, A: Tensor | None, B: Tensor | None, scale: float) -> OutputGuard:
    """Computes ``z = conv(x; W) + s B conv(x; A)`` again if the layer's output was overwritten."""
    autocast = autocast_of_now(x.device)

    def recompute(x: Tensor, low: Tensor) -> Tensor:
        with autocast():
            z = _without_bias(base, x)
            return z if A is None or B is None else z + low_rank(base, low, A, B, scale, z.dtype)

    return OutputGuard(recompute, x, low)


class Convolution(Kind):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``."""

    name = "convolution"

    def serves(self, base: nn.Module) -> bool:
        return isinstance(base, CONVS)

    def refusal(self, base: nn.Module) -> str | None:
        plain = next(c for c in CONVS if isinstance(base, c))
        if type(base).forward is not plain.forward or type(base)._conv_forward is not plain._conv_forward:  # type: ignore[attr-defined]
            return f"{type(base).__name__} has a forward of its own, which may not convolve with its weight as it is"
        return None

    def rows(self, base: nn.Module) -> WeightRows:
        return conv_rows(base)

    forward = staticmethod(forward)

    def file_refusal(self, base: nn.Module, config: AdapterConfig) -> str | None:
        if cast(Conv, base).groups == 1:
            return None
        return (
            "PEFT's A for a grouped convolution sees all input channels, so its update leaves the weight's shape, "
            "cannot be merged, and its norm is not that of the layer"
        )

    def to_file(self, base: nn.Module, part: str, tensor: Tensor) -> Tensor:
        conv = cast(Conv, base)
        ones = [1] * len(conv.kernel_size)
        if part == "lora_A.weight":
            return tensor.view(tensor.shape[0], -1, *conv.kernel_size)
        return tensor.view(*tensor.shape, *ones) if part == "lora_B.weight" else tensor.view(1, -1, *ones)

    def from_file(self, base: nn.Module, part: str, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1) if part == "lora_magnitude_vector" else tensor.flatten(1)

    def merged_layer(self, base: nn.Module, merged: Tensor, bias: Tensor | None) -> nn.Module:
        return super().merged_layer(base, merged.view(cast(Conv, base).weight.shape), bias)

    def probe(self, base: nn.Module, generator: torch.Generator) -> Tensor:
        conv = cast(Conv, base)
        reach = [d * (k - 1) + 4 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        pads = conv._reversed_padding_repeated_twice if conv.padding_mode != "zeros" else [0]
        size = [max(n, math.ceil(max(pads)) + 1) for n in reach]
        x = torch.randn(2, conv.in_channels, *size, generator=generator, device="cpu")
        return x.to(conv.weight.device, conv.weight.dtype)
