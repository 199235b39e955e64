"""The low-rank change ``s B A``: added to a base's output, fused with a dense base, or added to the weight itself.

Shapes: x ``[..., in]``, u ``[..., out]``, A ``[r, in]``, B ``[out, r]``. Products run in the dtype of the layer's
output; A and B (small) are cast, x and W (large) never are. The backward passes are written by hand, and without
gradients no autograd function is called.

With dropout the low-rank path sees x without the elements in ``dropped`` (``ops/dropout.py``); the caller's scale holds
``1 / (1 - p)``. A byte per element is kept, not another x.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from doratune.ops.hardware import sums_stay_wide
from doratune.ops.once import by_hand, once_differentiable, transformed


def as_rows(t: Tensor) -> Tensor:
    """All dimensions but the last in one."""
    return t if t.ndim == 2 else t.reshape(-1, t.shape[-1])


def reshaped(t: Tensor, shape: torch.Size) -> Tensor:
    """A fresh t in another shape, not as a view of it: autograd lets no view made in a Function be changed in place."""
    return t if t.shape == shape else torch.ops.aten._unsafe_view(t, shape)


def low_rank_update(
    base_output: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropped: Tensor | None = None
) -> Tensor:
    """``u = base_output + s B A x`` in base_output's dtype; keeps x, ``A x`` and nothing of size ``[out, in]``."""
    if by_hand():
        return _LowRankUpdate.apply(base_output, x, A, B, scale, dropped)
    dtype = base_output.dtype
    return _update(base_output, x, A.to(dtype), B.to(dtype), scale, dropped)[0]


def dense_low_rank(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropped: Tensor | None = None
) -> Tensor:
    """``u = W x + b + s B A x`` in x's dtype, for frozen W and b; the two input gradients share one buffer."""
    if by_hand():
        return _DenseLowRank.apply(x, W, bias, A, B, scale, dropped)
    if transformed():  # nothing may be written in place
        return low_rank_update(F.linear(x, W, bias), x, A, B, scale, dropped)
    return dense_update(x, W, bias, A.to(x.dtype), B.to(x.dtype), scale, dropped)[0]


def _update(
    base_output: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropped: Tensor | None
) -> tuple[Tensor, Tensor]:
    """u and ``h = A x``; A and B are in base_output's dtype."""
    h = _seen(as_rows(x).to(base_output.dtype), dropped) @ A.T
    u = torch.addmm(as_rows(base_output), h, B.T, alpha=scale)
    return reshaped(u, base_output.shape), h


def dense_update(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropped: Tensor | None
) -> tuple[Tensor, Tensor]:
    """u and ``h = A x``; A and B are in x's dtype."""
    rows, dtype = as_rows(x), x.dtype
    h = _seen(rows, dropped) @ A.T
    # Of x as it is: of rows that do not lie in one piece torch rounds otherwise on some processors.
    u = as_rows(F.linear(x, W.to(dtype), None if bias is None else bias.to(dtype)))
    u.addmm_(h, B.T, alpha=scale)
    return reshaped(u, torch.Size([*x.shape[:-1], W.shape[0]])), h


def _seen(rows: Tensor, dropped: Tensor | None) -> Tensor:
    """What the low-rank path sees of x, ``[rows, in]``."""
    return rows if dropped is None else rows.masked_fill(as_rows(dropped), 0)


def _as_it_is_now(x: Tensor) -> Tensor:
    """x for the backward pass. If it is overwritten in place later, eager autograd refuses to go on.

    Compiled code would use what is there then, so it gets a copy, which the compiler leaves out where it can.
    """
    return x.clone() if torch.compiler.is_compiling() else x


class _LowRankUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, base_output: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropped: Tensor | None
    ) -> Tensor:
        ctx.scale, ctx.dtypes = scale, (A.dtype, B.dtype)
        A, B = A.to(base_output.dtype), B.to(base_output.dtype)
        u, h = _update(base_output, x, A, B, scale, dropped)
        ctx.save_for_backward(_as_it_is_now(x), h, A, B, dropped)
        return u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, du: Tensor) -> tuple[Tensor | None, ...]:
        x, h, A, B, dropped = ctx.saved_tensors
        dx, dA, dB = low_rank_gradients(
            ctx.needs_input_grad[1:4], as_rows(du), x, h, A, B, ctx.scale, dropped, ctx.dtypes
        )
        return (du if ctx.needs_input_grad[0] else None), dx, dA, dB, None, None


class _DenseLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        dropped: Tensor | None,
    ) -> Tensor:
        ctx.scale, ctx.dtypes = scale, (A.dtype, B.dtype)
        A, B = A.to(x.dtype), B.to(x.dtype)
        u, h = dense_update(x, W, bias, A, B, scale, dropped)
        ctx.save_for_backward(_as_it_is_now(x), h, W, A, B, dropped)
        return u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, du: Tensor) -> tuple[Tensor | None, ...]:
        x, h, W, A, B, dropped = ctx.saved_tensors
        needs = ctx.needs_input_grad
        rows = as_rows(du)
        dx_base = rows @ W.to(du.dtype) if needs[0] else None
        dx, dA, dB = low_rank_gradients(
            (needs[0], *needs[3:5]), rows, x, h, A, B, ctx.scale, dropped, ctx.dtypes, dx_base
        )
        return dx, None, None, dA, dB, None, None


def low_rank_gradients(
    needs: tuple[bool, ...],
    du: Tensor,
    x: Tensor,
    h: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    dropped: Tensor | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    dx: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``s B A x``: ``dB = s du^T h``, ``dh = du B``, ``dA = s dh^T x``, ``dx (+)= s dh A``.

    h, A and B are in du's dtype, the gradients of A and B in ``dtypes``.
    """
    needs_x, needs_A, needs_B = needs
    # (h^T du)^T and not du^T h: it reads du row by row.
    dB = _gradient(_product(h.T, du, dtypes[1]).T, scale, dtypes[1]) if needs_B else None
    if not (needs_x or needs_A):
        return None, None, dB
    dh = du @ B
    seen = _seen(as_rows(x).to(du.dtype), dropped) if needs_A else None
    dA = None if seen is None else _gradient(_product(dh.T, seen, dtypes[0]), scale, dtypes[0])
    if needs_x:
        if dropped is not None:
            low = (dh * scale @ A).masked_fill_(as_rows(dropped), 0)
            dx = low if dx is None else dx.add_(low)
        else:
            dx = dh * scale @ A if dx is None else dx.addmm_(dh, A, alpha=scale)
        dx = dx.view(x.shape).to(x.dtype)
    return dx, dA, dB


def _product(a: Tensor, b: Tensor, wanted: torch.dtype) -> Tensor:
    """``a b``; in float32 if that is wanted and the device can give the sums of 16-bit numbers unrounded."""
    if wanted == torch.float32 and a.dtype.itemsize == 2 and sums_stay_wide(a.device):
        return torch.mm(a, b, out_dtype=wanted)
    return a @ b


def _gradient(product: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return product.to(dtype, memory_format=torch.contiguous_format).mul_(scale)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a weight of ``dtype`` is computed: float32, and float64 for itself."""
    return torch.promote_types(dtype, torch.float32)


class _AdaptedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, A: Tensor | None, B: Tensor | None, g: Tensor | None, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(W, A, B, g)
        return _weight(W, A, B, g, scale).to(W.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dW: Tensor) -> tuple[Tensor | None, ...]:
        W, A, B, g = ctx.saved_tensors
        dW = dW.to(_wide(W.dtype))
        dA = dB = dg = None
        if ctx.needs_input_grad[3]:
            dg = (dW * _weight(W, A, B, None, ctx.scale)).sum(1)
        if g is not None:
            dW = dW * g[:, None]
        if ctx.needs_input_grad[1]:
            dA = ctx.scale * (B.to(dW.dtype).T @ dW)
        if ctx.needs_input_grad[2]:
            dB = ctx.scale * (dW @ A.to(dW.dtype).T)
        return (dW.to(W.dtype) if ctx.needs_input_grad[0] else None), dA, dB, dg, None


def _weight(W: Tensor, A: Tensor | None, B: Tensor | None, g: Tensor | None, scale: float) -> Tensor:
    V = W.to(_wide(W.dtype))
    if A is not None and B is not None:
        V = torch.addmm(V, B.to(V.dtype), A.to(V.dtype), alpha=scale)
    return V if g is None else V * g[:, None]


def adapted_weight(W: Tensor, A: Tensor | None, B: Tensor | None, g: Tensor | None, scale: float) -> Tensor:
    """``W' = g (W + s B A)``, ``[out, in]`` in W's dtype; keeps nothing of that size for backward but W."""
    return _AdaptedWeight.apply(W, A, B, g, scale) if by_hand() else _weight(W, A, B, g, scale).to(W.dtype)
