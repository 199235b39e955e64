"""DoRA over a dense weight as one node of autograd's graph: ``y = g (W x + s B A x) + b``.

The arithmetic is that of ``low_rank`` and ``compose``, whose functions would make five nodes of it (of m / n, too).
Starting a node takes longer than the arithmetic of a small layer, and GPUs wait for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from doratune.ops.compose import Watch, is_alias, scale_in_place, scaled_backward
from doratune.ops.low_rank import as_rows, dense_update, low_rank_gradients
from doratune.ops.once import once_differentiable


class _ScaledDense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        inner: Tensor | None,
        outer: Tensor | None,
        m: Tensor,
        g: Tensor,
        A: Tensor,
        B: Tensor,
        scale: float,
        dropped: Tensor | None,
    ) -> Tensor:
        ctx.g, ctx.outer, ctx.scale, ctx.dtypes = g, outer, scale, (A.dtype, B.dtype)
        A, B = A.to(x.dtype), B.to(x.dtype)
        y, h = dense_update(x, W, inner, A, B, scale, dropped)
        scale_in_place(y, g, inner, outer, -1)
        ctx.watch = Watch(y)
        # ``data`` has a counter of its own: reading the others must not fail because somebody has overwritten y.
        ctx.save_for_backward(x, h, W, A, B, dropped, m, y.data if ctx.needs_input_grad[4] else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, W, A, B, dropped, m, y = ctx.saved_tensors
        needs_x, _, _, needs_outer, needs_m, _, needs_A, needs_B = ctx.needs_input_grad[:8]
        kept, bias, divisor = y, ctx.outer, m  # z = (y - b) / g, and dm = sum(dy z) g / m
        if needs_m and (ctx.watch.overwritten() or is_alias(y, dy)):
            kept, bias, divisor = dense_update(x, W, None, A, B, ctx.scale, dropped)[0], None, m / ctx.g
        wanted = (needs_x or needs_A or needs_B, needs_m, needs_outer)
        du, dm, total = scaled_backward(dy, kept if needs_m else dy, ctx.g, bias, -1, wanted)
        if needs_m:
            dm = (dm / divisor).masked_fill_(m == 0, 0).to(m.dtype)  # of rows trained as LoRA, too: their g stays 1
        d_outer = total.to(ctx.outer.dtype) if needs_outer else None
        dx = dA = dB = None
        if du is not None:
            rows = as_rows(du)
            dx = rows @ W.to(du.dtype) if needs_x else None
            needs = (needs_x, needs_A, needs_B)
            dx, dA, dB = low_rank_gradients(needs, rows, x, h, A, B, ctx.scale, dropped, ctx.dtypes, dx)
        return dx, None, None, d_outer, dm, None, dA, dB, None, None


def scaled_dense(
    x: Tensor,
    W: Tensor,
    inner: Tensor | None,
    outer: Tensor | None,
    m: Tensor,
    g: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    dropped: Tensor | None = None,
) -> Tensor:
    """``y = g (W x + s B A x) + outer`` in x's dtype, for a frozen W and a detached norm; y is kept for m's gradient.

    If y is overwritten in place before the backward pass, it is computed again there.

    Args:
        inner: a bias added to ``W x`` and taken away again, so that g = 1 gives the base's own output to the last bit.
        m: ``[out]``, only for its gradient.
        g: float32 ``[out]``, ``m / n`` without a graph.
    """
    y: Tensor = _ScaledDense.apply(x, W, inner, outer, m, g, A, B, scale, dropped)
    return y
