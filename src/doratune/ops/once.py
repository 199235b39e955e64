"""Backward passes that cannot be differentiated once more, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator, which is silent if no incoming gradient requires grad, as that of a sum.

    Our gradients depend on A, B and m all the same; a gradient penalty would miss that part without a word.
    """
    marked = function.once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            gradients = tuple(gradient.detach().requires_grad_() for gradient in gradients)
        return marked(ctx, *gradients)

    return wrapper
