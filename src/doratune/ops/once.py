"""Backward passes by hand: when they serve, and that they cannot be differentiated once more."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function


def transformed() -> bool:
    """Whether a transform of ``torch.func`` is active; its tensors have no memory and no versions of their own."""
    return torch._C._are_functorch_transforms_active()


def by_hand() -> bool:
    """Whether a backward pass by hand is wanted. Transforms differentiate torch's own operations, also twice."""
    return torch.is_grad_enabled() and not transformed()


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator, which is silent if no incoming gradient requires grad, as that of a sum.

    Our gradients depend on A, B and m all the same; a gradient penalty would miss that part without a word.
    """
    marked = function.once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *gradients: Tensor) -> Any:
        if torch.compiler.is_compiling():
            return marked(ctx, *gradients)
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        # create_graph=True
        gradients = tuple(gradient.detach().requires_grad_() for gradient in gradients)
        return marked(ctx, *gradients)

    return wrapper
