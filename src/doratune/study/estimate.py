"""Memory and arithmetic of a training step, from a model's configuration alone.

The model is built without data (meta device), given its adapters, and one step is run on it by the code that trains:
what that would allocate, keep and multiply is counted (``study/tape.py``). Of models with many layers one and two are
run, and the difference stands for each further one; parameters are counted on the whole model.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from doratune.config import AdapterConfig
from doratune.errors import AdapterError, first_line
from doratune.extras import require
from doratune.model import attach
from doratune.selection import select
from doratune.study.tape import Tape, flash_attention
from doratune.summary import summary
from doratune.targets import adapted_layers, plain_modules

QUANTISED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0, "torchao-int8": 1.0, "torchao-int4": 1 + 5 / 32}
"""Bytes a weight, scales of blocks included; those of rows are counted apart. torchao's trainable 4 bits take 8."""
SERVED = (
    "served are causal language models that transformers' AutoModelForCausalLM builds and that compute attention with "
    "torch's scaled_dot_product_attention, such as Llama, Mistral, Qwen and GPT-2"
)
STATES = 2
"""Numbers that Adam keeps for each that it trains, in float32."""


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device that needs most, operations of one step on one device, and where they come from."""

    parameters: int
    """Of the base."""
    adapter_parameters: int
    magnitude_parameters: int
    weights: int
    """Bytes of the base on one device."""
    gathered: int
    """FSDP2: bytes of whole layers while they compute, one and the next."""
    adapters: int
    """Bytes of A, B and m in float32."""
    gradients: int
    optimizer: int
    activations: int
    """Highest level of everything else in a step: what is kept for the backward pass and what comes and goes."""
    operations: float
    """Floating-point operations of the matrix products of one step on one device."""
    dora_share: float
    """Share of these that LoRA would not need: the norms'; 0 where layers have magnitudes only."""
    communication: int
    """FSDP2 or DDP: bytes that one device receives in a step."""
    norm_communication: int
    """Of these for DoRA: gradients of magnitudes. Norms need none."""

    @property
    def total(self) -> int:
        """Highest level of memory, in bytes."""
        return self.weights + self.gathered + self.adapters + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class _Counts:
    """Parameters of a whole model with its adapters."""

    parameters: int
    quantised: int
    rows: int
    """Output rows of quantised weights, each with a scale."""
    largest: int
    """Parameters of the largest weight that is quantised."""
    layer: int
    """Parameters of the largest of the base's repeated layers."""
    adapters: int
    magnitudes: int


def estimate(
    config: Any,
    adapter: AdapterConfig,
    *,
    tokens: int,
    batch_size: int = 1,
    devices: int = 1,
    fsdp: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    quantize: str | None = None,
    gradient_checkpointing: bool = False,
) -> Estimate:
    """Estimate a training step of a causal language model of transformers.

    Args:
        config: transformers' configuration of the model.
        adapter: what is trained.
        tokens: of one sequence.
        batch_size: sequences of one forward pass on one device.
        devices: that work on different sequences.
        fsdp: spread the base over the devices (FSDP2); else each has a copy (DDP).
        dtype: of weights and arithmetic.
        quantize: as in ``doratune train``.
        gradient_checkpointing: activations of a layer are computed again in the backward pass.

    Raises:
        AdapterError: if the configuration is not one of a causal language model whose step can be counted.
    """
    _refuse_encoder(config)
    has_norms = adapter.method == "dora" and 0 not in (adapter.rank, *adapter.rank_pattern.values())
    step = (batch_size, tokens), dtype, gradient_checkpointing
    try:
        run = _count(_model(config, adapter, dtype))
        peak, operations = _extrapolated(config, adapter, *step)
        plain = _extrapolated(config, replace(adapter, method="lora"), *step)[1] if has_norms else operations
    except AdapterError:
        raise
    except Exception as error:  # whatever a model of another kind makes transformers or torch raise
        said = first_line(error).split(". ")[0]
        raise AdapterError(f"a step of a {config.model_type} cannot be estimated: {said}; {SERVED}") from error
    size = dtype.itemsize
    quantised = run.quantised if quantize else 0
    # A quantised weight is made whole for its products; torchao keeps it so until the backward pass.
    whole = run.quantised if (quantize or "").startswith("torchao") and not gradient_checkpointing else run.largest
    weights = (run.parameters - quantised) * size
    if quantize:
        weights += round(quantised * QUANTISED[quantize]) + (0 if quantize == "nf4" else 4 * run.rows)
    parts = devices if fsdp else 1
    trained = run.adapters + run.magnitudes
    several = devices > 1
    # Each device receives what it lacks of the base, for the forward and again for the backward pass.
    moved = round(2 * weights * (parts - 1) / parts) + (2 * 4 * trained * (devices - 1) // devices if several else 0)
    return Estimate(
        parameters=run.parameters,
        adapter_parameters=trained,
        magnitude_parameters=run.magnitudes,
        weights=weights // parts,
        gathered=2 * run.layer * size if parts > 1 else 0,
        adapters=4 * trained,
        gradients=4 * trained,
        optimizer=4 * STATES * trained,
        activations=max(0, peak) + (whole * size if quantize else 0),
        operations=operations,
        dora_share=1 - plain / operations,
        communication=moved,
        norm_communication=2 * 4 * run.magnitudes * (devices - 1) // devices if several else 0,
    )


def _refuse_encoder(config: Any) -> None:
    """transformers builds a causal language model of encoders, too: one that nobody trains."""
    auto = require("transformers.models.auto.modeling_auto")
    if any("CausalLM" in name or "LMHead" in name for name in config.architectures or ()):
        return
    kind = "an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else None
    if config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        kind = kind or "an encoder"
    if kind:
        raise AdapterError(f"a step of a {config.model_type} cannot be estimated: it is {kind}; {SERVED}")


def _extrapolated(
    config: Any, adapter: AdapterConfig, shape: tuple[int, int], dtype: torch.dtype, gradient_checkpointing: bool
) -> tuple[int, int]:
    """What ``_step`` finds for the whole model, from one and two of its layers where it has more."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if layers <= 2:
        return _step(config, adapter, shape, dtype, gradient_checkpointing)
    one, two = (_step(_shortened(config, n), adapter, shape, dtype, gradient_checkpointing) for n in (1, 2))
    peak, operations = (last + (layers - 2) * (last - first) for first, last in zip(one, two, strict=True))
    return peak, operations


def _shortened(config: Any, layers: int) -> Any:
    short = copy.deepcopy(config)
    text = short.get_text_config()  # a part of the configuration where a model sees images, too
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return short


def _model(config: Any, adapter: AdapterConfig, dtype: torch.dtype) -> Any:
    """A model with adapters, on tensors without data."""
    transformers = require("transformers")
    config = copy.deepcopy(config)
    config.use_cache = False
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        model.requires_grad_(False)
        return attach(model, adapter)


def _count(model: nn.Module) -> _Counts:
    about = summary(model)
    modules = plain_modules(model)
    # What quantisers take is what all-linear means, whatever is adapted.
    shapes = [kind.rows(modules[path]).shape for path, kind in select(model, AdapterConfig()).layers.items()]
    sizes = [out * columns for out, columns in shapes]
    blocks = [block for m in model.modules() if isinstance(m, nn.ModuleList) for block in m]
    return _Counts(
        parameters=about.base,
        quantised=sum(sizes),
        rows=sum(out for out, _ in shapes),
        largest=max(sizes, default=0),
        layer=max((sum(p.numel() for p in b.parameters() if not p.requires_grad) for b in blocks), default=0),
        adapters=about.direction,
        magnitudes=about.magnitude,
    )


def _step(
    config: Any, adapter: AdapterConfig, shape: tuple[int, int], dtype: torch.dtype, gradient_checkpointing: bool
) -> tuple[int, int]:
    """Highest memory of one step, without the adapters' gradients that the tape has counted, and its operations."""
    model = _model(config, adapter, dtype)
    with torch.device("meta"):
        ids = torch.empty(shape, dtype=torch.long)
        model.train()
        if gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False, "preserve_rng_state": False})
        _as_after_attaching(model)
        tape = Tape()
        tape.know((*model.parameters(), *model.buffers(), ids))
        with tape, flash_attention():
            model(input_ids=ids, labels=ids).loss.backward()
    about = summary(model)
    return tape.highest - 4 * (about.direction + about.magnitude), tape.operations


def _as_after_attaching(model: nn.Module) -> None:
    """Set what needs data: |W|^2 without zero rows, and keep_output, as on a real model after attaching."""
    for layer in adapted_layers(model).values():
        squared = torch.empty(layer.weight_rows().shape[0], dtype=torch.float32)
        layer.cache._base_squared = lambda rows, n=squared: (n, n, False)  # type: ignore[method-assign, misc]
        for adapter in layer.adapters.values():
            adapter.keep_output = True
