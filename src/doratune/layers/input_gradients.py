"""Reentrant checkpointing computes gradients only past inputs that require grad, which frozen embeddings give none."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class InputsRequireGrad:
    """Forward hook on input embeddings. transformers has one for PEFT's models; this acts while checkpointing is on."""

    def __init__(self, checkpointed: list[nn.Module]) -> None:
        self.checkpointed = checkpointed

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output  # Swin's embeddings also tell the size
        wanted = isinstance(first, torch.Tensor) and first.is_floating_point() and not first.requires_grad
        if wanted and torch.is_grad_enabled() and self.is_checkpointing():
            first = first.requires_grad_(True).clone()  # no leaf: some models add positions or images to it in place
            return (first, *output[1:]) if isinstance(output, tuple) else first
        return None

    def is_checkpointing(self) -> bool:
        return any(m.gradient_checkpointing for m in self.checkpointed)


def hooks_of(module: nn.Module) -> dict[int, InputsRequireGrad]:
    """The hooks of this kind on a module, by torch's number."""
    return {k: hook for k, hook in module._forward_hooks.items() if isinstance(hook, InputsRequireGrad)}
