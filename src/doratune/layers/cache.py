"""What a layer may remember between calls: ``|W|^2`` of its frozen weight; n for checkpointing's second forward; in
evaluation ``g = m / n``, A and s B.

A stale scale is a wrong model, so everything remembered carries a stamp (object, version, memory, dtype) of the
tensors it was made from, and ``clear`` is called by whatever could change them unseen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from doratune.layers.weights import WeightRows, is_dtensor
from doratune.ops import row_norm
from doratune.ops.autocast import without_autocast
from doratune.ops.hardware import full_precision
from doratune.ops.once import transformed

Value = TypeVar("Value")

_steps = 0
"""How many steps the process's optimisers have made: torch's fused kernels, among others, leave no version behind."""


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class _Stamp:
    """Tells whether tensors are still the ones, in the state, that they were."""

    def __init__(self, *tensors: Tensor) -> None:
        self.made_from = [(weakref.ref(t), _state(t)) for t in tensors]
        # Weak references keep a storage's number its own. Without them ``p.data = ...`` twice may bring all numbers
        # back, as the second tensor may get the first one's memory.
        self.storages = [StorageWeakRef(t.untyped_storage()) for t in tensors]

    def fits(self, *tensors: Tensor) -> bool:
        if len(tensors) != len(self.made_from):
            return False
        for (reference, state), t in zip(self.made_from, tensors, strict=True):
            if reference() is not t or state != _state(t):
                return False
        return True


class _Memory(Generic[Value]):
    """A value made from an adapter's tensors and its scale."""

    def __init__(self, made_from: Sequence[Tensor], scale: float, value: Value) -> None:
        self.stamp = _Stamp(*made_from)
        self.scale = scale
        self.steps = _steps
        self.value = value

    def holds(self, made_from: Sequence[Tensor], scale: float) -> bool:
        return self.steps == _steps and self.scale == scale and self.stamp.fits(*made_from)


def _state(t: Tensor) -> tuple[Any, ...]:
    return t._version, t.data_ptr(), t.untyped_storage()._cdata, t.dtype, t.device


def _can_stamp(*tensors: Tensor) -> bool:
    """Inference tensors have no version, fake and meta tensors no data, DTensors no data pointer of their own.

    Those of ``torch.func`` have neither.
    """
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return not any(t.is_inference() or t.is_meta or _is_fake(t) or is_dtensor(t) or wrapped(t) for t in tensors)


def _is_fake(t: Tensor) -> bool:
    return type(t).__name__ in ("FakeTensor", "FunctionalTensor")


class Evaluation(NamedTuple):
    """An adapter ready for forwards without gradients: ``y = g W x + (g s B) A x``."""

    A: Tensor
    """``A^T``, ``[in, r]``."""
    B: Tensor
    """``(g s B)^T``, ``[r, out]``."""
    g: Tensor | None
    """float32 ``[out]``; None for LoRA."""


class ScaleCache:
    """The memory of one adapted layer. It is neither copied nor pickled with the layer."""

    def __init__(self) -> None:
        self.frozen: Tensor | None = None
        """The g to use, whatever the mode."""
        self.part: tuple[Tensor, Any] | None = None
        """Under tensor parallelism this process's part of W, and a plain layer with it."""
        self._of_part: ScaleCache | None = None
        self.clear()

    @property
    def of_part(self) -> ScaleCache:
        """The memory of what concerns this process's part of W only."""
        if self._of_part is None:
            self._of_part = ScaleCache()
        return self._of_part

    def clear(self) -> None:
        """Forget everything that was computed."""
        self._base: tuple[_Stamp, Tensor, Tensor, bool] | None = None
        self._of_part = None
        self.clear_scale()

    def clear_scale(self) -> None:
        """Forget what depends on the adapter; ``|W|^2`` does not."""
        self._norm: _Memory[Tensor] | None = None
        self._scale: _Memory[Tensor] | None = None
        self._evaluation: _Memory[Evaluation] | None = None
        if self._of_part is not None:
            self._of_part.clear_scale()

    def forget_evaluations(self) -> None:
        """Forget what evaluation remembers, because an optimiser's step may follow.

        Some optimisers' kernels (bitsandbytes' among them) write parameters without giving them a new version.
        """
        self._scale = self._evaluation = None
        if self._of_part is not None:
            self._of_part.forget_evaluations()

    def change_adapter(self) -> None:
        """Forget what depends on the adapter, a frozen g too."""
        self.clear_scale()
        self.frozen = None

    def freeze(self, g: Tensor | None) -> None:
        """Use this g from now on, as ``frozen_scales`` asks; None: compute it again."""
        self.forget_evaluations()
        self.frozen = g

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def base_squared(self, rows: WeightRows) -> Tensor:
        """``|W|^2``, float32 ``[out]``, computed once per state of W."""
        return self._base_squared(rows)[1]

    @full_precision()
    def squared_norm(self, rows: WeightRows, A: Tensor, B: Tensor, scale: float, dense: bool = False) -> Tensor:
        """``n^2``, float32 ``[out]``, computed now, for whole A and B, without TF32; it keeps no graph."""
        base, _, _ = self._base_squared(rows)
        A, B = rows.own(A, B)
        with torch.no_grad(), without_autocast(rows.stored.device):
            if dense:
                return rows.collected(row_norm.dense_squared_norm(rows.tiles, A, B, scale))
            return rows.collected(row_norm.squared_row_norm(base, rows.tiles, A, B, scale))

    def _base_squared(self, rows: WeightRows) -> tuple[Tensor, Tensor, bool]:
        """``|W|^2`` over this process's columns and over all columns, and whether the latter may be 0 in some row."""
        if torch.compiler.is_compiling():
            # Compiled code cannot look at stamps: it sums W again in each forward, in one pass.
            squared = row_norm.base_squared_norm(rows.tiles)
            return squared, rows.collected(squared), True
        known = self._base  # read once: another thread may clear it meanwhile
        if known is not None and known[0].fits(rows.stored):
            return known[1:]
        with torch.inference_mode(False), torch.no_grad(), without_autocast(rows.stored.device):
            squared = row_norm.base_squared_norm(rows.tiles)
            everywhere = rows.collected(squared)
        if not _can_stamp(rows.stored):
            return squared, everywhere, True
        may_be_zero = not bool((everywhere > 0).all())  # NaN counts as 0
        self._base = _Stamp(rows.stored), squared, everywhere, may_be_zero
        return squared, everywhere, may_be_zero

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
        reuse_norm: bool = False,
    ) -> Tensor:
        """``g = m / n``, float32 ``[out]``.

        Between calls g is remembered with ``reuse`` (evaluation), n with ``reuse_norm`` (until A, B or W change) and
        always for a forward inside a backward pass, which is checkpointing's second one.
        """
        if self.frozen is not None:
            return self.frozen.to(rows.stored.device)  # nn.DataParallel's replicas are on other devices
        made_from = [rows.stored, magnitude] if A is None or B is None else [rows.stored, magnitude, A, B]
        reuse = reuse and not torch.compiler.is_compiling()
        if reuse and (g := _remembered(self._scale, scale, made_from)) is not None:
            return g
        base, everywhere, may_be_zero = self._base_squared(rows)
        with without_autocast(rows.stored.device):
            squared = everywhere
            if A is not None and B is not None:
                squared = self._squared_norm(base, rows, A, B, scale, norm_gradient, dense_norm, reuse_norm)
            g = row_norm.row_scale(magnitude, squared, everywhere if may_be_zero else None)
        if reuse and _can_stamp(*made_from):
            self._scale = _Memory(made_from, scale, g)
        return g

    def _squared_norm(
        self,
        base: Tensor,
        rows: WeightRows,
        A: Tensor,
        B: Tensor,
        scale: float,
        norm_gradient: str,
        dense_norm: bool,
        reuse: bool,
    ) -> Tensor:
        made_from = [rows.stored, A, B]
        may_hold = norm_gradient == "detached" and not torch.compiler.is_compiling()
        if (
            may_hold
            and (_is_in_backward() or (reuse and not _begins_a_step(A, B)))
            and (n2 := _remembered(self._norm, scale, made_from)) is not None
        ):
            return n2
        exact = torch.is_grad_enabled() and norm_gradient == "exact"
        if transformed() and norm_gradient != "exact":
            A, B = A.detach(), B.detach()  # forward-mode derivatives take no notice of no_grad
        with torch.set_grad_enabled(exact):
            squared = row_norm.squared_row_norm(base, rows.tiles, A, B, scale)
            if dense_norm:
                # Near cancellation the factored value loses digits, its gradient formula does not.
                exactly = contextlib.nullcontext() if torch.compiler.is_compiling() else full_precision()
                with torch.no_grad(), exactly:
                    value = row_norm.dense_squared_norm(rows.tiles, A, B, scale)
                squared = value.detach() + (squared - squared.detach()) if squared.requires_grad else value
            squared = rows.collected(squared)
        self._norm = _Memory(made_from, scale, squared) if may_hold and _can_stamp(*made_from) else None
        return squared

    def evaluation(
        self,
        rows: WeightRows,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor | None,
        scale: float,
        dense_norm: bool = False,
    ) -> Evaluation:
        """What a forward without gradients multiplies with; remembered until something it was made from changes."""
        made_from = [rows.stored, A, B] if magnitude is None else [rows.stored, A, B, magnitude]
        if (ready := _remembered(self._evaluation, scale, made_from)) is not None:
            return ready
        g = None
        if magnitude is not None:
            g = self.row_scale(rows, A, B, magnitude, scale, dense_norm=dense_norm, reuse=True)
        scaled = B * scale if g is None else B * (scale * g)[:, None]
        # PEFT's adapters may be 16-bit, g is float32.
        ready = Evaluation(A.detach().T.to(scaled.dtype), scaled.T.contiguous(), g)
        if _can_stamp(*made_from):
            self._evaluation = _Memory(made_from, scale, ready)
        return ready


def _is_in_backward() -> bool:
    """Whether this is checkpointing's second forward: since the first one nothing has moved the parameters unseen."""
    return torch._C._current_graph_task_id() != -1


def _begins_a_step(*parameters: Tensor) -> bool:
    """Whether gradients are wanted and none has arrived yet, as in the first forward after ``zero_grad``.

    An optimiser that is not torch's may have moved the parameters just before, and given them no new version.
    """
    return torch.is_grad_enabled() and any(p.requires_grad and p.grad is None for p in parameters if p.is_leaf)


def _remembered(memory: _Memory[Value] | None, scale: float, made_from: Sequence[Tensor]) -> Value | None:
    """The value of a memory that still holds, else None. The memory is an argument: other threads may clear it."""
    return memory.value if memory is not None and memory.holds(made_from, scale) else None
