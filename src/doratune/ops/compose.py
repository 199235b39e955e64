"""DoRA's magnitude on the output of a layer: ``y = g (u - b) + b``, with a hand-written backward pass.

u ``[..., out]`` is the base's output plus the low-rank change, g ``[out]`` is ``m / n``, float32 whatever u's dtype.
The bias is never scaled.

For g's gradient ``sum(dy * z)``, ``z = u - b``, the step keeps its *output* y, because the next operation often keeps
it anyway and ``z = (y - b) / g``. If somebody overwrites y in place, an ``OutputGuard`` computes z again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from doratune.ops.low_rank import as_rows, reshaped
from doratune.ops.once import by_hand, once_differentiable, transformed

Recompute = Callable[..., Tensor]
"""Computes ``z = W x + s B A x`` again from the tensors that the guard kept."""


class Watch:
    """Tells whether a tensor was overwritten in place since, without keeping its memory, which checkpointing frees."""

    def __init__(self, t: Tensor) -> None:
        self.counter = t.detach()
        self.counter.data = t.new_empty(0)  # it still counts t's versions
        self.version = t._version

    def overwritten(self) -> bool:
        """Whether t, a view or an alias of it has been written to."""
        return self.counter._version != self.version


class OutputGuard:
    """Computes z again in the backward pass if y was overwritten in place meanwhile."""

    def __init__(self, recompute: Recompute, *inputs: Tensor) -> None:
        self.recompute = recompute
        self.inputs = inputs
        self.output: Watch | None = None
        self.watched: list[Watch] = []

    def watch(self, y: Tensor) -> None:
        """Begin to watch y and the inputs, at the end of the forward pass."""
        self.output = Watch(y)
        self.watched = [Watch(t) for t in self.inputs]
        self.inputs = ()

    def overwritten(self, y: Tensor, dy: Tensor) -> bool:
        """Whether y is not what it was."""
        assert self.output is not None
        return self.output.overwritten() or is_alias(y, dy)

    def again(self, inputs: Sequence[Tensor]) -> Tensor:
        """z, from inputs that must be as they were."""
        if any(watch.overwritten() for watch in self.watched):
            raise RuntimeError(
                "the output of an adapted layer has been modified by an inplace operation and so has its input, from "
                "which the output would be computed again; leave one of them as it is"
            )
        return self.recompute(*inputs)


def is_alias(kept: Tensor, dy: Tensor) -> bool:
    """Whether a gradient was written over what is kept.

    Other libraries' kernels (Liger's) do so with what they saved, by raw pointers, which leaves the version as it was.
    """
    alias: bool = torch._C._is_alias_of(kept, dy)  # type: ignore[attr-defined]
    return alias


class _ScaleRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        g: Tensor,
        inner: Tensor | None,
        outer: Tensor | None,
        dim: int,
        keep: str,
        guard: OutputGuard | None,
        same_bias: bool,
        in_place: bool,
    ) -> Tensor:
        inner = outer if same_bias else inner
        kept: tuple[Tensor, ...] = eight_bits(u, inner, dim) if keep == "8-bit" else (u,)
        if in_place:
            ctx.mark_dirty(u)
            scale_in_place(u, g, inner, outer, dim)
            y = u
        else:
            y = reshaped(_scaled(u, g, inner, outer, dim), u.shape)
        ctx.g, ctx.inner, ctx.outer, ctx.dim = g, inner, outer, dim
        ctx.keep, ctx.guard, ctx.same_bias = keep, guard, same_bias
        if ctx.needs_input_grad[1]:
            if keep == "output" and torch.compiler.is_compiling():
                # A tensor of its own, or the compiler would take what later overwrites y in place for what was kept.
                # It finds out by itself that both are the same, and computes and keeps one.
                kept = (reshaped(_scaled(u, g, inner, outer, dim), u.shape),)
            elif keep == "output" and guard is not None:
                # ``data`` has versions of its own: reading them must not fail because somebody has overwritten y.
                kept = (y.data, *(t.data for t in guard.inputs))
            elif keep == "output":
                kept = (y.detach(),)  # as no output: torch 2.8 keeps those under checkpointing, too
            ctx.save_for_backward(*kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_u, needs_g, needs_inner, needs_outer = ctx.needs_input_grad[:4]
        g = ctx.g
        # Where nothing is kept dy is handed over in its place; the kernel does not read it, as dg is not asked for.
        kept, bias, is_output = _kept(ctx, dy) if needs_g else (dy, None, False)
        wanted = (needs_u, needs_g, needs_inner or needs_outer)
        du, dg, total = scaled_backward(dy, kept, g, bias, ctx.dim, wanted)
        if is_output:
            dg = dg / torch.where(g == 0, 1.0, g)
        d_inner = (-g * total).to(ctx.inner.dtype) if needs_inner else None
        d_outer = ((1 - g) * total if ctx.same_bias else total).to(ctx.outer.dtype) if needs_outer else None
        return du, dg, d_inner, d_outer, None, None, None, None, None


def eight_bits(u: Tensor, inner: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    """``u - inner`` as int8, with a step size for each position: a large value costs digits at its own position only.

    A bias is larger at the same features of every position: left in, a few would cost all positions their digits.
    """
    if inner is not None:
        flat = _features_second(u, dim)
        u = (flat - _along(inner.to(u.dtype), flat)).view(u.shape)
    # 126 and not 127: a step rounded to bfloat16 could make 128 of it, which int8 takes for -128.
    # float16's steps go below its normal numbers, to where they still have 6 bits: outputs may well be that small.
    smallest = 2.0**-18 if u.dtype == torch.float16 else torch.finfo(u.dtype).tiny
    step = u.abs().amax(dim, keepdim=True).clamp_min(smallest * 126) / 126
    return (u / step).round_().to(torch.int8), step


def _kept(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, bool]:
    """What was kept for dg, the bias in it, and whether it is y, which g has multiplied."""
    if ctx.keep == "8-bit":
        levels, step = ctx.saved_tensors
        return levels.to(dy.dtype) * step, None, False
    kept, *inputs = ctx.saved_tensors
    if ctx.keep == "input":
        return kept, ctx.inner, False
    if ctx.guard is not None and ctx.guard.overwritten(kept, dy):
        return ctx.guard.again(inputs).to(dy.dtype), None, False
    return kept, ctx.outer, True


# Scale, subtract, add, and the sums of the backward pass are what batch normalisation in evaluation does, with 0 and 1
# for its statistics. Its kernels make one pass over the output each way, in float32 registers: g near 1 would have only
# 8 bits in bfloat16, and a float32 copy of u would cost more than the pass itself. For a float32 output multiplying it
# is one pass as well, and four times as fast on a CPU.

KERNELS = ("cpu", "cuda", "meta")
"""Devices whose kernels do this (Apple's does not write the sums). On others it is plain arithmetic."""


def _scaled(u: Tensor, g: Tensor, inner: Tensor | None, outer: Tensor | None, dim: int) -> Tensor:
    """``g (u - inner) + outer`` in u's dtype, shaped as by ``_features_second``; u where g is 1 and the bias stays."""
    if u.numel() == 0:
        return u.clone()
    flat = _features_second(u, dim)
    if not _by_kernel(u) or transformed():  # torch does not know the kernels' derivatives in mixed dtypes
        return _multiplied(flat.to(_wide(u)), g, inner, outer).to(u.dtype)
    g, mean, one = _statistics(u, g, inner)
    y, _, _ = torch.native_batch_norm(flat, g, _as(g, outer), mean, one, False, 0.0, 0.0)
    return y


def scale_in_place(u: Tensor, g: Tensor, inner: Tensor | None, outer: Tensor | None, dim: int) -> None:
    """``_scaled``, written over u: no fresh memory for another output."""
    if u.numel() == 0:
        return
    flat = _features_second(u, dim)
    if u.dtype == _wide(u):
        _multiplied(flat, g, inner, outer, out=flat)
    elif not _by_kernel(u):
        u.copy_(_scaled(u, g, inner, outer, dim).view(u.shape))
    else:
        g, mean, one = _statistics(u, g, inner)
        none = g.new_empty(0)
        torch.ops.aten.native_batch_norm.out(
            flat, g, _as(g, outer), mean, one, False, 0.0, 0.0, out=flat, save_mean=none, save_invstd=none.clone()
        )


def _by_kernel(u: Tensor) -> bool:
    return u.dtype != _wide(u) and u.device.type in KERNELS


def _wide(u: Tensor) -> torch.dtype:
    """The dtype of arithmetic with u."""
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _as(like: Tensor, values: Tensor | None) -> Tensor | None:
    return None if values is None else values.to(like.dtype)


def _multiplied(
    flat: Tensor, g: Tensor, inner: Tensor | None, outer: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """``g (flat - inner) + outer`` in one pass over flat."""
    g = g.to(flat.dtype)
    if inner is None and outer is None:
        return torch.mul(flat, _along(g, flat), out=out)
    shift = torch.zeros_like(g) if outer is None else outer.to(g.dtype)
    if inner is not None:
        shift = shift - g * inner
    return torch.addcmul(_along(shift, flat), flat, _along(g, flat), out=out)


def scaled_backward(
    dy: Tensor, kept: Tensor, g: Tensor, bias: Tensor | None, dim: int, wanted: tuple[bool, bool, bool]
) -> tuple[Any, Any, Any]:
    """``g dy``, ``sum(dy * (kept - bias))`` and ``sum(dy)``, the sums over everything but the features in float32."""
    if dy.numel() == 0:  # the kernels divide by the number of rows
        return dy.clone(), torch.zeros_like(g), torch.zeros_like(g)
    g, mean, one = _statistics(dy, g, bias)
    rows, kept = _features_second(dy, dim), _features_second(kept, dim)
    if dy.device.type in KERNELS:
        if dim == -1:
            rows = rows.contiguous()  # CUDA would read an expanded one (of y.sum()) column by column
        # The statistics are given twice: the CPU's kernel reads the running ones, CUDA's the saved ones.
        du, products, total = torch.ops.aten.native_batch_norm_backward(
            rows, kept, g, mean, one, mean, one, False, 0.0, wanted
        )
    else:
        wide, others = rows.to(g.dtype), [i for i in range(rows.ndim) if i != 1]
        du = (wide * _along(g, rows)).to(dy.dtype)
        products = (wide * (kept - _along(mean, rows))).sum(others)
        total = wide.sum(others)
    return (
        du.view(dy.shape) if wanted[0] else None,
        products.float() if wanted[1] else None,
        total.float() if wanted[2] else None,
    )


def _statistics(u: Tensor, g: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """g, mean and a variance of 1 in the dtype that batch normalisation wants beside u."""
    g = g.to(_wide(u))
    return g, torch.zeros_like(g) if mean is None else mean.to(g.dtype), torch.ones_like(g)


def _features_second(t: Tensor, dim: int) -> Tensor:
    """t with its features in the second dimension: as rows if they are in the last, -1."""
    return as_rows(t) if dim == -1 else t


def _along(values: Tensor, t: Tensor) -> Tensor:
    """Values of the features, to be broadcast over t."""
    return values.view(-1, *[1] * (t.ndim - 2))


def scale_rows(
    u: Tensor,
    g: Tensor,
    inner: Tensor | None = None,
    outer: Tensor | None = None,
    dim: int = -1,
    guard: OutputGuard | None = None,
    keep: str = "input",
    fresh: bool = False,
) -> Tensor:
    """``y = g (u - inner) + outer`` along ``dim``, in u's dtype; u where g is 1, on a CPU bit for bit.

    Args:
        u: the base's output plus the low-rank update.
        g: float32 ``[out]``, ``m / n``.
        inner: the bias that u already holds, or None.
        outer: the bias that y is to hold, or None.
        keep: what stays until the backward pass for g's gradient. "input": u. "output": y, often shared with the next
            operation; wrong where g is 0 and imprecise where outer is much larger than z. "8-bit": u rounded to
            int8.
        guard: with "output", what to do if y is overwritten in place before the backward pass.
        fresh: nobody else needs u, so that y may be written over it.
    """
    if not by_hand():
        return _scaled(u, g, inner, outer, dim).view(u.shape)
    # torch.compile does not accept the same tensor as two arguments.
    same_bias = inner is outer and inner is not None
    # The compiler reuses memory by itself; autograd lets no leaf be overwritten.
    in_place = fresh and keep != "input" and not torch.compiler.is_compiling() and u.grad_fn is not None
    y: Tensor = _ScaleRows.apply(u, g, None if same_bias else inner, outer, dim, keep, guard, same_bias, in_place)
    if guard is not None:
        guard.watch(y)
    return y
