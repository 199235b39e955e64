"""Adapters without a gradient, or none at all: nothing else would tell."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from doratune.errors import AdapterError
from doratune.targets import adapted_layers

log = logging.getLogger("doratune")

LISTED = 5
WHOLE = 0.95
"""From this share on all of a model is trained: Whisper's own positions, among others, never are."""


def warn_of_unused(model: nn.Module) -> None:
    """Name the adapted layers without a gradient, after a backward pass that gave others one."""
    gradients = {
        path: any(p.grad is not None for p in layer.adapter_parameters(layer.active))
        for path, layer in adapted_layers(model).items()
        if layer.active is not None and layer.trains(layer.active)
    }
    unused = [path for path, found in gradients.items() if not found]
    if not unused or len(unused) == len(gradients):  # some optimisers take all gradients within the backward pass
        return
    log.warning(
        "%d of %d adapted layers got no gradient from the first batch: %s%s. The loss does not depend on them (layers "
        "whose output is not used; towers whose input was absent; inputs cut off by reentrant checkpointing); if so in "
        "every batch, leave them out (exclude)",
        len(unused),
        len(gradients),
        ", ".join(unused[:LISTED]),
        ", ..." if len(unused) > LISTED else "",
    )


def check_without_adapter(trainer: Any) -> None:
    """Say that the whole model is trained, where its adapter may have been forgotten.

    Raises:
        AdapterError: if there are options for adapters.
    """
    given = {
        "magnitude_learning_rate": trainer.magnitude_learning_rate is not None,
        "magnitude_weight_decay": trainer.magnitude_weight_decay != 0,
        "lora_plus_ratio": trainer.lora_plus_ratio != 1,
    }
    if vain := [name for name, is_given in given.items() if is_given]:
        raise AdapterError(
            f"{', '.join(vain)}: the model has no active adapter of dt.attach or dt.load_adapter, and for others "
            "(PEFT's) these do nothing"
        )
    parameters = list(trainer.model.parameters())
    trained, total = sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
    if trained >= WHOLE * total:
        log.warning(
            "the model has no adapter: %s of its %s parameters are trained, and its checkpoints hold them; attach one "
            "before (dt.attach), or use a plain Trainer",
            f"{trained:,}",
            f"{total:,}",
        )
