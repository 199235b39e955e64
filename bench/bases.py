"""Base models: a single layer, and Llama shapes with random weights (speed and memory do not depend on the values)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.contestants import share

sys.path.append(str(Path(__file__).parent.parent / "examples"))


@dataclass(frozen=True)
class Shape:
    """A Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool = False


SHAPES = {
    "llama-6-layers": Shape(1024, 2816, 6, 16, 16, 2048),
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49152, tied=True),
    "llama-1b": Shape(2048, 5632, 22, 32, 4, 32000),  # TinyLlama's
    "llama-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "tiny": Shape(32, 64, 2, 2, 2, 64),
}


REAL = "real weights"


class OneLayer(nn.Module):
    """A model that is one linear layer."""

    def __init__(self, columns: int, out: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(columns, out, bias=False, dtype=dtype, device=device).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def llama(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, str]:
    """A frozen Llama, and what its weights are: SmolLM2's own if examples/assets.py has fetched them, else random."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    import assets

    folder = assets.cache_folder() / assets.SMOLLM2.folder
    if name == "smollm2-135m" and (folder / assets.MARKER).is_file():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device)
        return model.requires_grad_(False), REAL
    shape = SHAPES[name]
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False), "random weights"


def first_layers(model: Any, count: int) -> Any:
    """The same model with its first layers only, around the same tensors."""
    part = share(model)
    part.model.layers = part.model.layers[:count]
    part.config.num_hidden_layers = count
    return part


def linear_paths(model: Any) -> tuple[str, ...]:
    """All linear layers but the output head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return tuple(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head)


def quantise_nf4(model: Any) -> Any:
    """Store the weights of all adaptable linear layers as bitsandbytes' NF4, in place."""
    import bitsandbytes as bnb

    for path in linear_paths(model):
        linear = model.get_submodule(path)
        dtype, device = linear.weight.dtype, linear.weight.device
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        layer.to(device)
        layer.support_avx512bf16_for_cpu = False  # or an evaluation repacks the weight for good, for everybody
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    model.is_loaded_in_4bit = True  # what PEFT looks at
    return model


def dense_weight(linear: nn.Module) -> Tensor:
    """W of a plain or NF4 linear layer."""
    weight: Any = linear.weight
    if hasattr(weight, "quant_state"):
        import bitsandbytes as bnb

        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.detach()
