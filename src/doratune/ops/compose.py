"""DoRA's magnitude on the output of a layer: ``y = g (u - b) + b``, with a hand-written backward pass.

u ``[..., out]`` is the base's output plus the low-rank change, g ``[out]`` is ``m / n``, float32 whatever u's dtype.
The bias is never scaled.

For g's gradient ``sum(dy * z)``, ``z = u - b``, the step keeps its *output* y, because the next operation often keeps
it anyway and ``z = (y - b) / g``. If somebody overwrites y in place, an ``OutputGuard`` computes z again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Recompute = Callable[..., Tensor]
"""Computes ``z = W x + s B A x`` once more from the tensors the guard kept."""


AVERAGES_OUT = 256
"""From this many products on, their rounding to 16 bits is lost in that of the numbers multiplied."""


class OutputGuard:
    """Between base and scale: recomputes z in the backward pass if y was overwritten in place meanwhile."""

    def __init__(self, recompute: Recompute, *inputs: Tensor) -> None:
        self.recompute = recompute
        self.inputs = inputs
        self.overwritten = False


class _Guard(torch.autograd.Function):
    """The identity on u, whose backward finds dg if the next step could not."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, g: Tensor, dim: int, guard: OutputGuard, *inputs: Tensor) -> Tensor:
        ctx.g, ctx.dim, ctx.guard = g, dim, guard
        ctx.save_for_backward(*inputs)
        return u.view_as(u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, du: Tensor) -> tuple[Tensor | None, ...]:
        dg = None
        if ctx.guard.overwritten:
            ctx.guard.overwritten = False
            z = ctx.guard.recompute(*ctx.saved_tensors)
            dg = _sum_to_rows(du.float() * z.float(), ctx.dim) / _nonzero(ctx.g)
        # Not counted by ctx.saved_tensors: checkpointing lets them be read once.
        return du, dg, *[None] * (len(ctx.needs_input_grad) - 2)


class _ScaleRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        g: Tensor,
        inner: Tensor | None,
        outer: Tensor | None,
        dim: int,
        keep_output: bool,
        guard: OutputGuard | None,
        same_bias: bool,
    ) -> Tensor:
        inner = outer if same_bias else inner
        shift = _shift(g, inner, outer)
        y = scaled(u, g, shift, dim)
        # g and the biases are small. What is large is saved on its own, through autograd's saved tensors: reading
        # those fails as a whole once somebody has overwritten y, and du must not be lost with it.
        ctx.g, ctx.inner, ctx.outer, ctx.dim = g, inner, outer, dim
        ctx.keep_output, ctx.guard, ctx.same_bias = keep_output, guard, same_bias
        if guard is not None:
            ctx.version = y._version
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(y if keep_output else u)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_u, needs_g, needs_inner, needs_outer = ctx.needs_input_grad[:4]
        g, dim = ctx.g, ctx.dim
        du = scaled(dy, g, None, dim) if needs_u else None
        dg = d_inner = d_outer = None
        if needs_g:
            kept = _kept_tensor(ctx)
            if kept is not None:
                bias = ctx.outer if ctx.keep_output else ctx.inner
                dg = row_products(dy, kept, bias, dim)
                if ctx.keep_output:
                    dg = dg / _nonzero(g)
        if needs_inner or needs_outer:
            total = _sum_to_rows(dy, dim)
            d_inner = (-g * total).to(ctx.inner.dtype) if needs_inner else None
            d_outer = ((1 - g) * total if ctx.same_bias else total).to(ctx.outer.dtype) if needs_outer else None
        return du, dg, d_inner, d_outer, None, None, None, None


def _shift(g: Tensor, inner: Tensor | None, outer: Tensor | None) -> Tensor | None:
    """``outer - g inner``, float32 ``[out]``: exactly 0 where a bias stays and g is 1."""
    if inner is None:
        return None if outer is None else outer.float()
    return (-g * inner.float()) if outer is None else outer.float() - g * inner.float()


def scaled(u: Tensor, g: Tensor, shift: Tensor | None, dim: int) -> Tensor:
    """``g u + shift`` in u's dtype.

    For 16-bit u, g is applied as the sum of two 16-bit numbers: as precise as its float32 value, but without a float32
    copy of u. One alone has 8 bits in bfloat16, too few for a g near 1.
    """
    high = _broadcast(g.to(u.dtype), u, dim)
    y = u * high if shift is None else torch.addcmul(_broadcast(shift.to(u.dtype), u, dim), u, high)
    if u.dtype in (torch.float16, torch.bfloat16):
        low = g - g.to(u.dtype).float()
        y.addcmul_(u, _broadcast(low.to(u.dtype), u, dim))
    return y


def row_products(dy: Tensor, kept: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    """``sum(dy * (kept - bias))`` of each row, in float32, ``[out]``.

    Products of many bfloat16 numbers are rounded like the numbers themselves, which saves two float32 copies;
    float16 ones could vanish, compiled code makes no copies, and few do not average out.
    """
    many = not torch.compiler.is_compiling() and dy.numel() >= AVERAGES_OUT * dy.shape[dim]
    if dy.dtype != torch.bfloat16 or not many:
        dy, kept = dy.float(), kept.float()
    z = kept if bias is None else kept - _broadcast(bias.to(kept.dtype), kept, dim)
    return _sum_to_rows(dy * z, dim)


def _kept_tensor(ctx: Any) -> Tensor | None:
    """The tensor kept for dg; None, and a word to the guard, if it was overwritten since."""
    if ctx.guard is None:
        return ctx.saved_tensors[0]
    try:
        (kept,) = ctx.saved_tensors
        # Autograd checks versions by itself, but not under saved-tensor hooks (checkpointing, offloading).
        ctx.guard.overwritten = kept._version != ctx.version
    except RuntimeError:
        ctx.guard.overwritten = True
    return None if ctx.guard.overwritten else kept


def _broadcast(v: Tensor, like: Tensor, dim: int) -> Tensor:
    shape = [1] * like.ndim
    shape[dim] = -1
    return v.view(shape)


def _sum_to_rows(t: Tensor, dim: int) -> Tensor:
    """The sum over everything but the features, in float32."""
    others = [d for d in range(t.ndim) if d != dim % t.ndim]
    return t.sum(others, dtype=torch.float32) if others else t.float()


def _nonzero(g: Tensor) -> Tensor:
    return torch.where(g == 0, 1.0, g)


def scale_rows(
    u: Tensor,
    g: Tensor,
    inner: Tensor | None = None,
    outer: Tensor | None = None,
    dim: int = -1,
    guard: OutputGuard | None = None,
    keep_output: bool = False,
) -> Tensor:
    """``y = g (u - inner) + outer`` along ``dim``, in u's dtype; bit for bit u where g is 1.

    Args:
        u: the base's output plus the low-rank update.
        g: float32 ``[out]``, ``m / n``.
        inner: the bias that u already holds, or None.
        outer: the bias that y shall hold, or None.
        keep_output: keep y (often shared with the next operation) instead of u for g's gradient. Wrong where g is
            0 and imprecise where outer is much larger than z; such layers keep u.
        guard: with keep_output, what to do if y is overwritten in place before the backward pass.
    """
    if guard is not None:
        u = _Guard.apply(u, g, dim, guard, *guard.inputs)
        guard.inputs = ()
    # torch.compile does not take the same tensor twice.
    same_bias = inner is outer and inner is not None
    return _ScaleRows.apply(u, g, None if same_bias else inner, outer, dim, keep_output, guard, same_bias)
