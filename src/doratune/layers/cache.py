"""What a layer may remember between calls: ``|W|^2`` of its frozen weight and, in evaluation, ``g = m / n``.

A stale scale is a wrong model, so everything remembered carries a stamp (object, version, pointer, dtype) of the
tensors it was made from, and ``clear`` is called by whatever could change them unseen.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import Tensor

from doratune.layers.weights import WeightRows
from doratune.ops import row_norm


class _Stamp:
    """Tells whether tensors are still the ones, in the state, that they were."""

    def __init__(self, *tensors: Tensor) -> None:
        self.references = [weakref.ref(t) for t in tensors]
        self.states = [_state(t) for t in tensors]

    def fits(self, *tensors: Tensor) -> bool:
        return len(tensors) == len(self.references) and all(
            reference() is t and state == _state(t)
            for reference, state, t in zip(self.references, self.states, tensors, strict=True)
        )


def _state(t: Tensor) -> tuple[Any, ...]:
    return t._version, t.data_ptr(), t.dtype, t.device


def _can_stamp(*tensors: Tensor) -> bool:
    """Inference tensors have no version; fake and meta tensors have no data."""
    return not any(t.is_inference() or t.is_meta or _is_fake(t) for t in tensors)


def _is_fake(t: Tensor) -> bool:
    return type(t).__name__ in ("FakeTensor", "FunctionalTensor")


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which no product is cast to another dtype."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class ScaleCache:
    """The memory of one adapted layer. It is neither copied nor pickled with the layer."""

    def __init__(self) -> None:
        self.clear()
        self.frozen: Tensor | None = None
        """Set by ``frozen_scales``: the g to use, whatever the mode."""

    def clear(self) -> None:
        """Forget everything that was computed."""
        self._base: tuple[_Stamp, Tensor] | None = None
        self._scale: tuple[_Stamp, float, Tensor] | None = None

    def clear_scale(self) -> None:
        """Forget g, which depends on the adapter; ``|W|^2`` does not."""
        self._scale = None

    def change_adapter(self) -> None:
        """Forget g, a frozen one too: it belongs to another adapter."""
        self._scale = self.frozen = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def base_squared(self, rows: WeightRows) -> Tensor:
        """``|W|^2``, float32 ``[out]``, computed once per state of W."""
        if torch.compiler.is_compiling():
            # Compiled code cannot look at stamps; the graph sums W anew, one pass over it.
            return row_norm.base_squared_norm(rows.tiles)
        if self._base is not None and _can_stamp(rows.stored) and self._base[0].fits(rows.stored):
            return self._base[1]
        with torch.inference_mode(False), torch.no_grad(), without_autocast(rows.device):
            squared = row_norm.base_squared_norm(rows.tiles)
        self._base = (_Stamp(rows.stored), squared) if _can_stamp(rows.stored) else None
        return squared

    def row_scale(
        self,
        rows: WeightRows,
        A: Tensor | None,
        B: Tensor | None,
        magnitude: Tensor,
        scale: float,
        norm_gradient: str = "detached",
        dense_norm: bool = False,
        reuse: bool = False,
    ) -> Tensor:
        """``g = m / n``, float32 ``[out]``; remembered between calls where ``reuse`` allows it."""
        if self.frozen is not None:
            return self.frozen
        made_from = [rows.stored, magnitude] if A is None or B is None else [rows.stored, magnitude, A, B]
        reuse = reuse and not torch.compiler.is_compiling() and _can_stamp(*made_from)
        if reuse and self._scale is not None and self._scale[1] == scale and self._scale[0].fits(*made_from):
            return self._scale[2]
        base = self.base_squared(rows)
        with without_autocast(rows.device):
            squared = base
            if A is not None and B is not None:
                squared = _squared_norm(base, rows, A, B, scale, norm_gradient, dense_norm)
            g = row_norm.row_scale(magnitude, squared, base)
        if reuse:
            self._scale = (_Stamp(*made_from), scale, g)
        return g


def _squared_norm(
    base: Tensor, rows: WeightRows, A: Tensor, B: Tensor, scale: float, norm_gradient: str, dense_norm: bool
) -> Tensor:
    with torch.set_grad_enabled(torch.is_grad_enabled() and norm_gradient == "exact"):
        squared = row_norm.squared_row_norm(base, rows.tiles, A, B, scale)
    if dense_norm:
        # Near cancellation the factored value loses digits, its gradient formula does not.
        with torch.no_grad():
            value = row_norm.dense_squared_norm(rows.tiles, A, B, scale)
        squared = value + (squared - squared.detach()) if squared.requires_grad else value
    return squared
