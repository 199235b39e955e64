"""How much memory a forward pass keeps for its backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class _Kept:
    """Held by autograd in the place of a saved tensor; it dies with the graph's node."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an output would hold its own node


def saved_bytes(forward: Callable[[], Any], known: Iterable[Tensor] = ()) -> int:
    """Bytes that a forward pass keeps for its backward pass.

    Every storage counts once and whole, however many tensors look at it.

    Args:
        forward: returns what the backward pass would start from.
        known: tensors that are there anyway: parameters, buffers, inputs; their storages do not count.
    """
    live: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        live.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        result = forward()
    storages = {_pointer(kept.tensor): kept.tensor.untyped_storage().nbytes() for kept in live}
    del result
    there = {_pointer(tensor) for tensor in known}
    return sum(size for pointer, size in storages.items() if pointer not in there)


def _pointer(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
