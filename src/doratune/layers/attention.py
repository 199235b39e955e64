"""``nn.MultiheadAttention``: its q, k, v and output projections, each a layer that can be adapted on its own.

The module computes with its weights and never calls its parts (``out_proj.forward`` included), and so does the
evaluation fast path of ``nn.TransformerEncoderLayer``: a wrapped part would do nothing. So a host stands in the
module's place, computes the adapted weights ``W' = g (W + s B A)`` and lets the module's own forward run with them,
whatever its masks and options.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from doratune.config import AdapterConfig
from doratune.layers.adapted import AdaptedLayer
from doratune.layers.holder import shallow_copy
from doratune.layers.host import Host, Part
from doratune.layers.kind import Kind, Options
from doratune.layers.weights import WeightRows
from doratune.ops.autocast import without_autocast
from doratune.ops.low_rank import adapted_weight

NAMES = ("q_proj", "k_proj", "v_proj", "out_proj")


class Projection(Part):
    """One projection of an ``nn.MultiheadAttention``, seen as a linear layer."""

    @property
    def stored(self) -> Tensor:
        """The parameter that holds the weight, packed or not."""
        attention = self.owner
        if self.name == "out_proj":
            return attention.out_proj.weight
        packed: Tensor | None = attention.in_proj_weight
        if packed is not None:
            return packed
        separate: Tensor = getattr(attention, f"{self.name}_weight")
        return separate

    @property
    def weight(self) -> Tensor:
        """``[out, in]``."""
        if self.merged is not None:
            return self.merged[0]
        return self.stored[self._rows()] if self.owner.in_proj_weight is self.stored else self.stored

    @property
    def bias(self) -> Tensor | None:
        """``[out]``, or None."""
        if self.merged is not None:
            return self.merged[1]
        if self.name == "out_proj":
            return self.owner.out_proj.bias
        return None if self.owner.in_proj_bias is None else self.owner.in_proj_bias[self._rows()]

    def _rows(self) -> slice:
        index, size = NAMES.index(self.name), self.owner.embed_dim
        return slice(index * size, (index + 1) * size)

    def forward(self, x: Tensor) -> Tensor:
        """The projection of x, ``[..., in]``."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Name and shape."""
        out, columns = self.weight.shape
        return f"{self.name}, in_features={columns}, out_features={out}"


def projections(attention: nn.MultiheadAttention) -> dict[str, Projection]:
    """The four projections of a module."""
    return {name: Projection(attention, name) for name in NAMES}


class AttentionProjection(Kind):
    """A projection of ``nn.MultiheadAttention``."""

    name = "attention"

    def serves(self, base: nn.Module) -> bool:
        return isinstance(base, Projection)

    def parts(self, module: nn.Module) -> Mapping[str, Part]:
        return projections(module) if isinstance(module, nn.MultiheadAttention) else {}

    def host(self, module: nn.Module) -> Host | None:
        return AttentionHost(module) if isinstance(module, nn.MultiheadAttention) else None

    def config_refusal(self, config: AdapterConfig) -> str | None:
        if config.dropout:
            return "nn.MultiheadAttention takes one weight for all tokens, so dropout cannot act on its low-rank input"
        return None

    def rows(self, base: nn.Module) -> WeightRows:
        assert isinstance(base, Projection)
        return WeightRows.of_matrix(base.weight.detach(), base.stored)

    def explain(self, base: nn.Module) -> tuple[str, str]:
        return "with an adapted weight", "nn.MultiheadAttention computes with its weights, not with layers"

    def file_refusal(self, base: nn.Module, config: AdapterConfig) -> str | None:
        return "PEFT does not adapt single projections of nn.MultiheadAttention, and none of them with DoRA"

    @staticmethod
    def forward(
        base: nn.Module,
        x: Tensor,
        A: Tensor | None,
        B: Tensor | None,
        magnitude: Tensor | None,
        scale: float,
        options: Options,
    ) -> Tensor:
        """``y = W' x + b`` for x ``[..., in]``."""
        W, b = weight_and_bias(base, A, B, magnitude, scale, options)
        return F.linear(x, W, b)

    def merged_layer(self, base: nn.Module, merged: Tensor, bias: Tensor | None) -> nn.Module:
        assert isinstance(base, Projection)
        layer = Projection(base.owner, base.name)
        layer.merged = (merged, bias)
        return layer


def weight_and_bias(
    base: nn.Module,
    A: Tensor | None,
    B: Tensor | None,
    magnitude: Tensor | None,
    scale: float,
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """``W' = g (W + s B A)``, ``[out, in]`` in W's dtype, and the bias."""
    assert isinstance(base, Projection)
    g = None
    if magnitude is not None:
        rows = WeightRows.of_matrix(base.weight.detach(), base.stored)
        g = options.row_scale(rows, A, B, magnitude, scale)
    with without_autocast(base.weight.device):
        W = adapted_weight(base.weight, A, B, g, scale)
    bias = base.bias
    return W, bias if options.bias is None or bias is None else options.bias.to(bias.dtype)


class AttentionHost(Host):
    """Runs an ``nn.MultiheadAttention`` with adapted weights."""

    base_layer: nn.MultiheadAttention

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__(attention, projections(attention))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with adapted weights where an adapter is active."""
        changed = self.merged()
        for name, layer in self.active_layers():
            changed[name] = weight_and_bias(layer.base_layer, *layer.active_tensors())
        if not changed:
            return self.base_layer(*args, **kwargs)
        return functional_call(self.base_layer, self._assembled(changed), args, kwargs)

    def _assembled(self, changed: dict[str, tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
        """Changed weights and biases under the names of the module's parameters."""
        attention = self.base_layer
        views = projections(attention)
        parts = {name: changed.get(name) or (view.weight, view.bias) for name, view in views.items()}
        out_weight, out_bias = parts["out_proj"]
        result = {"out_proj.weight": out_weight}
        if out_bias is not None:
            result["out_proj.bias"] = out_bias
        packed: Tensor | None = attention.in_proj_weight
        if packed is None:
            result.update({f"{name}_weight": parts[name][0] for name in NAMES[:3]})
        else:
            result["in_proj_weight"] = torch.cat([parts[name][0] for name in NAMES[:3]])
        biases = [bias for _, bias in (parts[name] for name in NAMES[:3]) if bias is not None]
        if biases:
            result["in_proj_bias"] = torch.cat(biases)
        return result

    def plain(self) -> nn.MultiheadAttention:
        """The module with the weights its projections have now: itself, or a changed copy after merging."""
        merged = self.merged()
        if not merged:
            return self.base_layer
        attention = shallow_copy(self.base_layer)
        attention.out_proj = shallow_copy(attention.out_proj)
        for key, tensor in self._assembled(merged).items():
            owner, _, name = key.rpartition(".")
            parameter = nn.Parameter(tensor.detach().clone(), requires_grad=False)
            setattr(attention.get_submodule(owner), name, parameter)
        return attention


class NoNestedTensors:
    """Forward hooks of ``nn.TransformerEncoder``: no nested tensors while an adapter below is active.

    The encoder would hand them to its layers, whose ordinary path, which adapters need, does not take them.
    """

    def __init__(self) -> None:
        self.switched_off = False

    def enter(self, encoder: nn.Module, args: Any) -> None:
        """Before the forward."""
        if torch.compiler.is_compiling() or not getattr(encoder, "use_nested_tensor", False):
            return
        if any(isinstance(m, AdaptedLayer) and m.enabled and m.active is not None for m in encoder.modules()):
            self.switched_off = True
            encoder.use_nested_tensor = False  # type: ignore[assignment]

    def leave(self, encoder: nn.Module, args: Any, output: Any) -> None:
        """After the forward, whether it failed or not."""
        if self.switched_off:
            encoder.use_nested_tensor = True  # type: ignore[assignment]
            self.switched_off = False
