"""What is wrong with a run's options, as far as they tell by themselves."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, get_args

from doratune.extras import installed
from doratune.targets import HEAD_NAMES
from doratune.train.choices import Quantize
from doratune.train.processes import processes_asked

if TYPE_CHECKING:
    from doratune.train.config import TrainConfig


def numbers(c: TrainConfig) -> Iterator[str]:
    """Numbers that are too small, or no numbers."""
    positive = ("max_length", "batch_size", "gradient_accumulation", "log_every", "keep", "epochs", "learning_rate")
    for name in (*positive, "lora_plus_ratio", "sample_tokens"):
        value = getattr(c, name)
        if not 0 < value < math.inf:
            yield f"{name} must be above 0; found {value!r}"
    for name in ("steps", "eval_every", "save_every", "patience", "magnitude_learning_rate", "image_size"):
        value = getattr(c, name)
        if value is not None and not 0 < value < math.inf:
            yield f"{name} must be above 0, or absent; found {value!r}"
    not_negative = ("weight_decay", "magnitude_weight_decay", "warmup", "max_grad_norm", "seed")
    for name in (*not_negative, "workers"):
        value = getattr(c, name)
        if not 0 <= value < math.inf:
            yield f"{name} must be at least 0; found {value!r}"
    if c.seed >= 2**32:
        yield f"seed must be below 2**32, as NumPy has it; found {c.seed!r}"
    if not c.eval_data and not 0 < c.eval_fraction < 1:
        yield f"eval_fraction must lie between 0 and 1; found {c.eval_fraction!r}"
    if not 0 <= c.test_fraction < 1:
        yield f"test_fraction must be at least 0 and below 1; found {c.test_fraction!r}"


def combinations(c: TrainConfig) -> Iterator[str]:
    """Options that exclude each other."""
    if c.streaming and c.task != "text-generation":
        yield f"streaming serves text-generation; found task {c.task} (images are read while training anyway)"
    if c.streaming and c.steps is None:
        yield "streaming needs steps: the length of the data is not known beforehand"
    if c.streaming and c.test_fraction and not c.test_data:
        yield "streaming cannot set a test_fraction aside; name test_data"
    if c.quantize and not c.is_adapter:
        yield f"quantize freezes the base; method {c.method} trains it: use dora, lora or magnitude"
    if c.dtype == "float16" and (what := _trained_in_base_dtype(c)):
        yield f"dtype float16 loses the gradients of {what}, trained in the base's dtype; use bfloat16, float32 or auto"
    if c.fsdp:
        yield from _fsdp(c)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        yield "accelerate launch --use_fsdp shards too late to measure a model before training; use --fsdp instead"
    if c.keep_best and c.eval_every is None:
        yield "keep_best chooses among measurements while training; give eval_every"
    if c.patience is not None and not c.keep_best:
        yield "patience stops a run behind its best measurement, which is kept with keep_best only; give both"
    if c.prompt == "":
        yield "prompt is empty"
    if c.prompt is not None and c.task != "text-generation":
        yield f"prompt asks for a sample of generated text, but the task is {c.task}"
    if c.as_chat and c.messages_column:
        yield "as_chat is for prompts and completions; messages are put into the chat template anyway"
    if c.augment and c.task != "image-classification":
        yield f"augment changes images, but the task is {c.task}"


def _trained_in_base_dtype(c: TrainConfig) -> str | None:
    """What is, as adapters and the new heads of classifiers are not."""
    if c.method == "full" or (c.method == "head" and c.task == "text-generation"):
        return f"method {c.method}"
    heads = HEAD_NAMES if c.task != "text-generation" else ()
    if c.is_adapter and not set(c.adapter.modules_to_save) <= set(heads):
        return "modules_to_save"
    return "bias all" if c.is_adapter and c.adapter.bias == "all" else None


def _fsdp(c: TrainConfig) -> Iterator[str]:
    if processes_asked() == 1:
        yield "fsdp spreads a model over processes, and this is one: torchrun --nproc-per-node N -m doratune train ..."
    if not c.is_adapter or c.task != "text-generation" or c.adapter.modules_to_save or c.adapter.bias != "none":
        yield "fsdp serves adapters on language models without modules_to_save and bias; leave it out (DDP) for others"
    if c.quantize:
        yield f"fsdp does not spread quantised weights ({c.quantize}); leave out one of both"


def libraries(c: TrainConfig) -> Iterator[str]:
    """Options that need a library which is not there."""
    for name in c.report_to:
        if not installed(name):
            yield f"report_to {name}: {name} is not installed (pip install {name})"
    if "8bit" in c.optimizer:
        yield from _lacking(f"optimizer {c.optimizer}", "bitsandbytes")
    yield from quantize_problems(c.quantize)


def quantize_problems(kind: str | None) -> Iterator[str]:
    """That the library which loads a base in fewer bits is not there."""
    if kind in get_args(Quantize):
        yield from _lacking(f"quantize {kind}", "torchao" if str(kind).startswith("torchao") else "bitsandbytes")


def _lacking(what: str, library: str) -> Iterator[str]:
    if not installed(library):
        yield f"{what} needs {library}, which is not installed: pip install 'doratune[quant]'"
