"""Linear layers: ``nn.Linear`` and transformers' ``Conv1D``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from doratune.layers import quantised
from doratune.layers.kind import Kind, Options
from doratune.layers.weights import WeightRows, is_transformers_conv1d, linear_rows, on_device, rows_by_forward
from doratune.ops.compose import OutputGuard, scale_rows
from doratune.ops.low_rank import dense_low_rank, low_rank_update


def rows_of(base: nn.Module) -> WeightRows:
    """W, ``[out, in]``, however the layer keeps it."""
    if quantised.library_of(base) is not None:
        return quantised.quantised_rows(base)
    if has_own_forward(base):
        return rows_by_forward(base)
    return linear_rows(base)


def has_own_forward(base: nn.Module) -> bool:
    """True for a subclass of ``nn.Linear`` that computes its output in its own way."""
    return isinstance(base, nn.Linear) and type(base).forward is not nn.Linear.forward


def slow_reason(base: nn.Module, dropout: float) -> str | None:
    """Why W cannot be used directly, so that the base's own forward has to run; None if it can."""
    library = quantised.library_of(base)
    if library is not None:
        return f"the weight is quantised ({library})"
    if has_own_forward(base):
        return f"{type(base).__name__} has a forward of its own; its weight is found by running it on the identity"
    if "forward" in base.__dict__:
        return "the base layer's forward was replaced on the instance"
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return "the base layer has hooks"
    if hasattr(base, "parametrizations"):
        return "the base layer's weight is parametrised"
    weight = base.weight
    if type(weight) not in (Tensor, nn.Parameter):
        return f"the weight is a {type(weight).__name__}"
    if weight.requires_grad:
        return "the base weight is being trained"
    if dropout > 0:
        return "dropout separates the low-rank input from the base's"
    return None


def forward(
    base: nn.Module,
    x: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    magnitude: Tensor | None,
    scale: float,
    options: Options,
) -> Tensor:
    """``y = g (W x + s B A x) + b`` for x ``[..., in]``, one magnitude for each output row.

    The base's own output is the starting point, so hooks, quantisation and wrappers of the base keep working.
    """
    low = F.dropout(x, options.dropout) if options.dropout else x
    bias: Tensor | None = base.bias  # type: ignore[assignment]
    inner = bias
    if slow_reason(base, options.dropout) is None:
        if magnitude is not None and not options.keep_output:
            inner = None  # added last: it would drown z
        weight: Tensor = base.weight  # type: ignore[assignment]
        W = weight.T if is_transformers_conv1d(base) else weight
        if A is None or B is None:
            u = F.linear(_autocast(x), W, inner)
        else:
            u = dense_low_rank(_autocast(x), W, inner, A, B, scale)
    else:
        u = base(x)
        if A is not None and B is not None:
            u = low_rank_update(u, low, A, B, scale)
    outer = bias if options.bias is None else options.bias
    if magnitude is None:
        return _swap_bias(u, inner, outer)
    with on_device(base):
        g = options.row_scale(rows_of(base), A, B, magnitude, scale)
    guard = _guard(base, x, low, A, B, scale) if options.guards_output(g) else None
    return scale_rows(u, g, inner, outer, guard=guard, keep_output=options.keep_output)


def _guard(base: nn.Module, x: Tensor, low: Tensor, A: Tensor | None, B: Tensor | None, scale: float) -> OutputGuard:
    """Computes ``z = W x + s B A x`` again, through the base and its hooks, if the layer's output was overwritten."""

    def recompute(x: Tensor, low: Tensor) -> Tensor:
        z = base(x)
        bias: Tensor | None = base.bias  # type: ignore[assignment]
        if bias is not None:
            z = z - bias
        return z if A is None or B is None else low_rank_update(z, low, A, B, scale)

    return OutputGuard(recompute, x, low)


def _swap_bias(u: Tensor, inner: Tensor | None, outer: Tensor | None) -> Tensor:
    """LoRA's output with the bias it shall have in place of the one it has."""
    if inner is outer or outer is None:
        return u
    change = outer if inner is None else outer - inner
    return u + change.to(u.dtype)


def _autocast(x: Tensor) -> Tensor:
    """x as autocast would hand it to a linear layer."""
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


class Linear(Kind):
    """``nn.Linear``, its subclasses, and transformers' ``Conv1D``."""

    name = "linear"

    def serves(self, base: nn.Module) -> bool:
        return isinstance(base, nn.Linear) or is_transformers_conv1d(base) or quantised.library_of(base) is not None

    def rows(self, base: nn.Module) -> WeightRows:
        return rows_of(base)

    def refusal(self, base: nn.Module) -> str | None:
        return quantised.refusal(base)

    forward = staticmethod(forward)

    def explain(self, base: nn.Module, dropout: float) -> tuple[str, str]:
        reason = slow_reason(base, dropout)
        return ("dense, fused input gradient", "") if reason is None else ("over the base's output", reason)

    def probe(self, base: nn.Module, generator: torch.Generator) -> Tensor:
        library = quantised.library_of(base)
        if library is None:
            return super().probe(base, generator)
        rows = self.rows(base)
        dtype = next(iter(rows.tiles()))[1].dtype
        return torch.randn(8, rows.shape[1], generator=generator).to(rows.device, dtype)

    def merged_layer(self, base: nn.Module, merged: Tensor, bias: Tensor | None) -> nn.Module:
        own_way = has_own_forward(base) or hasattr(base, "parametrizations")
        if quantised.library_of(base) is None and not own_way:
            return super().merged_layer(base, merged.T.contiguous() if is_transformers_conv1d(base) else merged, bias)
        plain = nn.Linear(merged.shape[1], merged.shape[0], bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(merged, requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias.to(merged.dtype), requires_grad=False)
        return plain.train(base.training)
