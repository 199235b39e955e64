"""Models that compute with the weight of a layer past the layer itself, where an adapter would do nothing.

Layers known to be used so are left alone (``reader``), and so are layers that the model calls from elsewhere than their
place in it (``held_aside``). Any other adapted layer shows an ``UnreadWeight`` as its weight: it tells dtype, shape and
device, and is an error in any computation.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from doratune.errors import AdapterError

POSITIONS = ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")
READERS = {
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "MobileBertLMPredictionHead": ("dense",),
    "DetrMHAttentionMap": ("k_proj",),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "LayoutLMv2Encoder": POSITIONS,
    "LayoutLMv3Encoder": POSITIONS,
    "PPDocLayoutV2ReadingOrderEncoder": POSITIONS,
    "Gemma3nTextAltUp": ("prediction_coefs", "correction_coefs"),
    "TDNNLayer": ("kernel",),
    "LongcatFlashTopkRouter": ("classifier",),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "RwkvSelfAttention": ("output",),
    "RwkvFeedForward": ("value",),
    "LSHSelfAttention": ("query_key", "value"),
}
"""Classes of transformers, and their layers with whose weights they compute."""
EVERY_MODULES = frozenset(nn.Module().__dict__)
"""Attributes that torch gives every module."""
MAMBA = ("x_proj", "dt_proj", "out_proj")
"""The same for every Mamba: its fused kernels on GPUs take these weights, and dt_proj's is read everywhere."""


def reader(modules: Mapping[str, nn.Module], path: str) -> str | None:
    """Why an adapter on the layer at ``path`` would do nothing, or None if its parent calls the layer."""
    parent, _, name = path.rpartition(".")
    kind = type(modules.get(parent)).__name__
    mamba = all(hasattr(modules.get(parent), part) for part in ("A_log", "D"))
    # timm's BEiT, EVA and Swin V2 have biases of q and v only, and put them beside the weight.
    own_biases = name == "qkv" and isinstance(getattr(modules.get(parent), "q_bias", None), Tensor)
    if name in READERS.get(kind, ()) or (mamba and name in MAMBA) or own_biases:
        return f"{kind} computes with its weight and not through the layer"
    return None


def held_aside(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """Modules that lists, dicts or methods in another's attributes refer to, by id, with where that is.

    What stands in such a module's place does not stand there: whoever calls it from there goes past the adapter.
    """
    found: dict[int, str] = {}
    for module in modules.values():
        for name, value in module.__dict__.items():
            if name in EVERY_MODULES:
                continue
            held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
            for item in held:
                other = item.__self__ if inspect.ismethod(item) else item
                if isinstance(other, nn.Module) and other is not module:
                    found[id(other)] = (
                        f"{type(module).__name__}.{name} refers to it, too, and calls from there would go past the "
                        "adapter; keep layers in nn.ModuleList or nn.ModuleDict, or look them up when they are called"
                    )
    return found


def _functions(where: Any, names: str) -> list[Any]:
    return [getattr(where, name) for name in names.split() if hasattr(where, name)]


def _getters(names: str) -> list[Any]:
    return [attribute.__get__ for attribute in _functions(Tensor, names)]


# Lists of functions, which torch.compile can look through; of names it cannot make sense.
ASKING = [
    *_getters("dtype shape device ndim layout requires_grad is_leaf grad_fn itemsize nbytes _version names"),
    *_getters("is_meta is_cpu is_cuda is_mps is_xpu is_sparse is_quantized is_nested"),
    *_functions(Tensor, "__len__ __repr__ __format__ __hash__ __deepcopy__ __reduce_ex__ dim ndimension size stride"),
    *_functions(Tensor, "numel nelement element_size get_device is_contiguous is_pinned is_shared requires_grad_"),
    *_functions(Tensor, "is_floating_point is_complex is_signed is_inference"),
    *_functions(torch, "numel is_floating_point is_complex is_signed is_inference"),
    *[attribute.__set__ for attribute in _functions(Tensor, "requires_grad grad data")],
]
"""What may be asked of a weight, or set, without its numbers."""
EXAMPLES = [
    *_functions(Tensor, "new_empty new_zeros new_ones new_full new_tensor"),
    *_functions(torch, "empty_like zeros_like ones_like full_like rand_like randn_like"),
]
"""What makes tensors of a weight's dtype and device."""
OTHERS = _functions(Tensor, "to type_as")
"""The same, where the weight only says to which dtype and device another tensor goes."""
SHOWN = [*_getters("data T mT H mH grad"), Tensor.detach]
"""What gives the weight again, to be guarded likewise."""


class UnreadWeight(Tensor):
    """Stands for the weight of a layer while an adapter is active on it.

    Being a subclass, it also sends ``nn.TransformerEncoderLayer`` the ordinary way in evaluation, through its layers.
    """

    weight: Tensor
    path: str

    @classmethod
    def of(cls, weight: Tensor, path: str) -> UnreadWeight:
        """The stand-in for a weight of the layer at ``path``."""
        new = weight.detach().as_subclass(cls)
        new.weight, new.path = weight, path
        return new

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        itself = args[0] if args and isinstance(args[0], cls) else None
        if not (func in ASKING or func in SHOWN or func in EXAMPLES or (itself is None and func in OTHERS)):
            raise _error(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*(a.weight if isinstance(a, cls) else a for a in args), **(kwargs or {}))
        if itself is not None and func in SHOWN and isinstance(result, Tensor):
            return cls.of(result, itself.path)
        return result


def _error(func: Any, args: Any, kwargs: Any) -> AdapterError:
    used = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, UnreadWeight))
    return AdapterError(
        f"{used.path}: the model computes with this layer's weight ({getattr(func, '__name__', func)}) and not through "
        "the layer, where the adapter would do nothing: leave the layer out (exclude=[...]); a file's adapter that has "
        "the layer cannot be served. Outside of a model's forward the base's own weight is base_layer.weight"
    )
