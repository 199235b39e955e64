"""What a computation would allocate and calculate, found by running it on tensors without data (meta device)."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
_EXPERTS = "_grouped_mm"
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


class Tape(TorchDispatchMode):
    """Counts bytes that are alive, their highest level, and floating-point operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.highest = 0
        self.operations = 0
        self._seen: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()

    def know(self, tensors: Any) -> None:
        """Tensors that were there before do not count."""
        for tensor in tensors:
            self._seen[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True  # "are all tokens of one text?" is what transformers asks of its data
        grouped = func is torch.ops.aten._grouped_mm.default
        out = _grouped(*args, **(kwargs or {})) if grouped else func(*args, **(kwargs or {}))
        self.operations += _operations(func, args)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._look(tensor)
        return out

    def _look(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = None
        weakref.finalize(storage, self._released, size)
        self.alive += size
        self.highest = max(self.highest, self.alive)

    def _released(self, size: int) -> None:
        self.alive -= size


def _grouped(a: Tensor, b: Tensor, offs: Tensor, **_: Any) -> Tensor:
    """The result of experts' products; torch's own function for tensors without data knows bfloat16 alone."""
    shape = (a.shape[0], b.shape[2]) if b.ndim == 3 else (len(offs), a.shape[0], b.shape[1])
    return a.new_empty(shape)


def _operations(func: Any, args: Any) -> int:
    name = func.name().partition("::")[2].partition(".")[0]
    if name in (*_PRODUCTS, _EXPERTS):
        tensors = [a for a in args if isinstance(a, Tensor)]
        left, right = tensors[:2] if name == _EXPERTS else tensors[-2:]
        return 2 * left.shape[:-1].numel() * left.shape[-1] * right.shape[-1]
    if name.startswith(_ATTENTION):
        query, key = (args[1], args[2]) if name.endswith("_backward") else (args[0], args[1])
        products = 5 if name.endswith("_backward") else 2
        return products * 2 * query.shape[:-1].numel() * key.shape[-2] * query.shape[-1]
    return 0


@contextlib.contextmanager
def flash_attention() -> Iterator[None]:
    """Attention as the fused kernels compute it, without a matrix of scores; the meta device would write one out."""
    before = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:  # heads that share a key's, which the kernels read in place
            key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        width = value.shape[-1]
        if width < query.shape[-1]:  # DeepSeek's; the kernel wants one width
            value = F.pad(value, (0, query.shape[-1] - width))
        found: Tensor = getattr(torch.ops.aten, _ATTENTION)(query, key, value, 0.0, bool(options.get("is_causal")))[0]
        return found[..., :width]

    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before
