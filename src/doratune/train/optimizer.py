"""What is trained, and how fast: names of optimisers, LoRA+'s groups, heads alone, resumed states, broken weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from doratune.errors import AdapterError, DivergedError
from doratune.model import trainable_parameters
from doratune.targets import adapted_layers, unwrap

OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "lion_8bit": "lion_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
"""Our names, and transformers'."""
SCHEDULES = {"constant": "constant_with_warmup"}
"""Schedules that transformers calls by another name: its "constant" has no warm-up."""


def with_faster_b(model: nn.Module, groups: list[dict[str, Any]], ratio: float) -> list[dict[str, Any]]:
    """Parameter groups in which the B of every adapter has ``ratio`` times the learning rate (LoRA+)."""
    if ratio == 1:
        return groups
    faster = {id(p) for layer in adapted_layers(model).values() for p in layer.lora_B.values()}
    split: list[dict[str, Any]] = []
    for group in groups:
        own = [p for p in group["params"] if id(p) in faster]
        others = [p for p in group["params"] if id(p) not in faster]
        if others:
            split.append({**group, "params": others})
        if own:
            split.append({**group, "name": "B", "params": own, "lr": group["lr"] * ratio})
    return split


@contextlib.contextmanager
def keeping_rates(optimizer: Any, scheduler: Any) -> Iterator[None]:
    """Within this context a checkpoint's states are loaded; learning rates and weight decay stay those of this run.

    Moments and the number of steps are the checkpoint's. So are the learning rates of schedules that are no function of
    the step (ReduceLROnPlateau): there they are part of the state.

    Raises:
        AdapterError: if the checkpoint's optimiser has other groups of parameters.
    """
    kept = ("initial_lr", "weight_decay")
    own = [{key: group[key] for key in kept if key in group} for group in optimizer.param_groups]
    try:
        yield
    except ValueError as error:
        if "parameter group" not in str(error):
            raise
        raise AdapterError(
            f"the checkpoint's optimiser has other groups of parameters than this run's ({error}); leave "
            "lora_plus_ratio and what else says what is trained together as they were, or begin anew in another output"
        ) from error
    for group, before in zip(optimizer.param_groups, own, strict=True):
        group.update(before)
    if type(scheduler) is LambdaLR:  # as all that are functions of the step
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        for group, rate, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = rate * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what is logged for the next step


def train_only(model: nn.Module, head: Sequence[str]) -> None:
    """Freeze everything but these modules; without any, everything but a language model's output embeddings.

    Output embeddings that are tied to the input's get weights of their own, or else the input would train, too.

    Raises:
        AdapterError: if there is no head.
    """
    root: Any = unwrap(model)
    if head:
        trained = [root.get_submodule(path) for path in head]
    else:
        output, inputs = root.get_output_embeddings(), root.get_input_embeddings()
        if output is None:
            raise AdapterError(f"{type(root).__name__} has no output embeddings to train; use another method")
        if output.weight is inputs.weight:
            output.weight = nn.Parameter(output.weight.detach().clone())
            root.config.tie_word_embeddings = False
        trained = [output]
    root.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)


def keep_float32(model: nn.Module, head: Sequence[str]) -> None:
    """Make these modules float32, whatever the rest is: small steps would be lost in 16 bits. Inputs are cast to it."""
    for path in head:
        module = model.get_submodule(path)
        if any(p.dtype != torch.float32 for p in module.parameters()):
            module.float()
            module.register_forward_pre_hook(_in_float32)


def _in_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def refuse_broken_weights(model: nn.Module, step: int) -> None:
    """Refuse to save weights that hold NaN or infinity: their checkpoint would take the place of a good one.

    Raises:
        DivergedError: naming the first such weights.
    """
    bad = [name for name, p in trainable_parameters(model).items() if not torch.isfinite(p.detach()).all()]
    if bad:
        raise DivergedError(
            f"{len(bad)} weights are NaN or infinite at step {step}, such as {bad[0]}: training cannot recover. Try a "
            "lower learning_rate, a longer warmup, or dtype float32"
        )
