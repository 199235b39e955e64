"""DoRA's magnitude where every row of an output has its own matrix, as the tokens of a mixture's experts have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from doratune.ops.compose import eight_bits
from doratune.ops.once import by_hand, once_differentiable, transformed


class _ScaleGroups(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, g: Tensor, groups: Tensor, eight_bit: bool) -> Tensor:
        ctx.eight_bit = eight_bit
        ctx.save_for_backward(g, groups, *(eight_bits(z, None, -1) if eight_bit else (z,)))
        return _scaled(z, g, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        g, groups, *kept = ctx.saved_tensors
        dg = None
        if ctx.needs_input_grad[1]:
            z = kept[0].to(dy.dtype) * kept[1] if ctx.eight_bit else kept[0]
            wide = torch.promote_types(g.dtype, dy.dtype)
            dg = torch.zeros_like(g, dtype=wide).index_add_(0, groups, dy.to(wide) * z).to(g.dtype)
        return (_scaled(dy, g, groups) if ctx.needs_input_grad[0] else None), dg, None, None


def _scaled(z: Tensor, g: Tensor, groups: Tensor) -> Tensor:
    scale = g.to(torch.promote_types(g.dtype, z.dtype)).index_select(0, groups)
    return (scale * z if transformed() else scale.mul_(z)).to(z.dtype)


def scale_groups(z: Tensor, g: Tensor, groups: Tensor, eight_bit: bool = False) -> Tensor:
    """``y[t] = g[groups[t]] z[t]`` in z's dtype, computed in g's.

    Args:
        z: ``[tokens, out]``.
        g: ``[count, out]``, float32.
        groups: which of g's rows is each token's, whole numbers ``[tokens]``.
        eight_bit: keep z for g's gradient as int8.
    """
    return _ScaleGroups.apply(z, g, groups, eight_bit) if by_hand() else _scaled(z, g, groups)
