"""Linear layers: ``nn.Linear`` and transformers' ``Conv1D``."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from doratune.layers import quantised
from doratune.layers.kind import Kind, Options
from doratune.layers.sharded import rows_of_part
from doratune.layers.weights import (
    WeightRows,
    is_dtensor,
    is_transformers_conv1d,
    linear_rows,
    on_device,
    rows_by_forward,
)
from doratune.ops.autocast import autocast_of_now, is_autocast, without_autocast
from doratune.ops.compose import OutputGuard, scale_rows
from doratune.ops.dense import scaled_dense
from doratune.ops.dropout import dropped_elements
from doratune.ops.hardware import multiplies
from doratune.ops.low_rank import as_rows, dense_low_rank, low_rank_update

NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of weights that mean what they say."""
NOT_LINEAR = 0.1
"""How far f(2 x) may be from 2 f(x), relatively: some layers round their input to few bits."""
FEW_TOKENS = 64
"""Up to here 16-bit products cost more to start than float32 ones to compute (measured on CPUs: 46 us against 8)."""


def rows_of(base: nn.Module) -> WeightRows:
    """W, ``[out, in]``, however the layer keeps it."""
    if quantised.library_of(base) is not None:
        return quantised.quantised_rows(base)
    if is_dtensor(base.weight):
        return rows_of_part(base.weight, is_transformers_conv1d(base))
    if has_own_forward(base):
        return rows_by_forward(base)
    return linear_rows(base)


def has_own_forward(base: nn.Module) -> bool:
    """True for a subclass of ``nn.Linear`` that computes its output in its own way."""
    return isinstance(base, nn.Linear) and type(base).forward is not nn.Linear.forward


def own_forward_refusal(base: nn.Module) -> str | None:
    """Why the own forward of a subclass is not that of a linear layer, or None: a try on few numbers.

    Routers of mixtures (Llama 4) are such subclasses and answer with a tuple; others have an activation inside.
    """
    name, columns, out = type(base).__name__, int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
    with torch.no_grad(), on_device(base):
        x = torch.linspace(-1, 1, columns).to(base.weight)  # type: ignore[arg-type]
        try:
            y = base.forward(torch.stack([0 * x, x, 2 * x]))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            return f"{name} has a forward of its own, which takes no rows of its in_features ({error})"
    if not isinstance(y, Tensor) or y.shape != (3, out):
        found = f"a tensor {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        return f"{name} has a forward of its own, which gives {found} and not one row of {out} for each row"
    if y.is_meta:
        return None
    once, twice = (y[1:].float() - y[:1].float()).unbind()
    if not (twice - 2 * once).abs().max() <= NOT_LINEAR * twice.abs().max():
        return f"{name} has a forward of its own, which is not linear: it does more than multiply with a weight"
    return None


def slow_reason(base: nn.Module) -> str | None:
    """Why W cannot be used directly, so that the base's own forward has to run; None if it can."""
    weight: Tensor | None = getattr(base, "weight", None)  # HQQ's layer has none
    if type(base) is not nn.Linear or type(weight) is not nn.Parameter:
        library = quantised.library_of(base)
        if library is not None:
            return f"the weight is quantised ({library})"
        if has_own_forward(base):
            return f"{type(base).__name__} has a forward of its own; its weight is found by running it on the identity"
        if type(weight) not in (Tensor, nn.Parameter):
            return f"the weight is a {type(weight).__name__}"
        if "parametrizations" in base._modules:
            return "the base layer's weight is parametrised"
    if "forward" in base.__dict__:
        return "the base layer's forward was replaced on the instance"
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return "the base layer has hooks"
    if weight is not None and weight.requires_grad:
        return "the base weight is being trained"
    bias: Tensor | None = getattr(base, "bias", None)
    if bias is not None and bias.requires_grad:
        return "the base bias is being trained"
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

    The base's own output is the starting point, so hooks, quantisation and wrappers of the base keep working; a plain
    dense base is computed here, which saves a pass over the input's gradient.
    """
    if options.dropout and options.dropout_on_base and magnitude is not None:
        # y = W x + (g - 1) W d + g s B A d + b, d what dropout leaves of x: two products with W, where
        # W (x - d) is not found as a difference of rounded numbers.
        seen = F.dropout(x, options.dropout)
        rest = _without_bias(base, x - seen)
        return rest + forward(base, seen, A, B, magnitude, scale, options._replace(dropout=0.0))
    bias: Tensor | None = base.bias  # type: ignore[assignment]
    outer = bias if options.bias is None else options.bias
    inner = bias
    if options.reuse_scale and A is not None and B is not None and not torch.compiler.is_compiling():
        return _evaluate(base, x, A, B, magnitude, scale, options, inner, outer)
    dense = slow_reason(base) is None and _multiplies(base, x)
    change = None if A is None or B is None else LowRankChange.of(x, A, B, scale, options)
    if dense and magnitude is not None:
        if options.keep() != "output":
            inner = None  # added last: it would drown z
        elif change is not None and options.in_one_node():
            g = options.row_scale(options.rows or linear_rows(base), A, B, magnitude.detach(), scale)
            return scaled_dense(_autocast(x), _weight(base), inner, outer, magnitude, g, *change)
    u = _dense(base, _autocast(x), inner, change) if dense else _over_output(base(x), x, change)
    if magnitude is None:
        return _swap_bias(u, inner, outer)
    with on_device(base):
        g = options.row_scale(options.rows or rows_of(base), A, B, magnitude, scale)
    guard = _guard(base, x, change) if options.guards_output(g) else None
    fresh = dense or change is not None  # and not the base's own tensor
    return scale_rows(u, g, inner, outer, guard=guard, keep=options.keep(), fresh=fresh)


def _evaluate(
    base: nn.Module,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor | None,
    scale: float,
    options: Options,
    inner: Tensor | None,
    outer: Tensor | None,
) -> Tensor:
    """The same from what is remembered, so that a decode step pays for two small products and one pass."""
    u = base(x)
    with on_device(base):
        ready = options.cache.evaluation(options.rows or rows_of(base), A, B, magnitude, scale, options.dense_norm)
    rows, g = as_rows(x), ready.g
    if rows.shape[0] > FEW_TOKENS:
        scaled = _swap_bias(u, inner, outer) if g is None else scale_rows(u, g, inner, outer)
        with without_autocast(x.device):
            h = rows.to(u.dtype) @ ready.A.to(u.dtype)
            add = Tensor.addmm if scaled is u else Tensor.addmm_  # u may be the base's own tensor
            return add(as_rows(scaled), h, ready.B.to(u.dtype)).view(u.shape)
    y = rows.to(ready.A.dtype) @ ready.A @ ready.B
    if inner is not outer or (inner is not None and g is not None):
        kept = 0 if inner is None else inner if g is None else g * inner
        y = y + ((0 if outer is None else outer) - kept)
    y = y + as_rows(u) if g is None else torch.addcmul(y, as_rows(u), g)
    return y.to(u.dtype).view(u.shape)


class LowRankChange(NamedTuple):
    """``s B A x`` as one forward sees it."""

    A: Tensor
    B: Tensor
    scale: float
    dropped: Tensor | None
    """Elements of x that dropout takes away; their place is made up for in scale."""

    @classmethod
    def of(cls, x: Tensor, A: Tensor, B: Tensor, scale: float, options: Options) -> LowRankChange:
        """Draw what is dropped."""
        if not options.dropout:
            return cls(A, B, scale, None)
        return cls(A, B, scale / (1 - options.dropout), dropped_elements(x, options.dropout))


def _multiplies(base: nn.Module, x: Tensor) -> bool:
    """Whether the base takes an x of this dtype; where it does not, its own forward says so."""
    return x.dtype == base.weight.dtype or (is_autocast(x.device) and x.is_floating_point())


def _dense(base: nn.Module, x: Tensor, bias: Tensor | None, change: LowRankChange | None) -> Tensor:
    """``W x + b + s B A x`` from W itself."""
    W = _weight(base)
    if change is None:
        return F.linear(x, W, bias)
    return dense_low_rank(x, W, bias, *change)


def _weight(base: nn.Module) -> Tensor:
    """W of a dense base, ``[out, in]``."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    return weight.T if is_transformers_conv1d(base) else weight


def _over_output(base_output: Tensor, x: Tensor, change: LowRankChange | None) -> Tensor:
    """The base's own output plus ``s B A x``, in autocast's dtype: quantised bases may give back their input's."""
    return base_output if change is None else low_rank_update(_autocast(base_output), x, *change)


def _guard(base: nn.Module, x: Tensor, change: LowRankChange | None) -> OutputGuard:
    """Computes ``z = W x + s B A x`` again, through the base and its hooks, if the layer's output was overwritten."""
    autocast = autocast_of_now(x.device)
    large = [x] if change is None or change.dropped is None else [x, change.dropped]
    small = None if change is None else change._replace(dropped=None)

    # Nothing large but the arguments, which autograd keeps: under checkpointing it does not.
    def recompute(x: Tensor, dropped: Tensor | None = None) -> Tensor:
        with autocast():
            return _over_output(_without_bias(base, x), x, small and small._replace(dropped=dropped))

    return OutputGuard(recompute, *large)


def _without_bias(base: nn.Module, x: Tensor) -> Tensor:
    """The base's own output less its bias."""
    z: Tensor = base(x)
    bias: Tensor | None = base.bias  # type: ignore[assignment]
    return z if bias is None else z - bias.to(z.dtype)


def _swap_bias(u: Tensor, inner: Tensor | None, outer: Tensor | None) -> Tensor:
    """LoRA's output with the bias it shall have in place of the one it has."""
    if inner is outer or outer is None:
        return u
    change = outer if inner is None else outer - inner
    return u + change.to(u.dtype)


def _autocast(x: Tensor) -> Tensor:
    """x as autocast would hand it to a linear layer."""
    if is_autocast(x.device) and x.is_floating_point() and x.dtype != torch.float64:
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
        weight = getattr(base, "weight", None)
        if quantised.library_of(base) is None and weight is not None and weight.dtype not in NUMBERS:
            name = str(weight.dtype).removeprefix("torch.")
            return f"its weight holds {name}, as some quantiser's do that is not served; {quantised.SERVED}"
        if has_own_forward(base) and quantised.library_of(base) is None and not is_dtensor(weight):
            return own_forward_refusal(base)
        return quantised.refusal(base)

    forward = staticmethod(forward)

    def explain(self, base: nn.Module) -> tuple[str, str]:
        reason = slow_reason(base)
        if reason is not None:
            return "over the base's output", reason
        dtype, device = base.weight.dtype, base.weight.device
        if multiplies(dtype, device):  # type: ignore[arg-type]
            return "dense, fused input gradient", ""
        name = str(dtype).removeprefix("torch.")
        return "dense, fused input gradient", f"this processor has no {name} products, float32 is many times faster"

    def probe(self, base: nn.Module, generator: torch.Generator) -> Tensor:
        library = quantised.library_of(base)
        if library is None:
            return super().probe(base, generator)
        rows = self.rows(base)
        dtype = next(iter(rows.tiles()))[1].dtype
        return torch.randn(8, rows.shape[1], generator=generator, device="cpu").to(rows.stored.device, dtype)

    def merged_layer(self, base: nn.Module, merged: Tensor, bias: Tensor | None) -> nn.Module:
        own_way = has_own_forward(base) or hasattr(base, "parametrizations")
        if quantised.library_of(base) is None and not own_way:
            return super().merged_layer(base, merged.T.contiguous() if is_transformers_conv1d(base) else merged, bias)
        plain = nn.Linear(merged.shape[1], merged.shape[0], bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(merged, requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias.to(merged.dtype), requires_grad=False)
        return plain.train(base.training)
