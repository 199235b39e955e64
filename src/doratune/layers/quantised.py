"""Quantised linear layers: for each library, how to see W as numbers. The forward is always the library's own.

Tiles are made for the occasion and nothing keeps them: the layer's output comes from the base, which holds W in its own
form; only the norm, and merging, look at numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from doratune.layers.weights import WeightRows
from doratune.ops.row_norm import row_tiles

SERVED = "load the model in 16 or 32 bits, or quantised by bitsandbytes, torchao (weights only) or HQQ"
RowTiles = Iterator[tuple[slice, Tensor]]


def _class_of(obj: object, library: str, name: str) -> bool:
    """Whether an object is of a library's class, without importing the library."""
    return any(c.__name__ == name and c.__module__.split(".")[0] == library for c in type(obj).__mro__)


def library_of(base: nn.Module) -> str | None:
    """Which library quantised a layer: one of the keys below, or None if it is not quantised."""
    if type(base) is nn.Linear and type(getattr(base, "weight", None)) is nn.Parameter:
        return None  # nearly every layer, in nearly no time
    if _class_of(base, "bitsandbytes", "Linear4bit"):
        return "bitsandbytes 4-bit"
    if _class_of(base, "bitsandbytes", "Linear8bitLt"):
        return "bitsandbytes 8-bit"
    if _class_of(base, "hqq", "HQQLinear"):
        return "HQQ"
    # A plain weight first: torch.compile cannot trace the look at a class's module.
    weight = getattr(base, "weight", None)
    if (
        isinstance(base, nn.Linear)
        and type(weight) not in (Tensor, nn.Parameter)
        and type(weight).__module__.split(".")[0] == "torchao"
    ):
        return "torchao"
    return None


def unpacked_sizes(root: nn.Module) -> dict[int, int]:
    """How many weights there are in parameters that pack several into an element, by the parameter's id."""
    sizes = {}
    for module in root.modules():
        if library_of(module) == "HQQ":
            layer: Any = module
            sizes[id(layer.W_q)] = layer.out_features * layer.in_features
    for parameter in root.parameters():
        if state := getattr(parameter, "quant_state", None):  # bitsandbytes'
            sizes[id(parameter)] = state.shape.numel()
    return sizes


def _bnb_4bit(base: Any) -> RowTiles:
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    state = base.weight.quant_state
    rows, columns = state.shape
    if columns % state.blocksize:
        # Blocks run across rows, which the library's kernel for CPUs takes amiss: W is what its forward makes of it.
        yield slice(0, rows), dequantize_4bit(base.weight.data, state)
        return
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    packed = base.weight.data.view(torch.uint8).reshape(rows, -1)
    blocks = absmax.view(rows, -1)
    for tile in row_tiles((rows, columns), packed.device):
        part = QuantState(
            blocks[tile].reshape(-1),
            torch.Size([tile.stop - tile.start, columns]),
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        yield tile, dequantize_4bit(packed[tile].reshape(-1, 1), part)


def _bnb_8bit(base: Any) -> RowTiles:
    from bitsandbytes.functional import int8_vectorwise_dequant

    # The scales move from the weight to the state in the first forward.
    scales = base.weight.SCB if base.state.SCB is None else base.state.SCB
    scales = scales.to(base.weight.device)
    for tile in row_tiles(base.weight.shape, base.weight.device):
        yield tile, int8_vectorwise_dequant(base.weight.data[tile], scales[tile])


def _torchao(base: Any) -> RowTiles:
    for tile in row_tiles(base.weight.shape, base.weight.device):
        with torch.inference_mode(False), torch.no_grad():  # inference mode has no slices of such a weight
            part = base.weight[tile].dequantize()
        yield tile, part


def _hqq(base: Any) -> RowTiles:
    # Its groups and packing run across rows: there is only the whole.
    yield slice(0, base.out_features), base.dequantize().detach()


DEQUANTISE: dict[str, Callable[[Any], RowTiles]] = {
    "bitsandbytes 4-bit": _bnb_4bit,
    "bitsandbytes 8-bit": _bnb_8bit,
    "torchao": _torchao,
    "HQQ": _hqq,
}
"""W of a layer, tile by tile, each made when it is asked for."""


def refusal(base: nn.Module) -> str | None:
    """Why a quantised layer cannot be adapted, or None."""
    library = library_of(base)
    weight: Any = getattr(base, "weight", None)
    if getattr(base, "quantization_scheme", None) is not None:
        return "compressed-tensors quantises it; load the model with CompressedTensorsConfig(dequantize=True)"
    if library == "torchao":
        dynamic = getattr(weight, "act_quant_kwargs", None) or getattr(weight, "activation_quantization", None)
        if dynamic is not None:
            return (
                "torchao quantises its activations dynamically, which lets no gradient through; use a weight-only type"
            )
        try:
            if not weight.is_meta:
                weight[:1].dequantize()
        except NotImplementedError:
            return (
                f"torchao packs its weight ({type(weight).__name__}) for inference and has no way back to numbers; use "
                "Int8WeightOnlyConfig or IntxWeightOnlyConfig"
            )
    if library == "bitsandbytes 8-bit" and getattr(weight, "has_fp16_weights", False):
        return "has_fp16_weights keeps a weight that is not quantised yet; load it with has_fp16_weights=False"
    if library == "bitsandbytes 8-bit" and weight.dtype != torch.int8 and not weight.is_meta:
        return "the 8-bit weight is not quantised yet; move the layer to its device first"
    if library == "bitsandbytes 4-bit":
        state = getattr(weight, "quant_state", None)
        if state is None and not weight.is_meta:
            return "the 4-bit weight is not quantised yet; move the layer to its device first"
        if getattr(state, "packing_format_for_cpu", False):
            return (
                "bitsandbytes has repacked the weight for inference on this processor, which loses its gradient; "
                "attach the adapter before the first forward in evaluation, or load the model again"
            )
    return None


def prepare(base: nn.Module) -> None:
    """Keep bitsandbytes from repacking a 4-bit weight for good in its first evaluation forward on a CPU."""
    if library_of(base) == "bitsandbytes 4-bit":
        base.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def release(base: nn.Module) -> None:
    """Undo ``prepare``."""
    if library_of(base) == "bitsandbytes 4-bit":
        from bitsandbytes.functional import has_avx512bf16

        base.support_avx512bf16_for_cpu = has_avx512bf16()


def quantised_rows(base: Any) -> WeightRows:
    """W of a quantised layer: transient tiles, as its library dequantises them."""
    dequantise = DEQUANTISE[library_of(base) or ""]

    def tiles() -> Iterable[tuple[slice, Tensor]]:
        return dequantise(base)

    stored = base.W_q if library_of(base) == "HQQ" else base.weight
    inner = getattr(stored, "qdata", None)
    return WeightRows((base.out_features, base.in_features), stored if inner is None else inner, tiles, transient=True)


def _again_bnb_4bit(base: Any, merged: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    old = base.weight.quant_state
    packed, state = quantize_4bit(
        merged.to(old.dtype), blocksize=old.blocksize, compress_statistics=old.nested, quant_type=old.quant_type
    )
    return dequantize_4bit(packed, state)


def _again_bnb_8bit(base: Any, merged: Tensor) -> Tensor:
    scale = merged.float().abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (merged.float() / scale).round() * scale


def _again_torchao(base: Any, merged: Tensor) -> Tensor:
    weight = base.weight
    merged = merged.to(weight.dtype)
    if hasattr(weight, "target_dtype"):
        return type(weight).from_hp(merged, weight.block_size, weight.target_dtype).dequantize()
    from torchao.quantization.granularity import PerRow, PerTensor

    whole = PerTensor() if weight.scale.numel() == 1 else PerRow()
    return type(weight).from_hp(merged, granularity=whole).dequantize()


def _again_hqq(base: Any, merged: Tensor) -> Tensor:
    plain = nn.Linear(merged.shape[1], merged.shape[0], bias=False)
    plain.weight = nn.Parameter(merged.to(base.compute_dtype), requires_grad=False)
    options = {"offload_meta": False, **base.quant_config}  # HQQ takes this one out of the options it is given
    again = type(base)(plain, options, compute_dtype=base.compute_dtype, device=str(merged.device))
    return again.dequantize()


REQUANTISE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "bitsandbytes 4-bit": _again_bnb_4bit,
    "bitsandbytes 8-bit": _again_bnb_8bit,
    "torchao": _again_torchao,
    "HQQ": _again_hqq,
}


def requantisation_loss(base: nn.Module, merged: Tensor) -> float | None:
    """Relative change of ``merged``, ``[out, in]``, if quantised again as the base was; None if it was not."""
    library = library_of(base)
    if library is None:
        return None
    again = REQUANTISE[library](base, merged).float()
    return float((again - merged.float()).norm() / merged.float().norm().clamp_min(torch.finfo(torch.float32).tiny))
