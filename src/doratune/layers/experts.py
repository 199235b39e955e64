"""Experts of a mixture, as transformers 5 keeps them: the matrices of all experts in one parameter.

Each parameter (``gate_up_proj``, ``down_proj``) is a layer to be adapted, in which every expert has an A, a B and an m
of its own; they lie under each other (``ops/stacked.py``). The host sorts tokens by expert and computes with one
product for all experts, as transformers' own ``grouped_mm`` does. No adapted weight is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from doratune.config import AdapterConfig
from doratune.layers.holder import shallow_copy
from doratune.layers.host import Host, Part
from doratune.layers.kind import Kind, Options
from doratune.layers.sharded import whole
from doratune.layers.weights import WeightRows, on_device
from doratune.ops import row_norm
from doratune.ops.grouped import scale_groups
from doratune.ops.stacked import each

MARKS = ("has_gate", "has_bias", "is_transposed")
"""What transformers' ``use_experts_implementation`` writes on a module whose experts may be computed this way."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""What torch's grouped products take."""
ALIGNED = 16
"""Bytes at whose multiples the kernels of grouped products want rows to begin."""


class Groups(NamedTuple):
    """Tokens sorted by expert."""

    experts: Tensor
    """The expert of each token, ascending, ``[tokens]``."""
    ends: Tensor
    """How many tokens belong to an expert or one before it, int32 ``[count]``."""

    @classmethod
    def of(cls, experts: Tensor, count: int) -> Groups:
        """From sorted experts; without ``bincount``, whose result's size would depend on data."""
        every = torch.arange(count, device=experts.device, dtype=experts.dtype)
        return cls(experts, torch.searchsorted(experts, every, right=True, out_int32=True))


class ExpertProjection(Part):
    """One parameter of an experts module, ``[count, out, in]`` or, transposed, ``[count, in, out]``."""

    @property
    def stored(self) -> Tensor:
        """The parameter that holds the weights."""
        stored: Tensor = getattr(self.owner, self.name)
        return stored

    @property
    def weight(self) -> Tensor:
        """The weights as the module keeps them."""
        return self.stored if self.merged is None else self.merged[0]

    @property
    def matrices(self) -> Tensor:
        """The weights as ``[count, out, in]``."""
        return self.weight.mT if self.owner.is_transposed else self.weight

    @property
    def bias(self) -> Tensor | None:
        """Those of all experts, ``[count out]``, or None."""
        if self.merged is not None:
            return self.merged[1]
        return getattr(self.owner, f"{self.name}_bias").flatten() if self.owner.has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Output for x ``[tokens, in]``, of which every expert gets an equal part, the first the first."""
        return project(self, x, self.shared_out(x))

    def shared_out(self, x: Tensor) -> Groups:
        """Equal parts of x for all experts."""
        count = len(self.weight)
        return Groups.of(torch.arange(len(x), device=x.device) * count // len(x), count)

    def extra_repr(self) -> str:
        """Name and shape."""
        count, out, columns = self.matrices.shape
        return f"{self.name}, experts={count}, in_features={columns}, out_features={out}"


class _Tiles:
    """One tile for each expert; ``W A^T`` of all of them in one product."""

    def __init__(self, part: ExpertProjection) -> None:
        self.part = part

    def _matrices(self) -> Tensor:
        return whole(self.part.matrices.detach())

    def __call__(self) -> Iterable[tuple[slice, Tensor]]:
        matrices = self._matrices()
        out = matrices.shape[1]
        return ((slice(i * out, (i + 1) * out), W) for i, W in enumerate(matrices))

    def product(self, A: Tensor) -> Tensor:
        """``W A^T``, float32 ``[count out, r]``, differentiable in A ``[count r, in]``."""

        def batch() -> Iterable[tuple[slice, Tensor]]:
            W = self._matrices()
            return ((slice(0, len(W)), W),)

        count = len(self.part.weight)
        return row_norm.skinny_product(batch, A.unflatten(0, (count, -1))).flatten(0, 1)


def is_experts(module: nn.Module) -> bool:
    """Whether a module is one of transformers' fused experts; decided without importing it."""
    down = module._parameters.get("down_proj")
    return down is not None and down.ndim == 3 and all(hasattr(module, mark) for mark in MARKS)


def first_of(module: Any) -> str:
    """Name of the first projection."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def _product(x: Tensor, W: Tensor, groups: Groups) -> Tensor:
    """Each token times its expert's matrix ``[out, in]`` of W ``[count, out, in]``, in W's dtype."""
    from transformers.integrations.moe import _grouped_mm

    y: Tensor = _grouped_mm(x, W.mT, groups.ends)
    return y


def project(
    part: ExpertProjection,
    x: Tensor,
    groups: Groups,
    A: Tensor | None = None,
    B: Tensor | None = None,
    magnitude: Tensor | None = None,
    scale: float = 0.0,
    options: Options | None = None,
) -> Tensor:
    """``y = g (W x + s B A x) + b`` with each token's own expert, for x ``[tokens, in]`` sorted by expert."""
    bias = part.bias
    y = _product(x, part.matrices, groups)
    if options is not None:
        if A is not None and B is not None:
            A3, B3 = (t.to(y.dtype) for t in each(A, B))
            spare = -A3.shape[1] % (ALIGNED // y.dtype.itemsize)
            h = _product(F.dropout(x, options.dropout), F.pad(A3, (0, 0, 0, spare)), groups)
            y = torch.add(y, _product(h, F.pad(B3, (0, spare)), groups), alpha=scale)
        if magnitude is not None:
            g = options.row_scale(rows_of(part), A, B, magnitude, scale)
            y = scale_groups(y, g.unflatten(0, (len(part.weight), -1)), groups.experts, options.eight_bit)
        bias = bias if options.bias is None else options.bias
    if bias is None:
        return y
    return y + bias.unflatten(0, (len(part.weight), -1))[groups.experts].to(y.dtype)


def rows_of(part: ExpertProjection) -> WeightRows:
    """W, ``[count out, in]``."""
    count, out, columns = part.matrices.shape
    return WeightRows((count * out, columns), part.stored, _Tiles(part), matrices=count)


class Experts(Kind):
    """A parameter with the matrices of all experts of a mixture."""

    name = "experts"

    def serves(self, base: nn.Module) -> bool:
        return isinstance(base, ExpertProjection)

    def parts(self, module: nn.Module) -> Mapping[str, Part]:
        if not is_experts(module):
            return {}
        return {name: ExpertProjection(module, name) for name in (first_of(module), "down_proj")}

    def host(self, module: nn.Module) -> Host | None:
        parts = self.parts(module)
        return ExpertsHost(module, parts) if parts else None

    def refusal(self, base: nn.Module) -> str | None:
        assert isinstance(base, ExpertProjection)
        if base.owner._is_expert_parallel:
            return "its experts lie on several processes (expert parallelism); load the model whole on each"
        if type(base.stored) is not nn.Parameter or base.stored.dtype not in FLOATS:
            name = str(base.stored.dtype).removeprefix("torch.")
            return f"its experts hold {name} ({type(base.stored).__name__}); served are 16 and 32-bit numbers"
        return None

    def rows(self, base: nn.Module) -> WeightRows:
        assert isinstance(base, ExpertProjection)
        return rows_of(base)

    def forward(
        self,
        base: nn.Module,
        x: Tensor,
        A: Tensor | None,
        B: Tensor | None,
        magnitude: Tensor | None,
        scale: float,
        options: Options,
    ) -> Tensor:
        """The same as the part's own forward, with the adapter."""
        assert isinstance(base, ExpertProjection)
        return project(base, x, base.shared_out(x), A, B, magnitude, scale, options)

    def explain(self, base: nn.Module) -> tuple[str, str]:
        return "dense, one product for all experts", ""

    def file_refusal(self, base: nn.Module, config: AdapterConfig) -> str | None:
        if config.method == "lora" and not config.dropout and config.bias == "none":
            return None
        return "PEFT adapts fused experts with plain LoRA only, without dropout and biases (target_parameters)"

    def probe(self, base: nn.Module, generator: torch.Generator) -> Tensor:
        assert isinstance(base, ExpertProjection)
        count, _, columns = base.matrices.shape
        x = torch.randn(2 * count, columns, generator=generator, device="cpu")
        return x.to(base.stored.device, base.stored.dtype)

    def merged_layer(self, base: nn.Module, merged: Tensor, bias: Tensor | None) -> nn.Module:
        assert isinstance(base, ExpertProjection)
        layer = ExpertProjection(base.owner, base.name)
        matrices = merged.unflatten(0, (len(base.weight), -1))
        layer.merged = (matrices.mT.contiguous() if base.owner.is_transposed else matrices, bias)
        return layer


class ExpertsHost(Host):
    """Computes a mixture's experts with adapted weights."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The output for hidden states ``[tokens, in]`` and each token's experts and their weights, ``[tokens, k]``."""
        experts: Any = self.base_layer
        if not any(True for _ in self.active_layers()) and not self.merged():
            y: Tensor = experts(*args, **kwargs)
            return y
        with on_device(experts):
            return self._mixed(*args, *kwargs.values())

    def _mixed(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """What the module's own forward computes, with the parts as they are adapted."""
        experts: Any = self.base_layer
        chosen = index.shape[-1]
        order = index.flatten().argsort(stable=True)
        groups = Groups.of(index.flatten()[order], experts.num_experts)
        inner = self._project(first_of(experts), hidden[order // chosen], groups)
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        y = self._project("down_proj", inner, groups)
        if getattr(experts, "has_post_expert_norm", False):
            y = experts.post_expert_norm(y)
        y = y * weights.flatten()[order, None]
        mixed: Tensor = y[order.argsort()].unflatten(0, index.shape).sum(1)
        return mixed.to(hidden.dtype)

    def _project(self, name: str, x: Tensor, groups: Groups) -> Tensor:
        layer: Any = self._projections[name]
        if isinstance(layer, ExpertProjection):
            return project(layer, x, groups)
        if layer.active is None or not layer.enabled:
            return project(layer.base_layer, x, groups)
        return project(layer.base_layer, x, groups, *layer.active_tensors())

    def plain(self) -> nn.Module:
        merged = self.merged()
        if not merged:
            return self.base_layer
        experts: Any = shallow_copy(self.base_layer)
        for name, (weight, bias) in merged.items():
            setattr(experts, name, nn.Parameter(weight, requires_grad=False))
            if bias is not None:
                old = getattr(experts, f"{name}_bias")
                setattr(experts, f"{name}_bias", nn.Parameter(bias.detach().clone().view_as(old), requires_grad=False))
        return experts
