"""How a base model's weights are loaded: in fewer bits, or in parts over several processes."""

from __future__ import annotations

from typing import Any, get_args

import torch

from doratune.errors import AdapterError
from doratune.extras import require
from doratune.targets import HEAD_NAMES
from doratune.train.choices import Quantize
from doratune.train.config import TrainConfig
from doratune.train.processes import local_rank_asked, processes_asked

TRAINED_WHOLE = (*HEAD_NAMES, r".*\.pooler", "pre_classifier")
"""Modules of classifiers that a base's files may lack: names, or regular expressions of paths."""
GROUP = 32
"""Weights that share one scale in torchao's 4 bits."""


def take_own_gpu() -> None:
    """Make each of several processes load onto its own GPU.

    Else bases that come quantised, which are loaded onto the current GPU, would all be loaded onto the first.
    """
    if torch.cuda.is_available() and processes_asked() > 1:
        torch.cuda.set_device(_own_gpu())


def _own_gpu() -> int:
    """As accelerate numbers them: where each process sees only its own, that is the first."""
    return local_rank_asked() % torch.cuda.device_count()


def loading_options(config: TrainConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of transformers' ``from_pretrained`` for this run."""
    options = quantized(config.quantize, dtype, config.double_quant, config.task != "text-generation")
    if config.fsdp:
        shards = require("transformers.distributed").DistributedConfig(fsdp_size=processes_asked())
        options["distributed_config"] = shards
    if config.attention:
        options["attn_implementation"] = config.attention
    return options


def quantized(kind: str | None, dtype: torch.dtype, double: bool = True, classifier: bool = False) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a kind of quantisation, as in ``quantization``; none for None.

    Raises:
        AdapterError: if there is no such kind.
    """
    if kind is None:
        return {}
    if kind not in get_args(Quantize):
        raise AdapterError(f"quantize must be one of {', '.join(get_args(Quantize))}; found {kind!r}")
    options: dict[str, Any] = {"quantization_config": quantization(kind, dtype, double, classifier)}
    if torch.cuda.is_available():
        # Each process its own GPU: transformers would quantise all of them on the first, where DDP refuses them.
        options["device_map"] = {"": _own_gpu()}
    return options


def quantization(kind: str, dtype: torch.dtype, double: bool = True, classifier: bool = False) -> Any:
    """transformers' options for a kind of quantisation.

    Args:
        kind: nf4 and int8 are bitsandbytes', torchao-int8 and torchao-int4 torchao's; all for weights only.
        dtype: of the arithmetic, and of what is not quantised.
        double: nf4: quantise its scales, too.
        classifier: leave the head, which is trained, and what may be new with it as they are.
    """
    transformers = require("transformers")
    if kind.startswith("torchao"):
        whole = {"modules_to_not_convert": list(TRAINED_WHOLE)} if classifier else {}
        return transformers.TorchAoConfig(_torchao(kind), **whole)
    whole = {"llm_int8_skip_modules": list(TRAINED_WHOLE)} if classifier else {}
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, **whole)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
        **whole,
    )


def _torchao(kind: str) -> Any:
    library = require("torchao.quantization", "quant")
    if kind == "torchao-int8":
        return library.Int8WeightOnlyConfig()
    from torchao.quantization.granularity import PerGroup

    # Int4WeightOnlyConfig packs for inference: no gradient passes through it.
    return library.IntxWeightOnlyConfig(weight_dtype=getattr(torch, "int4"), granularity=PerGroup(GROUP))  # noqa: B009
