"""What is served: the active DoRA adapter of a PEFT layer as a kind's function takes it, or why PEFT computes it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from doratune.config import AdapterConfig
from doratune.layers import Kind, kind_of, quantised
from doratune.layers.linear import has_own_forward
from doratune.layers.weights import is_transformers_conv1d

VARIANTS = {"DoraLinearVariant", "DoraEmbeddingVariant", "DoraConv1dVariant", "DoraConv2dVariant", "DoraConv3dVariant"}
"""PEFT's classes that compute DoRA in its layers."""
PLAIN_FORWARDS = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
CALL_OPTIONS = {"adapter_names", "alora_offsets"}
"""Arguments of a PEFT layer's forward that are PEFT's own; all others go to the base layer."""
DEFAULTS = AdapterConfig()
"""Made once, as every forward asks whether a layer with such an adapter is served."""


class PeftAdapter(NamedTuple):
    """The active DoRA adapter of one PEFT layer; tensors are PEFT's own parameters."""

    name: str
    kind: Kind
    base: Any
    A: Tensor
    B: Tensor
    m: Tensor
    scale: float
    dropout: float
    """Probability of this call; 0 in evaluation."""

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """A ``[r, in]``, B ``[out, r]``, m ``[out]``: the parameters themselves or views of them."""
        parts = zip(self.kind.file_names, (self.A, self.B, self.m), strict=True)
        A, B, m = [self.kind.from_file(self.base, name, part) for name, part in parts]
        return A, B, m


def call_refusal(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why a call with these arguments is PEFT's, or None."""
    if args or any(name not in CALL_OPTIONS for name in kwargs):
        return "the call has arguments for the base layer"
    given = [name for name, value in kwargs.items() if value is not None]
    return f"the call has {', '.join(given)}" if given else None


def servable_adapter(layer: Any) -> PeftAdapter | str:
    """The adapter that doratune can compute for a PEFT layer as it is now, or the reason why PEFT has to.

    Read in every forward: PEFT's switches are plain attributes that anybody may set at any time.
    """
    if layer.disable_adapters:
        return "the adapters are disabled"
    if layer.merged:
        return "an adapter is merged"
    # Modules and parameters are looked up past nn.Module's __getattr__: a decode step comes here for every layer.
    modules = layer._modules
    table = modules["lora_embedding_A"]._parameters
    holder = table or modules["lora_A"]._modules
    names = [name for name in layer.active_adapters if name in holder]
    if len(names) != 1:
        return f"several adapters are active at once ({', '.join(names)})" if names else "no adapter is active"
    (name,) = names
    variant = type(layer.lora_variant.get(name)).__name__
    if variant not in VARIANTS:
        return "plain LoRA" if name not in layer.lora_variant else f"the adapter is not DoRA alone ({variant})"
    base, magnitude = modules["base_layer"], modules["lora_magnitude_vector"]._modules[name]
    if table:
        products: list[Any] = []
        A, B = table[name], modules["lora_embedding_B"]._parameters[name]
    else:
        products = [holder[name], modules["lora_B"]._modules[name]]
        A, B = products[0].weight, products[1].weight
    dropout, scale, m = modules["lora_dropout"]._modules[name], layer.scaling[name], magnitude.weight
    kind = kind_of(base)
    reason = (
        _base_refusal(layer, base, kind)
        or _parts_refusal(products, magnitude, (A, B, m))
        or _options_refusal(layer, dropout, scale, bool(table))
    )
    if reason is not None or kind is None:
        return reason or ""
    drops = layer.training and dropout.training and isinstance(dropout, nn.Dropout) and not table
    if drops and (base._forward_hooks or base._forward_pre_hooks):
        return "its base layer has hooks, which are to see the whole input, once"
    return PeftAdapter(name, kind, base, A, B, m, scale, dropout.p if drops else 0.0)


def _base_refusal(layer: Any, base: nn.Module, kind: Kind | None) -> str | None:
    if "base_layer" in base._modules:
        return f"its base layer is wrapped in another one ({type(base).__name__})"
    if kind is None:
        return f"doratune has no function for {type(base).__name__}"
    if kind.name == "linear":
        if has_own_forward(base) and quantised.library_of(base) is None:
            return f"{type(base).__name__} has a forward of its own, PEFT takes the norm of its weight as it is"
        if layer.fan_in_fan_out != is_transformers_conv1d(base):
            return f"fan_in_fan_out={layer.fan_in_fan_out} does not fit a {type(base).__name__}"
    return kind.refusal(base) or kind.file_refusal(base, DEFAULTS)


def _parts_refusal(products: list[Any], magnitude: Any, parameters: tuple[Tensor, ...]) -> str | None:
    for part in products:
        if type(part).forward not in PLAIN_FORWARDS:
            return f"lora_A or lora_B is a {type(part).__name__}"
        if part.bias is not None:
            return "lora_bias"
    for part in (*products, magnitude):
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return "lora_A, lora_B or the magnitude has hooks"
        if "forward" in part.__dict__ or "parametrizations" in part._modules:
            return "lora_A, lora_B or the magnitude was replaced or parametrised"
    for p in parameters:
        if hasattr(p, "ds_id"):
            return "A, B or m is partitioned by DeepSpeed's ZeRO-3, which gathers it for PEFT's modules"
        if type(p) is not nn.Parameter and type(p) is not Tensor:
            gathered = " outside of FSDP's forward, which gathers it" if type(p).__name__ == "DTensor" else ""
            return f"A, B or m is a {type(p).__name__}{gathered}"
    return None


def _options_refusal(layer: Any, dropout: nn.Module, scale: Any, embedding: bool) -> str | None:
    if not isinstance(scale, (float, int)):
        return "its scaling is a tensor (prepared for compiled hot-swapping)"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"its dropout is a {type(dropout).__name__}"
    if embedding and getattr(layer, "tp_layer", None) is not None:
        return "the embedding is tensor-parallel"
    if getattr(layer, "_is_replica", False):
        return "nn.DataParallel runs it on several devices at once"
    return None


def result_dtype(layer: Any, base_dtype: torch.dtype, x: Tensor, m: Tensor) -> torch.dtype:
    """The dtype of PEFT's result: the base's, but promoted by its quantised layers under CUDA's autocast."""
    if layer.__module__.rpartition(".")[2] in ("bnb", "hqq") and torch.is_autocast_enabled():
        return torch.promote_types(torch.promote_types(base_dtype, m.dtype), x.dtype)
    return base_dtype
