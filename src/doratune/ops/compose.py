"""DoRA's magnitude on the output of a layer: ``y = g (u - b) + b``, with a hand-written backward pass.

u ``[..., out]`` is the base's output plus the low-rank change, g ``[out]`` is ``m / n``; the bias is never scaled. g is
applied in float32, whatever u's dtype.

For g's gradient ``sum(dy * z)``, ``z = u - b``, the step keeps its *output* y, because the next operation often keeps
it anyway and ``z = (y - b) / g``. If somebody overwrites y in place, an ``OutputGuard`` computes z again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from doratune.ops.low_rank import as_rows, reshaped

Recompute = Callable[..., Tensor]
"""Computes ``z = W x + s B A x`` once more from the tensors the guard kept."""


def _flat(t: Tensor, dim: int) -> Tensor:
    """One row for each token, where the features come last."""
    return as_rows(t) if dim == -1 else t


PIECE = 1 << 18
"""Elements of a piece, on a CPU: its float32 copy stays in the cache of one core."""


def _pieces(t: Tensor) -> Sequence[slice]:
    """Slices of the first dimension: pieces that fit a CPU's cache; everything at once where kernels are fused."""
    if t.device.type != "cpu" or torch.compiler.is_compiling() or t.numel() <= PIECE:
        return (slice(None),)
    step = max(1, PIECE * t.shape[0] // t.numel())
    return [slice(start, start + step) for start in range(0, t.shape[0], step)]


def piecewise(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """``function(t)``, an elementwise one, without large float32 temporaries on a CPU."""
    pieces = _pieces(t)
    if len(pieces) == 1:
        return function(t)
    result = torch.empty_like(t)
    for piece in pieces:
        result[piece] = function(t[piece])
    return result


def sum_piecewise(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The sum of ``function`` over pieces of the tensors."""
    pieces = _pieces(tensors[0])
    total = function(*(t[pieces[0]] for t in tensors))
    for piece in pieces[1:]:
        total += function(*(t[piece] for t in tensors))
    return total


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
        y = reshaped(piecewise(lambda u: scaled(u, g, shift, dim), _flat(u, dim)), u.shape)
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
        shape, dy = dy.shape, _flat(dy, dim)
        du = piecewise(lambda dy: scaled(dy, g, None, dim), dy).view(shape) if needs_u else None
        dg = d_inner = d_outer = None
        if needs_g:
            kept = _kept_tensor(ctx)
            if kept is not None:
                bias = ctx.outer if ctx.keep_output else ctx.inner
                dg = sum_piecewise(lambda dy, kept: row_products(dy, kept, bias, dim), dy, _flat(kept, dim))
                if ctx.keep_output:
                    dg = dg / _nonzero(g)
        if needs_inner or needs_outer:
            total = sum_piecewise(lambda dy: _sum_to_rows(dy.float(), dim), dy)
            d_inner = (-g * total).to(ctx.inner.dtype) if needs_inner else None
            d_outer = ((1 - g) * total if ctx.same_bias else total).to(ctx.outer.dtype) if needs_outer else None
        return du, dg, d_inner, d_outer, None, None, None, None


def _shift(g: Tensor, inner: Tensor | None, outer: Tensor | None) -> Tensor | None:
    """``outer - g inner``, float32 ``[out]``: exactly 0 where a bias stays and g is 1."""
    if inner is None:
        return None if outer is None else outer.float()
    return (-g * inner.float()) if outer is None else outer.float() - g * inner.float()


def scaled(u: Tensor, g: Tensor, shift: Tensor | None, dim: int) -> Tensor:
    """``g u + shift`` in float32, rounded once to u's dtype."""
    y = u.float() * _broadcast(g, u, dim)
    if shift is not None:
        y = y + _broadcast(shift, u, dim)
    return y.to(u.dtype)


def row_products(dy: Tensor, kept: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    """``sum(dy * (kept - bias))`` of each row, float32 ``[out]``."""
    z = kept.float() if bias is None else kept.float() - _broadcast(bias, dy, dim)
    return _sum_to_rows(dy.float() * z, dim)


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
    return v.float().view(shape)


def _sum_to_rows(t: Tensor, dim: int) -> Tensor:
    return t.sum([d for d in range(t.ndim) if d != dim % t.ndim])


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
    """``y = g (u - inner) + outer`` along ``dim``, in u's dtype, computed in float32; bit for bit u where g is 1.

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
